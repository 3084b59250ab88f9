//! Lanes on real verbs when something is wrong: the wire, the limits, the other end. What can go on
//! does, what can't ends with an error that names the cause, and no byte is wrong.
#![forbid(unsafe_code)]

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex};
use pageferry_datapath::lane::{LaneError, LaneEvent, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::work::RoundWork;
use pageferry_rdma::error::{RdmaError, Status};
use pageferry_rdma::guest::RdmaMemory;
use pageferry_rdma::limits::LOCKED_BESIDE_BYTES;
use pageferry_rdma::plan::{ConnectPlan, Pin, StillThere};
use pageferry_rdma::source::RdmaPool;

use support::{
    PAGE, SOON, Source, Target, addresses, digest, fill, is_siw, memory, memory_of, page, plan,
    required, whole,
};

/// What a wire may do to packets without a lane failing. (Reordering is not among it: to RoCE it is
/// loss, again and again.)
const BAD_WIRES: [&str; 4] = ["loss 0.5%", "loss 2%", "delay 5ms", "delay 2ms loss 0.5%"];

/// This side's end of the wire. Mended when dropped.
struct Wire {
    netdev: String,
}

impl Wire {
    /// `None`, said, where it can't be spoiled.
    fn of(test: &str) -> Option<Self> {
        let veth = std::env::var("PF_TOPOLOGY").is_ok_and(|topology| topology == "veth");
        if !veth {
            assert!(!required(), "{test}: no wire of its own, and nothing may be skipped");
            println!("SKIP {test}: needs a wire of its own (make test-rdma)");
            return None;
        }
        Some(Self { netdev: std::env::var("PF_NETDEV").expect("set with the topology") })
    }

    /// Has netem do this to what the source sends.
    fn spoil(&self, how: &str) {
        let line = format!("qdisc replace dev {} root netem {how}", self.netdev);
        run("tc", &line.split(' ').collect::<Vec<_>>());
    }

    fn cut_off(&self) {
        run("rdma-vm-link", &["down"]);
    }

    fn mend(&self) {
        let _it_may_be_fine =
            Command::new("tc").args(["qdisc", "del", "dev", &self.netdev, "root"]).output();
        let flags = std::fs::read_to_string(format!("/sys/class/net/{}/flags", self.netdev));
        let is_up = |flags: &str| u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16);
        if flags.is_ok_and(|flags| is_up(&flags).is_ok_and(|flags| flags & 1 == 0)) {
            run("rdma-vm-link", &["up"]);
            // The device takes its port for usable a moment later.
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.mend();
    }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("it is there");
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

#[test]
fn a_wire_that_loses_or_delays_packets_changes_no_byte() {
    let name = "a_wire_that_loses_or_delays_packets_changes_no_byte";
    let Some((here, there)) = addresses(name) else { return };
    let Some(wire) = Wire::of(name) else { return };
    for (index, how) in BAD_WIRES.iter().enumerate() {
        let lanes = [1, 4][index % 2];
        let target = Target::listen(there, &[4 << 20, 64 << 10], Pin::Touched);
        let source_memory = memory(&[4 << 20, 64 << 10]);
        whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 7));
        let mut source = Source::connect(&plan(here, target.address, lanes), &source_memory);
        target.begin();
        wire.spoil(how);
        let start = Instant::now();
        source.move_round(0, whole(&source_memory));
        let scattered: Vec<Extent> = (0..200).map(|n| page(n * 5)).collect();
        scattered.iter().for_each(|extent| fill(&source_memory, *extent, 8));
        source.move_round(1, scattered);
        wire.mend();
        println!("{how}, {lanes} lanes: {} ms", start.elapsed().as_millis());
        assert_eq!(digest(&source_memory), digest(&target.memory), "{how}");
    }
}

/// The events of a round in which every lane fails: what was not acknowledged, and why.
fn failures(source: &Source, lanes: usize) -> (Vec<Extent>, Vec<LaneError>) {
    let (mut lost, mut errors) = (Vec::new(), Vec::new());
    for _ in 0..lanes {
        match source.events.recv_timeout(SOON).expect("an event in time") {
            LaneEvent::Failed { unacked, error, .. } => {
                lost.extend(unacked);
                errors.push(error);
            }
            event => panic!("{event:?}"),
        }
    }
    (lost, errors)
}

/// Begins a round on a wire so slow that it is half-way when this returns.
fn begin_slowly(wire: &Wire, source: &mut Source, memory: &GuestMemory) {
    wire.spoil("rate 40mbit");
    let work = std::sync::Arc::new(RoundWork::new(RoundIndex(1), whole(memory)));
    let (before, total) = (source.pool.moved_bytes(), work.total_bytes());
    source.pool.move_round(std::sync::Arc::clone(&work));
    let deadline = Instant::now() + SOON;
    while source.pool.moved_bytes() < before + total / 8 {
        assert!(Instant::now() < deadline, "the round does not get anywhere");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(source.events.is_empty(), "the round is over already");
    assert!(source.pool.moved_bytes() - before < total, "nothing is left of the round");
}

/// Cuts the wire half-way through a round, mends it, and has new lanes carry on with what was lost,
/// where the device can.
fn cut_and_carry_on(
    name: &str,
    cut: impl FnOnce(&Wire),
    comes_back: bool,
    is_named: impl Fn(&RdmaError) -> bool,
) {
    const SIZES: [u64; 1] = [24 << 20];
    let Some((here, there)) = addresses(name) else { return };
    let Some(wire) = Wire::of(name) else { return };
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    let start = Extent { region: RegionIndex(0), offset: 0, len: 1 << 20 };
    fill(&source_memory, start, 1);
    let plan =
        ConnectPlan { progress_wait: Duration::from_secs(6), ..plan(here, target.address, 2) };
    let mut source = Source::connect(&plan, &source_memory);
    target.begin();
    source.move_round(0, vec![start]);
    whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 2));
    begin_slowly(&wire, &mut source, &source_memory);
    let since = Instant::now();
    cut(&wire);
    let (lost, errors) = failures(&source, 2);
    println!("noticed after {} ms: {errors:?}", since.elapsed().as_millis());
    assert!(!lost.is_empty());
    assert_eq!(source.pool.alive(), 0);
    for error in &errors {
        let named = match error {
            LaneError::Transport { source, hint, .. } => {
                let error = source.downcast_ref::<RdmaError>().expect("it is one of ours");
                assert!(hint.is_some(), "{error:?} has no hint");
                is_named(error)
            }
            LaneError::Timeout { .. } => is_siw(),
            _ => false,
        };
        assert!(named, "{error:?}");
    }
    // Nothing older may come after what is sent from now on.
    target.fence();
    wire.mend();
    if !comes_back {
        return;
    }
    whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 3));
    let mut again = Source::connect(&plan, &source_memory);
    again.move_round(1, whole(&source_memory));
    assert_eq!(digest(&source_memory), digest(&target.memory));
}

#[test]
fn a_black_hole_in_the_middle_of_a_round_is_noticed_and_new_lanes_carry_on() {
    cut_and_carry_on(
        "a_black_hole_in_the_middle_of_a_round_is_noticed_and_new_lanes_carry_on",
        |wire| wire.spoil("loss 100%"),
        true,
        |error| matches!(error, RdmaError::Completion { status: Status::RetryExceeded, .. }),
    );
}

/// Each answer takes ten times as long as a lane waits: only what is said by others tells it from one
/// that never comes.
#[test]
fn a_silent_lane_whose_other_end_answers_by_other_means_is_left_in_peace() {
    let name = "a_silent_lane_whose_other_end_answers_by_other_means_is_left_in_peace";
    const SIZES: [u64; 1] = [1 << 20];
    let Some((here, there)) = addresses(name) else { return };
    let Some(wire) = Wire::of(name) else { return };
    for answers in [true, false] {
        let target = Target::listen(there, &SIZES, Pin::Touched);
        let source_memory = memory(&SIZES);
        whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 4));
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        let counted = std::sync::Arc::clone(&asked);
        let ask = move |lane| {
            assert_eq!(lane, LaneId(0));
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            answers
        };
        let plan = ConnectPlan {
            progress_wait: Duration::from_millis(40),
            still_there: Some(StillThere::new(ask)),
            ..plan(here, target.address, 1)
        };
        let mut source = Source::connect(&plan, &source_memory);
        target.begin();
        wire.spoil("delay 400ms");
        if answers {
            source.move_round(0, whole(&source_memory));
            assert_eq!(digest(&source_memory), digest(&target.memory));
        } else {
            let work = RoundWork::new(RoundIndex(0), whole(&source_memory));
            source.pool.move_round(std::sync::Arc::new(work));
            let (_, errors) = failures(&source, 1);
            assert!(matches!(errors[..], [LaneError::Timeout { .. }]), "{errors:?}");
        }
        let asked = asked.load(std::sync::atomic::Ordering::Relaxed);
        println!("answers: {answers}, asked {asked} times");
        assert!(asked > 0 && (answers || asked == 1), "{asked}");
        wire.mend();
    }
}

/// To be run last: soft-RoCE's connection manager does not survive that a message of its own finds
/// the link down, and makes no connections any more.
#[test]
fn a_link_that_goes_down_in_the_middle_of_a_round_is_named() {
    cut_and_carry_on(
        "a_link_that_goes_down_in_the_middle_of_a_round_is_named",
        Wire::cut_off,
        is_siw(),
        |error| matches!(error, RdmaError::PortDown { .. }),
    );
}

#[test]
fn one_lane_fails_and_the_others_finish_the_round_without_what_it_had() {
    let name = "one_lane_fails_and_the_others_finish_the_round_without_what_it_had";
    let Some((here, there)) = addresses(name) else { return };
    const SIZES: [u64; 1] = [16 << 20];
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 1));
    let mut source = Source::connect(&plan(here, target.address, 4), &source_memory);
    // Every lane has a batch, and waits for keys.
    let work = std::sync::Arc::new(RoundWork::new(RoundIndex(0), whole(&source_memory)));
    source.pool.move_round(std::sync::Arc::clone(&work));
    let deadline = Instant::now() + SOON;
    while work.taken_bytes() < 4 << 20 {
        assert!(Instant::now() < deadline, "not every lane has begun");
        std::thread::sleep(Duration::from_millis(5));
    }
    target.fence_one(LaneId(2));
    target.begin();
    let (mut lost, mut placed) = (Vec::new(), 0);
    for _ in 0..4 {
        match source.events.recv_timeout(SOON).expect("an event in time") {
            LaneEvent::Placed { .. } => placed += 1,
            LaneEvent::Failed { lane, unacked, error } => {
                println!("{error}");
                assert_eq!(lane, LaneId(2));
                lost.extend(unacked);
            }
            event => panic!("{event:?}"),
        }
    }
    assert_eq!((placed, source.pool.alive()), (3, 3));
    assert_eq!(lost.iter().map(|extent| extent.len).sum::<u64>(), 1 << 20);
    assert_ne!(digest(&source_memory), digest(&target.memory), "what it had is missing");
    source.move_round(1, lost);
    assert_eq!(digest(&source_memory), digest(&target.memory));
}

#[test]
fn a_region_that_the_target_can_not_register_is_refused_by_name() {
    let name = "a_region_that_the_target_can_not_register_is_refused_by_name";
    let Some((here, there)) = addresses(name) else { return };
    const SIZES: [u64; 1] = [32 << 20];
    let target = Target::listen(there, &SIZES, Pin::Touched);
    // The end of its file is gone, as of a guest whose memory somebody truncated.
    let file = target.memory.regions()[0].file();
    nix::unistd::ftruncate(file, 16 << 20).expect("a memfd of ours");
    let source_memory = memory(&SIZES);
    let (good, bad) = (page(0), page((24 << 20) / PAGE));
    fill(&source_memory, good, 1);
    fill(&source_memory, bad, 2);
    let mut source = Source::connect(&plan(here, target.address, 1), &source_memory);
    target.begin();
    source.move_round(0, vec![good]);
    source.pool.move_round(std::sync::Arc::new(RoundWork::new(RoundIndex(1), [bad])));
    let (lost, errors) = failures(&source, 1);
    println!("source: {:?}", errors[0]);
    assert_eq!(lost, [bad]);
    let LaneError::Transport { source: error, hint, .. } = &errors[0] else { panic!("{errors:?}") };
    let error = error.downcast_ref::<RdmaError>().expect("it is one of ours");
    assert!(matches!(error, RdmaError::KeyRefused { slice: 1, .. }), "{error:?}");
    assert!(hint.is_some());
    loop {
        match target.events.recv_timeout(SOON).expect("an event in time") {
            LaneEvent::Placed { .. } => {}
            LaneEvent::Failed { error: LaneError::Transport { source: error, .. }, .. } => {
                println!("target: {error:?}");
                let error = error.downcast_ref::<RdmaError>().expect("it is one of ours");
                assert!(matches!(error, RdmaError::Register { .. }), "{error:?}");
                break;
            }
            event => panic!("{event:?}"),
        }
    }
}

/// A process of its own that may lock 64 KiB, without the capability to lock more.
#[test]
fn memlock_that_is_too_small_is_said_with_the_number_needed() {
    const INNER: &str = "PAGEFERRY_TEST_LIMITED";
    const LIMIT: u64 = 64 << 10;
    let name = "memlock_that_is_too_small_is_said_with_the_number_needed";
    let Some((here, there)) = addresses(name) else { return };
    let sizes = [20 << 20];
    let source_memory = memory(&sizes);
    let filled = Extent { region: RegionIndex(0), offset: 0, len: 1 << 20 };
    fill(&source_memory, filled, 1);
    if std::env::var_os(INNER).is_none() {
        let me = std::env::current_exe().expect("known");
        let status = Command::new("setpriv")
            .args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit"])
            .args([&format!("--memlock={LIMIT}:{LIMIT}"), me.to_str().expect("text")])
            .args(["--exact", name, "--nocapture"])
            .env(INNER, "1")
            .status()
            .expect("util-linux is there");
        assert!(status.success(), "{status}");
        return;
    }
    let needed = |error: &RdmaError| match error {
        RdmaError::Memlock { needed_bytes, limit_bytes: LIMIT } => *needed_bytes,
        error => panic!("{error:?}"),
    };
    let refused = RdmaMemory::target(memory(&sizes), Pin::Touched, 1).expect_err("too much");
    let whole = sizes[0] + LOCKED_BESIDE_BYTES;
    assert_eq!(needed(&refused), whole);
    assert!(refused.hint().is_some_and(|hint| hint.contains(&whole.to_string())), "{refused:?}");
    println!("{refused}");
    let (events, _) = crossbeam_channel::unbounded();
    let plan = plan(here, std::net::SocketAddr::new(there, 9), 1);
    let (_, refused) = RdmaPool::connect(&plan, source_memory, events).expect_err("too much");
    // Not what is filled: the slice that it is in.
    assert_eq!(needed(&refused), (16 << 20) + LOCKED_BESIDE_BYTES);
}

#[test]
fn small_and_huge_pages_in_one_guest_arrive_whole() {
    let name = "small_and_huge_pages_in_one_guest_arrive_whole";
    let Some((here, there)) = addresses(name) else { return };
    let mixed = || {
        let huge = memory_of(&[4 << 20], Some(2 << 20))?;
        let small = memory(&[3 << 20, 4096]);
        Some(support::joined(vec![small, huge]))
    };
    let (Some(source_memory), Some(target_memory)) = (mixed(), mixed()) else {
        assert!(!required(), "no huge pages, and nothing may be skipped");
        println!("SKIP {name}: needs 4 huge pages of 2 MiB");
        return;
    };
    whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 4));
    let target = Target::with_memory(there, target_memory, Pin::Touched);
    let mut source = Source::connect(&plan(here, target.address, 2), &source_memory);
    target.begin();
    source.move_round(0, whole(&source_memory));
    assert_eq!(digest(&source_memory), digest(&target.memory));
}

#[test]
fn zero_pages_take_no_bytes_and_clear_what_was_there() {
    let name = "zero_pages_take_no_bytes_and_clear_what_was_there";
    let Some((here, there)) = addresses(name) else { return };
    const SIZES: [u64; 1] = [16 << 20];
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 1));
    let mut source = Source::connect(&plan(here, target.address, 2), &source_memory);
    target.begin();
    source.move_round(0, whole(&source_memory));
    assert_eq!(source.pool.zero_bytes(), 0);
    let moved = source.pool.moved_bytes();
    // All of it but every hundredth page, which is written anew.
    let zero = vec![0; PAGE as usize];
    for index in 0..SIZES[0] / PAGE {
        match index % 100 {
            99 => fill(&source_memory, page(index), 2),
            _ => source_memory.lease(page(index)).and_then(|it| it.copy_in(0, &zero)).expect("in"),
        }
    }
    source.move_round(1, whole(&source_memory));
    assert_eq!(digest(&source_memory), digest(&target.memory));
    let (zeros, data) = (source.pool.zero_bytes(), source.pool.moved_bytes() - moved);
    println!("{} KiB zero, {} KiB written", zeros >> 10, data >> 10);
    assert_eq!(zeros + data, SIZES[0]);
    assert!(zeros > SIZES[0] * 9 / 10, "{zeros}");
    let stats = source.pool.close(false);
    assert_eq!(stats.iter().map(|lane| lane.zero_bytes).sum::<u64>(), zeros);
}

/// Of a guest that is mostly holes only what is near its data is pinned.
#[test]
fn holes_are_not_pinned_unless_all_is_asked_for() {
    let name = "holes_are_not_pinned_unless_all_is_asked_for";
    let Some((here, there)) = addresses(name) else { return };
    const SIZES: [u64; 1] = [192 << 20];
    for pin in [Pin::Touched, Pin::All] {
        let target = Target::listen(there, &SIZES, pin);
        let source_memory = memory(&SIZES);
        let data = [page(0), page((100 << 20) / PAGE)];
        data.iter().for_each(|extent| fill(&source_memory, *extent, 1));
        let mut source = Source::connect(&plan(here, target.address, 1), &source_memory);
        target.registered.begin(data.to_vec()).expect("allowed");
        source.move_round(0, data.to_vec());
        let deadline = Instant::now() + SOON;
        let expected = if pin == Pin::All { SIZES[0] } else { 32 << 20 };
        while target.registered.registered_bytes() < expected && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(target.registered.registered_bytes(), expected, "{pin:?}");
        drop(source);
    }
}
