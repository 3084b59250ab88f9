//! Latencies of a migration as whole distributions: batches of extents, barriers, scans.
//!
//! Filled once at the end from what the lanes and the driver counted, in nanoseconds; shown in
//! microseconds. Written on request in the percentile format that HdrHistogram's own tools read
//! and plot.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hdrhistogram::Histogram;
use pageferry_datapath::lane::LaneStats;

use super::events::Latency;

/// Significant decimal digits kept: 0.1 % is finer than any two runs agree.
const DIGITS: u8 = 3;
/// Lines per halving of the distance to 100 %, HdrHistogram's own default.
const TICKS_PER_HALF_DISTANCE: u32 = 5;
const NANOS_PER_MICRO: f64 = 1000.0;

/// The three distributions.
#[derive(Clone, Debug)]
pub struct Latencies {
    /// From a batch's submission until the kernel or the NIC had taken all of it.
    pub batches: Histogram<u64>,
    /// From a barrier's submission until its acknowledgement.
    pub barriers: Histogram<u64>,
    /// Scans for dirty pages.
    pub scans: Histogram<u64>,
}

impl Default for Latencies {
    fn default() -> Self {
        let empty = || Histogram::new(DIGITS).expect("3 digits are allowed");
        Self { batches: empty(), barriers: empty(), scans: empty() }
    }
}

impl Latencies {
    /// What a migration's lanes and scans add up to.
    pub fn collect(lanes: &[LaneStats], scans: &[Duration]) -> Self {
        let mut latencies = Self::default();
        for lane in lanes {
            latencies.batches.add(&lane.batch_ns).expect("resizes by itself");
            latencies.barriers.add(&lane.barrier_ns).expect("resizes by itself");
        }
        for scan in scans {
            // Not `saturating_record`: that clamps instead of growing.
            let nanos = u64::try_from(scan.as_nanos()).unwrap_or(u64::MAX);
            latencies.scans.record(nanos).expect("resizes by itself");
        }
        latencies
    }

    /// Each with its name, in the order they are shown.
    pub fn named(&self) -> [(&'static str, &Histogram<u64>); 3] {
        [("batches", &self.batches), ("barriers", &self.barriers), ("scans", &self.scans)]
    }

    /// One line each, for the summary.
    pub fn lines(&self) -> Vec<Latency> {
        self.named().into_iter().map(|(name, histogram)| line(name, histogram)).collect()
    }

    /// Writes `path` with the batches, and beside it one file for the barriers and one for the
    /// scans, because the format holds one distribution: `run.hgrm`, `run.barriers.hgrm`,
    /// `run.scans.hgrm`. Returns what was written; on an error names the file.
    pub fn write_hgrm(&self, path: &Path) -> Result<Vec<PathBuf>, HistogramError> {
        let mut written = Vec::new();
        for (name, histogram) in self.named() {
            let path = match name {
                "batches" => path.to_owned(),
                name => beside(path, name),
            };
            let file = File::create(&path).and_then(|file| {
                let mut out = BufWriter::new(file);
                percentile_distribution(histogram, &mut out)?;
                out.flush()
            });
            file.map_err(|source| HistogramError { path: path.clone(), source })?;
            written.push(path);
        }
        Ok(written)
    }
}

/// A histogram could not be written.
#[derive(Debug, thiserror::Error)]
#[error("writing the histogram {} failed", path.display())]
pub struct HistogramError {
    /// Which file.
    pub path: PathBuf,
    /// The errno.
    #[source]
    pub source: io::Error,
}

/// `dir/run.hgrm` and `scans` make `dir/run.scans.hgrm`.
fn beside(path: &Path, name: &str) -> PathBuf {
    let extension = path.extension().unwrap_or("hgrm".as_ref());
    let mut file = path.file_stem().unwrap_or_default().to_owned();
    file.push(".");
    file.push(name);
    file.push(".");
    file.push(extension);
    path.with_file_name(file)
}

fn line(name: &str, histogram: &Histogram<u64>) -> Latency {
    let at = |quantile| match histogram.is_empty() {
        true => 0.0,
        false => histogram.value_at_quantile(quantile) as f64 / NANOS_PER_MICRO,
    };
    Latency {
        of: name.to_owned(),
        count: histogram.len(),
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: histogram.max() as f64 / NANOS_PER_MICRO,
    }
}

/// The text that `outputPercentileDistribution` of HdrHistogram's Java original prints, with
/// nanoseconds scaled to microseconds: value, percentile, count up to it, 1/(1-percentile).
pub fn percentile_distribution(histogram: &Histogram<u64>, out: &mut dyn Write) -> io::Result<()> {
    let (value, percentile, count) = ("Value", "Percentile", "TotalCount");
    writeln!(out, "{value:>12} {percentile:>14} {count:>10} {:>14}\n", "1/(1-Percentile)")?;
    let mut total = 0;
    // An empty histogram has no quantiles, and the original prints no line for it either.
    let quantiles = histogram.iter_quantiles(TICKS_PER_HALF_DISTANCE);
    for step in quantiles.take_while(|_| !histogram.is_empty()) {
        total += step.count_since_last_iteration();
        let value = histogram.highest_equivalent(step.value_iterated_to()) as f64 / NANOS_PER_MICRO;
        let quantile = step.quantile_iterated_to();
        write!(out, "{value:>12.3} {quantile:>2.12} {total:>10}")?;
        match quantile < 1.0 {
            true => writeln!(out, " {:>14.2}", 1.0 / (1.0 - quantile))?,
            false => writeln!(out)?,
        }
    }
    let (mean, deviation) = match histogram.is_empty() {
        true => (0.0, 0.0),
        false => (histogram.mean() / NANOS_PER_MICRO, histogram.stdev() / NANOS_PER_MICRO),
    };
    let max = histogram.max() as f64 / NANOS_PER_MICRO;
    writeln!(out, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]")?;
    writeln!(out, "#[Max     = {max:>12.3}, Total count    = {:>12}]", histogram.len())?;
    let (buckets, sub_buckets) = (histogram.buckets(), sub_buckets(histogram.sigfig()));
    writeln!(out, "#[Buckets = {buckets:>12}, SubBuckets     = {sub_buckets:>12}]")
}

/// Linear steps in each bucket: enough for `digits` decimal digits, rounded up to a power of two.
fn sub_buckets(digits: u8) -> u64 {
    (2 * 10_u64.pow(u32::from(digits))).next_power_of_two()
}

#[cfg(test)]
mod tests;
