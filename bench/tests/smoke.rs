//! The benchmarks run and write what they promise. The numbers are of no interest here.
#![forbid(unsafe_code)]

use std::process::Command;

use pageferry_ctl::lab::{is_root, skip};
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Runs the benchmarks' program; the JSON report, or nothing if this machine can't.
fn bench(name: &str, arguments: &[&str]) -> Result<Option<Value>, Box<dyn std::error::Error>> {
    if !is_root() {
        skip(name, "needs root");
        return Ok(None);
    }
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("report.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    let output = command.args(arguments).arg("--quick").arg("--json").arg(&json).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if said.contains("error: ") && said.contains("is missing") {
        skip(name, said.lines().last().unwrap_or_default());
        return Ok(None);
    }
    assert!(output.status.success(), "{said}");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    Ok(Some(serde_json::from_slice(&std::fs::read(&json)?)?))
}

#[test]
fn migrate_vs_qemu_compares_everyone() -> Outcome {
    let only = "pageferry,qemu plain,iperf3,sockets";
    let arguments =
        ["migrate-vs-qemu", "--turns", "1", "--mib", "64", "--tables", "warm", "--only", only];
    let Some(report) = bench("migrate_vs_qemu_compares_everyone", &arguments)? else {
        return Ok(());
    };
    let all = report["series"].as_array().ok_or("no series")?;
    for wanted in ["pageferry", "qemu plain", "iperf3", "sockets"] {
        let of = |series: &&Value| series["by"].as_str().is_some_and(|n| n.starts_with(wanted));
        let series = all.iter().find(of).ok_or(wanted)?;
        assert_eq!(series["failures"], serde_json::json!([]), "{series:#}");
        assert_eq!(series["runs"].as_array().map(Vec::len), Some(1));
        let run = &series["runs"][0];
        assert!(run["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{series:#}");
        let is_migration = series["kind"] == "migration";
        assert!(!is_migration || run["said"]["pause_ms"].is_f64(), "{series:#}");
    }
    let method = report["method"].as_str().ok_or("no method")?;
    assert!(method.contains("STOP event") && report["host"]["kernel"].is_string());
    Ok(())
}

fn run(arguments: &[&str]) -> std::io::Result<std::process::Output> {
    Command::new(env!("CARGO_BIN_EXE_pageferry-bench")).args(arguments).output()
}

/// The results of a benchmark of wires, each of whose series has run this often.
fn series_of(arguments: &[&str], runs: usize) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("results.json").display().to_string();
    let output = run(&[arguments, &["--json", &json]].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let results: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    assert!(results["host"]["kernel"].is_string() && results["parameters"]["all"].is_object());
    assert!(results["method"].as_str().is_some_and(|method| method.len() > 100));
    let shown = run(&["show", &json])?;
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    let series = results["series"].as_array().ok_or("no series")?.clone();
    for series in &series {
        assert_eq!(series["failures"], serde_json::json!([]), "{series:#}");
        assert_eq!(series["runs"].as_array().map(Vec::len), Some(runs), "{series:#}");
    }
    Ok(series)
}

fn by(series: &[Value]) -> Vec<&str> {
    series.iter().filter_map(|series| series["by"].as_str()).collect()
}

/// Loopback is enough, and no privilege is needed.
#[test]
fn latency_writes_everything_it_promises() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path().display().to_string();
    let arguments = ["latency", "--over", "tcp", "--sizes", "64", "--turns", "2"];
    let more = ["--operations", "300", "--warm-up", "50", "--interval-ms", "1", "--out", &out];
    let output = run(&[&arguments[..], &more].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name));
    let results: Value = serde_json::from_str(&read("results.json")?)?;
    let runs = results["series"][0]["runs"].as_array().ok_or("no runs")?;
    assert_eq!(runs.len(), 2, "{results:#}");
    assert_eq!(runs[0]["distribution"]["count"], 300, "the warm-up does not count");
    assert!(results["host"]["kernel"].is_string() && results["parameters"]["command"].is_array());
    let page = read("results.html")?;
    assert!(page.contains("<svg") && page.ends_with("</html>\n"));
    // Names of the format, which nobody fetches.
    let page = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("<script"));
    assert!(read("tcp-64-b-pageferry-bench.hgrm")?.contains("#[Max"));
    assert!(read("tcp-64-b-pageferry-bench.hlog")?.contains("Tag=turn-1,"));
    assert!(read("tcp-64-b-percentiles.svg")?.starts_with("<svg"));
    let json = folder.path().join("results.json").display().to_string();
    assert!(run(&["compare", &json, &json])?.status.success());
    assert!(!run(&["compare", &json, &out])?.status.success());
    Ok(())
}

#[test]
fn every_way_over_tcp_is_measured() -> Outcome {
    let over = "tcp,tcp-poll,tcp-uring";
    let arguments = ["latency", "--over", over, "--sizes", "8,10000", "--turns", "1"];
    let series = series_of(&[&arguments[..], &["--operations", "200"]].concat(), 1)?;
    assert_eq!(series.len(), 6);

    let over = "tcp,tcp-uring,tcp-zero-copy,tcp-lanes,tcp-lanes-plain";
    let arguments = ["throughput", "--over", over, "--sizes", "100,8192", "--lanes", "2"];
    let short = ["--seconds", "0.3", "--warm-up-seconds", "0.1", "--interval-ms", "20"];
    let series = series_of(&[&arguments[..], &short, &["--turns", "1"]].concat(), 1)?;
    assert_eq!(series.len(), 8, "no lanes with extents of 100 bytes: {:?}", by(&series));
    for series in &series {
        let run = &series["runs"][0];
        assert!(run["bytes"].as_u64() > Some(0) && run["intervals"][0].is_object(), "{series:#}");
    }
    Ok(())
}

/// Both ends in namespaces of their own, over a link of a known speed.
#[test]
fn a_shaped_link_is_filled_and_not_more() -> Outcome {
    if !is_root() {
        skip("a_shaped_link_is_filled_and_not_more", "needs root");
        return Ok(());
    }
    let link = ["throughput", "--over", "tcp", "--net", "veth", "--link-mbit", "200"];
    let short = ["--sizes", "65536", "--seconds", "1", "--turns", "1", "--interval-ms", "20"];
    let series = series_of(&[&link[..], &short].concat(), 1)?;
    let run = &series[0]["runs"][0];
    let rate = run["bytes"].as_f64().ok_or("bytes")? / run["seconds"].as_f64().ok_or("seconds")?;
    assert!((10e6..27e6).contains(&rate), "{rate} of 25e6 bytes/s");
    Ok(())
}

/// Those that are installed stand beside ours in the same file; the others are named.
#[test]
fn tools_stand_beside_ours() -> Outcome {
    let tools = ["sockperf", "qperf", "iperf3"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |tool: &&str| std::env::split_paths(&path).any(|p| p.join(tool).exists());
    let there: Vec<&str> = tools.iter().copied().filter(|tool| is_there(tool)).collect();
    for tool in tools.iter().filter(|tool| !there.contains(*tool)) {
        skip("tools_stand_beside_ours", format!("{tool} is not installed"));
    }
    let arguments = ["latency", "--vs", "sockperf,qperf", "--sizes", "64", "--turns", "1"];
    let series = series_of(&[&arguments[..], &["--operations", "200"]].concat(), 1)?;
    for tool in there.iter().filter(|tool| **tool != "iperf3") {
        assert!(by(&series).iter().any(|by| by.starts_with(tool)), "{tool}: {:?}", by(&series));
    }
    let arguments = ["throughput", "--over", "tcp", "--vs", "iperf3,sockperf,qperf"];
    let short = ["--sizes", "16384", "--seconds", "0.5", "--turns", "1"];
    let series = series_of(&[&arguments[..], &short].concat(), 1)?;
    for tool in there {
        assert!(by(&series).iter().any(|by| by.starts_with(tool)), "{tool}: {:?}", by(&series));
    }
    Ok(())
}

/// 4 KiB pages need no privilege where a process may track its own writes.
#[test]
fn scans_find_what_was_written() -> Outcome {
    let arguments = ["scan", "--page-sizes", "4k", "--mib", "16", "--written-percent", "0,10"];
    let more = ["--patterns", "scattered,together", "--scans", "3", "--turns", "1"];
    let probe = pageferry_datapath::tracker::probe::probe(4096, Default::default());
    if let Err(error) = probe {
        skip("scans_find_what_was_written", error.to_string());
        return Ok(());
    }
    let series = series_of(&[&arguments[..], &more].concat(), 1)?;
    // Start and stop; scans in one and two phases of two parts and two patterns; writers of one.
    assert_eq!(series.len(), 2 + 2 * 2 * 2 + 2 * 2, "{:?}", by(&series));
    Ok(())
}

#[test]
fn pages_are_moved_in_rounds_and_one_by_one() -> Outcome {
    let arguments = ["pages", "--memory-mib", "16", "--seconds", "0.2", "--turns", "1"];
    let more = ["--warm-up-seconds", "0.1", "--operations", "50", "--warm-up", "5"];
    let series = series_of(&[&arguments[..], &more].concat(), 1)?;
    assert_eq!(series.len(), 8, "{:?}", by(&series));
    Ok(())
}

/// One guest of half-empty pages, moved by both.
#[test]
fn a_chosen_guest_is_moved_by_both() -> Outcome {
    let name = "a_chosen_guest_is_moved_by_both";
    let arguments = ["migrate", "--vs", "qemu", "--channels", "0", "--mib", "48"];
    let more = ["--packing-percent", "50", "--turns", "1", "--memory", "tmpfs"];
    let Some(report) = bench(name, &[&arguments[..], &more].concat())? else { return Ok(()) };
    let series = report["series"].as_array().ok_or("no series")?;
    assert_eq!(by(series), ["pageferry", "qemu plain"]);
    for series in series {
        assert_eq!(series["failures"], serde_json::json!([]), "{series:#}");
        assert!(series["runs"][0]["said"]["pause_ms"].is_f64(), "{series:#}");
    }
    assert_eq!(report["ratios"].as_array().map(Vec::len), Some(4));
    Ok(())
}

/// The page has a section for each part, and what is left out is named.
#[test]
fn a_report_is_one_page_that_can_be_compared() -> Outcome {
    if pageferry_datapath::tracker::probe::probe(4096, Default::default()).is_err() {
        skip("a_report_is_one_page_that_can_be_compared", "no dirty tracking here");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let out = folder.path().display().to_string();
    let only = ["--only", "Dirty tracking", "--no-vm", "--turns", "1"];
    let output = run(&[&["report", "--quick", "--out", &out], &only[..]].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = std::fs::read_to_string(folder.path().join("results.html"))?;
    assert!(page.contains("id=\"part-0\">Dirty tracking</h1>") && page.ends_with("</html>\n"));
    assert!(folder.path().join("dirty-tracking/results.html").exists());
    let json = folder.path().join("results.json").display().to_string();
    assert!(run(&["compare", &json, &json])?.status.success());
    Ok(())
}
