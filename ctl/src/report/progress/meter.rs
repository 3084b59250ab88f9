//! The rate over the last second, and how long it will still take.

use std::collections::VecDeque;
use std::time::Duration;

use super::Progress;
use crate::report::timeline::per_second;

/// Long enough that a batch more or less doesn't show, short enough to see a link change.
const WINDOW: Duration = Duration::from_secs(1);

/// Remembers what was moved when, for a second.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    samples: VecDeque<(Duration, u64)>,
}

impl Meter {
    /// Takes the bytes moved up to a time.
    pub(crate) fn note(&mut self, at: Duration, moved_bytes: u64) {
        // Clocks of different origins or a restarted count: begin anew rather than be wrong.
        if self.samples.back().is_some_and(|(last, bytes)| at < *last || moved_bytes < *bytes) {
            self.samples.clear();
        }
        self.samples.push_back((at, moved_bytes));
        // One sample older than the window stays, so that the window is covered whole.
        while self.samples.len() > 2 && at.saturating_sub(self.samples[1].0) >= WINDOW {
            self.samples.pop_front();
        }
    }

    /// Over the last second, or since the beginning if that is later.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        let (Some((from, first)), Some((to, last))) = (self.samples.front(), self.samples.back())
        else {
            return 0;
        };
        per_second(last - first, *to - *from)
    }
}

/// Until the guest runs on the target: the rest of this round, then rounds that shrink by what
/// the guest writes meanwhile, then the pause. `None` while nothing moves, and for a guest that
/// writes as fast as the lanes move: nobody can know.
pub(super) fn eta(progress: &Progress, rate: u64) -> Option<Duration> {
    if rate == 0 {
        return None;
    }
    let left = progress.round_bytes.saturating_sub(progress.round_done_bytes) as f64;
    let share = progress.dirty_bytes_per_second.unwrap_or(0) as f64 / rate as f64;
    if share >= 1.0 {
        return None;
    }
    let seconds = left / rate as f64 / (1.0 - share);
    let rounds = Duration::try_from_secs_f64(seconds).ok()?;
    Some(rounds.saturating_add(progress.blackout_predicted.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut meter = Meter::default();
        assert_eq!(meter.bytes_per_second(), 0);
        for tenth in 0..=20_u64 {
            meter.note(Duration::from_millis(tenth * 100), tenth * 100);
        }
        assert_eq!(meter.bytes_per_second(), 1000);
        // The link stalls: a second later the rate is nothing.
        meter.note(Duration::from_millis(2500), 2000);
        meter.note(Duration::from_millis(3500), 2000);
        assert_eq!(meter.bytes_per_second(), 0);
        meter.note(Duration::from_millis(10), 5);
        assert_eq!(meter.bytes_per_second(), 0);
    }

    #[test]
    fn the_eta_counts_what_gets_dirty_meanwhile() {
        let progress = Progress {
            round_bytes: 3000,
            round_done_bytes: 1000,
            dirty_bytes_per_second: Some(500),
            blackout_predicted: Some(Duration::from_millis(30)),
            ..Progress::default()
        };
        assert_eq!(eta(&progress, 1000), Some(Duration::from_millis(4030)));
        assert_eq!(eta(&progress, 500), None);
        assert_eq!(eta(&progress, 0), None);
    }
}
