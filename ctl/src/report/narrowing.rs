//! What was left out of huge pages, for the summary: over all lanes, as an object and as a line.

use pageferry_datapath::lane::LaneStats;
use serde::{Deserialize, Serialize};

use super::units;

/// What of huge pages did not travel again, and why so much of it, or why all of it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NarrowingDetail {
    /// Guest memory that the target held already, and that was left out.
    pub spared_bytes: u64,
    /// Guest memory that was hashed to find that out, each time that it was.
    pub hashed_bytes: u64,
    /// Time all lanes spent in it, in microseconds.
    pub us: u64,
    /// Memory for it at the source.
    pub table_bytes: u64,
    /// Why so, in words.
    pub reason: String,
}

impl NarrowingDetail {
    /// Over all lanes; `None` without any.
    pub fn of(lanes: &[LaneStats]) -> Option<Self> {
        let last = &lanes.last()?.narrowing;
        let sum = |of: fn(&LaneStats) -> u64| lanes.iter().map(of).sum::<u64>();
        Some(Self {
            spared_bytes: sum(|lane| lane.narrowing.spared_bytes),
            hashed_bytes: sum(|lane| lane.narrowing.hashed_bytes),
            us: sum(|lane| lane.narrowing.ns) / 1000,
            table_bytes: last.table_bytes,
            reason: last.reason.clone(),
        })
    }

    /// For people.
    pub(super) fn line(&self) -> String {
        let spared = units::bytes(self.spared_bytes);
        format!("{spared} of huge pages were at the target already ({})", self.reason)
    }
}
