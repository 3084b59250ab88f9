//! Arguments; every default is said in the help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
