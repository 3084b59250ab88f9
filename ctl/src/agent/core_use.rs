//! How busy each core was while lanes were open: whether one was pegged while another idled.
//!
//! From `/proc/stat`, so with everybody's work: a core that a guest keeps busy is no more to be had
//! than one that packets do. Read twice, by whoever reports; no thread of its own.

use std::collections::BTreeMap;
use std::fs;

use pageferry_datapath::control::CoreUse;
use pageferry_datapath::limits::CORES_MAX;

/// Ticks of each core since the host started: all of them, and those it stood idle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoreTimes(BTreeMap<u16, (u64, u64)>);

impl CoreTimes {
    /// Now; of no core where /proc does not say.
    pub fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    fn parse(stat: &str) -> Self {
        let core = |line: &str| {
            let (name, times) = line.split_once(' ')?;
            let cpu = name.strip_prefix("cpu")?.parse().ok()?;
            // user, nice, system, idle, iowait, irq, softirq, steal; a guest's are in the first two.
            let ticks: Option<Vec<u64>> =
                times.split_whitespace().take(8).map(|text| text.parse().ok()).collect();
            let ticks = ticks.filter(|ticks| ticks.len() == 8)?;
            Some((cpu, (ticks.iter().sum(), ticks[3] + ticks[4])))
        };
        Self(stat.lines().filter_map(core).take(CORES_MAX).collect())
    }

    /// How busy each core was since then; none of them if that is too short a time to tell.
    pub fn since(&self, before: &Self) -> Vec<CoreUse> {
        let used = |(&cpu, &(total, idle)): (&u16, &(u64, u64))| {
            let &(total_before, idle_before) = before.0.get(&cpu)?;
            // Idle time has been seen to run backwards by a tick.
            let total = total.saturating_sub(total_before);
            let idle = idle.saturating_sub(idle_before).min(total);
            let percent = (total - idle) * 100 / Some(total).filter(|total| *total >= TICKS_MIN)?;
            Some(CoreUse { cpu, percent: percent as u8 })
        };
        self.0.iter().filter_map(used).collect()
    }
}

/// A twentieth of a second: a share of less is a share of nothing.
const TICKS_MIN: u64 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_core_was_not_idle_it_was_busy() {
        let before =
            "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 0 10 80 0 0 0 0 0 0\ncpu1 0 0 0 50 0 0 0 0\n";
        let after =
            "cpu0 60 0 30 100 10 0 0 0 5 5\ncpu1 0 0 0 151 0 0 0 0\ncpu7 1 1 1 1 1 1 1 1\nintr 5\n";
        let (before, after) = (CoreTimes::parse(before), CoreTimes::parse(after));
        let used = after.since(&before);
        assert_eq!(used, [CoreUse { cpu: 0, percent: 70 }, CoreUse { cpu: 1, percent: 0 }]);
        assert!(after.since(&after).is_empty());
        assert!(before.since(&after).is_empty());
    }

    #[test]
    fn this_hosts_cores_are_read() {
        assert!(!CoreTimes::now().0.is_empty());
        assert_eq!(CoreTimes::parse("cpux 1 2\ncpu0 1 2 3\n"), CoreTimes::default());
    }
}
