//! `latency`: request and response over TCP and RDMA, as whole distributions, beside the tools
//! people trust.

use serde_json::json;

use crate::args::{Carrier, LatencyArgs, Tool};
use crate::ends::Ends;
use crate::error::BenchError;
use crate::perftest::PerftestWay;
use crate::qperf::Test;
use crate::rdma_wire::{self, Verb};
use crate::recorder::{Pace, Recorded};
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::tcp_wire::{self, Calls};
use crate::turns::{Entrant, Setting};
use crate::{qperf, sockperf, svg, tools, turns};

/// Runs of tools that take a time instead of a number.
const TOOL_SECONDS: f64 = 2.0;
/// One request at a time is posted; a queue has to have some room.
const DEPTH: u32 = 16;

/// One who takes part, with the size of its messages.
#[derive(Clone, Copy, Debug)]
struct Contender {
    carrier: Carrier,
    tool: Option<Tool>,
    bytes: u32,
}

/// The benchmark.
pub(crate) fn run(args: &LatencyArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("latency", json!(args));
    let ends = Ends::new(&args.wire)?;
    let mut settings: Vec<Setting<Contender>> = Vec::new();
    for name in ["TCP", "RDMA WRITE", "RDMA READ", "RDMA SEND"] {
        let of_it = |carrier: &Carrier| carrier.group() == name;
        let carriers: Vec<Carrier> = args.over.iter().copied().filter(of_it).collect();
        let Some(&first) = carriers.first() else { continue };
        let tools = match args.wire.to {
            None => tools::usable(&args.turns.vs, name, |tool| program(tool, &carriers)),
            Some(_) => Vec::new(),
        };
        for &bytes in &args.sizes {
            let group = format!("{name} {}", svg::size(bytes.into()));
            let entrant = |carrier, tool| entrant(args, &group, Contender { carrier, tool, bytes });
            let ours = carriers.iter().map(|carrier| entrant(*carrier, None));
            let carrier = if first.is_tcp() { Carrier::Tcp } else { first };
            let theirs = tools.iter().map(|tool| entrant(carrier, Some(*tool)));
            settings.push(ours.chain(theirs).collect());
        }
    }
    turns::take(args.turns.count, &mut settings, |who| {
        Ok(measure(args, &ends, *who)?.map(Into::into))
    })?;
    results.series = turns::series(settings);
    let is_ours = |series: &Series| series.parameters["tool"].is_null();
    results.ratios = tools::ratios(&results.series, is_ours, |ours, _| ours.by == OURS);
    results.finish(&args.output)
}

fn entrant(args: &LatencyArgs, group: &str, who: Contender) -> Entrant<Contender> {
    let Contender { carrier, tool, bytes } = who;
    let by = match tool {
        None => format!("{OURS}{}", carrier.variant()),
        Some(Tool::Perftest) => format!("{} -R", perftest(carrier, bytes).program()),
        Some(Tool::Qperf) => format!("qperf {}", qperf_test(carrier).name()),
        Some(Tool::Sockperf) => "sockperf ping-pong --tcp".into(),
        Some(tool) => tool.package().into(),
    };
    let parameters = json!({
        "carrier": carrier, "tool": tool, "bytes": bytes, "rate": args.rate,
        "cores": args.wire.cores,
        "measured": if carrier.halves() { "half of a round trip" } else { "all of it" },
    });
    Entrant { who, series: Series::new(group, &by, Kind::Latency, parameters) }
}

/// As our own series are called where they do what tools do.
const OURS: &str = "pageferry-bench";

fn measure(
    args: &LatencyArgs,
    ends: &Ends,
    who: Contender,
) -> Result<Option<Recorded>, BenchError> {
    let Contender { carrier, tool, bytes } = who;
    let pace = Pace {
        warm_up: args.warm_up,
        operations: args.operations,
        rate: args.rate,
        interval_ms: args.turns.interval_ms,
        half: carrier.halves(),
    };
    match tool {
        None => ours(ends, carrier, bytes, pace).map(Some),
        Some(Tool::Sockperf) => sockperf::ping_pong(ends, bytes, pace, TOOL_SECONDS),
        Some(Tool::Qperf) => qperf_test(carrier).run(ends, bytes, TOOL_SECONDS).map(Some),
        Some(Tool::Perftest) => perftest(carrier, bytes).ping_pong(ends, pace).map(Some),
        Some(Tool::Iperf3 | Tool::Qemu) => Ok(None),
    }
}

fn ours(ends: &Ends, carrier: Carrier, bytes: u32, pace: Pace) -> Result<Recorded, BenchError> {
    match carrier.verb() {
        None => {
            let calls = match carrier {
                Carrier::TcpPoll => Calls::Poll,
                Carrier::TcpUring => Calls::Uring,
                _ => Calls::Sleep,
            };
            let way = tcp_wire::Way::echo(bytes, calls);
            ends.tcp(|peer| tcp_wire::ping_pong(peer, &way, pace))
        }
        Some(verb) => {
            let way = rdma_wire::Way {
                verb,
                bytes,
                depth: DEPTH,
                signal_every: 1,
                chain: 1,
                queue_pairs: 1,
                memory_bytes: 0,
                huge: false,
            };
            ends.over_rdma(|from, peer| rdma_wire::ping_pong(peer, from, &way, pace))
        }
    }
}

/// What a tool runs beside these, if it does such a thing.
fn program(tool: Tool, carriers: &[Carrier]) -> Option<&'static str> {
    let first = carriers.first()?;
    match tool {
        Tool::Perftest => first.verb().map(|_| perftest(*first, 0).program()),
        Tool::Qperf => Some(qperf::PROGRAM),
        Tool::Sockperf => first.is_tcp().then_some(sockperf::PROGRAM),
        Tool::Iperf3 | Tool::Qemu => None,
    }
}

fn perftest(carrier: Carrier, bytes: u32) -> PerftestWay {
    PerftestWay {
        verb: carrier.verb().unwrap_or(Verb::Write),
        streams: false,
        bytes,
        queue_pairs: 1,
        depth: None,
        signal_every: None,
        chain: None,
    }
}

fn qperf_test(carrier: Carrier) -> Test {
    carrier.verb().map_or(Test::TcpLatency, Test::RdmaLatency)
}

impl Carrier {
    fn verb(self) -> Option<Verb> {
        match self {
            Self::Tcp | Self::TcpPoll | Self::TcpUring => None,
            Self::RdmaWrite => Some(Verb::Write),
            Self::RdmaRead => Some(Verb::Read),
            Self::RdmaSend => Some(Verb::Send),
        }
    }

    /// A READ is there and back by itself.
    fn halves(self) -> bool {
        self != Self::RdmaRead
    }

    fn is_tcp(self) -> bool {
        self.verb().is_none()
    }

    /// Those that are compared with each other.
    fn group(self) -> &'static str {
        match self.verb() {
            None => "TCP",
            Some(Verb::Write) => "RDMA WRITE",
            Some(Verb::Read) => "RDMA READ",
            Some(Verb::Send) => "RDMA SEND",
        }
    }

    /// What is different from what tools do.
    fn variant(self) -> &'static str {
        match self {
            Self::TcpPoll => ", polled",
            Self::TcpUring => ", io_uring",
            Self::Tcp | Self::RdmaWrite | Self::RdmaRead | Self::RdmaSend => "",
        }
    }
}
