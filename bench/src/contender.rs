//! Who takes part, and what one run of it gave.

use serde_json::{Value, json};

use crate::ceiling::{CeilingWay, Streamed};
use crate::cpu;
use crate::iperf::IperfWay;
use crate::moved::Moved;
use crate::qemu::QemuWay;
use crate::recorder::Recorded;
use crate::rig::Mover;
use crate::series::{Kind, Series, SeriesRun};
use crate::stats::Stats;

/// One who takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// A migration.
    Mover(Mover),
    /// iperf3.
    Iperf(IperfWay),
    /// Bare sockets.
    Ceiling(CeilingWay),
}

impl Contender {
    /// As tables have it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Mover(mover) => mover.name(),
            Self::Iperf(way) => way.name(),
            Self::Ceiling(way) => way.name(),
        }
    }

    /// QEMU's way, if it is one.
    pub(crate) fn qemu(&self) -> Option<QemuWay> {
        match self {
            Self::Mover(Mover::Qemu(way)) => Some(*way),
            _ => None,
        }
    }
}

/// One run.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// In which turn.
    pub(crate) turn: u32,
    /// Throughput while memory moved, by the mover's own account, of what it moved.
    pub(crate) moving_gib_per_s: f64,
    /// The guest's incompressible memory over the time from the first page until the guest ran at
    /// the target.
    pub(crate) span_gib_per_s: Option<f64>,
    /// The same from the command on.
    pub(crate) wall_gib_per_s: Option<f64>,
    /// Processor seconds of everyone who takes part, per GiB.
    pub(crate) cpu_s_per_gib: f64,
    /// The same of the whole machine.
    pub(crate) machine_cpu_s_per_gib: f64,
    /// The guest's pause by QEMU's events.
    pub(crate) pause_ms: Option<f64>,
    /// The longest silence of the guest's ticks around it.
    pub(crate) tick_gap_ms: Option<f64>,
    /// The machine's load average after it.
    pub(crate) load_average: f64,
    /// What the mover says itself, and the processor time by process.
    pub(crate) account: Value,
}

impl Run {
    /// Of a migration of `gib` of incompressible memory.
    pub(crate) fn of_moved(turn: u32, moved: &Moved, tick_gap_ms: Option<f64>, gib: f64) -> Self {
        Self {
            turn,
            moving_gib_per_s: moved.moving_bytes_per_s / (1u64 << 30) as f64,
            span_gib_per_s: Some(gib / moved.span_s),
            wall_gib_per_s: Some(gib / moved.wall_s),
            cpu_s_per_gib: moved.cpu.total_s() / gib,
            machine_cpu_s_per_gib: moved.cpu.machine_s / gib,
            pause_ms: Some(moved.pause_ms),
            tick_gap_ms,
            load_average: cpu::load_average(),
            account: serde_json::to_value(moved).unwrap_or_default(),
        }
    }

    /// Of a mere stream of bytes.
    pub(crate) fn of_streamed(turn: u32, streamed: &Streamed) -> Self {
        Self {
            turn,
            moving_gib_per_s: streamed.gib_per_s(),
            span_gib_per_s: None,
            wall_gib_per_s: None,
            cpu_s_per_gib: streamed.cpu_s / streamed.gib(),
            machine_cpu_s_per_gib: streamed.machine_cpu_s / streamed.gib(),
            pause_ms: None,
            tick_gap_ms: None,
            load_average: cpu::load_average(),
            account: serde_json::to_value(streamed).unwrap_or_default(),
        }
    }
}

/// What is read off a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    Moving,
    Span,
    Wall,
    Cpu,
    Pause,
}

impl Metric {
    /// Its value in a run.
    pub(crate) fn of(self, run: &Run) -> Option<f64> {
        match self {
            Self::Moving => Some(run.moving_gib_per_s),
            Self::Span => run.span_gib_per_s,
            Self::Wall => run.wall_gib_per_s,
            Self::Cpu => Some(run.cpu_s_per_gib),
            Self::Pause => run.pause_ms,
        }
    }
}

/// A contender and all its runs.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Who.
    pub(crate) contender: Contender,
    /// What it did.
    pub(crate) runs: Vec<Run>,
    /// What went wrong instead.
    pub(crate) failures: Vec<String>,
}

impl Record {
    /// Nothing yet.
    pub(crate) fn new(contender: Contender) -> Self {
        Self { contender, runs: Vec::new(), failures: Vec::new() }
    }

    /// Numbers about one metric.
    pub(crate) fn stats(&self, metric: Metric) -> Option<Stats> {
        Stats::of(self.runs.iter().filter_map(|run| metric.of(run)))
    }

    /// The same as a series, of `gib` of guest memory.
    pub(crate) fn series(&self, group: &str, gib: f64) -> Series {
        let kind = match self.contender {
            Contender::Mover(_) => Kind::Migration,
            Contender::Iperf(_) | Contender::Ceiling(_) => Kind::Throughput,
        };
        let name = self.contender.name();
        let mut series = Series::new(group, &name, kind, json!({ "name": name }));
        series.failures = self.failures.clone();
        let bytes = (gib * (1u64 << 30) as f64) as u64;
        series.runs.extend(self.runs.iter().map(|run| {
            let seconds = gib / run.span_gib_per_s.unwrap_or(run.moving_gib_per_s);
            let machine_cpu_s = run.machine_cpu_s_per_gib * gib;
            let mut said = run.account.clone();
            said["processes_cpu_s_per_gib"] = json!(run.cpu_s_per_gib);
            said["tick_gap_ms"] = json!(run.tick_gap_ms);
            said["load_average"] = json!(run.load_average);
            let recorded = Recorded { bytes, seconds, ..Recorded::default() };
            SeriesRun { turn: run.turn, recorded, machine_cpu_s, said }
        }));
        series
    }

    /// The median of one metric.
    pub(crate) fn median(&self, metric: Metric) -> Option<f64> {
        self.stats(metric).map(|stats| stats.median)
    }
}
