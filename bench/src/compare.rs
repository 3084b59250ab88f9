//! `compare A.json B.json`: what became of each series, with confidence, and an exit code.

use crate::args::CompareArgs;
use crate::confidence::{self, Estimate};
use crate::error::BenchError;
use crate::results::Results;
use crate::table::{Table, cell};

/// Compares; an error if anything has become worse for sure, and by more than is allowed, or is gone.
pub(crate) fn run(args: &CompareArgs) -> Result<(), BenchError> {
    let (before, after) = (Results::read(&args.before)?, Results::read(&args.after)?);
    let compared = compare(&before, &after, args.allow_percent);
    let (a, b) = (args.before.display(), args.after.display());
    println!("A {a}\nB {b}\n\n{}", compared.table.text());
    compared.outcome(args.allow_percent)
}

/// What became of the readings of A.
struct Compared {
    table: Table,
    readings: u32,
    worse: u32,
    /// Series that A has runs of, and B has none.
    gone: u32,
}

impl Compared {
    fn outcome(&self, allowed_percent: f64) -> Result<(), BenchError> {
        match (self.readings, self.worse, self.gone) {
            (0, 0, 0) => Err(BenchError::Usage { what: "there is nothing in A to compare with" }),
            (_, 0, 0) => Ok(()),
            (_, count, gone) => Err(BenchError::Worse { count, gone, allowed_percent }),
        }
    }
}

fn compare(before: &Results, after: &Results, allow_percent: f64) -> Compared {
    let head = ["what", "by", "of", "A", "B", "B/A", "95 %", "verdict"];
    let mut compared = Compared { table: Table::new(&head), readings: 0, worse: 0, gone: 0 };
    for (old, new) in before.beside(after) {
        if old.runs.is_empty() {
            continue;
        }
        let Some(new) = new.filter(|series| !series.runs.is_empty()) else {
            let mut row = vec![String::new(); head.len()];
            (row[0], row[1], row[7]) = (old.group.clone(), old.by.clone(), "GONE".into());
            compared.table.row(row);
            compared.gone += 1;
            continue;
        };
        for column in old.kind.columns() {
            let (a, b) = (old.readings(column.reading), new.readings(column.reading));
            let Some(estimate) = confidence::ratio_apart(&b, &a) else { continue };
            let is_sure = a.len() > 1 && b.len() > 1;
            let verdict = match is_sure {
                true => verdict(&estimate, column.more_is_better, allow_percent),
                false => Verdict::Unsure,
            };
            compared.readings += 1;
            compared.worse += u32::from(verdict == Verdict::Worse);
            let median =
                |samples: &[f64]| crate::stats::median(samples.iter().copied()) / column.unit;
            let interval = || format!("{:.3}-{:.3}", estimate.low, estimate.high);
            compared.table.row(vec![
                old.group.clone(),
                old.by.clone(),
                column.name.into(),
                cell(Some(median(&a)), 2),
                cell(Some(median(&b)), 2),
                cell(Some(estimate.ratio), 3),
                is_sure.then(interval).unwrap_or_default(),
                verdict.text().into(),
            ]);
        }
    }
    compared
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Better,
    Same,
    Worse,
    /// One run has no spread.
    Unsure,
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Same => "",
            Self::Worse => "WORSE",
            Self::Unsure => "one run",
        }
    }
}

/// Worse (or better) only if all of the interval is, and the ratio itself by more than is allowed.
fn verdict(estimate: &Estimate, more_is_better: bool, allow_percent: f64) -> Verdict {
    let allowed = allow_percent / 100.0;
    let above = estimate.low > 1.0 && estimate.ratio > 1.0 + allowed;
    let below = estimate.high < 1.0 && estimate.ratio < 1.0 - allowed;
    match (above, below, more_is_better) {
        (true, _, true) | (_, true, false) => Verdict::Better,
        (true, _, false) | (_, true, true) => Verdict::Worse,
        _ => Verdict::Same,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::recorder::Recorded;
    use crate::series::{Kind, Series, SeriesRun};

    fn results(by: &str, rates: &[f64]) -> Results {
        let mut series = Series::new("TCP 64 KiB", by, Kind::Throughput, Value::Null);
        for &rate in rates {
            let recorded = Recorded::of_rate(rate, 1.0);
            series.runs.push(SeriesRun {
                turn: 0,
                recorded,
                machine_cpu_s: 0.0,
                said: Value::Null,
            });
        }
        let mut results = Results::begin("throughput", Value::Null);
        results.series.push(series);
        results
    }

    fn outcome(before: &Results, after: &Results) -> Result<(), BenchError> {
        compare(before, after, 5.0).outcome(5.0)
    }

    #[test]
    fn what_is_worse_or_gone_fails_and_one_run_does_not() {
        let good = results("us", &[100e6, 101e6, 102e6]);
        outcome(&good, &good).expect("the same");
        let worse = outcome(&good, &results("us", &[80e6, 81e6, 82e6])).unwrap_err();
        assert!(matches!(worse, BenchError::Worse { count: 1, gone: 0, .. }), "{worse:?}");
        assert_eq!(worse.exit_code(), 1);
        outcome(&results("us", &[100e6]), &results("us", &[80e6])).expect("one run says nothing");
        for gone in [results("us", &[]), results("other", &[100e6])] {
            let error = outcome(&good, &gone).unwrap_err();
            assert!(matches!(error, BenchError::Worse { count: 0, gone: 1, .. }), "{error:?}");
        }
        assert_eq!(outcome(&results("us", &[]), &good).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn only_what_is_sure_and_large_is_worse() {
        let estimate = |ratio, low, high| Estimate { ratio, low, high };
        let latency = |e| verdict(&e, false, 5.0);
        assert_eq!(latency(estimate(1.2, 1.1, 1.3)), Verdict::Worse);
        assert_eq!(latency(estimate(1.2, 0.9, 1.3)), Verdict::Same, "not sure");
        assert_eq!(latency(estimate(1.03, 1.01, 1.04)), Verdict::Same, "not large");
        assert_eq!(latency(estimate(0.8, 0.7, 0.9)), Verdict::Better);
        assert_eq!(verdict(&estimate(0.8, 0.7, 0.9), true, 5.0), Verdict::Worse);
    }
}
