//! Lanes that die, and lanes that are fenced: nothing is lost, nothing comes late.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LaneEvent, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_uring::plan::{PathWish, ZeroCopyWish};
use support::{SOON, Session, contents, extent, fill, memory, next, same};

const PATHS: [PathWish; 2] = [PathWish::Plain, PathWish::Uring];
const BYTES: u64 = 32 << 20;

fn filled(salt: u64) -> GuestMemory {
    let from = memory(&[BYTES]);
    fill(&from.regions()[0], extent(0, 0, BYTES), salt);
    from
}

/// All of memory, in the 64 KiB extents of a scattered round.
fn everything() -> Vec<Extent> {
    (0..BYTES).step_by(64 << 10).map(|offset| extent(0, offset, 64 << 10)).collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < SOON, "waiting until {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_lane_fenced_at_the_target_loses_nothing() {
    for paths in PATHS.map(|path| (path, path)) {
        let mut session = Session::open(2, (filled(1), memory(&[BYTES])), paths, |_| {});
        let work = session.begin(0, everything());
        wait_until("some bytes moved", || session.pool.moved_bytes() > BYTES / 8);
        let fenced = session.targets.remove(0);
        let lost = fenced.lane();
        fenced.fence();
        let (mut unacked, mut placed) = (None, None);
        while unacked.is_none() || placed.is_none() {
            match next(&session.at_source) {
                LaneEvent::Failed { lane, error, unacked: extents } => {
                    assert_eq!(lane, lost);
                    assert!(matches!(error, LaneError::PeerClosed { .. }), "{error:?}");
                    unacked = Some(extents);
                }
                // It was done before the fence: it will fail at the next round.
                LaneEvent::Placed { lane, .. } if lane == lost => unacked = Some(Vec::new()),
                LaneEvent::Placed { lane, .. } => placed = Some(lane),
                other => panic!("{other:?}"),
            }
        }
        // Fenced, so what it had can go another way.
        work.requeue(unacked.expect("a failed lane"));
        session.pool.move_round(work);
        while !matches!(next(&session.at_source), LaneEvent::Placed { .. }) {}
        assert_eq!(session.pool.alive(), 1);
        assert!(same(&session.from, &session.to));
        session.pool.close(false);
    }
}

#[test]
fn no_byte_lands_after_the_fence() {
    let mut in_time = 0;
    for turn in 0..12u64 {
        let path = PATHS[turn as usize % 2];
        let mut session = Session::open(1, (filled(turn), memory(&[BYTES])), (path, path), |_| {});
        session.begin(0, everything());
        let some = BYTES / 64 * (1 + turn);
        wait_until("some bytes moved", || session.pool.moved_bytes() > some);
        session.targets.remove(0).fence();
        let at_fence = contents(&session.to.regions()[0]);
        // On a busy machine the fence may come when all is done, which tells nothing.
        in_time += u32::from(at_fence != contents(&session.from.regions()[0]));
        thread::sleep(Duration::from_millis(50));
        assert!(at_fence == contents(&session.to.regions()[0]), "{path:?}: a byte came late");
        // A fence is this side's doing: nobody failed.
        let failed = |event| matches!(event, LaneEvent::Failed { .. });
        assert!(!session.at_target.try_iter().any(failed));
    }
    assert!(in_time > 0, "every fence came too late to tell");
}

#[test]
fn a_fence_while_nothing_moves_returns_at_once() {
    for path in PATHS {
        let mut session =
            Session::open(1, (memory(&[1 << 20]), memory(&[1 << 20])), (path, path), |_| {});
        let start = Instant::now();
        session.targets.remove(0).fence();
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn an_aborted_source_is_noticed_and_lets_go_of_memory() {
    for path in PATHS {
        for zero_copy in [ZeroCopyWish::Not("to be tried"), ZeroCopyWish::Try] {
            let guests = (filled(3), memory(&[BYTES]));
            let mut session =
                Session::open(2, guests, (path, path), |plan| plan.zero_copy = zero_copy);
            session.begin(0, everything());
            wait_until("some bytes moved", || session.pool.moved_bytes() > BYTES / 8);
            let start = Instant::now();
            session.pool.close(true);
            assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
            for _ in 0..2 {
                let event = next(&session.at_target);
                assert!(matches!(
                    event,
                    LaneEvent::Failed { error: LaneError::PeerClosed { .. }, .. }
                ));
            }
            session.targets.into_iter().for_each(|lane| drop(lane.finish()));
            for memory in [&session.from, &session.to] {
                assert_eq!(Arc::strong_count(&memory.regions()[0]), 1, "a lease is still out");
            }
        }
    }
}

#[test]
fn memory_stays_leased_while_the_kernel_may_read_it() {
    // A peer that does not read keeps the bytes, and with zero-copy the pages, in our socket.
    let acceptor = support::Acceptor::new(1);
    let from = filled(4);
    let (events, inbox) = crossbeam_channel::unbounded();
    let mut plan = acceptor.plan(PathWish::Uring);
    plan.progress_wait = Duration::from_millis(300);
    let serving = thread::spawn(move || {
        let (stream, _) = acceptor.listener.accept().expect("accept");
        let deadline = Instant::now() + SOON;
        pageferry_uring::greet::read_hello(&stream, deadline).expect("hello");
        let accepted = pageferry_datapath::framing::hello::Reply::Accepted;
        pageferry_uring::greet::send_reply(&stream, accepted, deadline).expect("reply");
        stream
    });
    let mut pool = pageferry_uring::source::LanePool::connect(&plan, from.clone(), events)
        .map(Box::new)
        .expect("connect");
    let _stream = serving.join().expect("target");
    let work = pageferry_datapath::work::RoundWork::new(
        pageferry_datapath::ids::RoundIndex(0),
        everything(),
    );
    pool.move_round(Arc::new(work));
    wait_until("a lease is out", || Arc::strong_count(&from.regions()[0]) > 2);
    let LaneEvent::Failed { lane, error, unacked } = next(&inbox) else { panic!("placed") };
    assert_eq!(lane, LaneId(0));
    assert!(matches!(error, LaneError::Timeout { .. }), "{error:?}");
    assert!(!unacked.is_empty());
    pool.close(true);
    assert_eq!(Arc::strong_count(&from.regions()[0]), 1, "a lease is still out");
}
