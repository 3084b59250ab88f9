//! Latency distributions: a line of percentiles for people, the whole of them for tools.
//!
//! The file is what HdrHistogram calls the percentile distribution (`.hgrm`), one block a
//! histogram, in microseconds: its plotter and everybody's scripts read it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use hdrhistogram::Histogram;

use super::events::Latency;

/// Percentile ticks per halving of what is left, as HdrHistogram's own writer uses.
const TICKS_PER_HALF: u32 = 5;

/// The percentiles of one histogram of nanoseconds, in microseconds.
pub fn latency(of: &str, histogram: &Histogram<u64>) -> Latency {
    let at = |percentile| us(histogram.value_at_percentile(percentile));
    Latency {
        of: of.to_owned(),
        count: histogram.len(),
        p50_us: at(50.0),
        p90_us: at(90.0),
        p99_us: at(99.0),
        p999_us: at(99.9),
        max_us: us(histogram.max()),
    }
}

/// Writes each histogram's whole distribution.
pub fn write_hgrm(path: &Path, histograms: &[(&str, &Histogram<u64>)]) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    for (name, histogram) in histograms {
        writeln!(out, "# {name}, microseconds")?;
        write_one(&mut out, histogram)?;
    }
    out.flush()
}

fn write_one(out: &mut dyn Write, histogram: &Histogram<u64>) -> io::Result<()> {
    writeln!(
        out,
        "{:>12} {:>14} {:>10} {:>14}\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    )?;
    let mut seen = 0;
    for value in histogram.iter_quantiles(TICKS_PER_HALF) {
        seen += value.count_since_last_iteration();
        let quantile = value.quantile_iterated_to();
        let (micros, percentile) = (us(value.value_iterated_to()), quantile);
        match quantile < 1.0 {
            true => writeln!(
                out,
                "{micros:>12.3} {percentile:>14.12} {seen:>10} {:>14.2}",
                1.0 / (1.0 - quantile)
            )?,
            false => writeln!(out, "{micros:>12.3} {percentile:>14.12} {seen:>10}")?,
        }
    }
    let (mean, deviation) = (histogram.mean() / 1e3, histogram.stdev() / 1e3);
    writeln!(out, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]")?;
    let (max, total) = (us(histogram.max()), histogram.len());
    writeln!(out, "#[Max     = {max:>12.3}, Total count    = {total:>12}]")?;
    let (buckets, sub_buckets) = (histogram.buckets(), histogram.distinct_values());
    writeln!(out, "#[Buckets = {buckets:>12}, SubBuckets     = {sub_buckets:>12}]")
}

fn us(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_with_all_of_it() {
        let mut histogram = Histogram::new_with_max(1_000_000_000, 3).expect("sound bounds");
        (1..=1000u64).for_each(|i| histogram.saturating_record(i * 1000));
        let mut bytes = Vec::new();
        write_one(&mut bytes, &histogram).expect("memory takes all");
        let text = String::from_utf8(bytes).expect("ascii");
        assert!(text.contains("1.000000000000       1000\n"), "{text}");
        assert!(text.contains("Total count    =         1000]"), "{text}");
        let line = latency("scans", &histogram);
        assert_eq!((line.count, line.p50_us.round()), (1000, 500.0));
    }
}
