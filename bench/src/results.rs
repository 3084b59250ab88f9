//! What a benchmark of distributions has measured: printed as tables, written as files.
//!
//! ```text
//!  Results ─▶ tables on standard output
//!          ─▶ --json FILE                     everything, to compare
//!          ─▶ --out FOLDER  results.json, results.html, plots (.svg), .hgrm and .hlog per series
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::OutputArgs;
use crate::distribution::QUANTILES;
use crate::error::BenchError;
use crate::goals::{self, Ratio};
use crate::machine::Machine;
use crate::method;
use crate::series::{Kind, Reading, Series};
use crate::stats::Stats;
use crate::table::{Table, cell};
use crate::{files, html};

/// Changes when readers of the JSON have to.
const FORMAT: u32 = 1;

/// All of one benchmark.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) format: u32,
    pub(crate) benchmark: String,
    pub(crate) method: String,
    pub(crate) host: Value,
    /// The command and every parameter with its value.
    pub(crate) parameters: Value,
    pub(crate) series: Vec<Series>,
    #[serde(default)]
    pub(crate) ratios: Vec<Ratio>,
}

impl Results {
    /// Looks at the machine, and prints what is measured and how.
    pub(crate) fn begin(benchmark: &str, parameters: Value) -> Self {
        let machine = Machine::here();
        let method = method::of_distributions(benchmark);
        println!("{benchmark}\n\nMethod\n{method}\n\nHost\n{}\n", machine.text());
        let command: Vec<String> = std::env::args().collect();
        Self {
            format: FORMAT,
            benchmark: benchmark.into(),
            method,
            host: json!(machine),
            parameters: json!({ "command": command, "all": parameters }),
            series: Vec::new(),
            ratios: Vec::new(),
        }
    }

    /// Prints the tables and writes what was asked for.
    pub(crate) fn finish(&self, output: &OutputArgs) -> Result<(), BenchError> {
        print!("{}", self.text());
        if let Some(path) = &output.json {
            self.write_json(path)?;
        }
        if let Some(folder) = &output.out {
            let shown = folder.display();
            std::fs::create_dir_all(folder).map_err(BenchError::io("make", shown))?;
            self.write_json(&folder.join("results.json"))?;
            let page = html::page(self);
            files::save(&folder.join("results.html"), |out| out.write_all(page.as_bytes()))?;
            for plot in html::plots(self) {
                let path = folder.join(plot.name + ".svg");
                files::save(&path, |out| out.write_all(plot.svg.as_bytes()))?;
            }
            files::write(folder, &self.series)?;
        }
        Ok(())
    }

    /// Reads what another run has written.
    pub(crate) fn read(path: &Path) -> Result<Self, BenchError> {
        let text = std::fs::read_to_string(path).map_err(BenchError::io("read", path.display()))?;
        let parsed: Result<Self, _> = serde_json::from_str(&text);
        match parsed {
            Ok(results) if results.format == FORMAT => Ok(results),
            Ok(results) => Err(not_ours(path, format!("format {}", results.format))),
            Err(error) => Err(not_ours(path, error.to_string())),
        }
    }

    /// The tables.
    pub(crate) fn text(&self) -> String {
        let of = |kind| self.series.iter().filter(move |s: &&Series| s.kind == kind);
        let mut parts = Vec::new();
        if of(Kind::Latency).next().is_some() {
            parts.push(latencies(of(Kind::Latency)));
        }
        if of(Kind::Throughput).next().is_some() {
            parts.push(rates("throughput", "MiB/s", Reading::BytesPerS, of(Kind::Throughput)));
        }
        if of(Kind::Cost).next().is_some() {
            parts.push(rates("cost", "s/GiB", Reading::SecondsPerGib, of(Kind::Cost)));
        }
        if !self.ratios.is_empty() {
            parts.push(goals::text(&self.ratios));
        }
        for series in &self.series {
            for failure in &series.failures {
                parts.push(format!("FAILED {}, {}: {failure}\n", series.group, series.by));
            }
        }
        parts.join("\n")
    }

    fn write_json(&self, path: &PathBuf) -> Result<(), BenchError> {
        let text = serde_json::to_string_pretty(self).expect("plain data");
        let failed = |source| BenchError::Report { path: path.clone(), source };
        std::fs::write(path, text + "\n").map_err(failed)
    }
}

fn not_ours(path: &Path, said: String) -> BenchError {
    BenchError::Unexpected { program: path.display().to_string(), said }
}

/// Medians of the runs' percentiles, in microseconds.
fn latencies<'a>(series: impl Iterator<Item = &'a Series>) -> String {
    let mut columns = vec!["latency, us", "by", "runs", "samples", "min", "mean"];
    columns.extend(QUANTILES.map(|(name, _)| name));
    let mut table = Table::new(&columns);
    for series in series {
        let all = series.distribution();
        let mut row = vec![series.group.clone(), series.by.clone()];
        row.push(series.runs.len().to_string());
        row.push(all.count().to_string());
        row.push(cell(Some(all.min() as f64 / 1e3), 2));
        row.push(cell((!all.is_empty()).then(|| all.mean() / 1e3), 2));
        for (_, quantile) in QUANTILES {
            let stats = Stats::of(series.readings(Reading::Quantile(quantile)));
            row.push(cell(stats.map(|stats| stats.median / 1e3), 2));
        }
        table.row(row);
    }
    table.text()
}

/// Median, least and largest of the runs.
fn rates<'a>(
    name: &str,
    unit: &str,
    reading: Reading,
    series: impl Iterator<Item = &'a Series>,
) -> String {
    let columns = [name, "by", "runs", unit, "min", "max", "CPU s/GiB"];
    let mut table = Table::new(&columns);
    let (scale, decimals) = match reading {
        Reading::BytesPerS => (f64::from(1 << 20), 1),
        _ => (1.0, 4),
    };
    for series in series {
        let stats = Stats::of(series.readings(reading).into_iter().map(|value| value / scale));
        let of = |read: fn(&Stats) -> f64| cell(stats.as_ref().map(read), decimals);
        let cpu = Stats::of(series.readings(Reading::CpuPerGib));
        table.row(vec![
            series.group.clone(),
            series.by.clone(),
            series.runs.len().to_string(),
            of(|stats| stats.median),
            of(|stats| stats.min),
            of(|stats| stats.max),
            cell(cpu.map(|stats| stats.median), 2),
        ]);
    }
    table.text()
}
