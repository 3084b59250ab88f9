//! `throughput`: messages one after the other over TCP and RDMA, by size, connections and depth,
//! beside the tools people trust.

use serde_json::{Value, json};

use crate::args::{Stream, ThroughputArgs, Tool};
use crate::cpu::Busy;
use crate::ends::Ends;
use crate::error::BenchError;
use crate::iperf::{self, IperfWay};
use crate::lanes_wire::{self, Over};
use crate::perftest::PerftestWay;
use crate::qperf::{self, Test};
use crate::rdma_wire::{self, Verb};
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::stream_wire::{self, Span};
use crate::tcp_wire::Calls;
use crate::turns::{Entrant, Setting, Taken};
use crate::{sockperf, svg, tools, turns};

/// Lanes carry whole pages, and no more than this in one extent.
const EXTENT_BYTES_MAX: u32 = 1 << 20;

/// What sockperf's server receives at a time, rounded.
const RECEIVE_BYTES: u32 = 64 << 10;

/// What is the same for all of a group.
#[derive(Clone, Copy, Debug)]
struct Shape {
    bytes: u32,
    lanes: u32,
}

/// One who takes part.
#[derive(Clone, Copy, Debug)]
enum Contender {
    Ours(Stream, Shape, u16),
    Tool(Tool, Shape, bool),
}

/// The benchmark.
pub(crate) fn run(args: &ThroughputArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("throughput", json!(args));
    let ends = Ends::new(&args.wire)?;
    let mut settings: Vec<Setting<Contender>> = Vec::new();
    for rdma in [false, true] {
        let streams: Vec<Stream> =
            args.over.iter().copied().filter(|stream| stream.is_rdma() == rdma).collect();
        if streams.is_empty() {
            continue;
        }
        let transport = if rdma { "RDMA" } else { "TCP" };
        let tools = match args.wire.to {
            None => tools::usable(&args.turns.vs, transport, |tool| program(tool, rdma)),
            Some(_) => Vec::new(),
        };
        for &bytes in &args.sizes {
            for &lanes in &args.lanes {
                let shape = Shape { bytes, lanes };
                let group = format!("{transport} {} x{lanes}", svg::size(bytes.into()));
                settings.push(setting(args, &streams, &tools, shape, &group));
            }
        }
    }
    turns::take(args.turns.count, &mut settings, |who| measure(args, &ends, *who))?;
    results.series = turns::series(settings);
    let is_ours = |series: &Series| series.parameters["tool"].is_null();
    results.ratios = tools::ratios(&results.series, is_ours, are_alike);
    results.finish(&args.output)
}

/// Tools send by plain calls, and post one by one; of a small message sockperf receives many at once.
fn are_alike(ours: &Series, theirs: &Series) -> bool {
    let of = |series: &Series, name: &str| series.parameters[name].as_str().map(str::to_owned);
    match (of(ours, "stream").as_deref(), of(theirs, "tool").as_deref()) {
        (Some("tcp"), tool) => tool != Some("sockperf"),
        (Some("tcp-receive-64k"), tool) => tool == Some("sockperf"),
        (stream, _) => stream == Some("rdma-write"),
    }
}

fn setting(
    args: &ThroughputArgs,
    streams: &[Stream],
    tools: &[Tool],
    shape: Shape,
    group: &str,
) -> Setting<Contender> {
    let mut setting = Vec::new();
    let series = |by: &str, parameters: Value| Series::new(group, by, Kind::Throughput, parameters);
    for &stream in streams {
        if stream.is_of_lanes()
            && (!shape.bytes.is_multiple_of(4096) || shape.bytes > EXTENT_BYTES_MAX)
        {
            continue;
        }
        if stream == Stream::TcpReceive64k && shape.bytes >= RECEIVE_BYTES {
            continue;
        }
        // Plain calls have nothing in flight but the socket's buffer, lanes their own depth.
        let depths: &[u16] = if stream.has_depth() { &args.depths } else { &[1] };
        for &depth in depths {
            let mut by = format!("pageferry-bench {}", stream.name());
            if stream.has_depth() {
                by.push_str(&format!(", depth {depth}"));
            }
            let parameters = json!({
                "stream": stream, "bytes": shape.bytes, "lanes": shape.lanes, "depth": depth,
                "cores": args.wire.cores, "huge": args.huge, "memory_mib": args.memory_mib,
            });
            let who = Contender::Ours(stream, shape, depth);
            setting.push(Entrant { who, series: series(&by, parameters) });
        }
    }
    for &tool in tools {
        let rdma = streams.iter().any(|stream| stream.is_rdma());
        // They have one connection, and perftest's and iperf3's others are of one thread.
        if shape.lanes > 1 && matches!(tool, Tool::Qperf | Tool::Sockperf) {
            continue;
        }
        let by = match tool {
            Tool::Iperf3 => iperf(args, shape).name(),
            Tool::Perftest => perftest(args, shape).name(),
            Tool::Qperf if rdma => format!("qperf {}", Test::RdmaStream.name()),
            Tool::Qperf => format!("qperf {}", Test::TcpStream.name()),
            Tool::Sockperf => "sockperf throughput --tcp".into(),
            Tool::Qemu => continue,
        };
        let parameters = json!({ "tool": tool, "bytes": shape.bytes, "lanes": shape.lanes, "cores": args.wire.cores });
        let who = Contender::Tool(tool, shape, rdma);
        setting.push(Entrant { who, series: series(&by, parameters) });
    }
    setting
}

/// A run, with the processor time that the machine spends while it is under way.
fn measure(
    args: &ThroughputArgs,
    ends: &Ends,
    who: Contender,
) -> Result<Option<Taken>, BenchError> {
    let busy = Busy::begin();
    let taken = match who {
        Contender::Ours(stream, shape, depth) => ours(args, ends, stream, shape, depth).map(Some),
        Contender::Tool(tool, shape, rdma) => by_tool(args, ends, tool, shape, rdma),
    };
    let cores_busy = busy.finish();
    Ok(taken?.map(|mut taken| {
        if taken.said.is_null() {
            taken.said = json!({});
        }
        taken.said["machine_cpu_s"] = json!(cores_busy.map(|busy| busy * taken.recorded.seconds));
        taken
    }))
}

fn ours(
    args: &ThroughputArgs,
    ends: &Ends,
    stream: Stream,
    shape: Shape,
    depth: u16,
) -> Result<Taken, BenchError> {
    let Shape { bytes, lanes } = shape;
    let span = span(args);
    let receiving = |receive_bytes, calls, zero_copy| {
        let interval_ms = args.turns.interval_ms;
        let connections = lanes;
        let way = stream_wire::Way {
            bytes,
            receive_bytes,
            connections,
            calls,
            depth,
            zero_copy,
            interval_ms,
        };
        ends.tcp(|peer| stream_wire::stream(peer, &way, span))
    };
    let connections = |calls, zero_copy| receiving(bytes, calls, zero_copy);
    let lanes_over = |over| {
        let way = lanes_wire::Way {
            over,
            lanes: lanes as u16,
            memory_bytes: (args.memory_mib << 20).max(bytes.into()),
            extent_bytes: bytes.into(),
            scattered: false,
            huge: args.huge,
            same_host: args.wire.to.is_none() && args.wire.net.is_none(),
        };
        let round = way.memory_bytes;
        ends.unpinned(over == Over::Rdma, |from, peer| match over {
            Over::Tcp { .. } => {
                lanes_wire::rounds(peer, from, &way, round, span, args.turns.interval_ms)
            }
            Over::Rdma => lanes_wire::stream(peer, from, &way, round, args.mib << 20),
        })
    };
    match stream {
        Stream::Tcp => connections(Calls::Sleep, false),
        Stream::TcpReceive64k => receiving(RECEIVE_BYTES, Calls::Sleep, false),
        Stream::TcpUring => connections(Calls::Uring, false),
        Stream::TcpZeroCopy => connections(Calls::Uring, true),
        Stream::TcpLanes => lanes_over(Over::Tcp { uring: true, zero_copy: false }),
        Stream::TcpLanesPlain => lanes_over(Over::Tcp { uring: false, zero_copy: false }),
        Stream::TcpLanesZeroCopy => lanes_over(Over::Tcp { uring: true, zero_copy: true }),
        Stream::RdmaLanes => lanes_over(Over::Rdma),
        Stream::RdmaWrite => {
            let way = rdma_wire::Way {
                verb: Verb::Write,
                bytes,
                depth: depth.into(),
                signal_every: 1,
                chain: 1,
                queue_pairs: lanes,
                memory_bytes: 0,
                huge: args.huge,
            };
            let (warm_up, each) = (u64::from(depth / 2), operations(args, shape));
            ends.over_rdma(|from, peer| rdma_wire::stream(peer, from, &way, warm_up, each))
                .map(Into::into)
        }
    }
}

fn by_tool(
    args: &ThroughputArgs,
    ends: &Ends,
    tool: Tool,
    shape: Shape,
    rdma: bool,
) -> Result<Option<Taken>, BenchError> {
    let Shape { bytes, .. } = shape;
    match tool {
        Tool::Iperf3 => {
            iperf(args, shape).stream(&ends.net, span(args), args.turns.interval_ms).map(Some)
        }
        Tool::Qperf => {
            let test = if rdma { Test::RdmaStream } else { Test::TcpStream };
            test.run(ends, bytes, args.seconds).map(|recorded| Some(recorded.into()))
        }
        Tool::Sockperf => Ok(sockperf::stream(ends, bytes, args.seconds)?.map(Into::into)),
        Tool::Perftest => {
            let recorded = perftest(args, shape).stream(ends, operations(args, shape))?;
            Ok(Some(recorded.into()))
        }
        Tool::Qemu => Ok(None),
    }
}

fn program(tool: Tool, rdma: bool) -> Option<&'static str> {
    match tool {
        Tool::Qperf => Some(qperf::PROGRAM),
        Tool::Iperf3 if !rdma => Some(iperf::PROGRAM),
        Tool::Sockperf if !rdma => Some(sockperf::PROGRAM),
        Tool::Perftest if rdma => Some("ib_write_bw"),
        _ => None,
    }
}

fn iperf(args: &ThroughputArgs, shape: Shape) -> IperfWay {
    IperfWay {
        streams: shape.lanes as usize,
        buffer_kib: None,
        length_bytes: shape.bytes as usize,
        placement: args.wire.cores,
        congestion: None,
    }
}

fn perftest(args: &ThroughputArgs, shape: Shape) -> PerftestWay {
    PerftestWay {
        verb: Verb::Write,
        streams: true,
        bytes: shape.bytes,
        queue_pairs: shape.lanes,
        depth: args.depths.first().map(|&depth| depth.into()),
        signal_every: Some(1),
        chain: None,
    }
}

fn span(args: &ThroughputArgs) -> Span {
    Span { warm_up_s: args.warm_up_seconds, seconds: args.seconds }
}

/// Of each queue pair.
fn operations(args: &ThroughputArgs, shape: Shape) -> u64 {
    ((args.mib << 20) / u64::from(shape.bytes) / u64::from(shape.lanes)).max(8)
}

impl Stream {
    fn is_rdma(self) -> bool {
        matches!(self, Self::RdmaWrite | Self::RdmaLanes)
    }

    fn is_of_lanes(self) -> bool {
        matches!(
            self,
            Self::TcpLanes | Self::TcpLanesPlain | Self::TcpLanesZeroCopy | Self::RdmaLanes
        )
    }

    fn has_depth(self) -> bool {
        matches!(self, Self::TcpUring | Self::TcpZeroCopy | Self::RdmaWrite)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "send",
            Self::TcpReceive64k => "send, received 64 KiB at a time",
            Self::TcpUring => "io_uring",
            Self::TcpZeroCopy => "io_uring, zero-copy",
            Self::TcpLanes => "lanes",
            Self::TcpLanesPlain => "lanes, plain sockets",
            Self::TcpLanesZeroCopy => "lanes, zero-copy",
            Self::RdmaWrite => "queue pairs",
            Self::RdmaLanes => "lanes",
        }
    }
}
