//! How sure a ratio of two medians is, from few runs of each: a bootstrap over the runs.
//!
//! Runs that took turns are drawn together, turn by turn: what slowed the machine slowed both. Runs of
//! different hours are drawn by themselves.

/// Times the runs are drawn anew: the interval's ends are then good to a few percent of its width.
const DRAWS: usize = 4000;
/// The interval holds this share of what was drawn.
const LEVEL: f64 = 0.95;

/// A ratio and where it lies with 95 % of the draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    pub(crate) ratio: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// The ratio of the medians of `a` and `b`, which took turns; nothing if one is empty or all zero.
pub(crate) fn ratio_of_medians(a: &[f64], b: &[f64]) -> Option<Estimate> {
    estimate(a, b, a.len() == b.len())
}

/// The same of runs that shared no turns.
pub(crate) fn ratio_apart(a: &[f64], b: &[f64]) -> Option<Estimate> {
    estimate(a, b, false)
}

fn estimate(a: &[f64], b: &[f64], together: bool) -> Option<Estimate> {
    let ratio = median(a)? / Some(median(b)?).filter(|m| *m != 0.0)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut drawn: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            let of_a: Vec<usize> = a.iter().map(|_| random.below(a.len())).collect();
            let of_b: Vec<usize> = match together {
                true => of_a.clone(),
                false => b.iter().map(|_| random.below(b.len())).collect(),
            };
            let pick = |from: &[f64], at: &[usize]| at.iter().map(|&i| from[i]).collect::<Vec<_>>();
            let under = median(&pick(b, &of_b)).filter(|m| *m != 0.0)?;
            Some(median(&pick(a, &of_a))? / under)
        })
        .collect();
    drawn.sort_by(f64::total_cmp);
    let at = |share: f64| drawn[((drawn.len() - 1) as f64 * share).round() as usize];
    let tail = (1.0 - LEVEL) / 2.0;
    match drawn.is_empty() {
        true => None,
        false => Some(Estimate { ratio, low: at(tail), high: at(1.0 - tail) }),
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    (!samples.is_empty()).then(|| crate::stats::median(samples.iter().copied()))
}

/// xorshift64*: the same draws each time, so that a comparison can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_runs_are_equal_for_sure() {
        let same = ratio_of_medians(&[2.0; 5], &[2.0; 5]).expect("runs");
        assert_eq!((same.ratio, same.low, same.high), (1.0, 1.0, 1.0));
    }

    #[test]
    fn what_both_suffer_from_does_not_widen_the_interval() {
        let noise = [1.0, 3.0, 2.0, 9.0, 5.0, 4.0, 8.0];
        let twice: Vec<f64> = noise.iter().map(|n| n * 2.0).collect();
        let together = ratio_of_medians(&twice, &noise).expect("runs");
        assert!((together.low - 2.0).abs() < 1e-9 && (together.high - 2.0).abs() < 1e-9);
        let apart = ratio_of_medians(&twice[..6], &noise).expect("runs");
        assert!(apart.low < 1.9 && apart.high > 2.1, "{apart:?}");
    }

    #[test]
    fn runs_of_different_hours_are_not_paired() {
        let noise = [1.0, 3.0, 2.0, 9.0, 5.0, 4.0, 8.0];
        let apart = ratio_apart(&noise, &noise).expect("runs");
        assert!(apart.ratio == 1.0 && apart.low < 0.9 && apart.high > 1.1, "{apart:?}");
    }

    #[test]
    fn nothing_of_nothing() {
        assert_eq!(ratio_of_medians(&[], &[1.0]), None);
        assert_eq!(ratio_of_medians(&[1.0], &[0.0]), None);
    }
}
