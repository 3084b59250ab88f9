//! What is to be reached, what was, and the ratios in between.

use serde::{Deserialize, Serialize};

use crate::contender::{Contender, Metric, Record};
use crate::results::Results;
use crate::rig::Mover;
use crate::table::{Table, cell};

/// A ratio of two medians; with a bound where one was set.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ratio {
    /// Of what to what.
    pub(crate) what: String,
    /// The contender that it is compared with.
    pub(crate) against: String,
    /// The ratio; null if one of the two has no run.
    pub(crate) ratio: Option<f64>,
    /// Where it lies with 95 % confidence, by the spread of the runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<(f64, f64)>,
    /// The bound.
    pub(crate) goal: Option<Goal>,
}

/// A bound on a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    /// No less.
    AtLeast(f64),
    /// No more.
    AtMost(f64),
}

impl Ratio {
    /// A ratio of two medians.
    pub(crate) fn new(
        what: impl Into<String>,
        against: impl Into<String>,
        ours: Option<f64>,
        theirs: Option<f64>,
        goal: Option<Goal>,
    ) -> Self {
        let ratio = ours.zip(theirs).map(|(ours, theirs)| ours / theirs);
        Self { what: what.into(), against: against.into(), ratio, interval: None, goal }
    }

    /// Whether the bound is kept; `None` without a bound or without a ratio.
    pub(crate) fn reached(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::AtLeast(least) => self.ratio? >= least,
            Goal::AtMost(most) => self.ratio? <= most,
        })
    }

    /// The bound lies in the interval: other turns might have said the contrary.
    pub(crate) fn is_undecided(&self) -> bool {
        let bound = match self.goal {
            None => return false,
            Some(Goal::AtLeast(bound) | Goal::AtMost(bound)) => bound,
        };
        self.interval.is_some_and(|(low, high)| (low..=high).contains(&bound))
    }

    /// What it is about, without the setting.
    fn kind(&self) -> &str {
        self.what.rsplit_once(": ").map_or(&self.what, |(_, kind)| kind)
    }

    /// For people.
    pub(crate) fn interval_text(&self) -> String {
        self.interval.map_or_else(String::new, |(low, high)| format!("{low:.3}-{high:.3}"))
    }
}

impl Goal {
    /// For people.
    pub(crate) fn text(self) -> String {
        match self {
            Self::AtLeast(least) => format!(">= {least}"),
            Self::AtMost(most) => format!("<= {most}"),
        }
    }
}

/// For people.
pub(crate) fn text(ratios: &[Ratio]) -> String {
    let mut table = Table::new(&["ratio", "ours/theirs", "95 %", "goal", "reached", "against"]);
    for ratio in ratios {
        let goal = ratio.goal.map(Goal::text).unwrap_or_default();
        let reached = ratio.reached().map_or("", |reached| if reached { "yes" } else { "NO" });
        table.row(vec![
            ratio.what.clone(),
            cell(ratio.ratio, 3),
            ratio.interval_text(),
            goal,
            reached.into(),
            ratio.against.clone(),
        ]);
    }
    table.text()
}

/// For people: of each goal of each part how often it was reached, and every time that it was not.
pub(crate) fn summary(results: &Results) -> String {
    let mut table = Table::new(&["goals", "goal", "reached", "worst", "missed"]);
    let (mut judged, mut reached) = (0, 0);
    for part in results.parts.iter().chain([results]) {
        for (what, goal) in kinds(&part.ratios) {
            let is_its = |ratio: &&Ratio| ratio.kind() == what && ratio.goal == Some(goal);
            let of_it: Vec<&Ratio> =
                part.ratios.iter().filter(is_its).filter(|ratio| ratio.ratio.is_some()).collect();
            let missed: Vec<&&Ratio> =
                of_it.iter().filter(|ratio| ratio.reached() == Some(false)).collect();
            (judged, reached) = (judged + of_it.len(), reached + of_it.len() - missed.len());
            let values = of_it.iter().filter_map(|ratio| ratio.ratio);
            let worst = match goal {
                Goal::AtLeast(_) => values.min_by(f64::total_cmp),
                Goal::AtMost(_) => values.max_by(f64::total_cmp),
            };
            table.row(vec![
                format!("{}: {what}", part.title()),
                goal.text(),
                format!("{} of {}", of_it.len() - missed.len(), of_it.len()),
                cell(worst, 3),
                if missed.is_empty() { "-".into() } else { missed.len().to_string() },
            ]);
        }
    }
    let mut text = format!("Goals reached: {reached} of {judged}\n\n{}", table.text());
    for part in results.parts.iter().chain([results]) {
        for missed in part.ratios.iter().filter(|ratio| ratio.reached() == Some(false)) {
            let goal = missed.goal.map(Goal::text).unwrap_or_default();
            let within = if missed.is_undecided() { ", within the spread" } else { "" };
            let ratio = cell(missed.ratio, 3);
            let (what, against) = (&missed.what, &missed.against);
            let interval = missed.interval_text();
            text.push_str(&format!(
                "MISSED {}: {what}: {ratio} ({interval}), {goal}{within}: {against}\n",
                part.title()
            ));
        }
    }
    text
}

/// What there is to reach, each kind once.
fn kinds(ratios: &[Ratio]) -> Vec<(&str, Goal)> {
    let mut kinds: Vec<(&str, Goal)> = Vec::new();
    for ratio in ratios {
        if let Some(goal) = ratio.goal
            && !kinds.contains(&(ratio.kind(), goal))
        {
            kinds.push((ratio.kind(), goal));
        }
    }
    kinds
}

/// What `migrate-vs-qemu` is about.
pub(crate) fn ratios(records: &[Record], warm: bool) -> Vec<Ratio> {
    let ours = find(records, |c| *c == Contender::Mover(Mover::Pageferry));
    let ours = |metric| ours.and_then(|record| record.median(metric));
    let fastest = best(records, |c| c.qemu().is_some(), Metric::Span);
    let iperf = best(records, |c| matches!(c, Contender::Iperf(_)), Metric::Moving);
    let ceiling = best(records, |c| matches!(c, Contender::Ceiling(_)), Metric::Moving);
    let ratio = |what: &str, metric, record: Option<&Record>, goal| {
        let name = record.map_or("no run".into(), |record| record.contender.name());
        let theirs = record.and_then(|record| record.median(metric));
        Ratio::new(what, name, ours(metric), theirs, goal)
    };
    let goal = |bound| warm.then_some(bound);
    let times = if warm { 1.6 } else { 2.0 };
    let mut all = vec![
        ratio(
            "throughput, first page to running at the target, QEMU's best",
            Metric::Span,
            fastest,
            Some(Goal::AtLeast(times)),
        ),
        ratio("throughput, from the command on", Metric::Wall, fastest, None),
        ratio("throughput while memory moves", Metric::Moving, fastest, None),
        ratio("CPU per GiB", Metric::Cpu, fastest, goal(Goal::AtMost(0.6))),
        ratio("CPU per GiB, QEMU's leanest", Metric::Cpu, leanest(records), None),
        ratio("throughput, iperf3's best", Metric::Moving, iperf, goal(Goal::AtLeast(1.0))),
        ratio("throughput, the ceiling", Metric::Moving, ceiling, goal(Goal::AtLeast(0.97))),
        ratio("CPU per GiB, the ceiling", Metric::Cpu, ceiling, None),
    ];
    for (what, limit, bound) in [
        ("pause, QEMU's least at its default limit", None, 0.1),
        ("pause, QEMU's least at a limit of 20 ms", Some(20), 0.5),
    ] {
        let with_limit = |c: &Contender| c.qemu().is_some_and(|way| way.downtime_ms == limit);
        let shortest = least(records, with_limit, Metric::Pause);
        if shortest.is_some() {
            all.push(ratio(what, Metric::Pause, shortest, goal(Goal::AtMost(bound))));
            let fastest = best(records, with_limit, Metric::Span);
            all.push(ratio("pause, QEMU's fastest way there", Metric::Pause, fastest, None));
        }
    }
    all
}

fn leanest(records: &[Record]) -> Option<&Record> {
    least(records, |c| c.qemu().is_some(), Metric::Cpu)
}

fn find(records: &[Record], wanted: impl Fn(&Contender) -> bool) -> Option<&Record> {
    records.iter().find(|record| wanted(&record.contender))
}

/// The one with the highest median.
fn best(
    records: &[Record],
    wanted: impl Fn(&Contender) -> bool,
    metric: Metric,
) -> Option<&Record> {
    with_median(records, wanted, metric).max_by(|a, b| a.1.total_cmp(&b.1)).map(|(r, _)| r)
}

/// The one with the lowest median.
fn least(
    records: &[Record],
    wanted: impl Fn(&Contender) -> bool,
    metric: Metric,
) -> Option<&Record> {
    with_median(records, wanted, metric).min_by(|a, b| a.1.total_cmp(&b.1)).map(|(r, _)| r)
}

fn with_median(
    records: &[Record],
    wanted: impl Fn(&Contender) -> bool,
    metric: Metric,
) -> impl Iterator<Item = (&Record, f64)> {
    records
        .iter()
        .filter(move |record| wanted(&record.contender))
        .filter_map(move |record| Some((record, record.median(metric)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_kept_or_not() {
        let ratio = |ours, goal| Ratio::new("x", "y", Some(ours), Some(2.0), Some(goal)).reached();
        assert_eq!(ratio(3.2, Goal::AtLeast(1.6)), Some(true));
        assert_eq!(ratio(3.1, Goal::AtLeast(1.6)), Some(false));
        assert_eq!(ratio(1.2, Goal::AtMost(0.6)), Some(true));
        assert_eq!(ratio(1.3, Goal::AtMost(0.6)), Some(false));
        assert_eq!(Ratio::new("x", "y", None, Some(2.0), Some(Goal::AtMost(1.0))).reached(), None);
    }

    #[test]
    fn what_was_missed_is_named() {
        let ratio = |what: &str, ours| {
            let goal = Some(Goal::AtMost(1.03));
            Ratio {
                interval: Some((0.9, 1.1)),
                ..Ratio::new(what, "us to x", Some(ours), Some(1.0), goal)
            }
        };
        let mut results = Results::begin("report", serde_json::Value::Null);
        results.ratios = vec![ratio("TCP 8 B: p50", 1.0), ratio("TCP 64 B: p50", 1.05)];
        let text = summary(&results);
        assert!(text.starts_with("Goals reached: 1 of 2\n"), "{text}");
        let named = "MISSED report: TCP 64 B: p50: 1.050 (0.900-1.100), <= 1.03, within the spread";
        assert!(text.contains(named), "{text}");
    }
}
