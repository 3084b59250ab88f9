//! `report`: one command that measures this machine beside all the tools, and makes one page of it.
//!
//! Its parts are in the order of the page; see `parts` for how they are run.

use serde_json::json;

use crate::args::{OutputArgs, ReportArgs};
use crate::error::BenchError;
use crate::goals;
use crate::parts::{Part, Parts};
use crate::results::Results;

const SHORT: &str = "--sizes 4096 --operations 500";

/// perftest's memory would be on 2 MiB pages where the kernel gives them by itself, and ours, which is
/// shared as a guest's is, would not.
const SMALL_PAGES: &str = "--append transparent_hugepage=never";

/// All of them, in the order of the page.
const PARTS: &[Part] = &[
    Part {
        title: "TCP latency beside sockperf and qperf",
        machine: None,
        arguments: "latency --over tcp,tcp-poll,tcp-uring --vs sockperf,qperf --sizes 8,64,4096,65536,1048576 --operations 10000 --cpu-dma-latency 0",
        quick: SHORT,
    },
    Part {
        title: "TCP latency where idle cores halt",
        machine: None,
        arguments: "latency --over tcp,tcp-uring --sizes 64,4096 --operations 10000",
        quick: SHORT,
    },
    Part {
        title: "TCP throughput beside iperf3, qperf and sockperf",
        machine: None,
        arguments: "throughput --over tcp,tcp-receive-64k,tcp-uring,tcp-zero-copy,tcp-lanes --vs iperf3,qperf,sockperf --sizes 4096,65536,1048576 --lanes 1,2 --seconds 1 --warm-up-seconds 1",
        quick: "--sizes 65536 --lanes 1 --seconds 1 --warm-up-seconds 0",
    },
    Part {
        title: "Guest pages over TCP: rounds and faults",
        machine: None,
        arguments: "pages --over tcp",
        quick: "--memory-mib 32 --seconds 0.5 --operations 100",
    },
    Part {
        title: "Dirty tracking",
        machine: None,
        arguments: "scan --patterns scattered,together",
        quick: "--mib 64 --written-percent 0,10 --scans 2",
    },
    Part {
        title: "Whole migrations beside QEMU: loopback",
        machine: None,
        arguments: "migrate --vs qemu --mib 512 --dirty-mib-per-s 0,100 --hot-mib 64 --channels 0,4",
        quick: "--mib 64 --dirty-mib-per-s 0 --channels 0",
    },
    Part {
        title: "Whole migrations beside QEMU: a link of 1 Gbit/s",
        machine: None,
        arguments: "migrate --vs qemu --mib 256 --packing-percent 0,75 --net veth --link-mbit 1000 --memory tmpfs",
        quick: "--mib 64 --dirty-mib-per-s 0 --packing-percent 0 --channels 0",
    },
    Part {
        title: "RDMA latency beside perftest and qperf",
        machine: Some(SMALL_PAGES),
        arguments: "latency --over rdma-write,rdma-read,rdma-send --vs perftest,qperf --sizes 4096 --operations 2000 --warm-up 100",
        quick: SHORT,
    },
    Part {
        title: "RDMA throughput beside perftest and qperf",
        machine: Some(SMALL_PAGES),
        arguments: "throughput --over rdma-write,rdma-lanes --vs perftest,qperf --sizes 65536,1048576 --lanes 1,4 --depths 128 --mib 32 --memory-mib 8",
        quick: "--sizes 65536 --lanes 1 --mib 8",
    },
    Part {
        title: "Guest pages over RDMA: rounds and faults",
        machine: Some(""),
        arguments: "pages --over rdma --vs perftest --page-sizes 4k --memory-mib 32 --operations 500 --warm-up 20",
        quick: "--seconds 0.5 --operations 50",
    },
    Part {
        title: "RDMA registration",
        machine: Some("--hugepages 64"),
        arguments: "register --mib 64",
        quick: "--mib 16",
    },
    Part {
        title: "Whole migrations over RDMA beside QEMU",
        machine: Some("--kernel 6.12 --mem 1536"),
        arguments: "rdma-vs-qemu --cases idle",
        quick: "--mib 32",
    },
];

/// The command.
pub(crate) fn run(args: &ReportArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("report", json!(args));
    results.title = Some("Pageferry beside the tools people trust".into());
    let shown = args.out.display();
    std::fs::create_dir_all(&args.out).map_err(BenchError::io("make", shown))?;
    let interrupted = run_parts(args, &mut results);
    // What was measured until then is not lost.
    results.finish(&OutputArgs { json: None, out: Some(args.out.clone()) })?;
    println!("{}\n{}", goals::summary(&results), args.out.join("results.html").display());
    interrupted
}

fn run_parts(args: &ReportArgs, results: &mut Results) -> Result<(), BenchError> {
    let parts = Parts { out: &args.out, turns: args.turns, quick: args.quick };
    for part in PARTS.iter().filter(|part| part.machine.is_none() || !args.no_vm) {
        for (device, title) in part.places() {
            let is_wanted = |word: &String| title.contains(word.as_str());
            if args.only.is_empty() || args.only.iter().any(is_wanted) {
                parts.run_at(part, device, &title, results)?;
                // After each, so that half an hour is not lost with its last minute.
                results.write_folder(&args.out)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    /// An option that was renamed would only be found by the report, after half an hour.
    #[test]
    fn every_part_is_a_command_that_is_understood() {
        for part in PARTS {
            for quick in [false, true] {
                let more = ["--turns", "3", "--out", "x"];
                let words = ["pageferry-bench"].into_iter().chain(part.words(quick)).chain(more);
                let parsed = Cli::try_parse_from(words);
                assert!(parsed.is_ok(), "{}: {:?}", part.title, parsed.err());
            }
        }
    }
}
