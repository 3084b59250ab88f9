//! Whether this host's guests need the processors that packing would use.
//!
//! `/proc/stat` tells how much of all processors was used and how much stood idle; what this process
//! used itself is taken off, and so is the user time of whoever runs with a raised nice value: that
//! work gives way by its own wish, and guests don't. Packing lanes give way to guests (`priority`),
//! so what others use then is what they want: if that is most of the host and nothing is idle, they
//! want it all.

use std::fs;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::limits;

/// Others use at least this share of all processors, in percent, ...
const OTHERS_PERCENT: u64 = 75;
/// ... and no more than this is idle.
const IDLE_PERCENT: u64 = 5;
/// Of `/proc/stat`: USER_HZ, which is 100 on every architecture we know.
const TICK_NS: u64 = 10_000_000;

/// Looks now and then; owned behind the lock of what lanes share.
#[derive(Debug)]
pub(super) struct CpuWatch {
    last: Option<Times>,
    next: Duration,
}

/// Since the host started, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Times {
    total: u64,
    idle: u64,
    /// Nobody's that count: interrupts, those of our own packets among them, and what gives way.
    /// Our own lanes' part of that is taken off twice, which errs by no more than we use ourselves.
    spare: u64,
    own: u64,
}

impl CpuWatch {
    pub(super) fn new() -> Self {
        Self { last: None, next: Duration::ZERO }
    }

    /// Whether the guests need the processors; `None` if it is not time to look again, or nobody
    /// can tell.
    pub(super) fn look(&mut self, now: Duration) -> Option<bool> {
        if now < self.next {
            return None;
        }
        self.next = now + limits::CPU_LOOK_EVERY;
        let times = times(&fs::read_to_string("/proc/stat").ok()?)?;
        let before = self.last.replace(times)?;
        needed(before, times)
    }
}

fn needed(before: Times, after: Times) -> Option<bool> {
    let over = |f: fn(&Times) -> u64| f(&after).saturating_sub(f(&before));
    let total = over(|t| t.total);
    if total < 2 * TICK_NS {
        return None;
    }
    let idle = over(|t| t.idle);
    let ours = over(|t| t.own) + over(|t| t.spare);
    let others = total.saturating_sub(idle).saturating_sub(ours);
    Some(others * 100 >= total * OTHERS_PERCENT && idle * 100 <= total * IDLE_PERCENT)
}

fn times(stat: &str) -> Option<Times> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guest times are within user and nice.
    let mut ticks = [0u64; 8];
    for (ticks, text) in ticks.iter_mut().zip(line.split_whitespace()) {
        *ticks = text.parse().ok()?;
    }
    let own = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).ok()?;
    Some(Times {
        total: ticks.iter().sum::<u64>() * TICK_NS,
        idle: (ticks[3] + ticks[4]) * TICK_NS,
        spare: (ticks[1] + ticks[5] + ticks[6]) * TICK_NS,
        own: own.tv_sec() as u64 * 1_000_000_000 + own.tv_nsec() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn over(total: u64, idle: u64, own: u64) -> Option<bool> {
        let before = Times { total: 5 * SECOND, idle: 3 * SECOND, spare: SECOND, own: SECOND };
        let after = Times {
            total: before.total + total,
            idle: before.idle + idle,
            own: before.own + own,
            ..before
        };
        needed(before, after)
    }

    #[test]
    fn guests_need_what_nobody_leaves_them() {
        assert_eq!(over(2 * SECOND, 0, SECOND / 10), Some(true));
        // One of two cores is theirs, and the other ours.
        assert_eq!(over(2 * SECOND, 0, SECOND), Some(false));
        assert_eq!(over(2 * SECOND, SECOND / 5, SECOND / 10), Some(false));
        assert_eq!(over(2 * SECOND, 0, 2 * SECOND), Some(false));
        assert_eq!(over(TICK_NS, 0, 0), None);
    }

    #[test]
    fn work_that_gives_way_by_itself_is_no_guest() {
        let before = Times::default();
        let compilers = Times { total: 2 * SECOND, spare: 9 * SECOND / 5, ..before };
        assert_eq!(needed(before, compilers), Some(false));
        let guests = Times { total: 2 * SECOND, spare: SECOND / 5, ..before };
        assert_eq!(needed(before, guests), Some(true));
    }

    #[test]
    fn the_kernels_line_is_read() {
        let stat = "cpu  100 20 30 400 50 6 7 8 9 10\ncpu0 1 2 3\n";
        let times = times(stat).unwrap();
        assert_eq!(times.total, 621 * TICK_NS);
        assert_eq!((times.idle, times.spare), (450 * TICK_NS, 33 * TICK_NS));
        assert!(super::times("intr 5\n").is_none() && super::times("cpu  a b\n").is_none());
        let mut watch = CpuWatch::new();
        assert_eq!(watch.look(Duration::ZERO), None);
        assert_eq!(watch.look(Duration::from_millis(1)), None);
    }
}
