//! The report as one HTML file that needs nothing else: plots, tables, ratios, method, host.

use std::fmt::Write as _;

use serde_json::Value;

use crate::distribution::{Distribution, QUANTILES};
use crate::goals::Goal;
use crate::results::Results;
use crate::series::{Kind, Reading, Series};
use crate::stats::Stats;
use crate::svg::{self, Bar, Curve, escaped};

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:920px;\
margin:2rem auto;padding:0 1rem}\
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;\
border-bottom:1px solid #ddd;padding-bottom:.2rem}\
table{border-collapse:collapse;margin:.8rem 0;font-size:13px;width:100%}\
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap;\
font-variant-numeric:tabular-nums}\
th{background:#f6f6f6;font-weight:600}th:first-child,td:first-child{text-align:left}\
td.text,th.text{text-align:left;white-space:normal}td:first-child{white-space:normal}.yes{color:#00703c}.no{color:#b00020;font-weight:600}\
svg{max-width:100%;height:auto;display:block;margin:.8rem 0}\
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:12.5px;white-space:pre-wrap}\
.scroll{overflow-x:auto}.dim{color:#666}";

/// A plot with the name of its file.
pub(crate) struct Plot {
    pub(crate) name: String,
    pub(crate) svg: String,
}

/// Every plot of the results, group by group.
pub(crate) fn plots(results: &Results) -> Vec<Plot> {
    let mut all = Vec::new();
    for (group, kind, series) in groups(results) {
        let name = |what: &str| crate::files::plain(&format!("{group} {what}"));
        let title = |what: &str| format!("{group}: {what}");
        match kind {
            Kind::Latency => {
                let curves: Vec<Curve> = series.iter().map(|s| percentile_curve(s)).collect();
                let svg = svg::percentiles(&title("latency by percentile"), &curves);
                all.push(Plot { name: name("percentiles"), svg });
                let curves: Vec<Curve> = series.iter().filter_map(|s| time_curve(s)).collect();
                if !curves.is_empty() {
                    let svg = svg::over_time(&title("median of each interval"), "us", &curves);
                    all.push(Plot { name: name("over time"), svg });
                }
            }
            Kind::Throughput => {
                let scale = f64::from(1 << 20);
                let bars = bars_of(&series, Reading::BytesPerS, scale);
                let svg = svg::bars(&title("throughput"), "MiB/s", &bars);
                all.push(Plot { name: name("throughput"), svg });
            }
            Kind::Cost => {
                let bars = bars_of(&series, Reading::SecondsPerGib, 1.0);
                all.push(Plot { name: name("cost"), svg: svg::bars(group, "s/GiB", &bars) });
            }
        }
    }
    all
}

/// The page.
pub(crate) fn page(results: &Results) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n",
        escaped(&results.benchmark)
    );
    let host = |name: &str| results.host[name].as_str().unwrap_or_default().to_owned();
    let _ = writeln!(
        out,
        "<p class=\"dim\">pageferry-bench {}, {}, kernel {}</p>",
        escaped(&host("commit")),
        escaped(&host("cpu")),
        escaped(&host("kernel"))
    );
    if !results.ratios.is_empty() {
        out.push_str("<h2>Ratios</h2>\n");
        out.push_str(&ratios(results));
    }
    let plots = plots(results);
    let mut plots = plots.iter();
    for (group, kind, series) in groups(results) {
        let _ = writeln!(out, "<h2>{}</h2>", escaped(group));
        out.push_str(&match kind {
            Kind::Latency => latencies(&series),
            Kind::Throughput => rates(&series, Reading::BytesPerS, f64::from(1 << 20), "MiB/s"),
            Kind::Cost => rates(&series, Reading::SecondsPerGib, 1.0, "s/GiB"),
        });
        let prefix = crate::files::plain(group) + "-";
        while let Some(plot) = plots.as_slice().first()
            && plot.name.starts_with(&prefix)
        {
            out.push_str(&plot.svg);
            plots.next();
        }
    }
    let _ = write!(
        out,
        "<h2>Method</h2>\n<pre>{}</pre>\n<h2>Host</h2>\n{}<h2>Parameters</h2>\n<pre>{}</pre>\n\
         </body></html>\n",
        escaped(&results.method),
        block(&results.host),
        escaped(&format!("{:#}", results.parameters))
    );
    out
}

/// Series of one setting, in the order they were measured.
fn groups(results: &Results) -> Vec<(&str, Kind, Vec<&Series>)> {
    let mut groups: Vec<(&str, Kind, Vec<&Series>)> = Vec::new();
    for series in results.series.iter().filter(|series| !series.runs.is_empty()) {
        match groups
            .iter_mut()
            .find(|(group, kind, _)| *group == series.group && *kind == series.kind)
        {
            Some((_, _, of_group)) => of_group.push(series),
            None => groups.push((&series.group, series.kind, vec![series])),
        }
    }
    groups
}

fn percentile_curve(series: &Series) -> Curve {
    let all: Distribution = series.distribution();
    // A step for each tenth of a nine, as far as there are samples.
    let most = (all.count().max(2) as f64).log10();
    let steps = 0..=(most * 20.0) as u32;
    let quantile = |step: u32| 1.0 - 10f64.powf(-f64::from(step) / 20.0);
    let points = steps.map(|step| (quantile(step), all.at(quantile(step)) as f64)).collect();
    Curve { label: series.by.clone(), points }
}

/// Medians of the intervals of all runs, one run after the other.
fn time_curve(series: &Series) -> Option<Curve> {
    let (mut points, mut before) = (Vec::new(), 0.0);
    for run in &series.runs {
        for interval in &run.recorded.intervals {
            let middle = before + interval.at_s + interval.seconds / 2.0;
            points.push((middle, interval.distribution.at(0.5) as f64 / 1e3));
        }
        before += run.recorded.seconds;
    }
    (points.len() > 1).then(|| Curve { label: series.by.clone(), points })
}

fn bars_of(series: &[&Series], reading: Reading, scale: f64) -> Vec<Bar> {
    let bar = |series: &&Series| {
        let stats = Stats::of(series.readings(reading).into_iter().map(|v| v / scale))?;
        let (value, min, max) = (stats.median, stats.min, stats.max);
        Some(Bar { label: series.by.clone(), value, min, max })
    };
    series.iter().filter_map(bar).collect()
}

fn latencies(series: &[&Series]) -> String {
    let mut head: Vec<&str> = vec!["latency", "runs", "samples", "min", "mean"];
    head.extend(QUANTILES.map(|(name, _)| name));
    let row = |series: &&Series| {
        let all = series.distribution();
        let mut row = vec![
            series.by.clone(),
            series.runs.len().to_string(),
            all.count().to_string(),
            svg::duration(all.min() as f64),
            svg::duration(all.mean()),
        ];
        for (_, quantile) in QUANTILES {
            let stats = Stats::of(series.readings(Reading::Quantile(quantile)));
            row.push(stats.map_or_else(String::new, |stats| svg::duration(stats.median)));
        }
        row
    };
    table(&head, series.iter().map(row))
}

fn rates(series: &[&Series], reading: Reading, scale: f64, unit: &str) -> String {
    let head = ["by", "runs", unit, "least", "largest", "CPU s/GiB"];
    let row = |series: &&Series| {
        let stats = Stats::of(series.readings(reading).into_iter().map(|v| v / scale));
        let of = |read: fn(&Stats) -> f64| {
            stats.as_ref().map_or_else(String::new, |stats| format!("{:.2}", read(stats)))
        };
        let cpu = Stats::of(series.readings(Reading::CpuPerGib));
        vec![
            series.by.clone(),
            series.runs.len().to_string(),
            of(|stats| stats.median),
            of(|stats| stats.min),
            of(|stats| stats.max),
            cpu.map_or_else(String::new, |stats| format!("{:.2}", stats.median)),
        ]
    };
    table(&head, series.iter().map(row))
}

fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = String>| {
        cells.fold(String::new(), |row, cell| row + &format!("<{tag}>{}</{tag}>", escaped(&cell)))
    };
    let mut out = String::from("<div class=\"scroll\"><table><tr>");
    out.push_str(&cells("th", &mut head.iter().map(|cell| (*cell).to_owned())));
    out.push_str("</tr>\n");
    for row in rows {
        let _ = writeln!(out, "<tr>{}</tr>", cells("td", &mut row.into_iter()));
    }
    out + "</table></div>\n"
}

fn ratios(results: &Results) -> String {
    let mut out = String::from(
        "<div class=\"scroll\"><table><tr><th>what</th><th class=\"text\">of what to what</th>\
         <th>ratio</th><th>95 %</th><th>goal</th><th>reached</th></tr>\n",
    );
    for ratio in &results.ratios {
        let goal = match ratio.goal {
            None => String::new(),
            Some(Goal::AtLeast(least)) => format!("at least {least}"),
            Some(Goal::AtMost(most)) => format!("at most {most}"),
        };
        let (class, reached) = match ratio.reached() {
            None => ("", ""),
            Some(true) => ("yes", "yes"),
            Some(false) => ("no", "no"),
        };
        let value = ratio.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}"));
        let interval =
            ratio.interval.map_or_else(String::new, |(low, high)| format!("{low:.3} to {high:.3}"));
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"text\">{}</td><td>{value}</td><td>{interval}</td>\
             <td>{goal}</td><td class=\"{class}\">{reached}</td></tr>",
            escaped(&ratio.what),
            escaped(&ratio.against),
        );
    }
    out + "</table></div>\n"
}

/// The host block as a table.
fn block(host: &Value) -> String {
    let fields = host.as_object().into_iter().flatten();
    let mut out = String::from("<table>");
    for (name, value) in fields {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Array(items) => {
                let texts = items.iter().map(|i| i.as_str().map_or(i.to_string(), Into::into));
                texts.collect::<Vec<String>>().join(", ")
            }
            other => other.to_string(),
        };
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"text\">{}</td></tr>",
            escaped(&name.replace('_', " ")),
            escaped(&text)
        );
    }
    out + "</table>\n"
}
