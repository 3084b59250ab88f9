//! Benchmarks of Pageferry beside the tools people trust.
//!
//! ```text
//! wires    latency, throughput, pages, cores, rdma_vs_perftest
//!            └─ ends      this process and `serve`, another one (tcp_wire, stream_wire, rdma_wire,
//!                         lanes_wire, cores_wire); tools beside them (iperf, qperf, sockperf, perftest)
//! memory   scan, register
//! guests   migrate, migrate_vs_qemu, slowdown, rails, sparse, rdma_vs_qemu
//!          link_table, ways, drain_table: over shaped links
//!            └─ rig       one guest that hops from QEMU to QEMU; by pageferry or by QEMU's migration
//! all      turns          everyone in turn; recorder: samples of a run; series: all of somebody's
//!          results        tables, JSON, html and svg, files (.hgrm, .hlog); compare, show
//!          report         all of them, one after the other, as one page (parts)
//! ```
//! Whole migrations are measured from outside: QMP events, `/proc`, `getrusage` of ended children, the
//! guest's console. The method is printed before the numbers; it stands in `docs/benchmarks.md`.
#![forbid(unsafe_code)]

mod args;
mod ceiling;
mod compare;
mod confidence;
mod contender;
mod cores;
mod cores_wire;
mod cpu;
mod distribution;
mod drain_table;
mod ends;
mod error;
mod files;
mod goals;
mod halted;
mod host;
mod html;
mod interrupt;
mod iperf;
mod lanes_wire;
mod latency;
mod link_table;
mod machine;
mod memory;
mod method;
mod migrate;
mod migrate_vs_qemu;
mod moved;
mod net;
mod ours;
mod output;
mod pages;
mod parts;
mod pause;
mod perftest;
mod places;
mod plots;
mod program;
mod qemu;
mod qperf;
mod rails;
mod rdma_vm;
mod rdma_vs_perftest;
mod rdma_vs_qemu;
mod rdma_wire;
mod recorder;
mod register;
mod report;
mod results;
mod rig;
mod scan;
mod screening;
mod series;
mod serve;
mod shaped;
mod slowdown;
mod sockperf;
mod sparse;
mod stats;
mod stream_wire;
mod svg;
mod table;
mod tcp_wire;
mod throughput;
mod tools;
mod turns;
mod ways;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    // Numbers mean nothing beside a test that runs guests, nor do a test's bounds beside these.
    let _alone = match cli.command {
        // These measure nothing themselves, and the machine in `rdma-vm` has a lock of its own.
        // Each part of a report takes the lock itself.
        args::Command::Serve(_)
        | args::Command::Compare(_)
        | args::Command::Show(_)
        | args::Command::Ways(_)
        | args::Command::Report(_) => None,
        _ => pageferry_ctl::lab::one_at_a_time(),
    };
    let done = interrupt::catch().and_then(|()| match &cli.command {
        args::Command::MigrateVsQemu(args) => migrate_vs_qemu::run(args),
        args::Command::Slowdown(args) => slowdown::run(args),
        args::Command::Sparse(args) => sparse::run(args),
        args::Command::Rails(args) => rails::run(args),
        args::Command::DrainTable(args) => drain_table::run(args),
        args::Command::LinkTable(args) => link_table::run(args),
        args::Command::Ways(args) => ways::run(args),
        args::Command::Cores(args) => cores::run(args),
        args::Command::RdmaVsPerftest(args) => rdma_vs_perftest::run(args),
        args::Command::RdmaVsQemu(args) => rdma_vs_qemu::run(args),
        args::Command::Compare(args) => compare::run(args),
        args::Command::Latency(args) => latency::run(args),
        args::Command::Throughput(args) => throughput::run(args),
        args::Command::Scan(args) => scan::run(args),
        args::Command::Register(args) => register::run(args),
        args::Command::Pages(args) => pages::run(args),
        args::Command::Migrate(args) => migrate::run(args),
        args::Command::Report(args) => report::run(args),
        args::Command::Show(args) => {
            results::Results::read(&args.results).and_then(|read| read.finish(&args.output))
        }
        args::Command::RdmaVm(args) => rdma_vm::run(args),
        args::Command::Serve(args) => serve::run(args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.chain());
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            error.exit_code().into()
        }
    }
}
