//! Lanes held to a rate: over seconds, all together, and changed while they run.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::lane::SourceLanes;
use pageferry_datapath::pace::{Pacer, clock};
use pageferry_uring::plan::PathWish;
use support::{Session, extent, fill, memory};

const BYTES: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Moves one guest's memory; what was handed over after each of these times.
fn moved_after(
    pacer: &Arc<Pacer>,
    lanes: usize,
    path: PathWish,
    mut step: impl FnMut(&dyn Fn() -> u64),
) {
    let guests = (memory(&[BYTES]), memory(&[BYTES]));
    fill(support::region(&guests.0, 0), extent(0, 0, 64 * MIB), 1);
    let mut session =
        Session::open(lanes, guests, (path, path), |plan| plan.pacer = Arc::clone(pacer));
    // The same memory again and again: it is the rate that counts.
    let extents = (0..64).map(|_| extent(0, 0, 64 * MIB)).collect();
    session.begin(0, extents);
    let pool = &session.pool;
    step(&|| pool.moved_bytes());
}

fn assert_held(bytes: u64, took: Duration, rate: u64) {
    let share = bytes as f64 / took.as_secs_f64() / rate as f64;
    // Counted is memory; headers are part of the rate.
    assert!((0.97..=1.02).contains(&share), "{share:.4} of the rate");
}

#[test]
fn a_rate_is_held_and_changed_in_flight() {
    let rate = 40 * MIB;
    let pacer = Arc::new(Pacer::new(Some(rate)));
    moved_after(&pacer, 3, PathWish::Auto, |moved| {
        for rate in [rate, rate * 2] {
            pacer.set(clock(), Some(rate));
            thread::sleep(Duration::from_millis(500));
            let (before, start) = (moved(), Instant::now());
            thread::sleep(Duration::from_secs(5));
            assert_held(moved() - before, start.elapsed(), rate);
        }
    });
}

#[test]
fn a_guest_that_stands_still_is_not_held_back() {
    let pacer = Arc::new(Pacer::new(Some(MIB)));
    moved_after(&pacer, 2, PathWish::Plain, |moved| {
        thread::sleep(Duration::from_millis(300));
        assert!(moved() < 4 * MIB, "{}", moved());
        pacer.hurry(true);
        let start = Instant::now();
        while moved() < 256 * MIB {
            assert!(start.elapsed() < support::SOON, "{}", moved());
            thread::sleep(Duration::from_millis(5));
        }
    });
}
