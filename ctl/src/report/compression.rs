//! What compression did, for the summary: over all lanes, as an object and as a line.

use pageferry_datapath::lane::LaneStats;
use serde::{Deserialize, Serialize};

use super::units;

/// What was compressed, and why or why not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compression {
    /// The codec in use at the end; null if memory travelled as it is then.
    pub codec: Option<String>,
    /// Why that one, or why none.
    pub reason: String,
    /// Guest memory that travelled compressed.
    pub raw_bytes: u64,
    /// What became of it.
    pub packed_bytes: u64,
    /// The first by the second; null where nothing was compressed.
    pub ratio: Option<f64>,
    /// Time all lanes spent in it.
    pub seconds: f64,
}

impl Compression {
    /// Over all lanes; `None` without any.
    pub fn of(lanes: &[LaneStats]) -> Option<Self> {
        let last = &lanes.last()?.packing;
        let sum = |of: fn(&LaneStats) -> u64| lanes.iter().map(of).sum::<u64>();
        let raw_bytes = sum(|lane| lane.packing.raw_bytes);
        let packed_bytes = sum(|lane| lane.packing.packed_bytes);
        Some(Self {
            codec: last.codec.map(|codec| codec.to_string()),
            reason: last.reason.clone(),
            raw_bytes,
            packed_bytes,
            ratio: (packed_bytes > 0).then(|| raw_bytes as f64 / packed_bytes as f64),
            seconds: sum(|lane| lane.packing.ns) as f64 / 1e9,
        })
    }

    /// For people.
    pub(super) fn line(&self) -> String {
        let codec = self.codec.as_deref().unwrap_or("off");
        match self.ratio {
            None => format!("{codec} ({})", self.reason),
            Some(_) => format!(
                "{codec}, {} became {} ({})",
                units::bytes(self.raw_bytes),
                units::bytes(self.packed_bytes),
                self.reason,
            ),
        }
    }
}
