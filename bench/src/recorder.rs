//! Takes the samples of one run: drops the warm-up, keeps intervals, and follows an intended rate.
//!
//! With a rate a sample counts from when its operation *should* have begun: one that is late
//! because those before it were slow is late, and is not left out (no coordinated omission).

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::distribution::Distribution;

/// What a run does besides measuring.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Pace {
    /// Operations dropped before the first that counts.
    pub(crate) warm_up: u64,
    /// Operations that count.
    pub(crate) operations: u64,
    /// Operations a second that are intended; none: the next begins when the last has ended.
    pub(crate) rate: Option<f64>,
    /// One point of the time series.
    pub(crate) interval_ms: u64,
    /// Halves what is measured, which was there and back.
    pub(crate) half: bool,
}

/// A part of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Interval {
    /// Since the first operation that counts.
    pub(crate) at_s: f64,
    pub(crate) seconds: f64,
    /// Payload of its operations.
    pub(crate) bytes: u64,
    /// Latencies that ended in it.
    #[serde(default, skip_serializing_if = "Distribution::is_empty")]
    pub(crate) distribution: Distribution,
}

/// What a run gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recorded {
    /// Payload of all operations that count.
    pub(crate) bytes: u64,
    /// From the first that counts until the last has ended.
    pub(crate) seconds: f64,
    #[serde(default, skip_serializing_if = "Distribution::is_empty")]
    pub(crate) distribution: Distribution,
    #[serde(default)]
    pub(crate) intervals: Vec<Interval>,
}

impl Recorded {
    pub(crate) fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    /// Of messages that went there and back one at a time, timed by a tool; of half a round trip or
    /// of a whole one.
    pub(crate) fn of_latencies(distribution: Distribution, bytes: u32, halves: bool) -> Self {
        let count = distribution.count();
        let seconds = distribution.mean() * count as f64 * if halves { 2.0 } else { 1.0 } / 1e9;
        let bytes = count * u64::from(bytes);
        Self { bytes, seconds, distribution, intervals: Vec::new() }
    }

    /// Of operations that cost some time each, with something else in between: what they took.
    pub(crate) fn of_costs(took: &[Duration], bytes_each: u64) -> Self {
        Self {
            bytes: took.len() as u64 * bytes_each,
            seconds: took.iter().sum::<Duration>().as_secs_f64(),
            distribution: Distribution::of(took.iter().map(|took| took.as_nanos() as u64)),
            intervals: Vec::new(),
        }
    }

    /// Of a tool that only tells its rate, in bytes a second.
    pub(crate) fn of_rate(bytes_per_s: f64, seconds: f64) -> Self {
        Self { bytes: (bytes_per_s * seconds) as u64, seconds, ..Self::default() }
    }

    /// Of a counter of bytes that was read at times, both since some beginning, without what was
    /// before `from_s`; nothing if it was read less than twice from then on.
    pub(crate) fn of_counter(readings: &[(f64, u64)], from_s: f64, until_s: f64) -> Option<Self> {
        let within = |(at, _): &&(f64, u64)| (from_s..=until_s).contains(at);
        let kept: Vec<(f64, u64)> = readings.iter().filter(within).copied().collect();
        let (&(began, before), &(ended, after)) = (kept.first()?, kept.last()?);
        let interval = |pair: &[(f64, u64)]| Interval {
            at_s: pair[0].0 - began,
            seconds: pair[1].0 - pair[0].0,
            bytes: pair[1].1 - pair[0].1,
            distribution: Distribution::default(),
        };
        let intervals: Vec<Interval> = kept.windows(2).map(interval).collect();
        let (bytes, seconds) = (after - before, ended - began);
        let distribution = Distribution::default();
        (seconds > 0.0).then_some(Self { bytes, seconds, distribution, intervals })
    }
}

/// Takes samples.
#[derive(Debug)]
pub(crate) struct Recorder {
    pace: Pace,
    left_to_drop: u64,
    began: Option<Instant>,
    ended: Option<Instant>,
    interval: Distribution,
    interval_bytes: u64,
    interval_began: Option<Instant>,
    recorded: Recorded,
}

impl Recorder {
    pub(crate) fn new(pace: Pace) -> Self {
        Self {
            pace,
            left_to_drop: pace.warm_up,
            began: None,
            ended: None,
            interval: Distribution::default(),
            interval_bytes: 0,
            interval_began: None,
            recorded: Recorded::default(),
        }
    }

    /// An operation that began, or should have begun, and ended.
    pub(crate) fn record(&mut self, began: Instant, ended: Instant, bytes: u64) {
        if self.left_to_drop > 0 {
            self.left_to_drop -= 1;
            return;
        }
        self.began.get_or_insert(began);
        let interval_began = *self.interval_began.get_or_insert(began);
        let ns = ended.saturating_duration_since(began).as_nanos() as u64;
        self.interval.record(if self.pace.half { ns / 2 } else { ns });
        self.interval_bytes += bytes;
        self.ended = Some(ended);
        if ended.saturating_duration_since(interval_began)
            >= Duration::from_millis(self.pace.interval_ms)
        {
            self.close_interval(interval_began, ended);
        }
    }

    fn close_interval(&mut self, began: Instant, ended: Instant) {
        let first = self.began.unwrap_or(began);
        let distribution = std::mem::take(&mut self.interval);
        self.recorded.distribution.add(&distribution);
        self.recorded.bytes += self.interval_bytes;
        self.recorded.intervals.push(Interval {
            at_s: began.saturating_duration_since(first).as_secs_f64(),
            seconds: ended.saturating_duration_since(began).as_secs_f64(),
            bytes: std::mem::take(&mut self.interval_bytes),
            distribution,
        });
        self.interval_began = Some(ended);
    }

    pub(crate) fn finish(mut self) -> Recorded {
        if let Some((began, ended)) = self.interval_began.zip(self.ended)
            && !self.interval.is_empty()
        {
            self.close_interval(began, ended);
        }
        if let Some((began, ended)) = self.began.zip(self.ended) {
            self.recorded.seconds = ended.saturating_duration_since(began).as_secs_f64();
        }
        self.recorded
    }
}

/// Runs an operation at the pace, and takes its samples. `operation` is told nothing and waits
/// for its own end.
pub(crate) fn run<E>(
    pace: Pace,
    bytes: u64,
    mut operation: impl FnMut() -> Result<(), E>,
) -> Result<Recorded, E> {
    let mut recorder = Recorder::new(pace);
    let gap = pace.rate.map(|rate| Duration::from_secs_f64(1.0 / rate));
    // The warm-up has no pace: it would take as long as what counts.
    for _ in 0..pace.warm_up {
        let began = Instant::now();
        operation()?;
        recorder.record(began, Instant::now(), bytes);
    }
    let blank = Instant::now();
    // Noted now, counted later: what counting takes is not part of the next operation. Written to
    // before: the first touch of a page would be part of one operation of a hundred.
    let mut samples = vec![(blank, blank); pace.operations as usize];
    let first = Instant::now();
    let mut last = first;
    for (index, sample) in samples.iter_mut().enumerate() {
        let began = match gap {
            // One reading of the clock for both: the end of one is the beginning of the next.
            None => last,
            Some(gap) => {
                let due = first + gap.mul_f64(index as f64);
                wait_until(due);
                due
            }
        };
        operation()?;
        last = Instant::now();
        *sample = (began, last);
    }
    for (began, ended) in samples {
        recorder.record(began, ended, bytes);
    }
    Ok(recorder.finish())
}

/// Sleeps for as long as sleeping is exact enough, then looks at the clock.
fn wait_until(due: Instant) {
    const SLEEP_IS_LATE_BY: Duration = Duration::from_micros(200);
    loop {
        let left = due.saturating_duration_since(Instant::now());
        match left.checked_sub(SLEEP_IS_LATE_BY) {
            _ if left.is_zero() => return,
            Some(long) if !long.is_zero() => std::thread::sleep(long),
            _ => std::hint::spin_loop(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace() -> Pace {
        Pace { warm_up: 3, operations: 20, rate: None, interval_ms: 2, half: false }
    }

    #[test]
    fn the_warm_up_is_dropped_and_intervals_add_up() {
        let mut calls = 0;
        let recorded = run(pace(), 10, || {
            calls += 1;
            std::thread::sleep(Duration::from_micros(500));
            Ok::<(), ()>(())
        });
        let recorded = recorded.expect("no error");
        assert_eq!((calls, recorded.distribution.count(), recorded.bytes), (23, 20, 200));
        let sum: u64 = recorded.intervals.iter().map(|i| i.distribution.count()).sum();
        assert_eq!(sum, 20);
        assert!(recorded.intervals.len() > 1);
        assert!(recorded.distribution.min() >= 500_000);
    }

    /// One operation in the middle takes 20 ms: at 1000 a second some twenty are late by it.
    #[test]
    fn a_stall_is_not_omitted_at_an_intended_rate() {
        let mut index = 0;
        let pace = Pace { warm_up: 0, operations: 60, rate: Some(1000.0), ..pace() };
        let recorded = run(pace, 1, || {
            index += 1;
            if index == 20 {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok::<(), ()>(())
        });
        let late = recorded.expect("no error");
        let over_5_ms = late.distribution.histogram().len()
            - late.distribution.histogram().count_between(0, 5_000_000);
        assert!(over_5_ms >= 10, "{over_5_ms}");
    }

    #[test]
    fn a_counter_is_read_within_its_time() {
        let readings = [(0.0, 0), (0.5, 100), (1.0, 300), (1.5, 400), (2.0, 1000)];
        let recorded = Recorded::of_counter(&readings, 0.4, 1.6).expect("readings");
        assert_eq!((recorded.bytes, recorded.seconds), (300, 1.0));
        assert_eq!(recorded.intervals.len(), 2);
        assert_eq!((recorded.intervals[1].bytes, recorded.intervals[1].at_s), (100, 0.5));
        assert!(Recorded::of_counter(&readings, 1.9, 9.0).is_none());
    }

    #[test]
    fn half_is_half() {
        let (now, pace) = (Instant::now(), Pace { warm_up: 0, half: true, ..pace() });
        let mut recorder = Recorder::new(pace);
        recorder.record(now, now + Duration::from_micros(100), 1);
        assert_eq!(recorder.finish().distribution.at(0.5) / 100, 500);
    }
}
