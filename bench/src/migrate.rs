//! `migrate`: whole migrations of a guest of a chosen shape, over a chosen link, beside QEMU's own.

use std::cell::RefCell;
use std::time::Duration;

use pageferry_ctl::lab::GuestParams;
use serde_json::json;

use crate::args::{MigrateArgs, Tool};
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::host::Host;
use crate::output;
use crate::qemu::QemuWay;
use crate::recorder::Recorded;
use crate::results::Results;
use crate::rig::{GuestShape, Mover, Rig, SETTLE};
use crate::series::{Kind, Reading, Series, ratio};
use crate::turns::{self, Entrant, Setting, Taken};

const NAME: &str = "migrate";
/// Kernel, initramfs and program.
const GUEST_OWN_MIB: u64 = 192;
/// Pages of 4 KiB in a MiB.
const PAGES_PER_MIB: f64 = 256.0;
/// A guest that rewrites its pages at this pace is idle.
const IDLE_PAGES_PER_SECOND: u64 = 1;

/// What one guest is made of.
#[derive(Clone, Copy, Debug)]
struct Guest {
    dirty_mib_per_s: f64,
    packing_percent: u32,
}

/// Who moves the guest, and what is said to it.
#[derive(Clone, Debug)]
struct Way {
    mover: Mover,
    /// `--compress`, if it is one of several.
    compress: Option<String>,
}

impl Way {
    /// As tables have it.
    fn name(&self) -> String {
        match &self.compress {
            None => self.mover.name(),
            Some(how) => format!("{} --compress {how}", self.mover.name()),
        }
    }
}

/// The benchmark.
pub(crate) fn run(args: &MigrateArgs) -> Result<(), BenchError> {
    let mut common = args.common.clone();
    // A guest that writes faster than the link carries is moved at last.
    common.migrate_args.push_str(" --not-converging switch-over");
    let mut results: Option<Results> = None;
    for &dirty_mib_per_s in &args.dirty_mib_per_s {
        for &packing_percent in &args.packing_percent {
            let guest = Guest { dirty_mib_per_s, packing_percent };
            let mut rig = Rig::new(&common, shape(args, guest))?;
            if results.is_none() {
                results = Some(Results::of_guests(NAME, &Host::of(&rig)?, json!(args)));
            }
            output::progress("starting the guest and filling its memory");
            rig.guest()?;
            let measured = measure_all(args, &common.migrate_args, guest, rig)?;
            let results = results.as_mut().expect("made above");
            results.ratios.extend(ratios(&measured));
            results.series.extend(measured);
        }
    }
    let nothing = BenchError::Usage { what: "no guest to move: both lists want a value" };
    results.ok_or(nothing)?.finish(&args.common.output)
}

fn shape(args: &MigrateArgs, guest: Guest) -> GuestShape {
    let is_idle = guest.dirty_mib_per_s <= 0.0;
    let pages_per_second = match (guest.dirty_mib_per_s * PAGES_PER_MIB).round() {
        _ if is_idle => IDLE_PAGES_PER_SECOND,
        // As fast as they can.
        rate if rate.is_infinite() => 0,
        rate => (rate as u64).max(1),
    };
    GuestShape {
        memory_mib: args.mib + args.mib / 24 + GUEST_OWN_MIB,
        params: GuestParams {
            fill_mib: args.mib,
            // What is not rewritten would be verified over and over, at the guest's cost.
            hot_mib: if is_idle { args.mib } else { args.hot_mib.min(args.mib) },
            writers: 1,
            pages_per_second,
            packing_percent: guest.packing_percent,
            scattered: args.scattered,
            ..GuestParams::default()
        },
        smp: args.smp,
        memory: args.common.memory,
        prealloc: true,
        kernel_words: String::new(),
        fresh_after: Duration::from_secs(if args.cold { 4 } else { 0 }),
        settle: SETTLE,
    }
}

/// All links with one guest; a link that was shaped is not set free again, so that comes first.
fn measure_all(
    args: &MigrateArgs,
    migrate_args: &str,
    guest: Guest,
    rig: Rig,
) -> Result<Vec<Series>, BenchError> {
    let mut links = args.link_mbit.clone();
    links.sort_unstable_by_key(|&mbit| if mbit == 0 { 0 } else { u64::MAX - mbit });
    let rig = RefCell::new(rig);
    let mut all = Vec::new();
    for link_mbit in links {
        rig.borrow().net().shape(link_mbit)?;
        let mut settings = vec![setting(args, guest, link_mbit)];
        turns::take(args.common.turns(), &mut settings, |way: &Way| {
            let mut rig = rig.borrow_mut();
            if let Some(how) = &way.compress {
                rig.set_migrate_args(&format!("--compress {how} {migrate_args}"));
            }
            one_move(args, &mut rig, way.mover, guest.dirty_mib_per_s > 0.0).map(Some)
        })?;
        all.extend(turns::series(settings));
    }
    Ok(all)
}

fn setting(args: &MigrateArgs, guest: Guest, link_mbit: u64) -> Setting<Way> {
    let mut group = format!("{} MiB", args.mib);
    match guest.dirty_mib_per_s {
        rate if rate <= 0.0 => group.push_str(", idle"),
        rate if rate.is_infinite() => {
            group.push_str(&format!(", {} MiB written over and over", args.hot_mib));
        }
        rate => group.push_str(&format!(", {rate} MiB/s written to {} MiB", args.hot_mib)),
    }
    if guest.packing_percent > 0 {
        group.push_str(&format!(", {} % packs", guest.packing_percent));
    }
    if link_mbit > 0 {
        group.push_str(&format!(", {link_mbit} Mbit/s"));
    }
    if args.cold {
        group.push_str(", fresh target memory");
    }
    let qemu = args.channels.iter().filter(|_| args.vs.contains(&Tool::Qemu)).map(|&channels| {
        let channels = Some(channels).filter(|channels| *channels > 0);
        Mover::Qemu(QemuWay { channels, downtime_ms: args.downtime_ms, ..QemuWay::default() })
    });
    let parameters = json!({
        "memory_mib": args.mib, "dirty_mib_per_s": guest.dirty_mib_per_s.to_string(),
        "hot_mib": args.hot_mib, "packing_percent": guest.packing_percent,
        "link_mbit": link_mbit, "cold": args.cold, "smp": args.smp,
    });
    let entrant = |way: Way| Entrant {
        series: Series::new(&group, &way.name(), Kind::Migration, parameters.clone()),
        who: way,
    };
    let mover = Mover::Pageferry;
    let mut ways: Vec<Way> =
        args.compress.iter().map(|how| Way { mover, compress: Some(how.clone()) }).collect();
    if ways.is_empty() {
        ways.push(Way { mover, compress: None });
    }
    let qemu = qemu.map(|mover| Way { mover, compress: None });
    ways.into_iter().chain(qemu).map(entrant).collect()
}

fn one_move(
    args: &MigrateArgs,
    rig: &mut Rig,
    mover: Mover,
    writes: bool,
) -> Result<Taken, BenchError> {
    rig.guest()?;
    let hop = match mover {
        Mover::Pageferry => rig.hop_checked(!args.cold)?,
        Mover::Qemu(_) => rig.hop(mover, !args.cold)?,
    };
    // A writing guest that lost writes ends, or is slower, at the next one's cost.
    if writes && matches!(mover, Mover::Qemu(_)) && rig.qemu_loses_writes() {
        rig.give_up_guest();
    }
    let mut said = json!(hop.moved);
    said["tick_gap_ms"] = json!(hop.tick_gap_ms);
    said["guest_lost"] = json!(hop.lost);
    said["machine_cpu_s"] = json!(hop.moved.cpu.machine_s);
    let (bytes, seconds) = (args.mib << 20, hop.moved.span_s);
    Ok(Taken { recorded: Recorded { bytes, seconds, ..Recorded::default() }, said })
}

/// Beside no compression, what decides by itself may lose so much and no more.
const BESIDE_OFF: f64 = 0.97;

/// Ours, which is the first of each group, beside each of the others.
fn ratios(all: &[Series]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for theirs in all.iter().filter(|series| !series.runs.is_empty()) {
        let Some(ours) = all.iter().find(|series| series.group == theirs.group) else { continue };
        if ours.by == theirs.by {
            continue;
        }
        let rate = "rate, first page to running";
        let is_ours_too = theirs.by.starts_with(&Mover::Pageferry.name());
        let not_slower = Some(Goal::AtLeast(if is_ours_too { BESIDE_OFF } else { 1.0 }));
        ratios.push(ratio(rate, ours, theirs, Reading::BytesPerS, not_slower));
        let wall = Reading::BytesPer("wall_s");
        ratios.push(ratio("rate, from the command", ours, theirs, wall, None));
        let not_longer = Some(Goal::AtMost(1.0)).filter(|_| !is_ours_too);
        ratios.push(ratio("pause", ours, theirs, Reading::Said("pause_ms"), not_longer));
        ratios.push(ratio("CPU per GiB", ours, theirs, Reading::CpuPerGib, None));
    }
    ratios
}
