//! `cores`: what every core does while one lane and several move memory, placed and not placed.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use clap::Args;
use pageferry_ctl::host::cpus_allowed;
use pageferry_datapath::control::NicQueues;
use serde::Serialize;
use serde_json::json;

use crate::args::{NetKind, OutputArgs, RdmaEndsArgs, ServeArgs, WireArgs};
use crate::ceiling::Placement;
use crate::cores_wire::{self, Way};
use crate::ends::Ends;
use crate::error::BenchError;
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::serve::{self, Peer};
use crate::stats;
use crate::table::{Table, cell};
use crate::turns::{self, Entrant, Setting};

const NAME: &str = "cores";
/// Where the other guest of `rdma-vm` serves.
const PORT: u16 = 6600;
/// It boots at the same time.
const OTHER_GUEST_MAX: Duration = Duration::from_secs(120);

/// Arguments of `cores`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct CoresArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Lanes beside one. Default: as many as there are cores.
    #[arg(long, value_name = "N")]
    lanes: Option<u16>,
    /// Memory that lanes send from, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 32)]
    memory_mib: u64,
    /// MiB of each run.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    mib: u64,
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 5)]
    turns: u32,
    /// Where `serve` runs. Default: in two guests of `rdma-vm` the server; else a namespace of this
    /// machine, joined by veth (root).
    #[arg(long, value_name = "ADDR:PORT")]
    to: Option<SocketAddr>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &CoresArgs) -> Result<(), BenchError> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let address = |name| variable(name).parse::<IpAddr>().ok();
    let two_guests = args.to.is_none() && variable("PF_TOPOLOGY") == "two-guests";
    let (is_server, local) = (variable("PF_ROLE") == "server", address("PF_LOCAL_ADDR"));
    if let Some(at) = local.filter(|_| two_guests && is_server) {
        let listen = SocketAddr::new(at, PORT);
        return serve::run(&ServeArgs { listen, once: true, cpu: None });
    }
    let there = address("PF_PEER_ADDR").filter(|_| two_guests);
    let to = args.to.or_else(|| Some(SocketAddr::new(there?, PORT)));
    let mut results = Results::begin(NAME, json!(args));
    let (series, why_not) = match to {
        Some(to) => measure(args, &mut Peer::connect_by(to, Instant::now() + OTHER_GUEST_MAX)?),
        None => here()?.unpinned(false, |_, peer| measure(args, peer)),
    }?;
    results.not_run.extend(why_not.map(|why| format!("placed: {why}")));
    print!("{}", table(&series));
    results.series = series;
    results.finish(&args.output)
}

/// Two namespaces of this machine.
fn here() -> Result<Ends, BenchError> {
    Ends::new(&WireArgs {
        net: Some(NetKind::Veth),
        link_mbit: 0,
        to: None,
        rdma: RdmaEndsArgs { local: None, peer: None, device: None },
        cores: Placement::TwoCores,
        cpu_dma_latency: None,
    })
}

/// All series, and why lanes could not be placed, if so.
fn measure(args: &CoresArgs, peer: &mut Peer) -> Result<(Vec<Series>, Option<String>), BenchError> {
    let told = cores_wire::ask(peer)?;
    let why_not = why_not(&told);
    let many = args.lanes.unwrap_or(cpus_allowed().len() as u16);
    let group = format!("{} MiB", args.mib);
    let entrant = |(lanes, placed): (u16, bool)| {
        let word = if lanes == 1 { "lane" } else { "lanes" };
        let by = format!("{lanes} {word}, {}", if placed { "placed" } else { "not placed" });
        let who = Way { lanes, memory_bytes: args.memory_mib << 20, placed };
        let series = Series::new(&group, &by, Kind::Throughput, json!(who));
        Entrant { who, series }
    };
    let ways = [(1, false), (1, true), (many, false), (many, true)];
    let setting: Setting<Way> =
        ways.into_iter().filter(|(_, placed)| !placed || why_not.is_none()).map(entrant).collect();
    let mut settings = [setting];
    turns::take(args.turns, &mut settings, |way| {
        cores_wire::stream(peer, &told, way, args.mib << 20).map(Some)
    })?;
    Ok((turns::series(settings.into()), why_not))
}

fn why_not(told: &[NicQueues]) -> Option<String> {
    match told.first() {
        None => Some("the other end's address is no NIC's".into()),
        Some(nic) => nic.why_not.clone(),
    }
}

/// Medians of all turns, core by core.
fn table(all: &[Series]) -> String {
    let mut table = Table::new(&[
        "lanes",
        "queues used",
        "end",
        "core",
        "softirq %",
        "others %",
        "busy %",
        "least",
        "largest",
    ]);
    for series in all {
        let of_runs = |read: &dyn Fn(&serde_json::Value) -> Option<f64>| -> Vec<f64> {
            series.runs.iter().filter_map(|run| read(&run.said)).collect()
        };
        let queues = of_runs(&|said| said["queues"].as_f64());
        let queues: Vec<String> = queues.iter().map(|used| format!("{used:.0}")).collect();
        for end in ["source", "target"] {
            let cores = series.runs.first().and_then(|run| run.said[end].as_array());
            for index in 0..cores.map_or(0, Vec::len) {
                let of = |name: &str| of_runs(&|said| said[end][index][name].as_f64());
                let busy = of("busy_percent");
                let (least, largest) =
                    (busy.iter().copied().reduce(f64::min), busy.iter().copied().reduce(f64::max));
                let core = series.runs[0].said[end][index]["cpu"].to_string();
                table.row(vec![
                    series.by.clone(),
                    queues.join(" "),
                    end.into(),
                    core,
                    cell(Some(stats::median(of("softirq_percent"))), 0),
                    cell(Some(stats::median(of("others_percent"))), 0),
                    cell(Some(stats::median(busy)), 0),
                    cell(least, 0),
                    cell(largest, 0),
                ]);
            }
        }
    }
    table.text() + "\n"
}
