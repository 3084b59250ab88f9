//! `pages`: random guest pages of 4 KiB and 2 MiB, as a round moves what was written, and as a guest
//! waits for one that has not come yet.

use serde_json::json;

use crate::args::{MovedAs, PageSize, PagesArgs, Tool, Transport};
use crate::ends::Ends;
use crate::error::BenchError;
use crate::lanes_wire::{self, Over};
use crate::perftest::PerftestWay;
use crate::rdma_wire::{self, Verb};
use crate::recorder::Pace;
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::stream_wire::Span;
use crate::tcp_wire::{self, Calls};
use crate::turns::{Entrant, Setting, Taken};
use crate::{tools, turns};

/// What asks for a page: its number.
const REQUEST_BYTES: u32 = 8;
/// One READ at a time is posted; a queue has to have some room.
const DEPTH: u32 = 16;

/// One who takes part.
#[derive(Clone, Copy, Debug)]
enum Contender {
    /// Our lanes; over TCP by io_uring or by plain sockets.
    Round(PageSize, Over),
    /// Asked for over TCP; by calls or by an io_uring without scattered memory.
    FaultTcp(PageSize, Calls),
    /// READ by the target itself.
    FaultRead(PageSize),
    /// `ib_read_lat`, from one page's memory.
    Perftest(PageSize),
}

/// The benchmark.
pub(crate) fn run(args: &PagesArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("pages", json!(args));
    let ends = Ends::new(&args.wire)?;
    let program = |tool| (tool == Tool::Perftest).then_some("ib_read_lat");
    let wants_perftest = args.over.contains(&Transport::Rdma) && args.wire.to.is_none();
    let asked = if wants_perftest { &args.turns.vs[..] } else { &[] };
    let perftest = !tools::usable(asked, "faults over RDMA", program).is_empty();
    let mut settings: Vec<Setting<Contender>> = Vec::new();
    for &size in &args.page_sizes {
        for &moved_as in &args.moved_as {
            for &transport in &args.over {
                settings.push(setting(args, size, moved_as, transport, perftest));
            }
        }
    }
    turns::take(args.turns.count, &mut settings, |who| measure(args, &ends, *who).map(Some))?;
    results.series = turns::series(settings);
    let is_ours = |series: &Series| !series.by.starts_with("ib_");
    results.ratios = tools::ratios(&results.series, is_ours, |_, _| false);
    results.finish(&args.output)
}

fn setting(
    args: &PagesArgs,
    size: PageSize,
    moved_as: MovedAs,
    transport: Transport,
    perftest: bool,
) -> Setting<Contender> {
    let over = if transport == Transport::Tcp { "TCP" } else { "RDMA" };
    let (group, kind) = match moved_as {
        MovedAs::Round => {
            let part = args.written_percent;
            let group = format!(
                "a round of {part} % in pages of {}, {} lanes, {over}",
                size.name(),
                args.lanes
            );
            (group, Kind::Throughput)
        }
        MovedAs::Fault => (format!("a fault of {}, {over}", size.name()), Kind::Latency),
    };
    let everyone: Vec<(&str, Contender)> = match (moved_as, transport) {
        (MovedAs::Round, Transport::Tcp) => [("lanes, io_uring", true), ("lanes, plain", false)]
            .map(|(by, uring)| (by, Contender::Round(size, Over::Tcp { uring, zero_copy: false })))
            .into(),
        (MovedAs::Round, Transport::Rdma) => {
            vec![("lanes", Contender::Round(size, Over::Rdma))]
        }
        (MovedAs::Fault, Transport::Tcp) => vec![
            ("asked for, recv", Contender::FaultTcp(size, Calls::Sleep)),
            ("asked for, polled", Contender::FaultTcp(size, Calls::Poll)),
        ],
        (MovedAs::Fault, Transport::Rdma) => {
            let mut everyone = vec![("READ", Contender::FaultRead(size))];
            if perftest {
                everyone.push(("ib_read_lat -R, one page's memory", Contender::Perftest(size)));
            }
            everyone
        }
    };
    let parameters = json!({
        "page": size, "moved_as": moved_as, "transport": transport, "lanes": args.lanes,
        "memory_mib": args.memory_mib, "written_percent": args.written_percent,
    });
    let entrant = |(by, who): (&str, Contender)| Entrant {
        who,
        series: Series::new(&group, by, kind, parameters.clone()),
    };
    everyone.into_iter().map(entrant).collect()
}

fn measure(args: &PagesArgs, ends: &Ends, who: Contender) -> Result<Taken, BenchError> {
    let memory_bytes = args.memory_mib << 20;
    let pace = Pace {
        warm_up: args.warm_up,
        operations: args.operations,
        rate: args.rate,
        interval_ms: args.turns.interval_ms,
        half: false,
    };
    match who {
        Contender::Round(size, over) => {
            let way = lanes_wire::Way {
                over,
                lanes: args.lanes,
                memory_bytes,
                extent_bytes: size.bytes(),
                scattered: true,
                // Huge pages of a process of its own have to be free, not only reserved here.
                huge: false,
                same_host: args.wire.to.is_none() && args.wire.net.is_none(),
            };
            let round = (memory_bytes as f64 * args.written_percent / 100.0) as u64;
            let span = Span { warm_up_s: args.warm_up_seconds, seconds: args.seconds };
            ends.unpinned(over == Over::Rdma, |from, peer| {
                lanes_wire::rounds(peer, from, &way, round, span, args.turns.interval_ms)
            })
        }
        Contender::FaultTcp(size, calls) => {
            let answer_bytes = size.bytes() as u32;
            let way = tcp_wire::Way { bytes: REQUEST_BYTES, answer_bytes, calls, memory_bytes };
            ends.tcp(|peer| tcp_wire::ping_pong(peer, &way, pace)).map(Into::into)
        }
        Contender::FaultRead(size) => {
            let way = rdma_wire::Way {
                verb: Verb::Read,
                bytes: size.bytes() as u32,
                depth: DEPTH,
                signal_every: 1,
                chain: 1,
                queue_pairs: 1,
                memory_bytes,
                huge: false,
            };
            ends.over_rdma(|from, peer| rdma_wire::ping_pong(peer, from, &way, pace))
                .map(Into::into)
        }
        Contender::Perftest(size) => {
            let way = PerftestWay {
                verb: Verb::Read,
                streams: false,
                bytes: size.bytes() as u32,
                queue_pairs: 1,
                depth: None,
                signal_every: None,
                chain: None,
            };
            way.ping_pong(ends, pace).map(Into::into)
        }
    }
}
