//! `link-table`: guests of several sizes, idle and loaded, over links of several speeds; the largest also
//! compressed, and by QEMU's multifd without and with zstd.

use std::cell::RefCell;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{Common, MemoryKind, Tool};
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::host::Host;
use crate::qemu::QemuWay;
use crate::results::Results;
use crate::rig::{GuestShape, Mover, Rig};
use crate::series::{Kind, Reading, Series, ratio};
use crate::turns::{self, Entrant, Setting, Taken};
use crate::{output, shaped};

const NAME: &str = "link-table";
/// Bytes of a page that a guest writes.
const PAGE_BYTES: f64 = 4096.0;
/// A loaded guest may take this much of an idle one's time.
const LOADED_AT_MOST: f64 = 1.25;

/// Arguments of `link-table`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct LinkTableArgs {
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
    /// Guest memory that its program fills with what no codec makes anything of, in MiB.
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', default_value = "32,64,128,256")]
    sizes: Vec<u64>,
    /// Speeds of the link, in Mbit/s.
    #[arg(long, value_name = "MBIT,...", value_delimiter = ',', default_value = "1000,10000")]
    mbit: Vec<u64>,
    /// What a loaded guest writes, in percent of the link's payload rate.
    #[arg(long, value_name = "PERCENT", default_value_t = 33.0)]
    loaded_percent: f64,
    /// What it writes to, over and over, in percent of its memory.
    #[arg(long, value_name = "PERCENT", default_value_t = 12.5)]
    hot_percent: f64,
    /// Who else moves the largest guest, in turns: qemu, by multifd without and with zstd. Ours is then
    /// compressed too.
    #[arg(long, value_enum, value_delimiter = ',')]
    vs: Vec<Tool>,
    /// QEMU's multifd channels.
    #[arg(long, value_name = "N", default_value_t = 4)]
    channels: u8,
}

/// Who moves a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ours { compress: &'static str },
    Qemu(QemuWay),
}

const OURS: Way = Way::Ours { compress: "off" };

impl Way {
    fn name(self) -> String {
        match self {
            OURS => "pageferry".into(),
            Self::Ours { compress } => format!("pageferry, --compress {compress}"),
            Self::Qemu(way) => way.name(),
        }
    }
}

/// One guest and its link.
#[derive(Clone, Copy, Debug)]
struct Cell {
    mib: u64,
    mbit: u64,
    loaded: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: &LinkTableArgs) -> Result<(), BenchError> {
    let common = shaped::common(&args.common);
    let mut results: Option<Results> = None;
    for &mib in &args.sizes {
        // One idle guest for all links; each link has a load of its own.
        let mut guests = vec![args.mbit.iter().map(|&mbit| (mbit, false)).collect::<Vec<_>>()];
        guests.extend(args.mbit.iter().map(|&mbit| vec![(mbit, true)]));
        for cells in guests {
            let Some(&(mbit, loaded)) = cells.first() else { continue };
            let first = Cell { mib, mbit, loaded };
            output::progress(&format!("{}: starting the guest", first.name()));
            let mut rig = Rig::new(&common, shape(args, first, common.memory))?;
            if results.is_none() {
                results = Some(Results::of_guests(NAME, &Host::of(&rig)?, json!(args)));
            }
            rig.guest()?;
            let rig = RefCell::new(rig);
            for (mbit, loaded) in cells {
                let series = measure(args, &common, &rig, Cell { mib, mbit, loaded })?;
                results.as_mut().expect("made above").series.extend(series);
            }
        }
    }
    let nothing = BenchError::Usage { what: "no guest to move: both lists want a value" };
    let mut results = results.ok_or(nothing)?;
    // Link by link, idle before loaded, small before large.
    results.series.sort_by_key(|series| {
        let of = |name: &str| series.parameters[name].as_u64().unwrap_or(0);
        (of("mbit"), of("mib"), series.parameters["loaded"].as_bool())
    });
    results.ratios = ratios(&results.series);
    results.finish(&common.output)
}

impl Cell {
    fn name(self) -> String {
        format!("{} MiB, {}", self.mib, if self.loaded { "loaded" } else { "idle" })
    }

    fn group(self) -> String {
        format!("a link of {} Mbit/s", self.mbit)
    }
}

fn shape(args: &LinkTableArgs, cell: Cell, memory: Option<MemoryKind>) -> GuestShape {
    let mut shape = GuestShape::idle(cell.mib, memory);
    if cell.loaded {
        let written = shaped::payload_bytes_per_s(cell.mbit) * args.loaded_percent / 100.0;
        shape.params.pages_per_second = (written / PAGE_BYTES).max(1.0) as u64;
        shape.params.hot_mib = (cell.mib as f64 * args.hot_percent / 100.0).max(1.0) as u64;
    }
    shape
}

/// Everyone's moves of one guest over one link.
fn measure(
    args: &LinkTableArgs,
    common: &Common,
    rig: &RefCell<Rig>,
    cell: Cell,
) -> Result<Vec<Series>, BenchError> {
    rig.borrow().net().shape(cell.mbit)?;
    let with_qemu = args.vs.contains(&Tool::Qemu) && args.sizes.iter().all(|&mib| mib <= cell.mib);
    let qemu = |zstd| {
        let channels = Some(args.channels);
        Way::Qemu(QemuWay { channels, zstd, ..QemuWay::default() })
    };
    let more = [qemu(false), Way::Ours { compress: "auto" }, qemu(true)];
    let more = more.into_iter().filter(|_| with_qemu);
    let entrant = |who: Way| {
        let parameters = json!({
            "who": who.name(), "mib": cell.mib, "mbit": cell.mbit, "loaded": cell.loaded,
            "zstd": if let Way::Qemu(way) = who { Some(way.zstd) } else { None },
        });
        let by = format!("{}, {}", cell.name(), who.name());
        Entrant { who, series: Series::new(&cell.group(), &by, Kind::Link, parameters) }
    };
    let setting: Setting<Way> = [OURS].into_iter().chain(more).map(entrant).collect();
    let mut settings = [setting];
    turns::take(args.common.turns(), &mut settings, |&way| {
        one_move(&mut rig.borrow_mut(), common, way, cell).map(Some)
    })?;
    Ok(turns::series(settings.into()))
}

fn one_move(rig: &mut Rig, common: &Common, way: Way, cell: Cell) -> Result<Taken, BenchError> {
    let hop = match way {
        Way::Ours { compress } => {
            rig.set_migrate_args(&format!("--compress {compress} {}", common.migrate_args));
            rig.hop_checked(true)?
        }
        Way::Qemu(way) => {
            // One that lost writes before is slower, or ends, at this one's cost.
            if cell.loaded && rig.verify().is_err() {
                rig.give_up_guest();
            }
            rig.hop(Mover::Qemu(way), true)?
        }
    };
    let mut taken = shaped::taken(&hop, cell.mib, cell.mbit);
    if matches!(way, Way::Qemu(way) if way.zstd) {
        // QEMU 7.2 counts what it compresses as it was before.
        taken.said["link_percent"] = Value::Null;
    }
    Ok(taken)
}

fn ratios(all: &[Series]) -> Vec<Ratio> {
    let is_ours = |series: &Series| series.parameters["who"] == OURS.name();
    let with_runs = || all.iter().filter(|series| !series.runs.is_empty());
    let find = |like: &Series, loaded: bool| {
        let same = |of: &Series, name: &str| of.parameters[name] == like.parameters[name];
        with_runs().find(|of| {
            is_ours(of) && same(of, "mib") && same(of, "mbit") && of.parameters["loaded"] == loaded
        })
    };
    let total = Reading::Said("wall_s");
    let mut ratios: Vec<Ratio> = with_runs().filter(|of| is_ours(of)).map(shaped::share).collect();
    for ours in with_runs().filter(|of| is_ours(of) && of.parameters["loaded"] == true) {
        let goal = Some(Goal::AtMost(LOADED_AT_MOST));
        ratios
            .extend(find(ours, false).map(|idle| ratio("total, loaded", ours, idle, total, goal)));
    }
    // Each beside the one that does the same: compressed or not.
    let of_qemu = |of: &&Series| of.parameters["zstd"].is_boolean();
    for theirs in with_runs().filter(of_qemu) {
        let is_like = |of: &&Series| {
            let alike = |name: &str| of.parameters[name] == theirs.parameters[name];
            !of_qemu(of)
                && alike("mib")
                && alike("mbit")
                && alike("loaded")
                && is_ours(of) != (theirs.parameters["zstd"] == true)
        };
        let Some(ours) = with_runs().find(is_like) else { continue };
        let not_longer = Some(Goal::AtMost(1.0));
        ratios.push(ratio("total", ours, theirs, total, not_longer));
        ratios.push(ratio("pause", ours, theirs, Reading::Said("pause_ms"), not_longer));
    }
    ratios
}
