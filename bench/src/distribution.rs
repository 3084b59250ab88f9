//! One distribution of latencies: a histogram of 3 significant digits, and what is said of it.
//!
//! In JSON it is its summary and the whole histogram (HdrHistogram's compressed form, base64), so
//! that two files can be compared at any percentile.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

/// Significant decimal digits: 0.1 % is finer than two runs ever agree.
const DIGITS: u8 = 3;

/// The percentiles that tables have.
pub(crate) const QUANTILES: [(&str, f64); 6] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999), ("max", 1.0)];

/// A distribution, in nanoseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(into = "Form", try_from = "Form")]
pub(crate) struct Distribution {
    histogram: Histogram<u64>,
}

/// Its form in JSON.
#[derive(Serialize, Deserialize)]
struct Form {
    count: u64,
    min_ns: u64,
    mean_ns: f64,
    stdev_ns: f64,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    p9999_ns: u64,
    max_ns: u64,
    histogram: String,
}

impl Default for Distribution {
    fn default() -> Self {
        Self { histogram: Histogram::new(DIGITS).expect("3 digits are allowed") }
    }
}

impl Distribution {
    /// Of these, in nanoseconds.
    pub(crate) fn of(samples: impl IntoIterator<Item = u64>) -> Self {
        let mut this = Self::default();
        for ns in samples {
            this.record(ns);
        }
        this
    }

    /// One more.
    pub(crate) fn record(&mut self, ns: u64) {
        self.histogram.record(ns).expect("resizes by itself");
    }

    /// All of another's.
    pub(crate) fn add(&mut self, other: &Self) {
        self.histogram.add(&other.histogram).expect("resizes by itself");
    }

    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.histogram
    }

    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.histogram.is_empty()
    }

    pub(crate) fn mean(&self) -> f64 {
        self.histogram.mean()
    }

    pub(crate) fn min(&self) -> u64 {
        self.histogram.min()
    }

    /// The value that this share of all samples does not exceed; 0 of none.
    pub(crate) fn at(&self, quantile: f64) -> u64 {
        match self.histogram.is_empty() {
            true => 0,
            // The exact one: `value_at_quantile(1.0)` is the end of its step.
            false if quantile >= 1.0 => self.histogram.max(),
            false => self.histogram.value_at_quantile(quantile),
        }
    }

    /// The compressed form that HdrHistogram's tools read, in base64.
    pub(crate) fn encoded(&self) -> String {
        let mut bytes = Vec::new();
        let done = V2DeflateSerializer::new().serialize(&self.histogram, &mut bytes);
        done.expect("writing to memory");
        STANDARD.encode(bytes)
    }
}

impl From<Distribution> for Form {
    fn from(from: Distribution) -> Self {
        Self {
            count: from.count(),
            min_ns: from.min(),
            mean_ns: from.mean(),
            stdev_ns: from.histogram.stdev(),
            p50_ns: from.at(0.5),
            p90_ns: from.at(0.9),
            p99_ns: from.at(0.99),
            p999_ns: from.at(0.999),
            p9999_ns: from.at(0.9999),
            max_ns: from.at(1.0),
            histogram: from.encoded(),
        }
    }
}

impl TryFrom<Form> for Distribution {
    type Error = String;

    fn try_from(form: Form) -> Result<Self, String> {
        let bytes = STANDARD.decode(form.histogram).map_err(|error| error.to_string())?;
        let histogram = Deserializer::new()
            .deserialize(&mut bytes.as_slice())
            .map_err(|error| format!("not a histogram: {error:?}"))?;
        Ok(Self { histogram })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() -> Result<(), serde_json::Error> {
        let one = Distribution::of((1..=10_000).map(|n| n * 37));
        let json = serde_json::to_value(&one)?;
        assert_eq!(json["count"], 10_000);
        let two: Distribution = serde_json::from_value(json)?;
        for (_, quantile) in QUANTILES {
            assert_eq!(one.at(quantile), two.at(quantile));
        }
        Ok(())
    }

    #[test]
    fn bytes_that_are_no_histogram_are_refused() {
        let json = serde_json::to_value(Distribution::of([1, 2, 3])).map(|mut value| {
            value["histogram"] = "AAAA".into();
            serde_json::from_value::<Distribution>(value).is_err()
        });
        assert!(json.is_ok_and(|refused| refused));
    }

    #[test]
    fn the_largest_is_exact_and_of_none_all_is_nothing() {
        assert_eq!(
            Distribution::of([5, 1_234_567]).at(1.0),
            1_234_567.max(Distribution::of([1_234_567]).at(1.0))
        );
        assert_eq!(Distribution::default().at(0.5), 0);
    }
}
