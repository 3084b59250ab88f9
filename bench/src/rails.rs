//! `rails`: one idle guest over one, two and four links of the same rate, and over two unequal ones.

use std::time::Duration;

use pageferry_ctl::lab::GuestParams;
use serde_json::json;

use crate::args::{Common, NetKind, RailsArgs};
use crate::contender::{Contender, Metric, Record, Run};
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::host::Host;
use crate::results::Results;
use crate::rig::{GuestShape, Mover, Rig, SETTLE};
use crate::{interrupt, output, shaped};

const NAME: &str = "rails";

/// Links that one series may use: all of them are there, and `--network` chooses.
struct Series {
    name: &'static str,
    rails: std::ops::Range<u8>,
    record: Record,
}

/// Runs the subcommand.
pub(crate) fn run(args: &RailsArgs) -> Result<(), BenchError> {
    let mut common = args.common.clone();
    common.net = NetKind::Veth;
    let mib = args.mib.unwrap_or(if common.quick { 96 } else { 384 });
    let mbit = args.mbit;
    let mut rig = Rig::new(&common, shape(&common, mib))?;
    // The last one has a quarter of the others' rate.
    for number in 0..5 {
        rig.net().rail(number, if number == 4 { mbit / 4 } else { mbit })?;
    }
    rig.guest()?;
    let setup = json!({ "fill_mib": mib, "mbit_per_rail": mbit, "turns": common.turns() });
    let mut results = Results::of_guests(NAME, &Host::of(&rig)?, setup);
    let series = |name, rails| Series {
        name,
        rails,
        record: Record::new(Contender::Mover(Mover::Pageferry)),
    };
    let mut all = [
        series("1 rail", 0..1),
        series("2 rails", 0..2),
        series("4 rails", 0..4),
        series("1 rail and 1/4", 3..5),
    ];
    // One more turn than asked for, dropped: the first move meets cold caches.
    for turn in 0..=common.turns() {
        for series in &mut all {
            interrupt::check()?;
            rig.set_migrate_args(&arguments(&common, series.rails.clone()));
            let hop = rig.hop(Mover::Pageferry, false)?;
            let gib = rig.populated_mib()? / 1024.0;
            let run = Run::of_moved(turn, &hop.moved, hop.tick_gap_ms, gib);
            output::progress_run(series.name, "pageferry", &run);
            if turn > 0 {
                series.record.runs.push(run);
            }
        }
    }
    rig.verify()?;
    let payload = |series: &Series| {
        let rates = series.rails.clone().map(|rail| if rail == 4 { mbit / 4 } else { mbit });
        shaped::payload_bytes_per_s(rates.sum())
    };
    let rate =
        |series: &Series| series.record.median(Metric::Moving).map(|gib| gib * f64::from(1 << 30));
    results.ratios = all
        .iter()
        .zip([None, Some(1.9), Some(3.7), None])
        .map(|(series, goal)| {
            let goal = goal.map(Goal::AtLeast);
            let what = format!("rate of the first pass and the rounds, {}", series.name);
            Ratio::new(what, all[0].name, rate(series), rate(&all[0]), goal)
        })
        .chain(all.iter().map(|series| {
            let what = format!("share of the links' payload rate, {}", series.name);
            Ratio::new(what, "the links", rate(series), Some(payload(series)), None)
        }))
        .collect();
    let gib = rig.populated_mib()? / 1024.0;
    results.series.extend(all.iter().map(|series| {
        let mut of_record = series.record.series(NAME, gib);
        of_record.by = series.name.into();
        of_record
    }));
    results.finish(&common.output)
}

fn arguments(common: &Common, rails: std::ops::Range<u8>) -> String {
    format!("--compress off {}{}", common.migrate_args, networks(rails))
}

/// Options of `pageferry migrate` that leave it these rails.
pub(crate) fn networks(rails: std::ops::Range<u8>) -> String {
    let network = |rail| match rail {
        0 => " --network 10.201.0.0/24".to_owned(),
        rail => format!(" --network 10.203.{rail}.0/24"),
    };
    rails.map(network).collect()
}

fn shape(common: &Common, fill_mib: u64) -> GuestShape {
    GuestShape {
        memory_mib: fill_mib + 192,
        params: GuestParams {
            fill_mib,
            hot_mib: 1,
            writers: 1,
            pages_per_second: 1,
            ..GuestParams::default()
        },
        smp: 1,
        memory: common.memory,
        prealloc: false,
        kernel_words: String::new(),
        fresh_after: Duration::ZERO,
        settle: SETTLE,
    }
}
