//! `slowdown`: what a guest that writes all the time loses while it is moved.

use std::time::{Duration, Instant};

use pageferry_ctl::lab::GuestParams;
use pageferry_ctl::lab::console::pages_per_second;
use serde::Serialize;
use serde_json::json;

use crate::args::{MemoryKind, SlowdownArgs};
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::host::Host;
use crate::interrupt;
use crate::output;
use crate::pause::instant_of;
use crate::qemu::QemuWay;
use crate::recorder::Recorded;
use crate::results::Results;
use crate::rig::{GuestShape, Hop, Mover, Rig};
use crate::series::{Kind, Series, SeriesRun};
use crate::stats::Stats;

const NAME: &str = "slowdown";
/// Kernel, initramfs and program.
const GUEST_OWN_MIB: u64 = 256;
/// The guest says this often how far it is: brown-outs are a second or less.
const TICK_MS: u32 = 20;
/// The guest's speed before the move is taken over this long, with nothing else going on.
const BEFORE: Duration = Duration::from_secs(2);
/// QEMU's ways that are compared.
const CHANNELS: [Option<u8>; 2] = [None, Some(2)];

/// One move of a writing guest.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    turn: u32,
    before_pages_per_s: f64,
    during_pages_per_s: f64,
    /// Speed lost, in percent of the speed before.
    lost_percent: f64,
    brownout_ms: f64,
    pause_ms: f64,
    /// What the mover said of itself.
    account: serde_json::Value,
}

/// All moves by one mover over one link.
struct Row {
    mover: Mover,
    link_mbit: u64,
    samples: Vec<Sample>,
    failures: Vec<String>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &SlowdownArgs) -> Result<(), BenchError> {
    // A guest that writes faster than the lanes move is moved at last, so that each brown-out has
    // an end; before the end nothing is different.
    let mut common = args.common.clone();
    common.migrate_args.push_str(" --not-converging switch-over");
    let fill_mib = args.mib.unwrap_or(if common.quick { 512 } else { 2048 }).max(args.hot_mib);
    let mut rig = Rig::new(&common, shape(args, fill_mib))?;
    let mut results = Results::of_guests(NAME, &Host::of(&rig)?, json!(null));
    output::progress("starting the guest and filling its memory");
    rig.guest()?;
    let mut speeds = args.link_mbit.clone();
    // A link that was shaped is not set free again.
    speeds.sort_unstable_by_key(|&mbit| if mbit == 0 { 0 } else { u64::MAX - mbit });
    let mut rows = Vec::new();
    for link_mbit in speeds {
        rig.net().shape(link_mbit)?;
        rows.extend(measure(&mut rig, common.turns(), link_mbit)?);
    }
    let setup = json!({
        "fill_mib": fill_mib, "hot_mib": args.hot_mib, "smp": args.smp,
        "write_rate": args.write_rate, "turns": common.turns(),
    });
    results.parameters["all"] = setup;
    results.ratios = rows.iter().filter(|r| r.mover == Mover::Pageferry).map(goal).collect();
    results.series = rows.iter().map(|row| row.series(fill_mib)).collect();
    results.finish(&common.output)
}

fn shape(args: &SlowdownArgs, fill_mib: u64) -> GuestShape {
    GuestShape {
        memory_mib: fill_mib + GUEST_OWN_MIB,
        params: GuestParams {
            fill_mib,
            // What is not rewritten would be verified over and over, at the writers' cost.
            hot_mib: args.hot_mib,
            writers: args.smp,
            pages_per_second: args.write_rate,
            tick_ms: TICK_MS,
            ..GuestParams::default()
        },
        smp: args.smp,
        memory: args.common.memory.or(Some(MemoryKind::Tmpfs)),
        prealloc: true,
        kernel_words: String::new(),
        fresh_after: Duration::ZERO,
        settle: BEFORE + Duration::from_millis(500),
    }
}

fn measure(rig: &mut Rig, turns: u32, link_mbit: u64) -> Result<Vec<Row>, BenchError> {
    let qemu = CHANNELS.map(|channels| Mover::Qemu(QemuWay { channels, ..QemuWay::default() }));
    let movers = [Mover::Pageferry].into_iter().chain(qemu);
    let blank = |mover| Row { mover, link_mbit, samples: Vec::new(), failures: Vec::new() };
    let mut rows: Vec<Row> = movers.map(blank).collect();
    for turn in 0..turns {
        for row in &mut rows {
            interrupt::check()?;
            rig.guest()?;
            match rig.hop(row.mover, true) {
                Ok(hop) => {
                    match row.mover {
                        Mover::Pageferry => drop(rig.verify()?),
                        // A guest that lost writes would be slower, or fail, at someone else's cost.
                        Mover::Qemu(_) if rig.qemu_loses_writes() => rig.give_up_guest(),
                        Mover::Qemu(_) => {}
                    }
                    let Some(sample) = sample(turn, &hop) else {
                        row.failures.push("too few ticks of the guest".into());
                        continue;
                    };
                    output::progress(&format!(
                        "turn {turn}: {}: {:.0} pages/s before, {:.0} during {:.0} ms: {:.1} % lost",
                        row.mover.name(),
                        sample.before_pages_per_s,
                        sample.during_pages_per_s,
                        sample.brownout_ms,
                        sample.lost_percent
                    ));
                    row.samples.push(sample);
                }
                Err(error) => {
                    output::progress(&format!("turn {turn}: {}", error.chain()));
                    row.failures.push(error.chain());
                }
            }
        }
    }
    Ok(rows)
}

fn sample(turn: u32, hop: &Hop) -> Option<Sample> {
    let moved = &hop.moved;
    let at = |time: Duration| instant_of(time);
    let back =
        |seconds: f64| moved.pause.resume.checked_sub(Duration::try_from_secs_f64(seconds).ok()?);
    let (started, first, stop) =
        (at(back(moved.wall_s)?)?, at(back(moved.span_s)?)?, at(moved.pause.stop)?);
    let rate = |from: Instant, to: Instant| pages_per_second(&hop.ticks, from, to);
    let before = rate(started.checked_sub(BEFORE)?, started)?;
    let during = rate(first, stop)?;
    Some(Sample {
        turn,
        before_pages_per_s: before,
        during_pages_per_s: during,
        lost_percent: (1.0 - during / before) * 100.0,
        brownout_ms: stop.saturating_duration_since(first).as_secs_f64() * 1e3,
        pause_ms: moved.pause_ms,
        account: moved.account.clone(),
    })
}

impl Row {
    fn stats(&self, of: impl Fn(&Sample) -> f64) -> Option<Stats> {
        Stats::of(self.samples.iter().map(of))
    }

    fn series(&self, fill_mib: u64) -> Series {
        let parameters = json!({ "link_mbit": self.link_mbit });
        let mut series = Series::new(NAME, &self.name(), Kind::Slowdown, parameters);
        series.failures = self.failures.clone();
        series.runs.extend(self.samples.iter().map(|sample| {
            let (bytes, seconds) = (fill_mib << 20, sample.brownout_ms / 1e3);
            let recorded = Recorded { bytes, seconds, ..Recorded::default() };
            let machine_cpu_s = sample.account["cpu"]["machine_s"].as_f64().unwrap_or(f64::NAN);
            SeriesRun { turn: sample.turn, recorded, machine_cpu_s, said: json!(sample) }
        }));
        series
    }

    fn name(&self) -> String {
        match self.link_mbit {
            0 => self.mover.name(),
            mbit => format!("{} over {mbit} Mbit/s", self.mover.name()),
        }
    }
}

fn goal(row: &Row) -> Ratio {
    let during = row.stats(|s| s.during_pages_per_s).map(|stats| stats.median);
    let before = row.stats(|s| s.before_pages_per_s).map(|stats| stats.median);
    let what = "pages/s during the brown-out";
    Ratio::new(what, format!("{}, before", row.name()), during, before, Some(Goal::AtLeast(0.9)))
}
