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

/// One goal of one benchmark, at all of its settings.
pub(crate) struct Tally<'a> {
    /// The benchmark.
    pub(crate) title: &'a str,
    /// What of it.
    pub(crate) what: &'a str,
    pub(crate) goal: Goal,
    /// Ratios that have it.
    pub(crate) of: usize,
    /// The one that is furthest from it, or nearest to missing it.
    pub(crate) worst: f64,
    pub(crate) missed: Vec<&'a Ratio>,
}

impl Tally<'_> {
    pub(crate) fn reached(&self) -> usize {
        self.of - self.missed.len()
    }
}

/// Each goal of each part: how often it was reached.
pub(crate) fn tallies(results: &Results) -> Vec<Tally<'_>> {
    let mut all = Vec::new();
    for part in results.parts.iter().chain([results]) {
        for (what, goal) in kinds(&part.ratios) {
            let is_its = |ratio: &&Ratio| ratio.kind() == what && ratio.goal == Some(goal);
            let values = part.ratios.iter().filter(is_its).filter_map(|ratio| ratio.ratio);
            let missed = part.ratios.iter().filter(is_its);
            let missed = missed.filter(|ratio| ratio.reached() == Some(false)).collect();
            let worst = match goal {
                Goal::AtLeast(_) => values.clone().min_by(f64::total_cmp),
                Goal::AtMost(_) => values.clone().max_by(f64::total_cmp),
            };
            if let Some(worst) = worst {
                let (title, of) = (part.title(), values.count());
                all.push(Tally { title, what, goal, of, worst, missed });
            }
        }
    }
    all
}

/// The same for people, and every time that one was not reached.
pub(crate) fn summary(results: &Results) -> String {
    let all = tallies(results);
    let mut table = Table::new(&["goal", "bound", "reached", "worst"]);
    for tally in &all {
        let reached = format!("{} of {}", tally.reached(), tally.of);
        let what = format!("{}: {}", tally.title, tally.what);
        table.row(vec![what, tally.goal.text(), reached, cell(Some(tally.worst), 3)]);
    }
    let (reached, of): (usize, usize) =
        all.iter().fold((0, 0), |sum, tally| (sum.0 + tally.reached(), sum.1 + tally.of));
    let mut text = format!("Goals reached: {reached} of {of}\n\n{}", table.text());
    for (tally, missed) in all.iter().flat_map(|tally| tally.missed.iter().map(move |m| (tally, m)))
    {
        let within = if missed.is_undecided() { ", within the spread" } else { "" };
        text.push_str(&format!(
            "MISSED {}: {}: {} ({}), {}{within}: {}\n",
            tally.title,
            missed.what,
            cell(missed.ratio, 3),
            missed.interval_text(),
            tally.goal.text(),
            missed.against
        ));
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
