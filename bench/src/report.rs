//! `report`: one command that measures this machine beside all the tools, and makes one page of it.
//!
//! Each part is this program again, with arguments that stand in the page: what it says is read from
//! the JSON that it writes. Those over RDMA run in the virtual machine, once with each device.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::args::{OutputArgs, ReportArgs};
use crate::error::BenchError;
use crate::results::Results;
use crate::{files, interrupt, output};

/// A part that takes longer hangs: the longest takes a quarter of it.
const PART_SECONDS_MAX: &str = "5400";

/// One benchmark of the report.
struct Part {
    title: &'static str,
    /// In the virtual machine: further arguments for it.
    machine: Option<&'static str>,
    /// The benchmark, and options with a value each.
    arguments: &'static str,
    /// Options that have other values where only a look is wanted.
    quick: &'static str,
}

const SHORT: &str = "--sizes 4096 --operations 500";

/// All of them, in the order of the page.
const PARTS: &[Part] = &[
    Part {
        title: "TCP latency beside sockperf and qperf",
        machine: None,
        arguments: "latency --over tcp,tcp-poll,tcp-uring --vs sockperf,qperf --sizes 8,64,4096,65536,1048576 --operations 10000",
        quick: SHORT,
    },
    Part {
        title: "TCP throughput beside iperf3, qperf and sockperf",
        machine: None,
        arguments: "throughput --over tcp,tcp-uring,tcp-zero-copy,tcp-lanes,tcp-lanes-plain --vs iperf3,qperf,sockperf --sizes 4096,65536,1048576 --lanes 1,2",
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
        arguments: "migrate --vs qemu --mib 1024 --dirty-mib-per-s 0,100 --hot-mib 64 --channels 0,2,4,8",
        quick: "--mib 64 --dirty-mib-per-s 0 --channels 0",
    },
    Part {
        title: "Whole migrations beside QEMU: a link of 1 Gbit/s",
        machine: None,
        arguments: "migrate --vs qemu --mib 256 --dirty-mib-per-s 0,20 --hot-mib 32 --packing-percent 0,75 --net veth --link-mbit 1000",
        quick: "--mib 64 --dirty-mib-per-s 0 --packing-percent 0 --channels 0",
    },
    Part {
        title: "RDMA latency beside perftest and qperf",
        machine: Some(""),
        arguments: "latency --over rdma-write,rdma-read,rdma-send --vs perftest,qperf --sizes 8,4096,65536 --operations 2000 --warm-up 100",
        quick: SHORT,
    },
    Part {
        title: "RDMA throughput beside perftest and qperf",
        machine: Some(""),
        arguments: "throughput --over rdma-write,rdma-lanes --vs perftest,qperf --sizes 65536,1048576 --lanes 1,4 --depths 128 --mib 32 --memory-mib 8",
        quick: "--sizes 65536 --lanes 1 --mib 8",
    },
    Part {
        title: "Guest pages over RDMA: rounds and faults",
        machine: Some(""),
        arguments: "pages --over rdma --vs perftest --memory-mib 32 --operations 500 --warm-up 20",
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
        arguments: "rdma-vs-qemu",
        quick: "--mib 32 --cases idle",
    },
];

impl Part {
    /// The command line, without the program.
    fn words(&self, quick: bool) -> Vec<&'static str> {
        let mut words: Vec<&str> = self.arguments.split_ascii_whitespace().collect();
        let quick: Vec<&str> =
            if quick { self.quick.split_ascii_whitespace().collect() } else { Vec::new() };
        for option in quick.chunks(2) {
            match words.iter().position(|word| *word == option[0]) {
                Some(at) => words[at + 1] = option[1],
                None => words.extend(option),
            }
        }
        words
    }
}

/// The command.
pub(crate) fn run(args: &ReportArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("report", json!(args));
    results.title = Some("Pageferry beside the tools people trust".into());
    let shown = args.out.display();
    std::fs::create_dir_all(&args.out).map_err(BenchError::io("make", shown))?;
    for part in PARTS {
        let places: &[Option<&str>] = match part.machine {
            None => &[None],
            Some(_) if args.no_vm => &[],
            Some(_) => &[Some("rxe"), Some("siw")],
        };
        for &device in places {
            interrupt::check()?;
            let title = match device {
                None => part.title.to_owned(),
                Some(device) => format!("{}: {device}", part.title),
            };
            if !args.only.is_empty() && !args.only.iter().any(|word| title.contains(word.as_str()))
            {
                continue;
            }
            output::progress(&format!("== {title}"));
            match run_part(args, part, device, &title, &mut results.not_run) {
                Ok(of_part) => results.parts.push(Results { title: Some(title), ..of_part }),
                // The others are no worse for it.
                Err(error) => results.not_run.push(format!("{title}: {}", error.chain())),
            }
            // After each, so that an hour is not lost with its last minute.
            results.write_folder(&args.out)?;
        }
    }
    results.finish(&OutputArgs { json: None, out: Some(args.out.clone()) })?;
    println!("{}", args.out.join("results.html").display());
    Ok(())
}

/// Runs one part; what it left out is added to `not_run`.
fn run_part(
    args: &ReportArgs,
    part: &Part,
    device: Option<&str>,
    title: &str,
    not_run: &mut Vec<String>,
) -> Result<Results, BenchError> {
    let folder = args.out.join(files::plain(title));
    std::fs::create_dir_all(&folder).map_err(BenchError::io("make", folder.display()))?;
    // The machine's file system is this one's, under the same names.
    let folder =
        std::fs::canonicalize(&folder).map_err(BenchError::io("find", folder.display()))?;
    let program = std::env::current_exe().map_err(BenchError::io("find", "this program"))?;
    let mut command = Command::new(program);
    if let (Some(device), Some(more)) = (device, part.machine) {
        command.args(["rdma-vm", "--driver", device, "--timeout", PART_SECONDS_MAX, "--writable"]);
        command.arg(&folder).args(more.split_ascii_whitespace()).arg("--");
    }
    command.args(part.words(args.quick)).args(["--turns", &args.turns.to_string()]);
    command.arg("--out").arg(&folder);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(BenchError::io("run", title))?;
    let out = child.stdout.take().expect("piped");
    for line in BufReader::new(out).lines().map_while(Result::ok) {
        println!("{line}");
        if let Some(skipped) = line.strip_prefix("SKIP ") {
            not_run.push(format!("{title}: {skipped}"));
        }
    }
    let status = child.wait().map_err(BenchError::io("wait for", title))?;
    let results = Results::read(Path::new(&folder.join("results.json")));
    match status.success() {
        true => results,
        false => {
            let (program, said) = (title.to_owned(), "see above".into());
            Err(BenchError::Program { program, status, said })
        }
    }
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
