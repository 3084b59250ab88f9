//! Numbers about numbers: few samples, kept all.

use serde::Serialize;

/// A metric's samples in the order they were taken, and what is said of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Stats {
    /// The least.
    pub(crate) min: f64,
    /// Half are no larger; the mean of the middle two of an even count.
    pub(crate) median: f64,
    /// 99 of 100 are no larger (nearest rank: of fewer than 100 samples, the largest).
    pub(crate) p99: f64,
    /// The largest.
    pub(crate) max: f64,
    /// All of them.
    pub(crate) samples: Vec<f64>,
}

impl Stats {
    /// `None` without samples.
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let samples: Vec<f64> = samples.into_iter().collect();
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        let rank = (sorted.len() * 99).div_ceil(100);
        Some(Self { min, median, p99: sorted[rank - 1], max, samples })
    }
}

/// The median, or NaN without samples.
pub(crate) fn median(samples: impl IntoIterator<Item = f64>) -> f64 {
    Stats::of(samples).map_or(f64::NAN, |stats| stats.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_samples() {
        assert_eq!(Stats::of([]), None);
        let one = Stats::of([2.0]).expect("one sample");
        assert_eq!((one.min, one.median, one.p99, one.max), (2.0, 2.0, 2.0, 2.0));
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn percentiles_are_samples() {
        let stats = Stats::of((1..=200).map(f64::from)).expect("samples");
        assert_eq!((stats.p99, stats.max, stats.median), (198.0, 200.0, 100.5));
        assert_eq!(stats.samples[0], 1.0, "order kept");
    }
}
