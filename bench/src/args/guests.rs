//! Arguments of the benchmarks that move guests.

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{OutputArgs, RdmaEndsArgs, Tool};

/// What all benchmarks take.
#[derive(Clone, Debug, Args, Serialize)]
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
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl Common {
    /// Times each contender runs.
    pub(crate) fn turns(&self) -> u32 {
        self.turns.unwrap_or(if self.quick { 2 } else { 5 })
    }
}

/// A QEMU that can be had here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WhichQemu {
    /// The installed one.
    System,
    /// The version that Debian also has: from backports, downloaded on first use.
    Other,
}

/// What joins source and target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NetKind {
    /// The loopback device (of a namespace of its own for root).
    Loopback,
    /// Two network namespaces joined by veth. Needs root.
    Veth,
}

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemoryKind {
    /// 2 MiB pages of a hugetlbfs of our own. Needs root.
    Hugetlbfs,
    /// 4 KiB pages of /dev/shm.
    Tmpfs,
}

/// Arguments of `migrate`.
#[derive(Clone, Debug, Args, Serialize)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) common: Common,
    /// Guest memory that its program fills, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub(crate) mib: u64,
    /// How much of it is written in a second, in MiB; 0 is next to nothing, `inf` as fast as it can.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0")]
    pub(crate) dirty_mib_per_s: Vec<f64>,
    /// What is written over and over, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) hot_mib: u64,
    /// It is written in a scattered order instead of upwards.
    #[arg(long)]
    pub(crate) scattered: bool,
    /// Part of each page, in percent, that a codec makes next to nothing of.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u32).range(..=100))]
    pub(crate) packing_percent: Vec<u32>,
    /// The guest's virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) smp: u32,
    /// Speeds of the link in Mbit/s; 0 is unshaped. Others need --net veth.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0")]
    pub(crate) link_mbit: Vec<u64>,
    /// Target memory that was never touched before.
    #[arg(long)]
    pub(crate) cold: bool,
    /// Ways of `pageferry migrate --compress` to take turns, the first beside each other: auto,off.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) compress: Vec<String>,
    /// Who else moves it, in turns: qemu.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) vs: Vec<Tool>,
    /// QEMU's multifd channels to try; 0 is its plain stream.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,4")]
    pub(crate) channels: Vec<u8>,
    /// QEMU's limit of the pause in ms. Default: its own, 300.
    #[arg(long, value_name = "MS")]
    pub(crate) downtime_ms: Option<u64>,
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
