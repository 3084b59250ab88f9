//! Which plots a benchmark's results have, group by group.

use crate::distribution::Distribution;
use crate::results::Results;
use crate::series::{Column, Kind, Series};
use crate::svg::{self, Bar, Curve};

/// A plot with the name of its file.
pub(crate) struct Plot {
    pub(crate) name: String,
    pub(crate) svg: String,
}

/// Series of one setting, which are compared with each other.
pub(crate) struct Group<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: Kind,
    pub(crate) series: Vec<&'a Series>,
}

/// Those with runs, in the order they were measured.
pub(crate) fn groups(results: &Results) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for series in results.series.iter().filter(|series| !series.runs.is_empty()) {
        let is_its = |g: &&mut Group<'_>| g.name == series.group && g.kind == series.kind;
        match groups.iter_mut().find(is_its) {
            Some(group) => group.series.push(series),
            None => {
                groups.push(Group { name: &series.group, kind: series.kind, series: vec![series] })
            }
        }
    }
    groups
}

/// Every plot of a group.
pub(crate) fn of(group: &Group<'_>) -> Vec<Plot> {
    let Group { name, kind, series } = group;
    let plot = |what: &str, svg| Plot { name: crate::files::plain(&format!("{name} {what}")), svg };
    let title = |what: &str| format!("{name}: {what}");
    let mut all = Vec::new();
    if *kind == Kind::Latency {
        let whole = series.iter().filter(|series| !series.has_only_means());
        let curves: Vec<Curve> = whole.map(|s| percentile_curve(s)).collect();
        if !curves.is_empty() {
            let svg = svg::percentiles(&title("latency by percentile"), &curves);
            all.push(plot("percentiles", svg));
        }
        let over_time: Vec<Curve> = series.iter().filter_map(|s| medians_over_time(s)).collect();
        if !over_time.is_empty() {
            let svg = svg::over_time(&title("median of each interval"), "us", &over_time);
            all.push(plot("over time", svg));
        }
        return all;
    }
    for column in kind.columns().iter().filter(|column| column.spread) {
        let bars = bars(series, column);
        if !bars.is_empty() {
            let (quantity, unit) = match (kind, column.name) {
                (_, "pause ms") => ("pause", "ms"),
                (_, "lost %") => ("speed lost", "%"),
                (_, "total s") => ("total", "s"),
                (Kind::Cost, unit) => ("cost", unit),
                (_, unit) => ("throughput", unit),
            };
            all.push(plot(quantity, svg::bars(&title(quantity), unit, &bars)));
        }
    }
    let over_time: Vec<Curve> = series.iter().filter_map(|s| rate_over_time(s)).collect();
    if *kind == Kind::Throughput && !over_time.is_empty() {
        let svg = svg::over_time(&title("throughput over time"), "MiB/s", &over_time);
        all.push(plot("over time", svg));
    }
    all
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

fn medians_over_time(series: &Series) -> Option<Curve> {
    over_time(series, |interval| interval.distribution.at(0.5) as f64 / 1e3)
}

fn rate_over_time(series: &Series) -> Option<Curve> {
    over_time(series, |interval| interval.bytes as f64 / interval.seconds / f64::from(1 << 20))
}

/// The intervals of all runs, one run after the other.
fn over_time(series: &Series, read: impl Fn(&crate::recorder::Interval) -> f64) -> Option<Curve> {
    let (mut points, mut before) = (Vec::new(), 0.0);
    for run in &series.runs {
        for interval in run.recorded.intervals.iter().filter(|i| i.seconds > 0.0) {
            points.push((before + interval.at_s + interval.seconds / 2.0, read(interval)));
        }
        before += run.recorded.seconds;
    }
    (points.len() > 1).then(|| Curve { label: series.by.clone(), points })
}

fn bars(series: &[&Series], column: &Column) -> Vec<Bar> {
    let bar = |series: &&Series| {
        let stats = series.stats(column)?;
        let (value, min, max) = (stats.median, stats.min, stats.max);
        Some(Bar { label: series.by.clone(), value, min, max })
    };
    series.iter().filter_map(bar).collect()
}
