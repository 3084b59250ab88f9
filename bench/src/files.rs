//! What stands in the folder of `--out` for each series: `.hgrm`, as HdrHistogram's plotters read
//! it, and `.hlog`, the intervals as its log tools read them.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{
    IntervalLogWriterBuilder, IntervalLogWriterError, Tag,
};
use pageferry_ctl::report::histograms::percentile_distribution;

use crate::error::BenchError;
use crate::series::Series;

/// The largest value of an interval is printed in milliseconds, as HdrHistogram's own log does.
const MAX_VALUE_DIVISOR: f64 = 1e6;

/// Writes both for every series that has latencies; file names are made of what they are about.
pub(crate) fn write(folder: &Path, series: &[Series]) -> Result<(), BenchError> {
    for series in series {
        let all = series.distribution();
        if all.is_empty() {
            continue;
        }
        let name = file_name(series);
        save(&folder.join(format!("{name}.hgrm")), |out| {
            percentile_distribution(all.histogram(), out)
        })?;
        save(&folder.join(format!("{name}.hlog")), |out| interval_log(series, out))?;
    }
    Ok(())
}

/// Letters, digits and dashes.
pub(crate) fn file_name(series: &Series) -> String {
    plain(&format!("{} {}", series.group, series.by))
}

/// Any text as part of a file's name.
pub(crate) fn plain(text: &str) -> String {
    let mut name = String::new();
    for letter in text.to_lowercase().chars() {
        match letter {
            'a'..='z' | '0'..='9' => name.push(letter),
            _ if name.ends_with('-') || name.is_empty() => {}
            _ => name.push('-'),
        }
    }
    name.trim_end_matches('-').into()
}

/// Writes a file by way of memory.
pub(crate) fn save(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), BenchError> {
    let mut bytes = Vec::new();
    fill(&mut bytes)
        .and_then(|()| std::fs::write(path, bytes))
        .map_err(|source| BenchError::Report { path: path.into(), source })
}

/// Runs one after the other, each with its turn as a tag.
fn interval_log(series: &Series, mut out: &mut dyn Write) -> io::Result<()> {
    let mut serializer = V2DeflateSerializer::new();
    let mut builder = IntervalLogWriterBuilder::new();
    builder.add_comment(&format!("{}, by {}; nanoseconds", series.group, series.by));
    builder.with_start_time(SystemTime::UNIX_EPOCH).with_base_time(SystemTime::UNIX_EPOCH);
    builder.with_max_value_divisor(MAX_VALUE_DIVISOR);
    let mut log = builder.begin_log_with(&mut out, &mut serializer)?;
    let mut before = 0.0;
    for run in &series.runs {
        let tag = format!("turn-{}", run.turn);
        for interval in &run.recorded.intervals {
            let at = Duration::from_secs_f64(before + interval.at_s);
            let length = Duration::from_secs_f64(interval.seconds);
            let histogram = interval.distribution.histogram();
            log.write_histogram(histogram, at, length, Tag::new(&tag)).map_err(
                |error| match error {
                    IntervalLogWriterError::IoError(error) => error,
                    other => io::Error::other(format!("{other:?}")),
                },
            )?;
        }
        before += run.recorded.seconds;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
    use serde_json::Value;

    use super::*;
    use crate::recorder::{Pace, run};
    use crate::series::{Kind, SeriesRun};

    fn series() -> Series {
        let pace = Pace { warm_up: 0, operations: 50, rate: None, interval_ms: 1, half: false };
        let recorded = run(pace, 1, || {
            std::thread::sleep(Duration::from_micros(300));
            Ok::<(), ()>(())
        });
        let recorded = recorded.expect("no error");
        let mut series = Series::new("WRITE 4 KiB, 1 QP", "us/them", Kind::Latency, Value::Null);
        series.runs.push(SeriesRun { turn: 0, recorded, machine_cpu_s: 0.0, said: Value::Null });
        series
    }

    #[test]
    fn a_log_is_read_by_its_reader() -> io::Result<()> {
        let (series, mut bytes) = (series(), Vec::new());
        interval_log(&series, &mut bytes)?;
        let entries = IntervalLogIterator::new(&bytes).map(|entry| entry.expect("well-formed"));
        let intervals = entries.filter(|entry| matches!(entry, LogEntry::Interval(_))).count();
        assert_eq!(intervals, series.runs[0].recorded.intervals.len());
        assert!(intervals > 3);
        Ok(())
    }

    #[test]
    fn names_are_of_files() {
        assert_eq!(file_name(&series()), "write-4-kib-1-qp-us-them");
    }
}
