//! What a source learned on its way.

use std::time::Duration;

use super::phase::Phase;
use crate::control::Running;
use crate::ids::RoundIndex;

/// One round, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
