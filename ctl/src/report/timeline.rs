//! Turns what the source's state machine noted into the events' numbers.
//!
//! Every time here is a difference of two phases' entries on the source's monotonic clock, but for
//! loading and resuming, which only the target can measure.

use std::time::Duration;

use pageferry_datapath::source::{Phase, RoundReport, SourceReport};

use super::events::{Blackout, BlackoutParts, Brownout, Drain, Round};

/// Milliseconds with fractions.
pub fn ms(time: Duration) -> f64 {
    (time.as_nanos() as f64 / 1e4).round() / 100.0
}

/// `bytes` over `time`, per second.
pub fn per_second(bytes: u64, time: Duration) -> u64 {
    if time.is_zero() {
        return 0;
    }
    u64::try_from(u128::from(bytes) * 1_000_000_000 / time.as_nanos()).unwrap_or(u64::MAX)
}

/// One attempt's phases with their times.
#[derive(Clone, Copy, Debug)]
pub struct Timeline<'a> {
    report: &'a SourceReport,
    /// When the report was taken.
    end: Duration,
}

impl<'a> Timeline<'a> {
    /// Over what is known at `end`.
    pub fn new(report: &'a SourceReport, end: Duration) -> Self {
        Self { report, end }
    }

    fn entered(&self, phase: Phase) -> Option<Duration> {
        self.report.phases.iter().find(|(at, _)| *at == phase).map(|(_, when)| *when)
    }

    /// Time in `phase`, all visits from `since` on.
    fn time_in(&self, phase: Phase, since: Duration) -> Duration {
        let phases = &self.report.phases;
        let ends = phases.iter().skip(1).map(|(_, when)| *when).chain([self.end]);
        phases
            .iter()
            .zip(ends)
            .filter(|((at, when), _)| *at == phase && *when >= since)
            .map(|((_, when), end)| end.saturating_sub(*when))
            .sum()
    }

    /// From the first page moved until the guest was paused, or until the attempt ended.
    pub fn brownout(&self) -> Option<Duration> {
        let began = self.entered(Phase::Moving)?;
        let ended = self
            .entered(Phase::Pausing)
            .or_else(|| self.entered(Phase::Unwinding))
            .unwrap_or(self.end);
        Some(ended.saturating_sub(began))
    }

    /// From asking the guest to pause until it ran at the target, as the target saw it, and the
    /// way of the target's word.
    pub fn blackout(&self) -> Option<Duration> {
        let paused = self.entered(Phase::Pausing)?;
        let told = self.entered(Phase::Releasing)?.saturating_sub(paused);
        Some(told.saturating_sub(self.late()))
    }

    /// How much later than it ran the target said so.
    fn late(&self) -> Duration {
        Duration::from_micros(self.report.running.map_or(0, |running| running.late_us))
    }

    /// How long the guest stood still at drain points.
    pub fn drain_pause(&self) -> Option<Duration> {
        self.entered(Phase::DrainPausing)?;
        let of = |phase| self.time_in(phase, Duration::ZERO);
        Some(of(Phase::DrainPausing) + of(Phase::DrainScanning) + of(Phase::DrainResuming))
    }

    fn last_drain_pause(&self) -> Option<Duration> {
        let phases = &self.report.phases;
        let began = phases.iter().rposition(|(at, _)| *at == Phase::DrainPausing)?;
        let drain = [Phase::DrainPausing, Phase::DrainScanning, Phase::DrainResuming];
        let after = phases[began..].iter().find(|(at, _)| !drain.contains(at));
        let ended = after.map_or(self.end, |(_, when)| *when);
        Some(ended.saturating_sub(phases[began].1))
    }

    /// Where the blackout went.
    pub fn blackout_parts(&self) -> Option<BlackoutParts> {
        let paused = self.entered(Phase::Pausing)?;
        let of = |phase| self.time_in(phase, paused);
        let running = self.report.running?;
        let load = Duration::from_micros(running.load_us);
        let resume = Duration::from_micros(running.resume_us);
        let saving = of(Phase::Saving);
        let saved = self
            .report
            .state_sent
            .zip(self.entered(Phase::Saving))
            .map_or(Duration::ZERO, |(sent, began)| sent.saturating_sub(began));
        // The target loads while the rest is still on its way; what neither side claims is the way.
        let save = saved.saturating_sub((saved + load).saturating_sub(saving));
        Some(BlackoutParts {
            pause: ms(of(Phase::Pausing)),
            last_scan: ms(of(Phase::LastScanning)),
            last_extents: ms(of(Phase::Moving)),
            barrier: ms(of(Phase::Closing)),
            verify: ms(of(Phase::Verifying)),
            device_state_save: ms(save),
            transfer: ms(saving.saturating_sub(save + load)),
            load: ms(load),
            commit: ms(
                (of(Phase::Deciding) + of(Phase::Committed)).saturating_sub(resume + self.late())
            ),
            resume: ms(resume),
        })
    }

    /// The event of one round.
    pub fn round_event(&self, round: &RoundReport) -> Round {
        Round {
            at_ms: ms(self.end),
            round: round.round.0,
            bytes: round.bytes,
            zero_bytes: round.zero_bytes,
            pages: round.pages,
            took_ms: ms(round.took),
            bytes_per_second: per_second(round.moved_bytes(), round.took),
            dirty_bytes_per_second: self.report.dirty_bytes_per_second,
            left_bytes: if round.last { None } else { self.report.left_bytes },
            blackout_predicted_ms: self.report.predicted_blackout.map(ms),
            in_blackout: round.last,
        }
    }

    /// The event of the last drain point.
    pub fn drain_event(&self, reason: &str) -> Option<Drain> {
        let pause = self.last_drain_pause()?;
        Some(Drain { at_ms: ms(self.end), pause_ms: ms(pause), reason: reason.to_owned() })
    }

    /// The event of the brownout. `wire_bytes` are those of the whole migration: what moved inside
    /// the pause is taken off, its headers are not.
    pub fn brownout_event(&self, wire_bytes: u64) -> Option<Brownout> {
        let brownout = self.brownout()?;
        let rounds: Vec<_> = self.report.rounds.iter().filter(|round| !round.last).collect();
        let moved_bytes = rounds.iter().map(|round| round.moved_bytes()).sum();
        let in_blackout: u64 =
            self.report.rounds.iter().filter(|r| r.last).map(RoundReport::moved_bytes).sum();
        let scans = |phase| self.report.phases.iter().filter(|(at, _)| *at == phase).count() as u32;
        Some(Brownout {
            at_ms: ms(self.entered(Phase::Pausing).unwrap_or(self.end)),
            brownout_ms: ms(brownout),
            rounds: rounds.len() as u32,
            moved_bytes,
            wire_bytes: wire_bytes.saturating_sub(in_blackout),
            bytes_per_second: per_second(moved_bytes, brownout),
            dirty_pages: rounds.iter().skip(1).map(|round| round.pages).sum(),
            scans: scans(Phase::Scanning) + scans(Phase::DrainScanning),
            drain_pause_ms: ms(self.drain_pause().unwrap_or_default()),
        })
    }

    /// The event of the blackout, once the guest runs at the target.
    pub fn blackout_event(&self, device_state_bytes: u64) -> Option<Blackout> {
        let last = self.report.rounds.iter().find(|round| round.last);
        Some(Blackout {
            at_ms: ms(self.entered(Phase::Releasing)?),
            blackout_ms: ms(self.blackout()?),
            blackout_predicted_ms: self.report.predicted_blackout.map(ms),
            parts_ms: self.blackout_parts()?,
            dirty_pages: last.map_or(0, |round| round.pages),
            moved_bytes: last.map_or(0, RoundReport::moved_bytes),
            device_state_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use pageferry_datapath::control::Running;

    use super::*;

    #[test]
    fn the_parts_of_a_blackout_add_up_to_it() {
        let at = Duration::from_millis;
        let report = SourceReport {
            phases: vec![
                (Phase::Moving, at(100)),
                (Phase::Closing, at(600)),
                (Phase::Scanning, at(601)),
                (Phase::Preparing, at(602)),
                (Phase::Pausing, at(610)),
                (Phase::LastScanning, at(611)),
                (Phase::Moving, at(612)),
                (Phase::Closing, at(615)),
                (Phase::Saving, at(616)),
                (Phase::Deciding, at(626)),
                (Phase::Committed, at(628)),
                (Phase::Releasing, at(632)),
            ],
            state_sent: Some(at(621)),
            running: Some(Running { load_us: 3000, resume_us: 1000, late_us: 3000, cpu_us: 0 }),
            ..SourceReport::default()
        };
        let timeline = Timeline::new(&report, at(640));
        assert_eq!(timeline.brownout(), Some(at(510)));
        assert_eq!(timeline.blackout(), Some(at(19)));
        let parts = timeline.blackout_parts().expect("it ran");
        assert!((parts.total() - 19.0).abs() < 0.01, "{parts:?}");
        assert_eq!((parts.device_state_save, parts.transfer, parts.load), (5.0, 2.0, 3.0));
        assert_eq!((parts.commit, parts.resume), (2.0, 1.0));
    }
}
