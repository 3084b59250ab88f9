//! What benchmarks of distributions give: series of runs by somebody, and ratios between them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::confidence;
use crate::distribution::Distribution;
use crate::goals::{Goal, Ratio};
use crate::recorder::Recorded;

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SeriesRun {
    /// In which turn.
    pub(crate) turn: u32,
    #[serde(flatten)]
    pub(crate) recorded: Recorded,
    /// Processor seconds of both ends, and of what the kernel did for them.
    pub(crate) machine_cpu_s: f64,
    /// What else is to be said, by who ran.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub(crate) said: Value,
}

/// All runs of one who takes part, at one setting.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Series {
    /// The setting, the same for all who are compared.
    pub(crate) group: String,
    /// Who.
    pub(crate) by: String,
    /// What it is about.
    pub(crate) kind: Kind,
    /// Every setting.
    pub(crate) parameters: Value,
    pub(crate) runs: Vec<SeriesRun>,
    /// What went wrong instead.
    pub(crate) failures: Vec<String>,
}

/// What a series is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Its distribution.
    Latency,
    /// Its bytes in its seconds.
    Throughput,
    /// Seconds for a GiB.
    Cost,
}

/// What is read off a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reading {
    BytesPerS,
    SecondsPerGib,
    CpuPerGib,
    /// Nanoseconds.
    Mean,
    /// Nanoseconds at this share.
    Quantile(f64),
}

impl Reading {
    pub(crate) fn of(self, run: &SeriesRun) -> Option<f64> {
        let recorded = &run.recorded;
        let gib = recorded.bytes as f64 / f64::from(1 << 30);
        match self {
            Self::BytesPerS => (recorded.seconds > 0.0).then(|| recorded.bytes_per_s()),
            Self::SecondsPerGib => (gib > 0.0).then(|| recorded.seconds / gib),
            Self::CpuPerGib => (gib > 0.0).then(|| run.machine_cpu_s / gib),
            Self::Mean => {
                let distribution = &recorded.distribution;
                (!distribution.is_empty()).then(|| distribution.mean())
            }
            Self::Quantile(quantile) => {
                let distribution = &recorded.distribution;
                (!distribution.is_empty()).then(|| distribution.at(quantile) as f64)
            }
        }
    }
}

impl Series {
    pub(crate) fn new(group: &str, by: &str, kind: Kind, parameters: Value) -> Self {
        let (group, by) = (group.into(), by.into());
        Self { group, by, kind, parameters, runs: Vec::new(), failures: Vec::new() }
    }

    /// One value of each run.
    pub(crate) fn readings(&self, reading: Reading) -> Vec<f64> {
        self.runs.iter().filter_map(|run| reading.of(run)).collect()
    }

    /// Samples of all runs.
    pub(crate) fn distribution(&self) -> Distribution {
        let mut all = Distribution::default();
        for run in &self.runs {
            all.add(&run.recorded.distribution);
        }
        all
    }
}

/// The ratio of two series' medians, with its interval by the turns.
pub(crate) fn ratio(
    what: &str,
    ours: &Series,
    theirs: &Series,
    reading: Reading,
    goal: Option<Goal>,
) -> Ratio {
    let (a, b) = (ours.readings(reading), theirs.readings(reading));
    let estimate = confidence::ratio_of_medians(&a, &b);
    Ratio {
        what: format!("{}: {what}", ours.group),
        against: format!("{} to {}", ours.by, theirs.by),
        ratio: estimate.map(|estimate| estimate.ratio),
        interval: estimate.map(|estimate| (estimate.low, estimate.high)),
        goal,
    }
}
