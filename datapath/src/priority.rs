//! How far a thread that moves memory gives way to the guest's own.
//!
//! The first pass is long, and most of it is work that nobody waits for: while it lasts, lanes and
//! the threads that populate the target's memory take idle time first. The rounds after it are
//! short, and decide how long the pause will be: they run like everyone else.
//!
//! Giving way has a floor: where a guest leaves nothing of a core, a pass that takes what is left
//! never ends. A thread that moves less than [`limits::GIVES_WAY_BYTES_MIN`] a second, and most of that
//! time waits for a core while it could run, comes back towards its own nice value step by step, and
//! stays there. Slowness by a link, or by a rate that is asked for, is no such wait.
//!
//! Nice values count among threads of one scheduling group: between control groups, and between
//! sessions where autogrouping is on, the groups' own weights do.

use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{getpriority_process, setpriority_process};

use crate::limits;

/// Nice value of a thread that gives way: on a core that a guest keeps busy the kernel leaves it
/// about 3 % (36 of 36 + 1024, sched_prio_to_weight), and all of one that is idle.
const NICE: i32 = 15;
/// How far a thread that starves comes back at once: each step is three times the share (by the same
/// table), so that it takes no more than it needs.
const STEP: i32 = 5;

/// Whether this thread gives way now.
#[derive(Debug)]
pub struct GivesWay {
    /// The nice value to return to.
    was: Option<i32>,
    /// The one it gives way with: lower once it starved.
    nice: i32,
    moved_bytes: u64,
    looked: Option<Look>,
}

/// What a thread had at some time.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    moved_bytes: u64,
    /// For how long it was able to run, and did not.
    waited: Duration,
}

impl Default for GivesWay {
    fn default() -> Self {
        Self { was: None, nice: NICE, moved_bytes: 0, looked: None }
    }
}

impl GivesWay {
    /// This thread gives way from now on. Without the privilege to return (CAP_SYS_NICE, or
    /// RLIMIT_NICE), or where the kernel does not tell how long it waits, nothing happens: it could
    /// starve, and nobody would help.
    pub fn begin(&mut self) {
        if self.was.is_none() && may_return() {
            self.was = lower(self.nice);
            self.looked = None;
        }
    }

    /// It does so no more.
    pub fn end(&mut self) {
        if let Some(was) = self.was.take() {
            set(was);
        }
    }

    /// It has moved so much since this was last said, and has more to do. Looks at itself now and
    /// then, and gives way less if it starves.
    pub fn moved(&mut self, bytes: u64) {
        self.moved_bytes += bytes;
        let Some(was) = self.was else { return };
        let at = Instant::now();
        let before = self.looked;
        if before.is_some_and(|before| at - before.at < limits::GIVES_WAY_LOOK_EVERY) {
            return;
        }
        let Some(waited) = waited() else { return };
        let now = Look { at, moved_bytes: self.moved_bytes, waited };
        self.looked = Some(now);
        let Some(before) = before else { return };
        let (over, bytes) = (now.at - before.at, now.moved_bytes - before.moved_bytes);
        let waited = now.waited.saturating_sub(before.waited);
        if starves(over, bytes, waited) && self.nice > was {
            self.nice = less_way(self.nice, was);
            tracing::info!(
                bytes,
                over_ms = over.as_millis(),
                waited_ms = waited.as_millis(),
                nice = self.nice,
                "a thread that gave way starves, and gives way less"
            );
            set(self.nice);
        }
    }
}

/// For a thread that gives way until it ends.
pub fn give_way() {
    lower(NICE);
}

/// It moved less than it has to, and not for want of a link or of work.
fn starves(over: Duration, bytes: u64, waited: Duration) -> bool {
    let due = u128::from(limits::GIVES_WAY_BYTES_MIN) * over.as_millis() / 1000;
    u128::from(bytes) < due && waited * 2 >= over
}

/// The next step from `nice` towards `was`.
fn less_way(nice: i32, was: i32) -> i32 {
    (nice - STEP).max(was)
}

/// Raises this thread's nice value; returns the one it had, if it was lower.
fn lower(nice: i32) -> Option<i32> {
    let was = getpriority_process(None).ok().filter(|&was| was < nice)?;
    setpriority_process(None, nice).ok().map(|()| was)
}

fn set(nice: i32) {
    if let Err(error) = setpriority_process(None, nice) {
        tracing::warn!(%error, "a thread's nice value stays raised");
    }
}

/// For how long this thread was able to run and did not, since it began: the second number of
/// `schedstat` (Documentation/scheduler/sched-stats.rst).
fn waited() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

/// Whether a nice value that was raised can be lowered again, tried once, on a thread of its own;
/// and whether there is a way to tell that it should be.
fn may_return() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let tried = std::thread::spawn(|| {
            lower(NICE).is_some_and(|was| setpriority_process(None, was).is_ok())
        });
        waited().is_some() && tried.join().unwrap_or(false)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FLOOR: u64 = limits::GIVES_WAY_BYTES_MIN;

    fn nice() -> i32 {
        getpriority_process(None).unwrap()
    }

    #[test]
    fn a_thread_gives_way_and_returns_and_no_other_does() {
        let before = nice();
        let seen = std::thread::spawn(move || {
            let mut gives_way = GivesWay::default();
            gives_way.begin();
            gives_way.begin();
            let lowered = nice();
            gives_way.end();
            gives_way.end();
            (lowered, nice())
        });
        let (lowered, after) = seen.join().unwrap();
        let expected = if may_return() { before.max(NICE) } else { before };
        assert_eq!((lowered, after, nice()), (expected, before, before));
    }

    #[test]
    fn who_waits_for_a_core_and_moves_too_little_starves() {
        assert!(starves(SECOND, FLOOR - 1, SECOND * 9 / 10));
        assert!(starves(4 * SECOND, 0, 2 * SECOND));
        assert!(!starves(4 * SECOND, 4 * FLOOR, 4 * SECOND), "it moves enough");
        assert!(!starves(SECOND, 0, SECOND / 3), "it waits for something else");
    }

    #[test]
    fn it_comes_back_in_steps_and_no_further_than_it_was() {
        let steps = |was| {
            let next = move |nice: &i32| (*nice > was).then(|| less_way(*nice, was));
            std::iter::successors(Some(NICE), next).collect::<Vec<_>>()
        };
        assert_eq!(steps(0), [15, 10, 5, 0]);
        assert_eq!(steps(8), [15, 10, 8]);
        assert_eq!(steps(15), [15]);
    }

    /// On one core with those who leave it nothing.
    #[test]
    fn a_thread_that_starves_gives_way_less_and_one_that_moves_enough_does_not() {
        let before = nice();
        if before >= NICE || !may_return() {
            crate::testing::skip(
                "a_thread_that_starves_gives_way_less_and_one_that_moves_enough_does_not",
                "needs CAP_SYS_NICE, /proc/thread-self/schedstat and a nice value to raise",
            );
            return;
        }
        let us = Pid::from_raw(0);
        let ours = sched_getaffinity(us).unwrap();
        let mut one_core = CpuSet::new();
        one_core
            .set((0..CpuSet::count()).find(|core| ours.is_set(*core).unwrap()).unwrap())
            .unwrap();
        let ended = AtomicBool::new(false);
        // Says that it moved so much each turn: until it came back wholly, or for so long.
        let mover = |bytes: u64, at_most: Duration| {
            let mut gives_way = GivesWay::default();
            gives_way.begin();
            let begun = Instant::now();
            while nice() > before && begun.elapsed() < at_most {
                gives_way.moved(bytes);
            }
            let seen = nice();
            gives_way.end();
            ended.store(true, Ordering::Relaxed);
            (seen, nice())
        };
        let among_spinners = |bytes, at_most| {
            ended.store(false, Ordering::Relaxed);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        sched_setaffinity(us, &one_core).unwrap();
                        while !ended.load(Ordering::Relaxed) {
                            std::hint::spin_loop();
                        }
                    });
                }
                let mover = scope.spawn(|| {
                    sched_setaffinity(us, &one_core).unwrap();
                    mover(bytes, at_most)
                });
                mover.join().unwrap()
            })
        };
        let enough = limits::GIVES_WAY_LOOK_EVERY * 3;
        assert_eq!(among_spinners(1000 * FLOOR, enough), (NICE, before));
        // Others may take the core too: it is waited for as long as that needs.
        assert_eq!(among_spinners(0, Duration::from_secs(600)), (before, before));
    }
}
