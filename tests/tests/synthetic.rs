//! Guests without a monitor (`pageferry_tests::synthetic`) moved by both agents in this process:
//! over TCP anywhere, over RDMA and over spoiled wires in the machines of `tests/rdma-vm/run`.
//!
//! With two machines each runs this test with its role: the guest is started in the client and
//! arrives in the server.
#![forbid(unsafe_code)]

#[path = "synthetic/queues.rs"]
mod queues;
#[path = "synthetic/rate.rs"]
mod rate;

use std::net::TcpStream;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use crossbeam_channel::never;
use pageferry_ctl::agent::monitor::TargetMonitor;
use pageferry_ctl::agent::source::Watch;
use pageferry_ctl::cli::{self, Cli, MigrateArgs, TargetArgs};
use pageferry_ctl::lab::{HugePages, Workplace, is_root, skip};
use pageferry_ctl::report::Reporter;
use pageferry_ctl::report::events::Event;
use pageferry_ctl::report::exit::Exit;
use pageferry_ctl::{migrate, receive};
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::source::Phase;
use pageferry_tests::synthetic::{Arrived, Giver, Guest, Shape, SyntheticSource, SyntheticTarget};
use serde_json::Value;

/// An emulated machine that others keep busy.
const SOON: Duration = Duration::from_secs(60);

fn shape(mib: u64, huge: Option<u64>) -> Shape {
    let bytes = mib << 20;
    // A quarter are holes.
    let filled_pages = bytes / 4096 * 3 / 4;
    Shape { bytes, filled_pages, huge, writers: 2, pages_per_second: 400, gives_back: false }
}

/// What is done when a round is half-way.
type HalfWay = Box<dyn FnMut(&Giver)>;

/// Events as JSON, and what to do when a round is half-way.
struct Told {
    events: Vec<Value>,
    half_way: Option<HalfWay>,
    giver: Option<Giver>,
    /// What the round was when that was done: its bytes, and those handed out.
    done_at: Option<(u64, u64)>,
}

impl Reporter for Told {
    fn event(&mut self, event: &Event) {
        self.events.push(serde_json::to_value(event).expect("events are JSON"));
    }

    fn progress(&mut self, watch: &Watch<'_>) {
        let (total, taken) = watch.round_bytes;
        let is_half_way =
            watch.phase == Phase::Moving && taken > total / 4 && taken < total * 7 / 8;
        if is_half_way
            && let Some(giver) = &self.giver
            && let Some(mut act) = self.half_way.take()
        {
            self.done_at = Some((total, taken));
            act(giver);
        }
    }
}

/// How a move ended at the source, and the guest if it arrived here.
struct Moved {
    exit: Exit,
    told: Told,
    /// The guest's pages that were wrong at the source.
    bad_at_source: u64,
    /// What was there of its memory at the source, at the end.
    left_bytes: u64,
    arrived: Option<Guest>,
}

impl Moved {
    fn summary(&self) -> &Value {
        self.told.events.last().expect("a summary comes last")
    }

    fn assert_migrated(&self, transport: &str) {
        let summary = self.summary();
        println!(
            "{}: {} ({}), {} rounds, {} KiB and {} KiB of zeros, pause {} ms {}",
            summary["outcome"],
            summary["transport"],
            summary["transport_reason"],
            summary["rounds"],
            summary["moved_bytes"].as_u64().unwrap_or(0) >> 10,
            summary["zero_bytes"].as_u64().unwrap_or(0) >> 10,
            summary["blackout_ms"],
            summary["blackout_parts_ms"],
        );
        assert_eq!(self.exit, Exit::Done, "{summary:#}");
        assert_eq!(summary["verified"], true);
        assert!(
            summary["transport"].as_str().is_some_and(|it| it.starts_with(transport)),
            "{summary:#}"
        );
        assert_eq!(self.bad_at_source, 0, "pages hold what they should not");
    }
}

/// The guest goes on where it is, and all it finds is right.
fn assert_goes_on(guest: &Guest) {
    let (before, deadline) = (guest.written(), Instant::now() + SOON);
    while guest.written() < before + 200 {
        assert!(Instant::now() < deadline, "it does not write any more");
        thread::sleep(Duration::from_millis(20));
    }
    guest.pause();
    assert_eq!((guest.bad(), guest.verify()), (0, 0), "pages hold what they should not");
    guest.run();
}

/// Where the target listens, and whether it is this process that runs the source, or the target.
struct Scene {
    to: String,
    has_source: bool,
    has_target: bool,
}

impl Scene {
    fn here() -> Self {
        Self { to: "127.0.0.1:0".into(), has_source: true, has_target: true }
    }

    /// On an RDMA device; `None`, said, where there is none.
    fn rdma(test: &str, port: u16) -> Option<Self> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        if variable("PF_RDMA_DEV").is_empty() {
            skip(test, "needs an RDMA device (make test-rdma)");
            return None;
        }
        let role = variable("PF_ROLE");
        let at = if role == "server" { "PF_LOCAL_ADDR" } else { "PF_PEER_ADDR" };
        Some(Self {
            to: format!("{}:{port}", variable(at)),
            has_source: role != "server",
            has_target: role != "client",
        })
    }

    /// On several wires between two machines, each with an RDMA device; `None`, said, elsewhere.
    fn rails(test: &str, port: u16) -> Option<Self> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        if variable("PF_WIRES").parse().unwrap_or(1) < 2 || variable("PF_RDMA_DEV_1").is_empty() {
            skip(test, "needs two wires with RDMA devices (make test-rdma)");
            return None;
        }
        let is_source = variable("PF_ROLE") == "client";
        let at = if is_source { variable("PF_PEER_ADDR") } else { "0.0.0.0".into() };
        let to = format!("{at}:{port}");
        Some(Self { to, has_source: is_source, has_target: !is_source })
    }

    /// Moves a guest; `more` are arguments of `migrate`. `None` at a machine that only sends.
    fn move_guest(&self, shape: &Shape, more: &[&str], half_way: Option<HalfWay>) -> Moved {
        let state = tempfile::tempdir().expect("a folder");
        let arrived = Arrived::default();
        let to = match self.to.strip_suffix(":0") {
            Some(host) => format!("{host}:{}", free_port()),
            None => self.to.clone(),
        };
        let target = self.has_target.then(|| {
            let (shape, arrived) = (shape.clone(), Arc::clone(&arrived));
            let folder = state.path().join("target").display().to_string();
            let args = target_args(&["--listen", &to, "--state-dir", &folder]);
            thread::spawn(move || {
                let open = |_: &_| {
                    let target = SyntheticTarget::new(shape.clone(), &arrived);
                    Ok(Box::new(target) as Box<dyn TargetMonitor>)
                };
                receive::run_with(&open, &args, &never())
            })
        });
        let mut told = Told { events: Vec::new(), half_way, giver: None, done_at: None };
        let (mut exit, mut bad_at_source, mut left_bytes) = (Exit::Done, 0, 0);
        if self.has_source {
            let mut source = SyntheticSource::new(Guest::start(shape.clone()).expect("memory"));
            told.giver = Some(source.guest().giver());
            wait_for(&to);
            let folder = state.path().join("source").display().to_string();
            let args = [&["--to", &to, "--state-dir", &folder, "--verify"], more].concat();
            exit = migrate::run_with(&mut source, &source_args(&args), &never(), &mut told);
            (bad_at_source, left_bytes) = (source.guest().bad(), source.guest().allocated_bytes());
            if exit != Exit::Done {
                assert_goes_on(source.guest());
            }
        }
        if let Some(target) = target {
            let ended = target.join().expect("the target's own panic");
            let agree = !self.has_source || (ended == Exit::Done) == (exit == Exit::Done);
            assert!(agree, "the two ends do not agree: {ended:?}, {exit:?}");
        }
        let arrived = arrived.lock().unwrap_or_else(PoisonError::into_inner).take();
        Moved { exit, told, bad_at_source, left_bytes, arrived }
    }

    /// Moves a guest over two wires, of which the source's end of the second goes down in the middle
    /// of a round, and stays so.
    fn lose_a_wire(&self, more: &[&str]) -> Moved {
        let lost = std::env::var("PF_NETDEV_1").expect("set");
        let down = move || {
            let status = Command::new("ip").args(["link", "set", &lost, "down"]).status();
            assert!(status.is_ok_and(|status| status.success()), "ip link set {lost} down");
        };
        self.lose_half_way(more, down)
    }

    /// The same where the source's RDMA device on the second wire is removed, and the wire stays.
    /// Nothing of ours may keep the device: its removal waits for all who use it.
    fn lose_a_device(&self, more: &[&str]) -> Moved {
        let (removed, when) = crossbeam_channel::bounded(1);
        let begun = Instant::now();
        // Of its own, as the agent's loop has to go on.
        let remove = move || {
            thread::spawn(move || {
                let gone = WithoutDevice::of(1);
                println!("the device was gone {} ms after the start", begun.elapsed().as_millis());
                let _nobody_waits_after_a_panic = removed.send(gone);
            });
        };
        let moved = self.lose_half_way(more, remove);
        println!("the migration ended {} ms after the start", begun.elapsed().as_millis());
        if self.has_source {
            drop(when.recv_timeout(SOON).expect("the device was let go of"));
        }
        moved
    }

    /// Moves a guest over two wires; `lose` is done at the source in the middle of a round.
    fn lose_half_way(&self, more: &[&str], lose: impl FnOnce() + 'static) -> Moved {
        if self.has_source {
            // So that there is a half-way: not all of the round is posted at once, either.
            let wires =
                ["PF_NETDEV_0", "PF_NETDEV_1"].map(|name| std::env::var(name).expect("set"));
            wires.iter().for_each(|wire| Wire::spoil(wire, "rate 50mbit limit 300"));
        }
        let mut lose = Some(lose);
        let half_way = move |_: &Giver| lose.take().into_iter().for_each(|lose| lose());
        let more = [&["--lanes", "2"], more, &HOWEVER_SLOW[..]].concat();
        let moved = self.move_guest(&shape(48, None), &more, Some(Box::new(half_way)));
        if self.has_source {
            let (total, taken) = moved.told.done_at.expect("a round was half-way");
            println!("lost when {} of {} KiB were handed out", taken >> 10, total >> 10);
        }
        moved
    }

    /// Moves one over RDMA, and looks at it where it arrives.
    fn move_by_rdma(&self, shape: &Shape, lanes: &str) {
        // Two emulated machines on one processor may each stand still for longer than soft-RoCE's
        // retries take, when there is much for them to do.
        let is_sure = self.has_source && self.has_target || lanes == "1";
        let transport = if is_sure { "rdma" } else { "auto" };
        let more = ["--transport", transport, "--lanes", lanes, "--downtime-ms", "1000"];
        let moved = self.move_guest(shape, &more, None);
        if self.has_source {
            moved.assert_migrated(if is_sure { transport } else { "" });
        }
        if self.has_target {
            assert_goes_on(&moved.arrived.expect("it arrived"));
        }
    }
}

fn target_args(more: &[&str]) -> TargetArgs {
    let words = [&["pageferry", "target", "--insecure", "--once", "--json"], more].concat();
    match Cli::parse_from(words).command {
        cli::Command::Target(args) => args,
        other => panic!("{other:?}"),
    }
}

fn source_args(more: &[&str]) -> MigrateArgs {
    let words = [&["pageferry", "migrate", "--insecure", "--qmp", "/none"], more].concat();
    match Cli::parse_from(words).command {
        cli::Command::Migrate(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// Until the target listens, which may be on a machine that is still booting.
fn wait_for(address: &str) {
    let deadline = Instant::now() + 2 * SOON;
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "nobody listens at {address}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_without_a_monitor_moves_over_tcp() {
    let shape = Shape { pages_per_second: 5000, ..shape(64, None) };
    let moved = Scene::here().move_guest(&shape, &["--lanes", "2", "--transport", "tcp"], None);
    moved.assert_migrated("tcp");
    assert_goes_on(&moved.arrived.expect("it arrived"));
}

/// Some of it was sent before it is given back, some not; none of it comes back, on neither side.
fn give_back_on_the_way(huge: Option<u64>) {
    const MIB: u64 = 1 << 20;
    let shape = Shape { gives_back: true, ..shape(64, huge) };
    let given = [4 * MIB..8 * MIB, 28 * MIB..44 * MIB];
    let given_bytes: u64 = given.iter().map(|bytes| bytes.end - bytes.start).sum();
    let half_way = move |giver: &Giver| given.iter().for_each(|it| giver.give_back(it.clone()));
    let more = ["--transport", "tcp", "--lanes", "2", "--max-bandwidth", "8388608B", "--compress"];
    let more = [&more[..], &["off", "--downtime-ms", "1000"]].concat();
    let moved = Scene::here().move_guest(&shape, &more, Some(Box::new(half_way)));
    moved.assert_migrated("tcp");
    let (total, taken) = moved.told.done_at.expect("a round was half-way");
    let holes = moved.summary()["hole_bytes"].as_u64().unwrap_or(0);
    let guest = moved.arrived.expect("it arrived");
    let (left, arrived) = (moved.left_bytes / MIB, guest.arrived_bytes() / MIB);
    println!(
        "{} MiB given back when {} of {} were handed out; {} as holes; {left} MiB at the source, \
         {arrived} at the target",
        given_bytes / MIB,
        taken / MIB,
        total / MIB,
        holes / MIB,
    );
    assert!(holes >= given_bytes, "{holes}");
    assert_eq!(left, 48 - given_bytes / MIB, "sending took memory again");
    assert_eq!(arrived, left);
    assert_goes_on(&guest);
}

#[test]
fn what_is_given_back_on_the_way_is_a_hole_at_the_target() {
    give_back_on_the_way(None);
}

#[test]
fn huge_pages_given_back_on_the_way_are_holes_at_the_target() {
    if !is_root() {
        let name = "huge_pages_given_back_on_the_way_are_holes_at_the_target";
        return skip(name, "needs root for huge pages");
    }
    let workplace = Workplace::new().expect("a folder");
    let _pages = HugePages::reserve(&workplace, 2 * (64 << 20)).expect("huge pages");
    give_back_on_the_way(Some(2 << 20));
}

#[test]
fn rdma_guests_on_tmpfs_move_with_one_and_with_four_queue_pairs() {
    let name = "rdma_guests_on_tmpfs_move_with_one_and_with_four_queue_pairs";
    for (lanes, port) in [("1", 4801), ("4", 4802)] {
        let Some(scene) = Scene::rdma(name, port) else { return };
        scene.move_by_rdma(&shape(24, None), lanes);
    }
}

#[test]
fn rdma_a_guest_on_huge_pages_moves() {
    let Some(scene) = Scene::rdma("rdma_a_guest_on_huge_pages_moves", 4803) else { return };
    // Whole huge pages are dirty: what is written has to fit into a pause.
    let shape = Shape { writers: 1, pages_per_second: 20, ..shape(8, Some(2 << 20)) };
    scene.move_by_rdma(&shape, "2");
}

/// Bytes that went over the rail of a NIC here.
fn over(summary: &Value, netdev: &str) -> u64 {
    let rails = summary["rails"].as_array().into_iter().flatten();
    let of = rails.filter(|rail| rail["device"] == netdev);
    of.map(|rail| rail["moved_bytes"].as_u64().unwrap_or(0)).sum()
}

/// Two emulated machines that others keep busy may move less than a guest writes.
const HOWEVER_SLOW: [&str; 4] = ["--downtime-ms", "2000", "--not-converging", "switch-over"];

/// Each wire has carried more than `least` bytes.
fn assert_on_both_wires(summary: &Value, least: u64) {
    println!("{}", summary["rails"]);
    for netdev in ["PF_NETDEV_0", "PF_NETDEV_1"] {
        let netdev = std::env::var(netdev).expect("set with the wires");
        assert!(over(summary, &netdev) > least, "{netdev}: {summary:#}");
    }
}

/// Two emulated machines on busy cores: retries run out now and then without a cause, so all that is
/// sure is that RDMA is not given up, and that each device has moved something.
#[test]
fn rails_on_two_devices_both_carry_a_guest() {
    let Some(scene) = Scene::rails("rails_on_two_devices_both_carry_a_guest", 4821) else { return };
    let more = [&["--transport", "rdma", "--lanes", "2"], &HOWEVER_SLOW[..]].concat();
    let moved = scene.move_guest(&shape(16, None), &more, None);
    if scene.has_target {
        return assert_goes_on(&moved.arrived.expect("it arrived"));
    }
    moved.assert_migrated("rdma");
    assert_on_both_wires(moved.summary(), 1 << 20);
}

#[test]
fn rails_on_two_devices_lose_one_in_the_middle_of_a_round_and_carry_on_over_the_other() {
    let name = "rails_on_two_devices_lose_one_in_the_middle_of_a_round_and_carry_on_over_the_other";
    let Some(scene) = Scene::rails(name, 4822) else { return };
    let moved = scene.lose_a_wire(&["--transport", "rdma"]);
    if scene.has_target {
        return assert_goes_on(&moved.arrived.expect("it arrived"));
    }
    moved.assert_migrated("rdma");
    assert_on_both_wires(moved.summary(), 0);
}

#[test]
fn rails_on_two_devices_lose_a_device_in_the_middle_of_a_round_and_carry_on_over_the_other() {
    let name =
        "rails_on_two_devices_lose_a_device_in_the_middle_of_a_round_and_carry_on_over_the_other";
    let Some(scene) = Scene::rails(name, 4825) else { return };
    let moved = scene.lose_a_device(&["--transport", "rdma"]);
    if scene.has_target {
        return assert_goes_on(&moved.arrived.expect("it arrived"));
    }
    moved.assert_migrated("rdma");
    assert_on_both_wires(moved.summary(), 0);
}

/// A NIC that has no RDMA device as long as this is there, and has one again afterwards.
struct WithoutDevice {
    device: String,
    netdev: String,
}

impl WithoutDevice {
    /// That of a wire.
    fn of(wire: u32) -> Self {
        let variable = |name: &str| std::env::var(format!("{name}_{wire}")).expect("set");
        let it = Self { device: variable("PF_RDMA_DEV"), netdev: variable("PF_NETDEV") };
        assert!(it.rdma(&["link", "delete", &it.device]), "rdma link delete {}", it.device);
        it
    }

    fn rdma(&self, args: &[&str]) -> bool {
        Command::new("rdma").args(args).status().is_ok_and(|status| status.success())
    }
}

impl Drop for WithoutDevice {
    fn drop(&mut self) {
        let driver = std::env::var("PF_DRIVER").unwrap_or_default();
        let again = ["link", "add", &self.device, "type", &driver, "netdev", &self.netdev];
        if !self.rdma(&again) {
            println!("{} did not come back", self.device);
        }
    }
}

/// What lanes over this transport moved, as the summary tells.
fn by_lanes_over(summary: &Value, transport: &str) -> u64 {
    let lanes = summary["lane_details"].as_array().into_iter().flatten();
    let of = lanes.filter(|lane| lane["path"].as_str().is_some_and(|it| it.starts_with(transport)));
    of.map(|lane| lane["moved_bytes"].as_u64().unwrap_or(0)).sum()
}

/// RDMA may be lost on busy cores, as above: what is sure is that both kinds of lanes have moved
/// something, each on its own NIC.
#[test]
fn rails_on_one_device_and_one_plain_nic_both_carry_a_guest() {
    let name = "rails_on_one_device_and_one_plain_nic_both_carry_a_guest";
    let Some(scene) = Scene::rails(name, 4823) else { return };
    let _plain = WithoutDevice::of(0);
    let more = [&["--lanes", "2"], &HOWEVER_SLOW[..]].concat();
    let moved = scene.move_guest(&shape(16, None), &more, None);
    if scene.has_target {
        return assert_goes_on(&moved.arrived.expect("it arrived"));
    }
    moved.assert_migrated("");
    let summary = moved.summary();
    println!("{}", summary["rails"]);
    for (netdev, transport) in [("PF_NETDEV_0", "tcp"), ("PF_NETDEV_1", "rdma")] {
        let netdev = std::env::var(netdev).expect("set with the wires");
        let bytes = by_lanes_over(summary, transport);
        println!("{transport}: {} KiB", bytes >> 10);
        assert!(over(summary, &netdev) > 0 && bytes > 0, "{netdev}: {summary:#}");
    }
}

#[test]
fn rails_on_one_device_and_one_plain_nic_lose_the_device_and_carry_on_over_tcp() {
    let name = "rails_on_one_device_and_one_plain_nic_lose_the_device_and_carry_on_over_tcp";
    let Some(scene) = Scene::rails(name, 4826) else { return };
    let _plain = WithoutDevice::of(0);
    let moved = scene.lose_a_device(&[]);
    if scene.has_target {
        return assert_goes_on(&moved.arrived.expect("it arrived"));
    }
    moved.assert_migrated("tcp");
    assert_both_kinds_moved(moved.summary());
}

#[test]
fn rails_on_one_device_and_one_plain_nic_lose_the_wire_of_the_device_and_carry_on_over_tcp() {
    let name =
        "rails_on_one_device_and_one_plain_nic_lose_the_wire_of_the_device_and_carry_on_over_tcp";
    let Some(scene) = Scene::rails(name, 4824) else { return };
    let _plain = WithoutDevice::of(0);
    let moved = scene.lose_a_wire(&[]);
    if scene.has_target {
        return assert_goes_on(&moved.arrived.expect("it arrived"));
    }
    moved.assert_migrated("tcp");
    assert_both_kinds_moved(moved.summary());
}

fn assert_both_kinds_moved(summary: &Value) {
    println!("{}", summary["rails"]);
    let (rdma, tcp) = (by_lanes_over(summary, "rdma"), by_lanes_over(summary, "tcp"));
    println!("rdma: {} KiB, tcp: {} KiB", rdma >> 10, tcp >> 10);
    assert!(rdma > 0 && tcp > 0, "{summary:#}");
}

/// This side's end of a wire of its own; mended when dropped.
struct Wire(String);

impl Wire {
    fn of(test: &str) -> Option<Self> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        if variable("PF_TOPOLOGY") == "veth" {
            return Some(Self(variable("PF_NETDEV")));
        }
        // Where both machines are real the wire is nobody's to spoil.
        println!("not spoiled here: {test}");
        None
    }

    fn spoil(netdev: &str, how: &str) {
        let line = format!("qdisc replace dev {netdev} root netem {how}");
        let status = Command::new("tc").args(line.split(' ')).status();
        assert!(status.is_ok_and(|status| status.success()), "tc {line}");
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _it_may_be_fine =
            Command::new("tc").args(["qdisc", "del", "dev", &self.0, "root"]).output();
    }
}

#[test]
fn rdma_over_a_wire_that_loses_or_delays_no_byte_is_wrong() {
    let name = "rdma_over_a_wire_that_loses_or_delays_no_byte_is_wrong";
    for (how, port) in [("loss 0.5%", 4811), ("loss 2%", 4812), ("delay 5ms", 4813)] {
        let Some(scene) = Scene::rdma(name, port) else { return };
        let Some(wire) = Wire::of(name) else { return };
        Wire::spoil(&wire.0, how);
        println!("{how}:");
        let more = ["--lanes", "2", "--downtime-ms", "2000"];
        let moved = scene.move_guest(&shape(8, None), &more, None);
        // Over RDMA to the end, or carried on over TCP: that is the lanes' to decide.
        moved.assert_migrated("");
        assert_goes_on(&moved.arrived.expect("it arrived"));
    }
}

/// Cuts something half-way through a round, as the round itself tells, and has it back some seconds
/// later. The guest is whole afterwards, wherever it runs; the source's report, if there is a wire.
fn cut(
    name: &str,
    port: u16,
    cut: impl Fn(&str) + 'static,
    back: impl Fn(&str) + Send + 'static,
) -> Option<Value> {
    let scene = Scene::rdma(name, port)?;
    let wire = Wire::of(name)?;
    // So that there is a half-way.
    Wire::spoil(&wire.0, "rate 50mbit limit 300");
    let netdev = wire.0.clone();
    let back = Arc::new(Mutex::new(Some(back)));
    let mender = Arc::new(Mutex::new(None));
    let started = Arc::clone(&mender);
    let half_way = move |_: &Giver| {
        cut(&netdev);
        let (back, netdev) = (back.lock().expect("once").take().expect("once"), netdev.clone());
        let mending = thread::spawn(move || {
            thread::sleep(Duration::from_secs(4));
            back(&netdev);
        });
        *started.lock().expect("once") = Some(mending);
    };
    let more = ["--lanes", "2", "--downtime-ms", "2000"];
    let moved = scene.move_guest(&shape(32, None), &more, Some(Box::new(half_way)));
    let (total, taken) = moved.told.done_at.expect("a round was half-way");
    println!("cut when {} of {} KiB were handed out", taken >> 10, total >> 10);
    assert!(taken < total, "{}", RoundIndex(0));
    if let Some(mender) = mender.lock().expect("once").take() {
        mender.join().expect("mended");
    }
    let summary = moved.summary().clone();
    match moved.exit {
        Exit::Done => {
            moved.assert_migrated("");
            assert_goes_on(&moved.arrived.expect("it arrived"));
        }
        // Then it runs at the source, which was looked at there.
        exit => {
            println!("ended: {:#}", summary["reason"]);
            assert_eq!(exit, Exit::RunningAtSource, "{:#}", moved.summary());
            assert!(moved.arrived.is_none());
        }
    }
    Some(summary)
}

#[test]
fn rdma_a_black_hole_in_the_middle_of_a_round_loses_nothing() {
    cut(
        "rdma_a_black_hole_in_the_middle_of_a_round_loses_nothing",
        4805,
        |netdev| Wire::spoil(netdev, "loss 100%"),
        |netdev| Wire::spoil(netdev, "rate 400mbit"),
    );
}

/// Removes the device that a variable names, in the middle of a round; both ends are in this process,
/// which goes on, and removing it ends when nobody uses it any more.
fn lose_the_device(name: &str, port: u16, variable: &str) {
    let Ok(device) = std::env::var(variable) else {
        return skip(name, "needs an RDMA device (make test-rdma)");
    };
    let (removed, when) = crossbeam_channel::bounded(1);
    let summary = cut(
        name,
        port,
        move |_| {
            let (device, removed) = (device.clone(), removed.clone());
            thread::spawn(move || {
                let status = Command::new("rdma").args(["link", "delete", &device]).status();
                println!("rdma link delete {device}: {status:?}");
                let is_gone = status.is_ok_and(|status| status.success());
                let _nobody_waits_after_a_panic = removed.send(is_gone);
            });
        },
        |netdev| Wire::spoil(netdev, "rate 400mbit"),
    );
    let Some(summary) = summary else { return }; // Said: no device, or no wire to spoil.
    let is_gone = when.recv_timeout(SOON).expect("the device was let go of");
    assert!(is_gone, "the device was not removed");
    match summary["outcome"] == "migrated" {
        true => {
            let (path, why) = (&summary["transport"], &summary["transport_reason"]);
            let is_over_tcp = path.as_str().is_some_and(|path| path.starts_with("tcp"));
            let was_lost = why.as_str().is_some_and(|why| why.contains("RDMA was lost"));
            assert!(is_over_tcp && was_lost, "{summary:#}");
        }
        false => assert!(!summary["reason"].is_null(), "{summary:#}"),
    }
}

/// To be run last, as the next two: none leaves a device that works. (`lanes-in-guest` knows them by
/// their names.)
#[test]
fn rdma_a_link_that_loses_its_device_in_the_middle_of_a_round_loses_nothing() {
    let name = "rdma_a_link_that_loses_its_device_in_the_middle_of_a_round_loses_nothing";
    lose_the_device(name, 4807, "PF_RDMA_DEV");
}

#[test]
fn rdma_a_link_that_loses_the_targets_device_in_the_middle_of_a_round_loses_nothing() {
    let name = "rdma_a_link_that_loses_the_targets_device_in_the_middle_of_a_round_loses_nothing";
    lose_the_device(name, 4808, "PF_PEER_DEV");
}

/// To be run last: soft-RoCE makes no connections any more after this.
#[test]
fn rdma_a_link_that_is_down_for_a_while_in_the_middle_of_a_round_loses_nothing() {
    let link = |how: &'static str| {
        move |_: &str| {
            let status = Command::new("rdma-vm-link").arg(how).status();
            assert!(status.is_ok_and(|status| status.success()), "rdma-vm-link {how}");
        }
    };
    cut(
        "rdma_a_link_that_is_down_for_a_while_in_the_middle_of_a_round_loses_nothing",
        4806,
        link("down"),
        link("up"),
    );
}
