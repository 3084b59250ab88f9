//! A host with io_uring switched off: lanes use plain sockets and say so. As root, for real.
//!
//! A binary of its own, because the switch is the machine's: nothing else may need a ring meanwhile.

mod support;

use std::fs;

use pageferry_datapath::lane::{LaneError, LaneEvent, LanePath, SourceLanes, ZeroCopy};
use pageferry_uring::plan::PathWish;
use pageferry_uring::source::LanePool;
use support::{Acceptor, Session, extent, fill, memory, next, same, skip};

const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

/// The switch's value before, put back on every way out.
struct Disabled(String);

impl Disabled {
    fn everywhere() -> std::io::Result<Self> {
        let before = Self(fs::read_to_string(SWITCH)?);
        fs::write(SWITCH, "2")?;
        Ok(before)
    }
}

impl Drop for Disabled {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, &self.0);
    }
}

#[test]
fn lanes_fall_back_to_plain_sockets_and_say_so() {
    let guests = (memory(&[2 << 20]), memory(&[2 << 20]));
    let all = extent(0, 0, 2 << 20);
    fill(&guests.0.regions()[0], all, 1);
    let acceptor = Acceptor::new(1);
    let disabled = match Disabled::everywhere() {
        Ok(disabled) => disabled,
        Err(error) => {
            return skip("lanes_fall_back_to_plain_sockets_and_say_so", &error.to_string());
        }
    };
    let mut session = Session::open(2, guests, (PathWish::Auto, PathWish::Auto), |_| {});
    let asked_for = refused_ring(&acceptor);
    drop(disabled);
    assert!(matches!(asked_for, LaneError::Host { call: "io_uring_setup", .. }), "{asked_for:?}");
    session.begin(0, vec![all]);
    for _ in 0..2 {
        assert!(matches!(next(&session.at_source), LaneEvent::Placed { .. }));
    }
    assert!(same(&session.from, &session.to));
    let mut stats = session.pool.close(false);
    stats.extend(session.targets.into_iter().map(|lane| lane.finish()));
    assert_eq!(stats.len(), 4);
    for stats in stats {
        assert_eq!((stats.path, stats.zero_copy), (LanePath::TcpPlain, ZeroCopy::Off));
        assert!(stats.path_reason.contains("io_uring"), "{}", stats.path_reason);
    }
}

/// What a source is told that insists on a ring.
fn refused_ring(acceptor: &Acceptor) -> LaneError {
    let (events, _inbox) = crossbeam_channel::unbounded();
    let memory = memory(&[4096]);
    std::thread::scope(|scope| {
        let plan = acceptor.plan(PathWish::Uring);
        let connecting = scope.spawn(move || LanePool::connect(&plan, memory, events));
        let (stream, _) = acceptor.listener.accept().expect("accept");
        let deadline = std::time::Instant::now() + support::SOON;
        pageferry_uring::greet::read_hello(&stream, deadline).expect("hello");
        let accepted = pageferry_datapath::framing::hello::Reply::Accepted;
        pageferry_uring::greet::send_reply(&stream, accepted, deadline).expect("reply");
        connecting.join().expect("connect").expect_err("a ring where there is none")
    })
}
