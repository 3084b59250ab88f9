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
use crate::error::BenchError;
use crate::goals::{self, Ratio};
use crate::host::Host;
use crate::machine::Machine;
use crate::method;
use crate::series::{Kind, Series};
use crate::stats::Stats;
use crate::table::{Table, cell};
use crate::{files, html, plots};

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
    #[serde(default)]
    pub(crate) series: Vec<Series>,
    #[serde(default)]
    pub(crate) ratios: Vec<Ratio>,
    /// What to call it among others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) title: Option<String>,
    /// What was left out, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) not_run: Vec<String>,
    /// Benchmarks that were run together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parts: Vec<Self>,
}

impl Results {
    /// Looks at the machine, and prints what is measured and how.
    pub(crate) fn begin(benchmark: &str, parameters: Value) -> Self {
        let machine = Machine::here();
        let method = method::of_distributions(benchmark);
        Self::with(benchmark, method, &machine.text(), json!(machine), parameters)
    }

    /// The same for benchmarks that move guests: their host block has more in it.
    pub(crate) fn of_guests(benchmark: &str, host: &Host, setup: Value) -> Self {
        Self::with(benchmark, method::of(benchmark), &host.text(), json!(host), setup)
    }

    /// The same for those that set hosts up, of which the machine's block says enough.
    pub(crate) fn of_hosts(benchmark: &str, parameters: Value) -> Self {
        let machine = Machine::here();
        Self::with(benchmark, method::of(benchmark), &machine.text(), json!(machine), parameters)
    }

    fn with(
        benchmark: &str,
        method: String,
        host_text: &str,
        host: Value,
        parameters: Value,
    ) -> Self {
        println!("{benchmark}\n\nMethod\n{method}\n\nHost\n{host_text}\n");
        let command: Vec<String> = std::env::args().collect();
        Self {
            format: FORMAT,
            benchmark: benchmark.into(),
            method,
            host,
            parameters: json!({ "command": command, "all": parameters }),
            series: Vec::new(),
            ratios: Vec::new(),
            title: None,
            not_run: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Prints the tables and writes what was asked for.
    pub(crate) fn finish(&self, output: &OutputArgs) -> Result<(), BenchError> {
        print!("{}", self.text());
        if let Some(path) = &output.json {
            self.write_json(path)?;
        }
        match &output.out {
            Some(folder) => self.write_folder(folder),
            None => Ok(()),
        }
    }

    /// Everything that is written to a folder; of parts only what they have in common.
    pub(crate) fn write_folder(&self, folder: &Path) -> Result<(), BenchError> {
        let shown = folder.display();
        std::fs::create_dir_all(folder).map_err(BenchError::io("make", shown))?;
        self.write_json(&folder.join("results.json"))?;
        let page = html::page(self);
        files::save(&folder.join("results.html"), |out| out.write_all(page.as_bytes()))?;
        for plot in plots::groups(self).iter().flat_map(plots::of) {
            let path = folder.join(plot.name + ".svg");
            files::save(&path, |out| out.write_all(plot.svg.as_bytes()))?;
        }
        files::write(folder, &self.series)
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
        let mut parts = Vec::new();
        for (kind, title) in Kind::ALL {
            let mut of_kind = self.series.iter().filter(|s| s.kind == kind).peekable();
            if of_kind.peek().is_some() {
                parts.push(table(title, kind, of_kind));
            }
        }
        if !self.ratios.is_empty() {
            parts.push(goals::text(&self.ratios));
        }
        for series in &self.series {
            for failure in &series.failures {
                parts.push(format!("FAILED {}, {}: {failure}\n", series.group, series.by));
            }
        }
        for left_out in &self.not_run {
            parts.push(format!("NOT RUN {left_out}\n"));
        }
        for part in &self.parts {
            parts.push(format!("== {} ==\n\n{}", part.title(), part.text()));
        }
        parts.join("\n")
    }

    /// Each series of this, part by part, with `other`'s of the same name.
    pub(crate) fn beside<'a>(&'a self, other: &'a Self) -> Vec<(&'a Series, Option<&'a Series>)> {
        let in_other = |one: &Series| {
            let is_same =
                |two: &&Series| two.group == one.group && two.by == one.by && two.kind == one.kind;
            other.series.iter().find(is_same)
        };
        let mut pairs: Vec<_> = self.series.iter().map(|one| (one, in_other(one))).collect();
        for part in &self.parts {
            match other.parts.iter().find(|of_other| of_other.title() == part.title()) {
                Some(same) => pairs.extend(part.beside(same)),
                None => pairs.extend(part.series.iter().map(|one| (one, None))),
            }
        }
        pairs
    }

    /// What it is about.
    pub(crate) fn title(&self) -> &str {
        self.title.as_deref().unwrap_or(&self.benchmark)
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

/// Medians of the runs, with the least and the largest where that says something.
fn table<'a>(title: &str, kind: Kind, series: impl Iterator<Item = &'a Series>) -> String {
    let is_latency = kind == Kind::Latency;
    let mut head = vec![title, "by", "runs"];
    if is_latency {
        head.extend(["samples", "min", "mean"]);
    }
    let series: Vec<&Series> = series.collect();
    let mut columns = kind.columns();
    // Of one run there is no spread to show.
    let is_spread = series.iter().any(|series| series.runs.len() > 1);
    columns.iter_mut().for_each(|column| column.spread &= is_spread);
    for column in &columns {
        head.push(column.name);
        if column.spread {
            head.extend(["least", "largest"]);
        }
    }
    let mut table = Table::new(&head);
    for series in series {
        let runs = series.runs.len().to_string();
        let mut row = vec![series.group.clone(), series.by.clone(), runs];
        if is_latency {
            let all = series.distribution();
            row.push(all.count().to_string());
            let min = (!series.has_only_means()).then(|| all.min() as f64 / 1e3);
            row.push(cell(min, 2));
            row.push(cell((!all.is_empty()).then(|| all.mean() / 1e3), 2));
        }
        for column in &columns {
            let stats = series.stats(column);
            let of = |read: fn(&Stats) -> f64| cell(stats.as_ref().map(read), column.decimals);
            row.push(of(|stats| stats.median));
            if column.spread {
                row.extend([of(|stats| stats.min), of(|stats| stats.max)]);
            }
        }
        table.row(row);
    }
    table.text()
}
