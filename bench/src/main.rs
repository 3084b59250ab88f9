//! Benchmarks of Pageferry beside the tools people trust.
//!
//! ```text
//! migrate_vs_qemu   the same guest memory by us, by QEMU, by iperf3 and by bare sockets
//! slowdown          what a writing guest loses while it is moved
//! sparse            what memory that was never touched costs
//!        └─ rig     one guest that hops from QEMU to QEMU; by pageferry or by QEMU's migration
//! ```
//! Everything is measured from outside: QMP events, `/proc`, `getrusage` of ended children, the
//! guest's console. The method is printed before the numbers; it stands in `docs/benchmarks.md`.
#![forbid(unsafe_code)]

mod args;
mod ceiling;
mod contender;
mod cpu;
mod error;
mod goals;
mod host;
mod interrupt;
mod iperf;
mod memory;
mod method;
mod migrate_vs_qemu;
mod moved;
mod net;
mod ours;
mod output;
mod pause;
mod qemu;
mod report;
mod rig;
mod screening;
mod slowdown;
mod sparse;
mod stats;
mod table;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    // Numbers mean nothing beside a test that runs guests, nor do a test's bounds beside these.
    let _alone = pageferry_ctl::lab::one_at_a_time();
    let done = interrupt::catch().and_then(|()| match &cli.command {
        args::Command::MigrateVsQemu(args) => migrate_vs_qemu::run(args),
        args::Command::Slowdown(args) => slowdown::run(args),
        args::Command::Sparse(args) => sparse::run(args),
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
