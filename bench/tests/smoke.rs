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
    let records = report["warm"].as_array().ok_or("no table")?;
    for wanted in ["pageferry", "qemu plain", "iperf3", "sockets"] {
        let of = |record: &&Value| record["name"].as_str().is_some_and(|n| n.starts_with(wanted));
        let record = records.iter().find(of).ok_or(wanted)?;
        assert_eq!(record["failures"], serde_json::json!([]), "{record:#}");
        let throughput = &record["metrics"]["moving_gib_per_s"];
        assert!(throughput["median"].as_f64().is_some_and(|median| median > 0.0), "{record:#}");
        assert_eq!(throughput["samples"].as_array().map(Vec::len), Some(1));
    }
    let method = report["method"].as_str().ok_or("no method")?;
    assert!(method.contains("STOP event") && report["host"]["kernel"].is_string());
    Ok(())
}

/// Loopback is enough, and no privilege is needed.
#[test]
fn latency_writes_everything_it_promises() -> Outcome {
    let folder = tempfile::tempdir()?;
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
        command.args(arguments).output()
    };
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
