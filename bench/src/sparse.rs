//! `sparse`: a large guest that is mostly holes beside a small one with the same populated memory.

use std::time::Duration;

use pageferry_ctl::lab::GuestParams;
use serde_json::json;

use crate::args::{MemoryKind, SparseArgs};
use crate::contender::{Contender, Record, Run};
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::host::Host;
use crate::interrupt;
use crate::output;
use crate::results::Results;
use crate::rig::{GuestShape, Mover, Rig, SETTLE};
use crate::series::Series;
use crate::stats::Stats;

const NAME: &str = "sparse";
/// The program of a guest that is only there to see what all the rest takes.
const PROBE_FILL_MIB: u64 = 16;

/// One of the two guests.
struct Side {
    name: &'static str,
    rig: Rig,
    populated_mib: f64,
    record: Record,
}

/// Runs the subcommand.
pub(crate) fn run(args: &SparseArgs) -> Result<(), BenchError> {
    let common = &args.common;
    let large_mib = args.large_mib.unwrap_or(if common.quick { 4096 } else { 16384 });
    output::progress("starting a guest to see what its kernel populates");
    let mut probe = Rig::new(common, shape(args, args.small_mib, PROBE_FILL_MIB))?;
    let own_mib = probe.populated_mib()? - PROBE_FILL_MIB as f64;
    let host = Host::of(&probe)?;
    drop(probe);
    let fill_mib = (args.populated_mib as f64 - own_mib).max(1.0) as u64;
    let setup = json!({ "fill_mib": fill_mib, "turns": common.turns(), "quick": common.quick });
    let mut results = Results::of_guests(NAME, &host, setup);

    let mut sides = Vec::new();
    for (name, memory_mib) in [("small", args.small_mib), ("large", large_mib)] {
        output::progress(&format!("starting the {name} guest, {memory_mib} MiB"));
        let mut rig = Rig::new(common, shape(args, memory_mib, fill_mib))?;
        let populated_mib = rig.populated_mib()?;
        let record = Record::new(Contender::Mover(Mover::Pageferry));
        sides.push(Side { name, rig, populated_mib, record });
    }
    // One more turn than asked for, dropped: the first move meets cold caches.
    for turn in 0..=common.turns() {
        for side in &mut sides {
            side.turn(turn)?;
        }
    }
    for side in &mut sides {
        side.rig.verify()?;
    }
    results.ratios = ratios(&sides[0], &sides[1]);
    results.series = sides.iter().map(Side::series).collect();
    results.finish(&common.output)
}

fn shape(args: &SparseArgs, memory_mib: u64, fill_mib: u64) -> GuestShape {
    GuestShape {
        memory_mib,
        params: GuestParams {
            fill_mib,
            hot_mib: fill_mib,
            writers: 1,
            pages_per_second: 1,
            ..GuestParams::default()
        },
        smp: 2,
        // Huge pages would be reserved for the whole guest.
        memory: args.common.memory.or(Some(MemoryKind::Tmpfs)),
        prealloc: false,
        // A kernel populates 1/64 of its memory to describe it; both describe the small guest's.
        kernel_words: format!("mem={}M", args.small_mib),
        fresh_after: Duration::ZERO,
        settle: SETTLE,
    }
}

impl Side {
    fn turn(&mut self, turn: u32) -> Result<(), BenchError> {
        interrupt::check()?;
        let hop = self.rig.hop(Mover::Pageferry, false)?;
        let gib = self.populated_mib / 1024.0;
        let run = Run::of_moved(turn, &hop.moved, hop.tick_gap_ms, gib);
        output::progress_run(self.name, "pageferry", &run);
        if turn > 0 {
            self.record.runs.push(run);
        }
        Ok(())
    }

    fn series(&self) -> Series {
        let mut series = self.record.series(NAME, self.populated_mib / 1024.0);
        series.by = format!("{} guest, {} MiB", self.name, self.rig.memory_mib());
        series.parameters = json!({
            "memory_mib": self.rig.memory_mib(), "populated_mib": self.populated_mib,
        });
        series
    }

    fn wall_ms(&self) -> Option<Stats> {
        self.account(|account| account["wall_s"].as_f64().map(|seconds| seconds * 1e3))
    }

    fn total_ms(&self) -> Option<Stats> {
        self.account(|account| account["account"]["total_ms"].as_f64())
    }

    fn account(&self, of: impl Fn(&serde_json::Value) -> Option<f64>) -> Option<Stats> {
        Stats::of(self.record.runs.iter().filter_map(|run| of(&run.account)))
    }
}

fn ratios(small: &Side, large: &Side) -> Vec<Ratio> {
    let median = |stats: Option<Stats>| stats.map(|stats| stats.median);
    vec![
        Ratio::new(
            "time, from the command until it runs at the target",
            "the small guest",
            median(large.wall_ms()),
            median(small.wall_ms()),
            Some(Goal::AtMost(1.3)),
        ),
        Ratio::new(
            "time, by pageferry's own account",
            "the small guest",
            median(large.total_ms()),
            median(small.total_ms()),
            None,
        ),
    ]
}
