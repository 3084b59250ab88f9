//! `latency`: request and response over TCP and RDMA, as whole distributions, beside the tools
//! people trust.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use crate::args::{Carrier, LatencyArgs, Tool};
use crate::error::BenchError;
use crate::goals::Goal;
use crate::perftest::{PerftestWay, is_installed};
use crate::rdma_wire::{self, Verb};
use crate::recorder::{Pace, Recorded};
use crate::results::Results;
use crate::series::{Kind, Reading, Series, SeriesRun, ratio};
use crate::serve::Peer;
use crate::{cpu, interrupt, output, tcp_tools, tcp_wire};

/// Runs of tools that take a time instead of a number.
const TOOL_SECONDS: u64 = 2;
/// One request at a time is posted; a queue has to have some room.
const DEPTH: u32 = 16;

/// One who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Ours(Carrier),
    Tool(Tool, Carrier),
}

impl Contender {
    fn name(self) -> String {
        match self {
            Self::Ours(_) => "pageferry-bench".into(),
            Self::Tool(Tool::Perftest, carrier) => format!("{} -R", perftest(carrier, 0).program()),
            Self::Tool(Tool::Sockperf, _) => "sockperf ping-pong --tcp".into(),
            Self::Tool(Tool::Qperf, _) => "qperf tcp_lat".into(),
        }
    }
}

/// The benchmark.
pub(crate) fn run(args: &LatencyArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("latency", json!(args));
    let mut all: Vec<(Contender, u32, Series)> = Vec::new();
    for &carrier in &args.over {
        for &bytes in &args.sizes {
            let mut contenders = vec![Contender::Ours(carrier)];
            contenders.extend(tools(args, carrier).map(|tool| Contender::Tool(tool, carrier)));
            for contender in contenders {
                let group = format!("{} {}", carrier_name(carrier), size(bytes));
                let parameters = json!({
                    "carrier": carrier, "bytes": bytes, "rate": args.rate,
                    "measured": if halves(carrier) { "half of a round trip" } else { "all of it" },
                });
                let series = Series::new(&group, &contender.name(), Kind::Latency, parameters);
                all.push((contender, bytes, series));
            }
        }
    }
    for turn in 0..args.turns {
        let count = all.len();
        for index in 0..count {
            let (contender, bytes, series) = &mut all[(index + turn as usize) % count];
            interrupt::check()?;
            one_run(args, *contender, *bytes, turn, series);
        }
    }
    let series: Vec<Series> = all.into_iter().map(|(_, _, series)| series).collect();
    for theirs in series.iter().filter(|s| s.by != "pageferry-bench" && !s.runs.is_empty()) {
        let is_ours = |s: &&Series| s.group == theirs.group && s.by == "pageferry-bench";
        let Some(ours) = series.iter().find(is_ours) else { continue };
        if theirs.by.starts_with("qperf") {
            // Its one number is a mean: compared with ours.
            let mean = Reading::Mean;
            results.ratios.push(ratio("mean", ours, theirs, mean, Some(Goal::AtMost(1.03))));
            continue;
        }
        for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            let (reading, goal) = (Reading::Quantile(quantile), Some(Goal::AtMost(1.03)));
            results.ratios.push(ratio(name, ours, theirs, reading, goal));
        }
    }
    results.series = series;
    results.finish(&args.output)
}

/// Those asked for that fit what carries the messages and are installed.
fn tools(args: &LatencyArgs, carrier: Carrier) -> impl Iterator<Item = Tool> {
    let fits = move |tool: &Tool| match tool {
        Tool::Perftest => verb(carrier).is_some(),
        Tool::Sockperf | Tool::Qperf => carrier == Carrier::Tcp,
    };
    let is_there = move |tool: &Tool| {
        let program = match tool {
            Tool::Perftest => perftest(carrier, 0).program(),
            Tool::Sockperf => "sockperf",
            Tool::Qperf => "qperf",
        };
        let there = is_installed(program);
        if !there {
            println!("{program} is not installed: left out");
        }
        there
    };
    args.vs.iter().copied().filter(fits).filter(is_there).collect::<Vec<_>>().into_iter()
}

fn one_run(args: &LatencyArgs, who: Contender, bytes: u32, turn: u32, series: &mut Series) {
    let busy = cpu::machine_busy_s().unwrap_or(f64::NAN);
    match measure(args, who, bytes) {
        Ok(Some(recorded)) => {
            let machine_cpu_s = cpu::machine_busy_s().unwrap_or(f64::NAN) - busy;
            let p50 = recorded.distribution.at(0.5) as f64 / 1e3;
            let (group, by) = (&series.group, &series.by);
            output::progress(&format!("turn {turn}: {group}: {by}: p50 {p50:.2} us"));
            series.runs.push(SeriesRun { turn, recorded, machine_cpu_s, said: Value::Null });
        }
        Ok(None) => {}
        Err(error) => {
            let failure = format!("turn {turn}: {}", error.chain());
            output::progress(&format!("{}: {}: {failure}", series.group, series.by));
            series.failures.push(failure);
        }
    }
}

fn measure(
    args: &LatencyArgs,
    contender: Contender,
    bytes: u32,
) -> Result<Option<Recorded>, BenchError> {
    let (Contender::Ours(carrier) | Contender::Tool(_, carrier)) = contender;
    let pace = Pace {
        warm_up: args.warm_up,
        operations: args.operations,
        rate: args.rate,
        interval_ms: args.interval_ms,
        half: halves(carrier),
    };
    let cores = if args.no_pin { None } else { cpu::two_cores() };
    match contender {
        Contender::Tool(Tool::Sockperf, _) => tcp_tools::sockperf(bytes, cores, pace, TOOL_SECONDS),
        Contender::Tool(Tool::Qperf, _) => {
            tcp_tools::qperf(bytes, Ipv4Addr::LOCALHOST.into(), cores, TOOL_SECONDS).map(Some)
        }
        Contender::Tool(Tool::Perftest, _) => {
            let ends = args.ends.resolve()?;
            let way = perftest(carrier, bytes);
            way.ping_pong(&ends.device, ends.peer, cores, pace).map(Some)
        }
        Contender::Ours(_) => ours(args, carrier, bytes, cores, pace).map(Some),
    }
}

/// On a thread of its own: only it is to be kept on one core.
fn ours(
    args: &LatencyArgs,
    carrier: Carrier,
    bytes: u32,
    cores: Option<(usize, usize)>,
    pace: Pace,
) -> Result<Recorded, BenchError> {
    let there = cores.map(|(server, _)| server);
    let start = |at: IpAddr| match args.to {
        Some(address) => Peer::connect(address),
        None => Peer::start(at, there),
    };
    let work = || {
        if let Some((_, client)) = cores {
            cpu::pin_to(client)?;
        }
        match verb(carrier) {
            None => {
                let way = tcp_wire::Way { bytes, poll: carrier == Carrier::TcpPoll };
                let mut peer = start(Ipv4Addr::LOCALHOST.into())?;
                tcp_wire::ping_pong(&mut peer, &way, pace)
            }
            Some(verb) => {
                let ends = args.ends.resolve()?;
                let way = rdma_wire::Way {
                    verb,
                    bytes,
                    depth: DEPTH,
                    signal_every: 1,
                    chain: 1,
                    queue_pairs: 1,
                    huge: false,
                };
                let mut peer = start(ends.peer)?;
                rdma_wire::ping_pong(&mut peer, ends.local, &way, pace)
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn perftest(carrier: Carrier, bytes: u32) -> PerftestWay {
    PerftestWay {
        verb: verb(carrier).unwrap_or(Verb::Write),
        streams: false,
        bytes,
        queue_pairs: 1,
        depth: None,
        signal_every: None,
        chain: None,
    }
}

fn verb(carrier: Carrier) -> Option<Verb> {
    match carrier {
        Carrier::Tcp | Carrier::TcpPoll => None,
        Carrier::RdmaWrite => Some(Verb::Write),
        Carrier::RdmaRead => Some(Verb::Read),
        Carrier::RdmaSend => Some(Verb::Send),
    }
}

/// A READ is there and back by itself.
fn halves(carrier: Carrier) -> bool {
    carrier != Carrier::RdmaRead
}

fn carrier_name(carrier: Carrier) -> &'static str {
    match carrier {
        Carrier::Tcp => "TCP",
        Carrier::TcpPoll => "TCP, polled",
        Carrier::RdmaWrite => "RDMA WRITE",
        Carrier::RdmaRead => "RDMA READ",
        Carrier::RdmaSend => "RDMA SEND",
    }
}

fn size(bytes: u32) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes / 1024),
        _ => format!("{} MiB", bytes >> 20),
    }
}
