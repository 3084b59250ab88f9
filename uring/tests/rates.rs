//! Lanes held to a rate: over seconds, all together, and changed while they run.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::framing::HEADER_BYTES;
use pageferry_datapath::lane::SourceLanes;
use pageferry_datapath::pace::{Pacer, clock};
use pageferry_uring::plan::PathWish;
use support::{Session, extent, fill, memory};

const BYTES: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// A rate is held over this.
const WINDOW: Duration = Duration::from_secs(5);
/// For so long windows begin, one each [`STEP`].
const WATCHED: Duration = Duration::from_secs(2);
/// See [`WATCHED`].
const STEP: Duration = Duration::from_millis(50);
/// After a change lanes finish the pieces that they have taken.
const SETTLING: Duration = Duration::from_millis(500);

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

/// What a batch at this rate carries, and what travels for it: headers are part of the rate.
fn with_header(pacer: &Pacer) -> f64 {
    let piece = pacer.piece_bytes() as f64;
    (piece + HEADER_BYTES as f64) / piece
}

/// Holds lanes to each of the rates in turn, without a pause; the least and the most that was sent
/// in any window of [`WINDOW`] after a change had its time, as shares of the rate.
fn windows(name: &str, lanes: usize, rates: &[u64]) -> Vec<(f64, f64)> {
    let pacer = Arc::new(Pacer::new(rates.first().copied()));
    let mut found = Vec::new();
    moved_after(&pacer, lanes, PathWish::Auto, |moved| {
        for &rate in rates {
            pacer.set(clock(), Some(rate));
            thread::sleep(SETTLING);
            let (start, mut seen) = (Instant::now(), Vec::new());
            while start.elapsed() < WINDOW + WATCHED {
                seen.push((start.elapsed(), moved() as f64 * with_header(&pacer)));
                thread::sleep(STEP);
            }
            let shares = seen.iter().filter_map(|(from, before)| {
                let (to, after) = seen.iter().find(|(to, _)| *to >= *from + WINDOW)?;
                Some((after - before) / (*to - *from).as_secs_f64() / rate as f64)
            });
            let (least, most) = shares.fold((f64::MAX, 0.0f64), |(least, most), share| {
                (least.min(share), most.max(share))
            });
            println!(
                "{name}, {lanes} lanes at {} MiB/s: {:.2} % to {:.2} % in any {} s",
                rate / MIB,
                least * 100.0,
                most * 100.0,
                WINDOW.as_secs()
            );
            found.push((least, most));
        }
    });
    found
}

#[test]
fn any_five_seconds_are_within_two_percent_of_the_rate() {
    // All at the same time, as migrations that share a link are: the last two take 90 and 10 % of
    // a budget, which is changed too.
    let runs: [(&str, usize, [u64; 2]); 4] = [
        ("alone", 1, [40 * MIB, 80 * MIB]),
        ("alone", 4, [80 * MIB, 40 * MIB]),
        ("90 %", 2, [36 * MIB, 72 * MIB]),
        ("10 %", 1, [4 * MIB, 8 * MIB]),
    ];
    thread::scope(|scope| {
        for (name, lanes, rates) in runs {
            scope.spawn(move || {
                for (least, most) in windows(name, lanes, &rates) {
                    // Never more. Less only where this machine was too busy to run the lanes.
                    assert!(most <= 1.02 && least >= 0.95, "{name}: {least:.4} to {most:.4}");
                }
            });
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
