//! Huge pages of which little was written, through real lanes on loopback.

mod support;

use std::sync::Arc;

use pageferry_datapath::extent::Extent;
use pageferry_datapath::lane::{LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::pace::Pacer;
use pageferry_datapath::region::GuestMemory;
use pageferry_uring::plan::{ConnectPlan, NarrowingWish, PathWish};
use support::{HUGE_PAGE_BYTES, HugePages, Session, extent, fill, memory_of, next, region, same};

const PAGES: u64 = 16;
const BYTES: u64 = PAGES * HUGE_PAGE_BYTES;
const LANES: usize = 2;

/// Memory of huge pages, filled, and as much for a target; `None`, said, where there is none.
fn guests(test: &str) -> Option<(HugePages, (GuestMemory, GuestMemory))> {
    let pages = HugePages::reserve(test, 2 * PAGES)?;
    let guests = (memory_of(&[BYTES], true), memory_of(&[BYTES], true));
    fill(region(&guests.0, 0), extent(0, 0, BYTES), 1);
    Some((pages, guests))
}

fn open(guests: &(GuestMemory, GuestMemory), change: impl FnOnce(&mut ConnectPlan)) -> Session {
    Session::open(LANES, guests.clone(), (PathWish::Auto, PathWish::Auto), change)
}

/// Writes a page of each huge page.
fn write_some(memory: &GuestMemory, salt: u64) {
    for huge in 0..PAGES {
        let offset = huge * HUGE_PAGE_BYTES + (salt * 7 + huge) % 512 * 4096;
        fill(region(memory, 0), extent(0, offset, 4096), salt);
    }
}

/// All of it, as a scan would report it.
fn whole() -> Vec<Extent> {
    vec![extent(0, 0, BYTES)]
}

fn finish_round(session: &Session) {
    for events in [&session.at_source, &session.at_target] {
        for _ in 0..LANES {
            let event = next(events);
            assert!(matches!(event, LaneEvent::Placed { .. }), "{event:?}");
        }
    }
}

fn spared(stats: &[LaneStats]) -> u64 {
    stats.iter().map(|lane| lane.narrowing.spared_bytes).sum()
}

#[test]
fn a_page_in_each_huge_page_is_all_that_is_sent_again() {
    let name = "a_page_in_each_huge_page_is_all_that_is_sent_again";
    let Some((_pages, guests)) = guests(name) else { return };
    let mut session = open(&guests, |plan| plan.narrowing = NarrowingWish::Always);
    for round in 0..6 {
        session.begin(round, whole());
        finish_round(&session);
        assert!(same(&guests.0, &guests.1), "round {round}");
        write_some(&guests.0, u64::from(round) + 2);
    }
    assert_eq!(session.pool.moved_bytes(), BYTES + 5 * PAGES * 4096);
    let stats = session.pool.close(false);
    assert_eq!(spared(&stats), 5 * (BYTES - PAGES * 4096));
    let wire = stats.iter().map(|lane| lane.wire_bytes).sum::<u64>();
    // A header for many pages, and not for each.
    assert!(wire < BYTES * 103 / 100, "{wire} bytes for {BYTES}");
}

#[test]
fn what_lanes_that_are_gone_have_sent_is_not_relied_upon() {
    let name = "what_lanes_that_are_gone_have_sent_is_not_relied_upon";
    let Some((_pages, guests)) = guests(name) else { return };
    let always = |plan: &mut ConnectPlan| plan.narrowing = NarrowingWish::Always;
    let mut session = open(&guests, always);
    session.begin(0, whole());
    finish_round(&session);
    write_some(&guests.0, 2);
    session.begin(1, whole());
    // Cut off in the middle of the round, or near its end.
    drop(session);
    // As if the target had got nothing of it.
    fill(region(&guests.1, 0), extent(0, 0, BYTES), 99);
    write_some(&guests.0, 3);
    let mut session = open(&guests, always);
    for round in 1..4 {
        session.begin(round, whole());
        finish_round(&session);
        assert!(same(&guests.0, &guests.1), "round {round}");
        write_some(&guests.0, u64::from(round) + 4);
    }
    assert_eq!(spared(&session.pool.close(false)), 2 * (BYTES - PAGES * 4096));
}

#[test]
fn lanes_that_decide_for_themselves_spare_something_and_lose_nothing() {
    let name = "lanes_that_decide_for_themselves_spare_something_and_lose_nothing";
    let Some((_pages, guests)) = guests(name) else { return };
    // A gigabit a second.
    let pacer = Arc::new(Pacer::new(Some(125_000_000)));
    let mut session = open(&guests, |plan| plan.pacer = pacer);
    for round in 0..4 {
        session.begin(round, whole());
        finish_round(&session);
        assert!(same(&guests.0, &guests.1), "round {round}");
        write_some(&guests.0, u64::from(round) + 2);
    }
    let stats = session.pool.close(false);
    // How much depends on what this machine takes to hash; samples are taken in any case.
    let reason = &stats[0].narrowing.reason;
    println!("{} of {} bytes spared: {reason}", spared(&stats), 3 * BYTES);
    assert!(spared(&stats) > 0, "{reason}");
}
