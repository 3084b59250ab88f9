//! `compare A.json B.json`: what became of each series, with confidence, and an exit code.

use crate::args::CompareArgs;
use crate::confidence::{self, Estimate};
use crate::error::BenchError;
use crate::results::Results;
use crate::table::{Table, cell};

/// Compares; an error if anything has become worse for sure, and by more than is allowed.
pub(crate) fn run(args: &CompareArgs) -> Result<(), BenchError> {
    let (before, after) = (Results::read(&args.before)?, Results::read(&args.after)?);
    let mut table = Table::new(&["what", "by", "of", "A", "B", "B/A", "95 %", "verdict"]);
    let (mut worse, mut compared) = (0, 0);
    for (old, new) in before.in_common(&after) {
        for column in old.kind.columns() {
            let (a, b) = (old.readings(column.reading), new.readings(column.reading));
            let Some(estimate) = confidence::ratio_of_medians(&b, &a) else { continue };
            let verdict = verdict(&estimate, column.more_is_better, args.allow_percent);
            compared += 1;
            worse += u32::from(verdict == Verdict::Worse);
            let median =
                |samples: &[f64]| crate::stats::median(samples.iter().copied()) / column.unit;
            table.row(vec![
                old.group.clone(),
                old.by.clone(),
                column.name.into(),
                cell(Some(median(&a)), 2),
                cell(Some(median(&b)), 2),
                cell(Some(estimate.ratio), 3),
                format!("{:.3}-{:.3}", estimate.low, estimate.high),
                verdict.text().into(),
            ]);
        }
    }
    println!("A {}\nB {}\n\n{}", args.before.display(), args.after.display(), table.text());
    match (compared, worse) {
        (0, _) => Err(BenchError::Usage { what: "the two have no series in common" }),
        (_, 0) => Ok(()),
        (_, count) => Err(BenchError::Worse { count, allowed_percent: args.allow_percent }),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Better,
    Same,
    Worse,
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Same => "",
            Self::Worse => "WORSE",
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
    use super::*;

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
