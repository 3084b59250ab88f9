//! Arguments; every default is said in the help.

mod guests;
mod memory;
mod wires;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;

pub(crate) use guests::*;
pub(crate) use memory::*;
pub(crate) use wires::*;

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
    /// Guests of four sizes, idle and loaded, over links of 1 and 10 Gbit/s: total, brown-out, pause,
    /// share of the link used; the largest one also by QEMU's multifd, without and with zstd.
    LinkTable(crate::link_table::LinkTableArgs),
    /// One guest over TCP, compressed, over two rails and, in the virtual machine, over RDMA.
    Ways(crate::ways::WaysArgs),
    /// What every core does while one lane and several move memory over TCP, each on a receive queue
    /// of its own or wherever the NIC puts it. `rdma-vm --topology two-guests --queues 2` gives NICs
    /// with several queues.
    Cores(crate::cores::CoresArgs),
    /// Our RDMA WRITEs beside perftest's ib_write_bw and ib_write_lat, in turns. Runs where there
    /// is an RDMA device; `rdma-vm` gives one.
    RdmaVsPerftest(RdmaVsPerftestArgs),
    /// Whole migrations over RDMA of a guest that does nothing, by us and by QEMU, in turns. Runs
    /// where there is an RDMA device and a kernel from 6.7 on; `rdma-vm` gives both.
    RdmaVsQemu(RdmaVsQemuArgs),
    /// What became of each series from one JSON of results to another; exit code 1 if any reading
    /// became worse for sure (which takes two runs at least) or a series has no run any more, 2 if
    /// they can't be compared.
    Compare(CompareArgs),
    /// Latency of messages over TCP and RDMA, as distributions, beside the tools people trust.
    Latency(LatencyArgs),
    /// Streams over TCP and RDMA by message size, lanes and queue depth, with and without copying,
    /// beside the tools people trust.
    Throughput(ThroughputArgs),
    /// What dirty tracking costs for each GiB of memory, by page size and by how much of it is
    /// written.
    Scan(ScanArgs),
    /// What an RDMA device takes to register memory and to let go of it, for each GiB.
    Register(RegisterArgs),
    /// Random guest pages, as a round moves what was written, and as a guest waits for one.
    Pages(PagesArgs),
    /// Whole migrations of a guest of a chosen shape, over a chosen link, beside QEMU's own.
    Migrate(MigrateArgs),
    /// All of it: this machine beside all the tools, RDMA in the virtual machine, as one page.
    Report(ReportArgs),
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

/// Arguments of `report`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct ReportArgs {
    /// A folder for results.html, results.json, and a folder for each part.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// Times each contender runs.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) turns: u32,
    /// Small sizes and few settings, to see that everything works. The numbers mean little.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Without the parts over RDMA, which run in a virtual machine.
    #[arg(long)]
    pub(crate) no_vm: bool,
    /// Only parts whose title contains one of these (comma-separated).
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
}

/// Arguments of `rdma-vm`.
#[derive(Debug, Args)]
pub(crate) struct RdmaVmArgs {
    /// As `tests/rdma-vm/run` takes them, then `--` and a benchmark with its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) arguments: Vec<String>,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
