//! Benchmarks of Pageferry beside the tools people trust.
//!
//! ```text
//! migrate_vs_qemu   the same guest memory by us, by QEMU, by iperf3 and by bare sockets
//! slowdown          what a writing guest loses while it is moved
//! rails             several links beside one
//! drain_table       many guests of a host, emptied over links of several speeds
//! sparse            what memory that was never touched costs
//!        └─ rig     one guest that hops from QEMU to QEMU; by pageferry or by QEMU's migration
//! ```
//! Messages, as whole distributions, and RDMA beside other tools:
//! ```text
//! rdma_vs_perftest, rdma_vs_qemu, latency
//!        ├─ serve      the other end, a process of its own (rdma_wire, lanes_wire, tcp_wire)
//!        ├─ recorder   samples of a run; distribution, series: what is kept of them
//!        └─ results    tables, JSON, html and svg, files (.hgrm, .hlog); compare
//! ```
//! Whole migrations are measured from outside: QMP events, `/proc`, `getrusage` of ended children, the
//! guest's console. The method is printed before the numbers; it stands in `docs/benchmarks.md`.
#![forbid(unsafe_code)]

mod args;
mod ceiling;
mod compare;
mod confidence;
mod contender;
mod cpu;
mod distribution;
mod drain_table;
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
mod machine;
mod memory;
mod method;
mod migrate_vs_qemu;
mod moved;
mod net;
mod ours;
mod output;
mod pause;
mod perftest;
mod qemu;
mod rails;
mod rdma_vm;
mod rdma_vs_perftest;
mod rdma_vs_qemu;
mod rdma_wire;
mod recorder;
mod report;
mod results;
mod rig;
mod screening;
mod series;
mod serve;
mod slowdown;
mod sparse;
mod stats;
mod svg;
mod table;
mod tcp_tools;
mod tcp_wire;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    // Numbers mean nothing beside a test that runs guests, nor do a test's bounds beside these.
    let _alone = match cli.command {
        // These measure nothing themselves, and the machine in `rdma-vm` has a lock of its own.
        args::Command::Serve(_) | args::Command::Compare(_) | args::Command::Show(_) => None,
        _ => pageferry_ctl::lab::one_at_a_time(),
    };
    let done = interrupt::catch().and_then(|()| match &cli.command {
        args::Command::MigrateVsQemu(args) => migrate_vs_qemu::run(args),
        args::Command::Slowdown(args) => slowdown::run(args),
        args::Command::Sparse(args) => sparse::run(args),
        args::Command::Rails(args) => rails::run(args),
        args::Command::DrainTable(args) => drain_table::run(args),
        args::Command::RdmaVsPerftest(args) => rdma_vs_perftest::run(args),
        args::Command::RdmaVsQemu(args) => rdma_vs_qemu::run(args),
        args::Command::Compare(args) => compare::run(args),
        args::Command::Latency(args) => latency::run(args),
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
            ExitCode::FAILURE
        }
    }
}
