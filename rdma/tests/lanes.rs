//! Lanes on real verbs: bytes arrive whole, barriers mean what they say, failures are named.
#![forbid(unsafe_code)]

mod support;

use pageferry_datapath::control::Ticket;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::Refusal;
use pageferry_datapath::ids::{RegionIndex, RoundIndex};
use pageferry_datapath::lane::{LaneEvent, LanePath, SourceLanes};
use pageferry_datapath::work::RoundWork;
use pageferry_rdma::error::RdmaError;
use pageferry_rdma::plan::Pin;
use pageferry_rdma::source::RdmaPool;

use std::net::SocketAddr;
use std::sync::Arc;

use support::{
    PAGE, SOON, Source, TICKET, Target, addresses, digest, fill, is_same, memory, memory_of, page,
    plan, required, whole,
};

const SIZES: [u64; 2] = [20 << 20, 64 << 10];

#[test]
fn memory_arrives_whole_and_later_content_wins() {
    let Some((here, there)) = addresses("memory_arrives_whole_and_later_content_wins") else {
        return;
    };
    for (pin, lanes) in [(Pin::Touched, 1), (Pin::All, 4)] {
        let target = Target::listen(there, &SIZES, pin);
        let source_memory = memory(&SIZES);
        whole(&source_memory).into_iter().for_each(|extent| fill(&source_memory, extent, 1));
        let mut plan = plan(here, target.address, lanes);
        plan.pin = pin;
        let mut source = Source::connect(&plan, &source_memory);
        target.begin();
        source.move_round(0, whole(&source_memory));
        assert_eq!(digest(&source_memory), digest(&target.memory), "{pin:?}");
        for round in 1..4u64 {
            let scattered: Vec<Extent> = (0..600).map(|n| page(n * 8 + round)).collect();
            scattered.iter().for_each(|extent| fill(&source_memory, *extent, round << 32));
            source.move_round(round as u32, scattered);
        }
        assert_eq!(digest(&source_memory), digest(&target.memory), "{pin:?}");
        let stats = source.pool.close(false);
        assert_eq!(stats.len(), usize::from(lanes));
        let moved: u64 = stats.iter().map(|lane| lane.moved_bytes).sum();
        assert_eq!(moved, SIZES.iter().sum::<u64>() + 3 * 600 * PAGE);
        assert!(stats.iter().all(|lane| lane.path == LanePath::Rdma));
        for _ in 0..usize::from(lanes) * 4 {
            let event = target.events.recv_timeout(SOON).expect("an event in time");
            assert!(matches!(event, LaneEvent::Placed { .. } | LaneEvent::Closed { .. }));
        }
    }
}

#[test]
fn a_tiny_send_queue_is_never_overrun() {
    let Some((here, there)) = addresses("a_tiny_send_queue_is_never_overrun") else { return };
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    let scattered: Vec<Extent> = (0..500).map(|n| page(n * 3)).collect();
    scattered.iter().for_each(|extent| fill(&source_memory, *extent, 5));
    let mut plan = plan(here, target.address, 1);
    plan.depth = 4;
    let mut source = Source::connect(&plan, &source_memory);
    target.begin();
    source.move_round(0, scattered);
    assert_eq!(digest(&source_memory), digest(&target.memory));
}

#[test]
fn nothing_is_registered_before_it_may_be() {
    let Some((here, there)) = addresses("nothing_is_registered_before_it_may_be") else { return };
    let target = Target::listen(there, &SIZES, Pin::All);
    let source_memory = memory(&SIZES);
    fill(&source_memory, page(0), 3);
    let mut source = Source::connect(&plan(here, target.address, 1), &source_memory);
    source.pool.move_round(Arc::new(RoundWork::new(RoundIndex(0), [page(0)])));
    assert!(source.events.recv_timeout(std::time::Duration::from_millis(500)).is_err());
    assert_eq!(target.registered.registered_bytes(), 0);
    target.begin();
    let event = source.events.recv_timeout(SOON).expect("an event in time");
    assert!(matches!(event, LaneEvent::Placed { .. }), "{event:?}");
    assert!(is_same(&source_memory, &target.memory, page(0)));
}

#[test]
fn a_fenced_lane_places_nothing_any_more() {
    let Some((here, there)) = addresses("a_fenced_lane_places_nothing_any_more") else { return };
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    fill(&source_memory, page(0), 1);
    let mut source = Source::connect(&plan(here, target.address, 1), &source_memory);
    target.begin();
    source.move_round(0, vec![page(0)]);
    target.fence();
    let before = digest(&target.memory);
    fill(&source_memory, page(0), 2);
    source.pool.move_round(Arc::new(RoundWork::new(RoundIndex(1), [page(0)])));
    match source.events.recv_timeout(SOON).expect("an event in time") {
        LaneEvent::Failed { unacked, .. } => assert_eq!(unacked, [page(0)]),
        event => panic!("{event:?}"),
    }
    assert_eq!(source.pool.alive(), 0);
    assert_eq!(digest(&target.memory), before);
}

#[test]
fn a_wrong_ticket_and_a_closed_port_are_told_apart() {
    let name = "a_wrong_ticket_and_a_closed_port_are_told_apart";
    let Some((here, there)) = addresses(name) else { return };
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    let (events, _) = crossbeam_channel::unbounded();
    let mut wrong = plan(here, target.address, 1);
    wrong.lanes[0].ticket = Ticket([8; 32]);
    let refused = RdmaPool::connect(&wrong, source_memory.clone(), events.clone());
    let (_, error) = refused.expect_err("refused");
    assert!(matches!(error, RdmaError::Refused { refusal: Refusal::Ticket }), "{error:?}");

    // Nobody listens on a port of the kernel's that was given back.
    let port = target.address.port();
    drop(target);
    let closed = plan(here, SocketAddr::new(there, port), 1);
    assert!(closed.lanes[0].ticket == TICKET);
    let (_, error) = RdmaPool::connect(&closed, source_memory, events).expect_err("nobody there");
    println!("closed port: {error:?}");
    let named = matches!(error, RdmaError::Rejected { .. } | RdmaError::Unreachable { .. });
    assert!(named, "{error:?}");
    assert!(error.hint().is_some());
}

/// Whoever holds the target's end goes without a word, in the middle of a round.
#[test]
fn a_lost_peer_is_an_error_with_what_was_not_acknowledged() {
    let name = "a_lost_peer_is_an_error_with_what_was_not_acknowledged";
    let Some((here, there)) = addresses(name) else { return };
    let target = Target::listen(there, &SIZES, Pin::Touched);
    let source_memory = memory(&SIZES);
    fill(&source_memory, page(0), 1);
    let mut source = Source::connect(&plan(here, target.address, 1), &source_memory);
    // The lane waits for keys, which never come.
    source.pool.move_round(Arc::new(RoundWork::new(RoundIndex(0), [page(0), page(9)])));
    target.fence();
    drop(target);
    match source.events.recv_timeout(SOON).expect("an event in time") {
        LaneEvent::Failed { unacked, error, .. } => {
            println!("lost peer: {error:?}");
            assert_eq!(unacked, [page(0), page(9)]);
        }
        event => panic!("{event:?}"),
    }
    assert_eq!(source.pool.alive(), 0);
}

#[test]
fn huge_pages_arrive_whole() {
    let Some((here, there)) = addresses("huge_pages_arrive_whole") else { return };
    let sizes = [8 << 20];
    let huge = Some(2 << 20);
    let (Some(source_memory), Some(target_memory)) =
        (memory_of(&sizes, huge), memory_of(&sizes, huge))
    else {
        assert!(!required(), "no huge pages, and nothing may be skipped");
        println!("SKIP huge_pages_arrive_whole: needs 8 huge pages of 2 MiB");
        return;
    };
    let target = Target::with_memory(there, target_memory, Pin::Touched);
    let filled = Extent { region: RegionIndex(0), offset: 2 << 20, len: 4 << 20 };
    fill(&source_memory, filled, 11);
    let mut source = Source::connect(&plan(here, target.address, 2), &source_memory);
    target.begin();
    source.move_round(0, vec![filled]);
    assert!(is_same(&source_memory, &target.memory, filled));
    let last = Extent { region: RegionIndex(0), offset: 6 << 20, len: 2 << 20 };
    fill(&source_memory, last, 12);
    source.move_round(1, vec![last, Extent { offset: 2 << 20, len: 2 << 20, ..last }]);
    assert_eq!(digest(&source_memory), digest(&target.memory));
}
