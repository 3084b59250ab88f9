//! Arguments; every default is said in the help.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::error::BenchError;

/// Benchmarks of Pageferry beside the tools people trust.
#[derive(Debug, Parser)]
#[command(name = "pageferry-bench", version)]
pub(crate) struct Cli {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move the same guest by Pageferry and by QEMU's own TCP migration, beside iperf3 and a
    /// plain-socket ceiling: throughput, CPU per GiB, pause.
    MigrateVsQemu(MigrateVsQemuArgs),
    /// What a guest that writes 256 MiB over and over loses while it is moved.
    Slowdown(SlowdownArgs),
    /// A 16 GiB guest of which 200 MiB are populated beside a 1 GiB guest with the same 200 MiB.
    Sparse(SparseArgs),
    /// A guest that does nothing over one, two and four shaped links, and over two unequal ones.
    Rails(RailsArgs),
    /// 1, 10 and 20 guests of 512 MiB, drained over links of 1 and 10 Gbit/s, one at a time and
    /// several: total, brownout, blackout, share of the link used.
    DrainTable(crate::drain_table::DrainTableArgs),
    /// Our RDMA WRITEs beside perftest's ib_write_bw and ib_write_lat, in turns. Runs where there
    /// is an RDMA device; `rdma-vm` gives one.
    RdmaVsPerftest(RdmaVsPerftestArgs),
    /// Whole migrations over RDMA of a guest that does nothing, by us and by QEMU, in turns. Runs
    /// where there is an RDMA device and a kernel from 6.7 on; `rdma-vm` gives both.
    RdmaVsQemu(RdmaVsQemuArgs),
    /// What became of each series from one JSON of results to another; exit code 1 if any reading
    /// became worse for sure.
    Compare(CompareArgs),
    /// Latency of messages over TCP and RDMA, as distributions, beside the tools people trust.
    Latency(LatencyArgs),
    /// The same as tables, HTML, plots and logs of a JSON that was written before.
    Show(ShowArgs),
    /// Any of these in a virtual machine with a soft-RoCE or soft-iWARP device: arguments of
    /// `tests/rdma-vm/run`, then `--`, then what to run here.
    RdmaVm(RdmaVmArgs),
    /// The other end of a measurement.
    Serve(ServeArgs),
}

/// Where results go, beside the tables on standard output.
#[derive(Clone, Debug, Default, Args, Serialize)]
pub(crate) struct OutputArgs {
    /// Everything measured, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// A folder for everything: results.json, results.html, plots, and a .hgrm and a .hlog file
    /// for each series.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: Option<PathBuf>,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// What it was.
    pub(crate) before: PathBuf,
    /// What it is.
    pub(crate) after: PathBuf,
    /// A reading may be this much worse.
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    pub(crate) allow_percent: f64,
}

/// Arguments of `show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Results of any benchmark of distributions.
    pub(crate) results: PathBuf,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `rdma-vm`.
#[derive(Debug, Args)]
pub(crate) struct RdmaVmArgs {
    /// As `tests/rdma-vm/run` takes them, then `--` and a benchmark with its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) arguments: Vec<String>,
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
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) turns: u32,
    /// Round trips of each run that count.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub(crate) operations: u64,
    /// Round trips dropped before them.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) warm_up: u64,
    /// Round trips intended in a second. Default: the next begins when the last has ended.
    #[arg(long, value_name = "N")]
    pub(crate) rate: Option<f64>,
    /// One point of the time series, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub(crate) interval_ms: u64,
    /// Tools to run beside it, in turns; one that is not installed is left out, and that is said.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) vs: Vec<Tool>,
    /// Where `serve` runs, for TCP. Default: a process of its own on this machine.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) to: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) ends: RdmaEndsArgs,
    /// Let the kernel choose the cores of both ends.
    #[arg(long)]
    pub(crate) no_pin: bool,
}

/// What carries messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Carrier {
    /// TCP: plain calls that sleep until something comes.
    Tcp,
    /// TCP without sleeping: both ends look again and again.
    TcpPoll,
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
    /// RDMA.
    Perftest,
    /// TCP.
    Sockperf,
    /// TCP.
    Qperf,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to wait for benchmarks. Whoever reaches it can have it use memory and processors:
    /// nothing else is given away.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: SocketAddr,
    /// End with the first benchmark.
    #[arg(long)]
    pub(crate) once: bool,
    /// The core to run on.
    #[arg(long, value_name = "N")]
    pub(crate) cpu: Option<usize>,
}

/// Arguments of `rdma-vs-qemu`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct RdmaVsQemuArgs {
    #[command(flatten)]
    pub(crate) ends: RdmaEndsArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) turns: u32,
    /// The guest's memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub(crate) mib: u64,
    /// Whether it is written to meanwhile.
    #[arg(long, value_enum, default_value_t = Cases::Both)]
    pub(crate) cases: Cases,
    /// What is written to over and over, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    pub(crate) hot_mib: u64,
    /// How much is written in a second, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 8.0)]
    pub(crate) dirty_mib_per_s: f64,
    /// Our lanes.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) lanes: u16,
    /// Only contenders whose name contains one of these (comma-separated).
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Further arguments for `pageferry migrate`, in one word.
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    pub(crate) migrate_args: String,
    /// Further arguments for `pageferry target`, in one word.
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    pub(crate) target_args: String,
}

/// Whether the guest is written to meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cases {
    /// Never.
    Idle,
    /// Always.
    Dirty,
    /// One and the other.
    Both,
}

impl Cases {
    pub(crate) fn dirty(self) -> &'static [bool] {
        match self {
            Self::Idle => &[false],
            Self::Dirty => &[true],
            Self::Both => &[false, true],
        }
    }
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
    /// As told, or as `tests/rdma-vm/run` says in the environment.
    pub(crate) fn resolve(&self) -> Result<RdmaEnds, BenchError> {
        let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        let address = |told: Option<IpAddr>, name| told.or_else(|| variable(name)?.parse().ok());
        let what = "no RDMA device is known: --local, --peer and --device, or run it by `rdma-vm`";
        let missing = || BenchError::Usage { what };
        Ok(RdmaEnds {
            local: address(self.local, "PF_LOCAL_ADDR").ok_or_else(missing)?,
            peer: address(self.peer, "PF_PEER_ADDR").ok_or_else(missing)?,
            device: self.device.clone().or_else(|| variable("PF_RDMA_DEV")).ok_or_else(missing)?,
        })
    }
}

/// Arguments of `rdma-vs-perftest`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct RdmaVsPerftestArgs {
    #[command(flatten)]
    pub(crate) ends: RdmaEndsArgs,
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
    /// Let the kernel choose the cores of both ends, ours and perftest's.
    #[arg(long)]
    pub(crate) no_pin: bool,
}

/// What all benchmarks take.
#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// What joins the two ends.
    #[arg(long, value_enum, default_value_t = NetKind::Loopback)]
    pub(crate) net: NetKind,
    /// TCP congestion control for everyone, where the ends are namespaces (root). Default: the
    /// machine's.
    #[arg(long, value_name = "NAME")]
    pub(crate) congestion: Option<String>,
    /// Times each contender runs. Default: 5, or 2 with --quick.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) turns: Option<u32>,
    /// Small sizes and few settings, to see that everything works. The numbers mean little.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Which QEMU runs the guest and, for comparison, moves it.
    #[arg(long, value_enum, default_value_t = WhichQemu::System)]
    pub(crate) qemu: WhichQemu,
    /// What guest memory is made of. Default: hugetlbfs for root, else tmpfs; see each benchmark.
    #[arg(long, value_enum)]
    pub(crate) memory: Option<MemoryKind>,
    /// Further arguments for `pageferry migrate`, in one word: --migrate-args "--lanes 2".
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    pub(crate) migrate_args: String,
    /// Further arguments for `pageferry target`, in one word.
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    pub(crate) target_args: String,
    /// Everything measured, every sample, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

impl Common {
    /// Times each contender runs.
    pub(crate) fn turns(&self) -> u32 {
        self.turns.unwrap_or(if self.quick { 2 } else { 5 })
    }
}

/// A QEMU that can be had here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WhichQemu {
    /// The installed one.
    System,
    /// The version that Debian also has: from backports, downloaded on first use.
    Other,
}

/// What joins source and target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetKind {
    /// The loopback device (of a namespace of its own for root).
    Loopback,
    /// Two network namespaces joined by veth. Needs root.
    Veth,
}

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryKind {
    /// 2 MiB pages of a hugetlbfs of our own. Needs root.
    Hugetlbfs,
    /// 4 KiB pages of /dev/shm.
    Tmpfs,
}

/// Arguments of `migrate-vs-qemu`.
#[derive(Debug, Args)]
pub(crate) struct MigrateVsQemuArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Incompressible guest memory in MiB. Default: 2048, or 256 with --quick.
    #[arg(long, value_name = "MIB")]
    pub(crate) mib: Option<u64>,
    /// Which tables to make.
    #[arg(long, value_enum, default_value_t = Tables::Both)]
    pub(crate) tables: Tables,
    /// Only contenders whose name contains one of these (comma-separated).
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Seconds that memory given back stays away before it is reserved again as fresh.
    #[arg(long, value_name = "SECONDS", default_value_t = 4.0)]
    pub(crate) cold_wait: f64,
}

/// Which tables to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tables {
    /// Target memory touched before.
    Warm,
    /// Fresh target memory.
    Cold,
    /// One after the other.
    Both,
}

/// Arguments of `slowdown`.
#[derive(Debug, Args)]
pub(crate) struct SlowdownArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Guest memory that the program fills, in MiB. Default: 2048, or 512 with --quick.
    #[arg(long, value_name = "MIB")]
    pub(crate) mib: Option<u64>,
    /// Memory that the writer rewrites over and over, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub(crate) hot_mib: u64,
    /// Virtual processors, each with a writer. One leaves the other core to the agents.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) smp: u32,
    /// Pages that the writers rewrite per second at most; 0 is no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) write_rate: u64,
    /// Speeds of the link to measure at, in Mbit/s; 0 is unshaped. Others need --net veth.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0")]
    pub(crate) link_mbit: Vec<u64>,
}

/// Arguments of `rails`.
#[derive(Debug, Args)]
pub(crate) struct RailsArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Incompressible guest memory in MiB. Default: 384, or 96 with --quick.
    #[arg(long, value_name = "MIB")]
    pub(crate) mib: Option<u64>,
    /// Rate of each link; low enough that the processor is not the limit.
    #[arg(long, value_name = "MBIT", default_value_t = 200)]
    pub(crate) mbit: u64,
}

/// Arguments of `sparse`.
#[derive(Debug, Args)]
pub(crate) struct SparseArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Size of the large guest in MiB. Default: 16384, or 4096 with --quick.
    #[arg(long, value_name = "MIB")]
    pub(crate) large_mib: Option<u64>,
    /// Size of the small guest in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub(crate) small_mib: u64,
    /// Memory that is populated in either, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 200)]
    pub(crate) populated_mib: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
