//! The report as one HTML file that needs nothing else: plots, tables, ratios, method, host.

use std::fmt::Write as _;

use serde_json::Value;

use crate::goals::{self, Goal, Ratio};
use crate::plots::{self, Group};
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::stats::Stats;
use crate::svg::{self, escaped};

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:920px;\
margin:2rem auto;padding:0 1rem}\
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;\
border-bottom:1px solid #ddd;padding-bottom:.2rem}\
table{border-collapse:collapse;margin:.8rem 0;font-size:13px;width:100%}\
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap;\
font-variant-numeric:tabular-nums}\
th{background:#f6f6f6;font-weight:600}th:first-child,td:first-child{text-align:left}\
td.text,th.text{text-align:left;white-space:normal}td:first-child{white-space:normal;min-width:11rem}.yes{color:#00703c}.no{color:#b00020;font-weight:600}\
svg{max-width:100%;height:auto;display:block;margin:.8rem 0}\
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:12.5px;white-space:pre-wrap}\
h1.part{margin-top:4rem;border-top:3px solid #222;padding-top:.6rem}details{margin:.8rem 0}\
summary{cursor:pointer;font-weight:600}a{color:#0050a0}.scroll{overflow-x:auto}.dim{color:#666}";

/// The page; of several benchmarks a section for each, with its contents first.
pub(crate) fn page(results: &Results) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n",
        escaped(results.title())
    );
    let host = |name: &str| results.host[name].as_str().unwrap_or_default().to_owned();
    let _ = writeln!(
        out,
        "<p class=\"dim\">pageferry-bench {}, {}, kernel {}</p>",
        escaped(&host("commit")),
        escaped(&host("cpu")),
        escaped(&host("kernel"))
    );
    if !results.parts.is_empty() {
        out.push_str(&contents(&results.parts));
        out.push_str(&aims(results));
    }
    out.push_str(&body(results));
    for (index, part) in results.parts.iter().enumerate() {
        let _ =
            writeln!(out, "<h1 class=\"part\" id=\"part-{index}\">{}</h1>", escaped(part.title()));
        out.push_str(&body(part));
    }
    out + "</body></html>\n"
}

/// Titles, each with how many of its goals were reached.
fn contents(parts: &[Results]) -> String {
    let row = |(index, part): (usize, &Results)| {
        let judged: Vec<bool> = part.ratios.iter().filter_map(Ratio::reached).collect();
        let (count, reached) = (judged.len(), judged.iter().filter(|reached| **reached).count());
        let runs = part.series.iter().map(|series| series.runs.len()).max().unwrap_or(0);
        let failed: usize = part.series.iter().map(|series| series.failures.len()).sum();
        let class = |is_good| if is_good { "yes" } else { "no" };
        let (runs_class, class) = (class(failed == 0), class(reached == count));
        let goals = if count == 0 { String::new() } else { format!("{reached} of {count}") };
        format!(
            "<tr><td><a href=\"#part-{index}\">{}</a></td><td>{}</td><td>{runs}</td>\
             <td class=\"{runs_class}\">{failed}</td><td class=\"{class}\">{goals}</td></tr>\n",
            escaped(part.title()),
            part.series.len(),
        )
    };
    let rows: String = parts.iter().enumerate().map(row).collect();
    format!(
        "<h2>Contents</h2>\n<div class=\"scroll\"><table><tr><th>benchmark</th><th>series</th>\
         <th>runs each</th><th>failed runs</th><th>goals reached</th></tr>\n{rows}</table></div>\n"
    )
}

/// Each goal of each part: how often it was reached, and where it was not.
fn aims(results: &Results) -> String {
    let mut out = String::from(
        "<h2>Goals</h2>\n<div class=\"scroll\"><table><tr><th>goal</th><th>bound</th>\
         <th>reached</th><th>worst</th><th class=\"text\">missed</th></tr>\n",
    );
    for tally in goals::tallies(results) {
        let class = if tally.missed.is_empty() { "yes" } else { "no" };
        let missed = |ratio: &&Ratio| {
            let within = if ratio.is_undecided() { ", within the spread" } else { "" };
            let value = ratio.ratio.unwrap_or(f64::NAN);
            escaped(&format!("{}: {value:.3}{within} ({})", ratio.what, ratio.against))
        };
        let missed: Vec<String> = tally.missed.iter().map(missed).collect();
        let _ = writeln!(
            out,
            "<tr><td>{}: {}</td><td>{}</td><td class=\"{class}\">{} of {}</td><td>{:.3}</td>\
             <td class=\"text\">{}</td></tr>",
            escaped(tally.title),
            escaped(tally.what),
            escaped(&tally.goal.text()),
            tally.reached(),
            tally.of,
            tally.worst,
            missed.join("<br>"),
        );
    }
    out + "</table></div>\n"
}

/// Ratios, tables, plots, method, host and parameters of one benchmark.
fn body(results: &Results) -> String {
    let mut out = String::new();
    if !results.ratios.is_empty() {
        out.push_str("<h2>Ratios</h2>\n");
        out.push_str(&ratios(results));
    }
    for group in plots::groups(results) {
        let _ = writeln!(out, "<h2>{}</h2>", escaped(group.name));
        out.push_str(&numbers(&group));
        for plot in plots::of(&group) {
            out.push_str(&plot.svg);
        }
    }
    if !results.not_run.is_empty() {
        let _ = writeln!(out, "<h2>Not run</h2>\n<ul>");
        for left_out in &results.not_run {
            let _ = writeln!(out, "<li>{}</li>", escaped(left_out));
        }
        out.push_str("</ul>\n");
    }
    let failures: String = results
        .series
        .iter()
        .flat_map(|s| s.failures.iter().map(move |said| format!("{}, {}: {said}\n", s.group, s.by)))
        .collect();
    if !failures.is_empty() {
        let _ = write!(out, "<h2>Failed runs</h2>\n<pre>{}</pre>\n", escaped(&failures));
    }
    let parameters = escaped(&format!("{:#}", results.parameters));
    let _ = write!(
        out,
        "<details open><summary>Method</summary>\n<pre>{}</pre></details>\n\
         <details><summary>Host</summary>\n{}</details>\n\
         <details><summary>Parameters</summary>\n<pre>{parameters}</pre></details>\n",
        escaped(&results.method),
        block(&results.host),
    );
    out
}

/// A group's numbers, as the tables on standard output have them.
fn numbers(group: &Group<'_>) -> String {
    let is_latency = group.kind == Kind::Latency;
    let mut columns = group.kind.columns();
    // Of one run there is no spread to show.
    let is_spread = group.series.iter().any(|series| series.runs.len() > 1);
    columns.iter_mut().for_each(|column| column.spread &= is_spread);
    let mut head = vec!["by", "runs"];
    if is_latency {
        head.extend(["samples", "min", "mean"]);
    }
    for column in &columns {
        head.push(column.name);
        if column.spread {
            head.extend(["least", "largest"]);
        }
    }
    let row = |series: &&Series| {
        let mut row = vec![series.by.clone(), series.runs.len().to_string()];
        if is_latency {
            let all = series.distribution();
            row.push(all.count().to_string());
            let min = (!series.has_only_means()).then(|| svg::duration(all.min() as f64));
            row.extend([min.unwrap_or_default(), svg::duration(all.mean())]);
        }
        for column in &columns {
            let stats = series.stats(column);
            let shown = |value: f64| match is_latency {
                true => svg::duration(value * column.unit),
                false => format!("{value:.*}", column.decimals),
            };
            let of = |read: fn(&Stats) -> f64| stats.as_ref().map(read).map(shown);
            row.push(of(|stats| stats.median).unwrap_or_default());
            if column.spread {
                row.push(of(|stats| stats.min).unwrap_or_default());
                row.push(of(|stats| stats.max).unwrap_or_default());
            }
        }
        row
    };
    table(&head, group.series.iter().map(row))
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
        let goal = ratio.goal.map(Goal::text).unwrap_or_default();
        let goal = escaped(&goal);
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
