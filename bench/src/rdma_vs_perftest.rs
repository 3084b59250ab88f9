//! `rdma-vs-perftest`: our WRITEs beside `ib_write_bw` and `ib_write_lat`, in turns.

use serde_json::{Value, json};

use crate::args::RdmaVsPerftestArgs;
use crate::ends::Ends;
use crate::error::BenchError;
use crate::lanes_wire::Over;
use crate::perftest::PerftestWay;
use crate::rdma_wire::Verb;
use crate::recorder::Pace;
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::turns::{Entrant, Setting, Taken};
use crate::{lanes_wire, rdma_wire, svg, tools, turns};

/// perftest's own depth.
const DEPTH: u32 = 128;

/// One who takes part at one setting.
enum Contender {
    Perftest(PerftestWay),
    /// Round trips, or a stream.
    Wire(rdma_wire::Way, bool),
    Lanes(lanes_wire::Way),
}

/// The benchmark.
pub(crate) fn run(args: &RdmaVsPerftestArgs) -> Result<(), BenchError> {
    let ends = Ends::new(&args.wire)?;
    let parameters = json!({ "ends": ends.rdma()?, "args": args });
    let mut results = Results::begin("rdma-vs-perftest", parameters);
    let mut settings = Vec::new();
    for &bytes in &args.sizes {
        settings.extend(args.queue_pairs.iter().map(|&count| streaming(args, bytes, count)));
    }
    settings.extend(args.latency_sizes.iter().map(|&bytes| ping_pong(bytes, args.huge)));
    turns::take(args.turns, &mut settings, |who| measure(args, &ends, who).map(Some))?;
    results.series = turns::series(settings);
    let is_ours = |series: &Series| !series.by.starts_with("ib_");
    results.ratios = tools::ratios(&results.series, is_ours, |_, _| true);
    results.finish(&args.output)
}

fn streaming(args: &RdmaVsPerftestArgs, bytes: u32, queue_pairs: u32) -> Setting<Contender> {
    let group = format!("WRITE {}, {queue_pairs} QP", svg::size(bytes.into()));
    let wire = rdma_wire::Way {
        verb: Verb::Write,
        bytes,
        depth: DEPTH,
        signal_every: 1,
        chain: 1,
        queue_pairs,
        memory_bytes: 0,
        huge: args.huge,
    };
    let perftest = PerftestWay {
        verb: Verb::Write,
        streams: true,
        bytes,
        queue_pairs,
        depth: Some(DEPTH),
        signal_every: Some(1),
        chain: None,
    };
    let lanes = lanes_wire::Way {
        over: Over::Rdma,
        lanes: queue_pairs as u16,
        memory_bytes: u64::from(bytes),
        extent_bytes: u64::from(bytes),
        scattered: false,
        huge: args.huge,
        same_host: false,
    };
    let series =
        |by: &str, parameters: Value| Series::new(&group, by, Kind::Throughput, parameters);
    let entrant = |who, by: &str, parameters| Entrant { who, series: series(by, parameters) };
    let mut setting = vec![
        entrant(Contender::Perftest(perftest.clone()), &perftest.name(), json!(perftest)),
        entrant(Contender::Wire(wire, false), "pageferry's queue pair", json!(wire)),
        entrant(Contender::Lanes(lanes), "pageferry's lanes", json!(lanes)),
    ];
    if let Some(mib) = args.memory_mib {
        let lanes = lanes_wire::Way { memory_bytes: mib << 20, ..lanes };
        let by = format!("pageferry's lanes, {mib} MiB of memory");
        setting.push(entrant(Contender::Lanes(lanes), &by, json!(lanes)));
    }
    setting
}

fn ping_pong(bytes: u32, huge: bool) -> Setting<Contender> {
    let group = format!("WRITE {}", svg::size(bytes.into()));
    let wire = rdma_wire::Way {
        verb: Verb::Write,
        bytes,
        depth: DEPTH,
        signal_every: 1,
        chain: 1,
        queue_pairs: 1,
        memory_bytes: 0,
        huge,
    };
    let perftest = PerftestWay {
        verb: Verb::Write,
        streams: false,
        bytes,
        queue_pairs: 1,
        depth: None,
        signal_every: None,
        chain: None,
    };
    let series = |by: &str, parameters| Series::new(&group, by, Kind::Latency, parameters);
    let entrant = |who, by: &str, parameters| Entrant { who, series: series(by, parameters) };
    vec![
        entrant(Contender::Perftest(perftest.clone()), &perftest.name(), json!(perftest)),
        entrant(Contender::Wire(wire, true), "pageferry's queue pair", json!(wire)),
    ]
}

fn measure(
    args: &RdmaVsPerftestArgs,
    ends: &Ends,
    contender: &Contender,
) -> Result<Taken, BenchError> {
    let pace = Pace {
        warm_up: args.warm_up,
        operations: args.operations,
        rate: None,
        interval_ms: 100,
        half: true,
    };
    let per_queue_pair =
        |bytes: u32, count: u32| ((args.mib << 20) / u64::from(bytes) / u64::from(count)).max(8);
    match contender {
        Contender::Perftest(way) if !way.streams => way.ping_pong(ends, pace).map(Into::into),
        Contender::Perftest(way) => {
            let each = per_queue_pair(way.bytes, way.queue_pairs);
            way.stream(ends, each).map(Into::into)
        }
        Contender::Wire(way, true) => {
            ends.over_rdma(|from, peer| rdma_wire::ping_pong(peer, from, way, pace)).map(Into::into)
        }
        Contender::Wire(way, false) => {
            let each = per_queue_pair(way.bytes, way.queue_pairs);
            let warm_up = u64::from(DEPTH / 2);
            ends.over_rdma(|from, peer| rdma_wire::stream(peer, from, way, warm_up, each))
                .map(Into::into)
        }
        Contender::Lanes(way) => {
            let warm_up = u64::from(DEPTH / 2) * way.extent_bytes * u64::from(way.lanes);
            // Its workers choose their cores as in a migration.
            ends.unpinned(true, |from, peer| {
                lanes_wire::stream(peer, from, way, warm_up.min(16 << 20), args.mib << 20)
            })
        }
    }
}
