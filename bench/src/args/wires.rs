//! Arguments of the benchmarks of wires: messages and streams over TCP and RDMA.

use std::net::{IpAddr, SocketAddr};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{NetKind, OutputArgs};
use crate::ceiling::Placement;

/// What joins the two ends of a benchmark of wires, and where they run.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct WireArgs {
    /// What joins the two ends, for TCP. Default: this machine's own loopback device; the others
    /// are namespaces, and need root.
    #[arg(long, value_enum)]
    pub(crate) net: Option<NetKind>,
    /// Speed of the link in Mbit/s, with --net veth; 0 is unshaped.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) link_mbit: u64,
    /// Where `serve` runs. Default: a process of its own on this machine.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) to: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) rdma: RdmaEndsArgs,
    /// Cores of the two ends, the tools' too; lanes choose theirs as in a migration.
    #[arg(long, value_enum, default_value_t = Placement::TwoCores)]
    pub(crate) cores: Placement,
    /// Holds the machine's cores to waking up within so many microseconds (/dev/cpu_dma_latency, needs
    /// root); at 0 an idle core polls instead of halting. Default: as the machine is set.
    #[arg(long, value_name = "US")]
    pub(crate) cpu_dma_latency: Option<i32>,
}

/// The two ends of RDMA connections.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct RdmaEndsArgs {
    /// This end's address, that of an RDMA device. Default: $PF_LOCAL_ADDR.
    #[arg(long, value_name = "IP")]
    pub(crate) local: Option<IpAddr>,
    /// The other end's, also on this machine. Default: $PF_PEER_ADDR.
    #[arg(long, value_name = "IP")]
    pub(crate) peer: Option<IpAddr>,
    /// The RDMA device, for perftest. Default: $PF_RDMA_DEV.
    #[arg(long, value_name = "NAME")]
    pub(crate) device: Option<String>,
}

/// The two ends, found.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RdmaEnds {
    pub(crate) local: IpAddr,
    pub(crate) peer: IpAddr,
    pub(crate) device: String,
}

impl RdmaEndsArgs {
    /// As told, or as `tests/rdma-vm/run` says in the environment; else what to do about it.
    pub(crate) fn resolve(&self) -> Result<RdmaEnds, &'static str> {
        let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        let address = |told: Option<IpAddr>, name| told.or_else(|| variable(name)?.parse().ok());
        let missing =
            || "no RDMA device is known: --local, --peer and --device, or run it by `rdma-vm`";
        Ok(RdmaEnds {
            local: address(self.local, "PF_LOCAL_ADDR").ok_or_else(missing)?,
            peer: address(self.peer, "PF_PEER_ADDR").ok_or_else(missing)?,
            device: self.device.clone().or_else(|| variable("PF_RDMA_DEV")).ok_or_else(missing)?,
        })
    }
}

/// How often everyone runs, who else, and how finely it is seen.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct TurnsArgs {
    /// Times each contender runs.
    #[arg(long = "turns", value_name = "N", default_value_t = 3)]
    pub(crate) count: u32,
    /// One point of the time series, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub(crate) interval_ms: u64,
    /// Tools to run beside it, in turns, where they do such a thing; one that is not installed is left
    /// out, and that is said.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) vs: Vec<Tool>,
}

/// Arguments of `latency`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct LatencyArgs {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// What carries the messages.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tcp")]
    pub(crate) over: Vec<Carrier>,
    /// Sizes of messages in bytes.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "8,4096,65536")]
    pub(crate) sizes: Vec<u32>,
    /// Round trips of each run that count.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub(crate) operations: u64,
    /// Round trips dropped before them.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) warm_up: u64,
    /// Round trips intended in a second. Default: the next begins when the last has ended.
    #[arg(long, value_name = "N")]
    pub(crate) rate: Option<f64>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) turns: TurnsArgs,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
}

/// What carries messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Carrier {
    /// TCP: plain calls that sleep until something comes.
    Tcp,
    /// TCP without sleeping: both ends look again and again.
    TcpPoll,
    /// TCP by an io_uring at each end.
    TcpUring,
    /// RDMA WRITE.
    RdmaWrite,
    /// RDMA READ.
    RdmaRead,
    /// RDMA SEND.
    RdmaSend,
}

/// A tool that people trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tool {
    /// RDMA, by ib_write_lat, ib_write_bw and their like.
    Perftest,
    /// TCP and RDMA; an average of each run.
    Qperf,
    /// TCP.
    Sockperf,
    /// Streams over TCP.
    Iperf3,
    /// Whole migrations.
    Qemu,
}

/// Arguments of `throughput`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct ThroughputArgs {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Who streams.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tcp,tcp-uring,tcp-lanes")]
    pub(crate) over: Vec<Stream>,
    /// Sizes of messages in bytes; lanes take multiples of 4096 up to 1 MiB only.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "4096,65536,1048576")]
    pub(crate) sizes: Vec<u32>,
    /// Numbers of connections, queue pairs or lanes.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    pub(crate) lanes: Vec<u32>,
    /// Messages in flight on each io_uring or queue pair.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "16")]
    pub(crate) depths: Vec<u16>,
    /// Memory that lanes send from, in MiB; the others send one message over and over.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) memory_mib: u64,
    /// Memory of 2 MiB pages, for lanes and queue pairs.
    #[arg(long)]
    pub(crate) huge: bool,
    /// Seconds of each run over TCP that count; tools know whole ones.
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    pub(crate) seconds: f64,
    /// Seconds dropped before them.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub(crate) warm_up_seconds: f64,
    /// MiB of each run over RDMA.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) mib: u64,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) turns: TurnsArgs,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
}

/// What streams messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stream {
    /// TCP by send and recv.
    Tcp,
    /// The same, received 64 KiB at a time, as sockperf's server does.
    #[value(name = "tcp-receive-64k")]
    #[serde(rename = "tcp-receive-64k")]
    TcpReceive64k,
    /// TCP, sent by an io_uring with several messages in flight.
    TcpUring,
    /// The same from memory without copying, where the kernel can.
    TcpZeroCopy,
    /// A migration's lanes over TCP, by io_uring.
    TcpLanes,
    /// The same by plain sockets.
    TcpLanesPlain,
    /// The same by io_uring from memory without copying, where the kernel can.
    TcpLanesZeroCopy,
    /// RDMA WRITEs.
    RdmaWrite,
    /// A migration's lanes over RDMA.
    RdmaLanes,
}

/// Arguments of `rdma-vs-perftest`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct RdmaVsPerftestArgs {
    #[command(flatten)]
    pub(crate) wire: WireArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) turns: u32,
    /// Sizes of streamed WRITEs in bytes; an empty list leaves streaming out.
    #[arg(long, value_name = "LIST", value_delimiter = ',', num_args = 0.., default_value = "65536,1048576")]
    pub(crate) sizes: Vec<u32>,
    /// Numbers of queue pairs that stream.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,4")]
    pub(crate) queue_pairs: Vec<u32>,
    /// MiB streamed in each run.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) mib: u64,
    /// Has lanes stream also over this much memory, instead of one message's over and over.
    #[arg(long, value_name = "MIB")]
    pub(crate) memory_mib: Option<u64>,
    /// Sizes of WRITEs whose latency is measured, in bytes; an empty list leaves it out.
    #[arg(long, value_name = "LIST", value_delimiter = ',', num_args = 0.., default_value = "4096")]
    pub(crate) latency_sizes: Vec<u32>,
    /// Round trips of each run that count.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub(crate) operations: u64,
    /// Round trips dropped before them.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) warm_up: u64,
    /// Our buffers on 2 MiB pages, as perftest's are wherever the kernel gives a process such pages
    /// by itself.
    #[arg(long)]
    pub(crate) huge: bool,
}
