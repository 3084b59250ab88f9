//! What benchmarks of distributions give: series of runs by somebody, and ratios between them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::confidence;
use crate::distribution::{Distribution, QUANTILES};
use crate::goals::{Goal, Ratio};
use crate::recorder::Recorded;
use crate::stats::Stats;

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
    /// Whole migrations: their rate and the guest's pause.
    Migration,
    /// What a writing guest loses while it is moved.
    Slowdown,
    /// Whole migrations over shaped links.
    Link,
    /// Hosts emptied over shaped links.
    Drain,
}

/// What tables, plots and comparisons have of a series, beside its name and how many runs it has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// Its unit is in it.
    pub(crate) name: &'static str,
    pub(crate) reading: Reading,
    /// What a reading is divided by.
    pub(crate) unit: f64,
    pub(crate) decimals: usize,
    /// The least and the largest run stand beside the median.
    pub(crate) spread: bool,
    pub(crate) more_is_better: bool,
}

const MIB: f64 = (1u64 << 20) as f64;

impl Kind {
    /// All of them, as tables have them, with their titles.
    pub(crate) const ALL: [(Self, &str); 7] = [
        (Self::Latency, "latency, us"),
        (Self::Throughput, "throughput"),
        (Self::Cost, "cost"),
        (Self::Migration, "migrations"),
        (Self::Slowdown, "brown-outs"),
        (Self::Link, "migrations over links"),
        (Self::Drain, "drains"),
    ];

    pub(crate) fn columns(self) -> Vec<Column> {
        let column = |name, reading, unit, decimals, spread, more_is_better| Column {
            name,
            reading,
            unit,
            decimals,
            spread,
            more_is_better,
        };
        let cpu = column("CPU s/GiB", Reading::CpuPerGib, 1.0, 2, false, false);
        let rate = column("MiB/s", Reading::BytesPerS, MIB, 1, true, true);
        match self {
            Self::Latency => QUANTILES
                // The runs' spread of the two that are compared with tools.
                .map(|(name, at)| {
                    let spread = name == "p50" || name == "p99";
                    column(name, Reading::Quantile(at), 1e3, 2, spread, false)
                })
                .to_vec(),
            Self::Throughput => vec![rate, cpu],
            Self::Cost => vec![column("s/GiB", Reading::SecondsPerGib, 1.0, 4, true, false), cpu],
            Self::Migration => vec![
                rate,
                column("from the command", Reading::BytesPer("wall_s"), MIB, 1, false, true),
                column("while moving", Reading::Said("moving_bytes_per_s"), MIB, 1, false, true),
                column("pause ms", Reading::Said("pause_ms"), 1.0, 1, true, false),
                cpu,
            ],
            Self::Slowdown => vec![
                column("lost %", Reading::Said("lost_percent"), 1.0, 1, true, false),
                column("pages/s before", Reading::Said("before_pages_per_s"), 1.0, 0, false, true),
                column("during", Reading::Said("during_pages_per_s"), 1.0, 0, false, true),
                column("brown-out ms", Reading::Said("brownout_ms"), 1.0, 0, false, false),
                column("pause ms", Reading::Said("pause_ms"), 1.0, 1, true, false),
            ],
            Self::Link => vec![
                column("total s", Reading::Said("wall_s"), 1.0, 2, true, false),
                column("brown-out s", Reading::Said("brownout_s"), 1.0, 2, false, false),
                column("pause ms", Reading::Said("pause_ms"), 1.0, 1, true, false),
                column("% of link", Reading::Said("link_percent"), 1.0, 1, false, true),
                cpu,
            ],
            Self::Drain => vec![
                column("total s", Reading::Said("total_s"), 1.0, 2, true, false),
                column("moved MiB", Reading::Said("moved_mib"), 1.0, 0, false, false),
                column("% of links", Reading::Said("link_percent"), 1.0, 1, false, true),
                column("brown-out ms", Reading::Said("brownout_ms"), 1.0, 0, false, false),
                column("longest", Reading::Said("brownout_ms_max"), 1.0, 0, false, false),
                column("pause ms", Reading::Said("blackout_ms"), 1.0, 1, false, false),
                column("longest", Reading::Said("blackout_ms_max"), 1.0, 1, false, false),
                cpu,
            ],
        }
    }
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
    /// Bytes in these seconds, of what was said.
    BytesPer(&'static str),
    /// A number of what was said.
    Said(&'static str),
}

impl Reading {
    pub(crate) fn of(self, run: &SeriesRun) -> Option<f64> {
        let recorded = &run.recorded;
        let gib = recorded.bytes as f64 / f64::from(1 << 30);
        match self {
            Self::BytesPer(name) => Some(recorded.bytes as f64 / run.said[name].as_f64()?),
            Self::Said(name) => run.said[name].as_f64(),
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

    /// Each run gave one latency, an average: it has no percentiles.
    pub(crate) fn has_only_means(&self) -> bool {
        let mut runs = self.runs.iter().map(|run| run.recorded.distribution.count());
        self.kind == Kind::Latency && !self.runs.is_empty() && runs.all(|count| count == 1)
    }

    /// The runs' median and spread, in the column's unit.
    pub(crate) fn stats(&self, column: &Column) -> Option<Stats> {
        if self.has_only_means() {
            return None;
        }
        Stats::of(self.readings(column.reading).into_iter().map(|value| value / column.unit))
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
        // One run has no spread.
        interval: estimate
            .filter(|_| a.len() > 1 || b.len() > 1)
            .map(|estimate| (estimate.low, estimate.high)),
        goal,
    }
}
