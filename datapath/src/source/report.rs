//! What a source learned on its way.

use std::time::Duration;

use super::phase::Phase;
use crate::control::Running;
use crate::ids::RoundIndex;

/// One round, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RoundReport {
    /// Which round.
    pub round: RoundIndex,
    /// Bytes of guest memory brought up to date at the target.
    pub bytes: u64,
    /// Of these, those that were zero and did not travel.
    pub zero_bytes: u64,
    /// Pages moved.
    pub pages: u64,
    /// From its start until the target acknowledged every lane's barrier.
    pub took: Duration,
    /// Inside the pause.
    pub last: bool,
}

impl RoundReport {
    /// What travelled of it, in bytes.
    pub fn moved_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.zero_bytes)
    }
}

/// What the source learned on its way.
#[derive(Clone, Debug, Default)]
pub struct SourceReport {
    /// When each phase was entered, in order; a phase may be entered many times.
    pub phases: Vec<(Phase, Duration)>,
    /// The rounds, in order.
    pub rounds: Vec<RoundReport>,
    /// Bytes that were not holes when the first pass began.
    pub populated_bytes: u64,
    /// What the last scan while the guest ran found left to move, in bytes.
    pub left_bytes: Option<u64>,
    /// Pages written between the last two scans, per second, in bytes.
    pub dirty_bytes_per_second: Option<u64>,
    /// The pause predicted when the switchover was decided.
    pub predicted_blackout: Option<Duration>,
    /// Digests were compared and equal.
    pub verified: bool,
    /// The monitor had sent its device state.
    pub state_sent: Option<Duration>,
    /// The target's word that the guest runs there.
    pub running: Option<Running>,
}

/// Of so many rounds the quickest counts.
const LATEST: usize = 3;

impl SourceReport {
    /// Bytes moved and the time it took, of the quickest of the latest rounds: while the guest runs
    /// it takes its share of the cores, and in the pause it will not. A round counts if it moved at
    /// least half of `left`, so that what each round costs is in it as it will be. If none did, all
    /// rounds together are the measure, with their zero pages.
    ///
    /// The first pass is soon left behind: it may be much slower than what follows, because it is
    /// the first to touch the target's memory.
    pub fn bandwidth(&self, left: u64) -> (u64, Duration) {
        let latest = self.rounds.iter().rev().take(LATEST);
        let counting = latest.filter(|round| round.moved_bytes() >= (left / 2).max(1));
        let of = |round: &RoundReport| (round.moved_bytes(), round.took);
        counting
            .map(of)
            .max_by_key(|&(bytes, took)| u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1))
            .unwrap_or_else(|| {
                let bytes = self.rounds.iter().map(|round| round.bytes).sum();
                (bytes, self.rounds.iter().map(|round| round.took).sum())
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(round: u32, bytes: u64, zero_bytes: u64, millis: u64) -> RoundReport {
        let took = Duration::from_millis(millis);
        RoundReport { round: RoundIndex(round), bytes, zero_bytes, pages: 1, took, last: false }
    }

    #[test]
    fn the_quickest_of_the_latest_rounds_that_are_long_enough_is_the_bandwidth() {
        let mut report = SourceReport::default();
        let bandwidth = |report: &SourceReport, left| {
            let (bytes, took) = report.bandwidth(left);
            (bytes, took.as_millis())
        };
        assert_eq!(bandwidth(&report, 1), (0, 0));
        report.rounds = vec![round(0, 9000, 1000, 80), round(1, 500, 0, 2), round(2, 500, 0, 3)];
        assert_eq!(bandwidth(&report, 0), (500, 2));
        assert_eq!(bandwidth(&report, 1000), (500, 2));
        assert_eq!(bandwidth(&report, 1002), (8000, 80));
        report.rounds.push(round(3, 100, 90, 1));
        assert_eq!(bandwidth(&report, 1000), (500, 2));
        assert_eq!(bandwidth(&report, 1002), (10100, 86));
        report.rounds.push(round(4, 100, 90, 1));
        assert_eq!(bandwidth(&report, 1000), (500, 3));
    }

    #[test]
    fn where_nothing_travelled_zero_pages_are_the_measure() {
        let rounds = vec![round(0, 9000, 9000, 80), round(1, 10, 10, 1)];
        let report = SourceReport { rounds, ..SourceReport::default() };
        assert_eq!(report.bandwidth(0), (9010, Duration::from_millis(81)));
    }
}
