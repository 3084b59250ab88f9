//! `ways`: one guest over one link, compressed, and over two rails; and over RDMA beside TCP, in the
//! virtual machine.

use std::cell::RefCell;

use clap::Args;
use pageferry_ctl::lab::one_at_a_time;
use serde::Serialize;
use serde_json::json;

use crate::args::Common;
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::host::Host;
use crate::parts::{Part, Parts};
use crate::rails::networks;
use crate::results::Results;
use crate::rig::{GuestShape, Mover, Rig};
use crate::series::{Kind, Reading, Series, ratio};
use crate::turns::{self, Entrant, Setting};
use crate::{output, shaped};

const NAME: &str = "ways";
/// Of each page, in percent, so that a codec makes a third of it.
const THREE_TO_ONE: u32 = 67;
/// Compression is to win this much on 1 Gbit/s where memory packs three to one, and to lose no more
/// than this where it does not pack.
const PACKED_AT_LEAST: f64 = 1.8;
const UNPACKED_AT_LEAST: f64 = 0.97;
/// Two rails are to carry this much of one.
const TWO_RAILS_AT_LEAST: f64 = 1.9;
const OVER_RDMA: Part = Part {
    title: "A guest over RDMA and over TCP",
    machine: Some("--kernel 6.12 --mem 1536"),
    arguments: "rdma-vs-qemu --only pageferry --cases idle --mib 128",
    quick: "--mib 32",
};

/// Arguments of `ways`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct WaysArgs {
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
    /// Guest memory that its program fills, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 384)]
    mib: u64,
    /// Speed of the link and of each rail, in Mbit/s.
    #[arg(long, value_name = "MBIT", default_value_t = 1000)]
    mbit: u64,
    /// Without RDMA, which takes a virtual machine.
    #[arg(long)]
    no_vm: bool,
}

/// One way to move it.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    rails: u8,
    compress: &'static str,
}

const WAYS: [Way; 4] = [
    Way { name: "TCP", rails: 1, compress: "off" },
    Way { name: "compressed", rails: 1, compress: "auto" },
    Way { name: "two rails", rails: 2, compress: "off" },
    Way { name: "two rails, compressed", rails: 2, compress: "auto" },
];

/// Runs the subcommand.
pub(crate) fn run(args: &WaysArgs) -> Result<(), BenchError> {
    let mut results = on_rails(args)?;
    let output = &args.common.output;
    if !args.no_vm {
        let scratch = std::env::temp_dir().join(format!("pageferry-ways-{}", std::process::id()));
        let out = output.out.as_deref().unwrap_or(&scratch);
        let parts = Parts { out, turns: args.common.turns(), quick: args.common.quick };
        parts.run(&OVER_RDMA, &mut results)?;
        if output.out.is_none() {
            // It was only there for the part to write to.
            let _ = std::fs::remove_dir_all(&scratch);
        }
    }
    results.finish(output)
}

fn on_rails(args: &WaysArgs) -> Result<Results, BenchError> {
    // The virtual machine's part takes the lock itself.
    let _alone = one_at_a_time();
    let common = shaped::common(&args.common);
    let mut results: Option<Results> = None;
    for packing_percent in [0, THREE_TO_ONE] {
        let mut shape = GuestShape::idle(args.mib, common.memory);
        shape.params.packing_percent = packing_percent;
        let mut rig = Rig::new(&common, shape)?;
        for rail in 0..2 {
            rig.net().rail(rail, args.mbit)?;
        }
        let host = Host::of(&rig)?;
        let results = results.get_or_insert_with(|| Results::of_guests(NAME, &host, json!(args)));
        output::progress("starting the guest and filling its memory");
        rig.guest()?;
        let series = measure(args, &common, packing_percent, rig)?;
        results.ratios.extend(ratios(&series, packing_percent));
        results.series.extend(series);
    }
    Ok(results.expect("two guests"))
}

fn measure(
    args: &WaysArgs,
    common: &Common,
    packing_percent: u32,
    rig: Rig,
) -> Result<Vec<Series>, BenchError> {
    let packs = if packing_percent == 0 { "does not pack" } else { "packs 3:1" };
    let group = format!("{} MiB that {packs}, rails of {} Mbit/s", args.mib, args.mbit);
    let entrant = |who: Way| {
        let parameters = json!({
            "mib": args.mib, "packing_percent": packing_percent, "rails": who.rails,
            "mbit": args.mbit, "compress": who.compress,
        });
        Entrant { who, series: Series::new(&group, who.name, Kind::Link, parameters) }
    };
    let setting: Setting<Way> = WAYS.into_iter().map(entrant).collect();
    let mut settings = [setting];
    let rig = RefCell::new(rig);
    turns::take(args.common.turns(), &mut settings, |way| {
        let mut rig = rig.borrow_mut();
        let (more, networks) = (&common.migrate_args, networks(0..way.rails));
        rig.set_migrate_args(&format!("--compress {} {more}{networks}", way.compress));
        let hop = rig.hop(Mover::Pageferry, true)?;
        Ok(Some(shaped::taken(&hop, args.mib, args.mbit * u64::from(way.rails))))
    })?;
    rig.into_inner().verify()?;
    Ok(turns::series(settings.into()))
}

fn ratios(all: &[Series], packing_percent: u32) -> Vec<Ratio> {
    let of = |name: &str| all.iter().find(|series| series.by == name && !series.runs.is_empty());
    let least = if packing_percent == 0 { UNPACKED_AT_LEAST } else { PACKED_AT_LEAST };
    let (rate, moving) = (Reading::BytesPerS, Reading::Said("moving_bytes_per_s"));
    let pairs = [
        ("compressed", "TCP", rate, Some(least)),
        ("two rails", "TCP", moving, Some(TWO_RAILS_AT_LEAST)),
        ("two rails, compressed", "two rails", rate, None),
    ];
    let pair = |(ours, theirs, reading, least): (&str, &str, _, Option<f64>)| {
        let what =
            if reading == rate { "rate, first page to running" } else { "rate while moving" };
        Some(ratio(what, of(ours)?, of(theirs)?, reading, least.map(Goal::AtLeast)))
    };
    let shares = ["TCP", "two rails"].into_iter().filter_map(|name| of(name).map(shaped::share));
    pairs.into_iter().filter_map(pair).chain(shares).collect()
}
