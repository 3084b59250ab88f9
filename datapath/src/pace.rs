//! How fast lanes may send: one budget for all lanes of a migration, changed while it runs.
//!
//! ```text
//!   granted ──(rate x time)──▶ ────────────────┐
//!   reserved ──(each piece, before it is sent)─▶ │ a piece may go once all before it are granted
//! ```
//!
//! Both only grow. What is granted and not used is lost but for a few milliseconds ([`BURST`]), so
//! a lane that was late catches up and one that was idle does not flood the link. Shared by every
//! lane's worker behind a lock that is held for a few additions; the time is the caller's.
//!
//! While the guest stands still nothing is held back ([`Pacer::hurry`]): what is left then is small,
//! and every millisecond of it is the guest's.

use std::sync::Mutex;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::limits::BATCH_BYTES_MAX;

/// What may be caught up: the scheduler's lateness on a busy host.
const BURST: Duration = Duration::from_millis(10);
/// A piece takes about this long at the rate.
const PIECE: Duration = Duration::from_millis(20);
/// The smallest piece: below it, headers would be what travels.
const PIECE_BYTES_MIN: u64 = 64 << 10;

/// The slowest rate: with more lanes than anyone opens, no lane is silent for so long that its
/// peer gives it up.
pub const BYTES_PER_SECOND_MIN: u64 = 125_000;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Pacer {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rate: Option<u64>,
    hurry: bool,
    /// Counts changes.
    version: u64,
    /// Bytes granted until `at`; fractions are kept so that small steps add up.
    granted: f64,
    at: Duration,
    reserved: f64,
}

/// A piece that was reserved.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// What must be granted before it may go.
    after: f64,
}

impl Pacer {
    /// Holds lanes to so many bytes a second, or to nothing.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let pacer = Self::default();
        pacer.set(Duration::ZERO, bytes_per_second);
        pacer
    }

    /// Changes the rate from `now` on.
    pub fn set(&self, now: Duration, bytes_per_second: Option<u64>) {
        let mut state = self.state();
        state.grant(now);
        let rate = bytes_per_second.map(|rate| rate.max(BYTES_PER_SECOND_MIN));
        if state.rate != rate {
            state.version += 1;
            state.rate = rate;
            // What was sent without a rate is nobody's debt.
            state.reserved = state.reserved.min(state.granted + BATCH_BYTES_MAX as f64);
        }
    }

    /// The rate, if there is one.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.state().rate
    }

    /// The guest stands still, or runs again: hold nothing back meanwhile.
    pub fn hurry(&self, hurry: bool) {
        let mut state = self.state();
        state.version += u64::from(state.hurry != hurry);
        state.hurry = hurry;
    }

    /// Whether the guest stands still.
    pub fn is_hurried(&self) -> bool {
        self.state().hurry
    }

    /// Changes whenever the rate does; with the rate that counts now.
    pub fn version(&self) -> (u64, Option<u64>) {
        let state = self.state();
        (state.version, state.in_force())
    }

    /// The most bytes to send at a time.
    pub fn piece_bytes(&self) -> u64 {
        self.state().in_force().map_or(BATCH_BYTES_MAX, |rate| {
            let bytes = rate as f64 * PIECE.as_secs_f64();
            (bytes as u64).clamp(PIECE_BYTES_MIN, BATCH_BYTES_MAX)
        })
    }

    /// Takes `bytes` from the budget; [`Self::wait`] says when they may be sent.
    pub fn reserve(&self, now: Duration, bytes: u64) -> Piece {
        let mut state = self.state();
        state.grant(now);
        let after = state.reserved;
        if state.in_force().is_some() {
            state.reserved += bytes as f64;
        }
        Piece { after }
    }

    /// How long the piece still has to wait; zero if it may go. The rate may change meanwhile: ask
    /// again after no longer than a few tens of milliseconds.
    pub fn wait(&self, now: Duration, piece: Piece) -> Duration {
        let mut state = self.state();
        state.grant(now);
        match state.in_force() {
            None => Duration::ZERO,
            Some(rate) => {
                let missing = (piece.after - state.granted).max(0.0);
                Duration::from_secs_f64(missing / rate as f64)
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The clock that pacers are told: one for all lanes, and for whoever changes a rate.
pub fn clock() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

impl State {
    fn in_force(&self) -> Option<u64> {
        self.rate.filter(|_| !self.hurry)
    }

    fn grant(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        if let Some(rate) = self.rate {
            let rate = rate as f64;
            let most = self.reserved + rate * BURST.as_secs_f64();
            self.granted = (self.granted + passed * rate).min(most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 10_000_000;

    /// Sends pieces for so long in virtual time, each lane late by up to `late` after each wait;
    /// the bytes sent.
    fn send(pacer: &Pacer, from: Duration, lasting: Duration, lanes: usize, late: Duration) -> u64 {
        let mut free = vec![from; lanes];
        let (mut sent, mut state) = (0, 1u64);
        loop {
            let lane = (0..lanes).min_by_key(|&lane| free[lane]).unwrap();
            let mut now = free[lane];
            if now >= from + lasting {
                return sent;
            }
            let bytes = pacer.piece_bytes();
            let piece = pacer.reserve(now, bytes);
            loop {
                let wait = pacer.wait(now, piece);
                if wait.is_zero() {
                    break;
                }
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                now += wait.min(Duration::from_millis(20)) + late * (state >> 60) as u32 / 16;
            }
            if now < from + lasting {
                sent += bytes;
            }
            free[lane] = now + Duration::from_micros(50);
        }
    }

    fn assert_held(sent: u64, rate: u64, lasting: Duration) {
        let share = sent as f64 / (rate as f64 * lasting.as_secs_f64());
        assert!((0.98..=1.02).contains(&share), "{share} of the rate");
    }

    #[test]
    fn a_rate_is_held_by_all_lanes_together() {
        let five = Duration::from_secs(5);
        for (lanes, late_ms) in [(1, 0), (1, 4), (4, 8), (16, 8)] {
            let pacer = Pacer::new(Some(RATE));
            let late = Duration::from_millis(late_ms);
            let sent = send(&pacer, Duration::from_secs(1), five, lanes, late);
            assert_held(sent, RATE, five);
        }
    }

    #[test]
    fn a_change_counts_from_then_on() {
        let five = Duration::from_secs(5);
        let pacer = Pacer::new(Some(RATE));
        send(&pacer, Duration::ZERO, five, 2, Duration::ZERO);
        pacer.set(five, Some(RATE * 10));
        assert_held(send(&pacer, five, five, 2, Duration::ZERO), RATE * 10, five);
        pacer.set(five * 2, None);
        let piece = pacer.reserve(five * 2, 1 << 30);
        assert!(pacer.wait(five * 2, piece).is_zero());
        // What was sent meanwhile is not paid for later.
        pacer.set(five * 2, Some(RATE));
        assert_held(send(&pacer, five * 2, five, 2, Duration::ZERO), RATE, five);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let pacer = Pacer::new(Some(RATE));
        let hour = Duration::from_secs(3600);
        let sent = send(&pacer, hour, Duration::from_millis(100), 1, Duration::ZERO);
        let most = RATE / 10 + RATE / 100 + 2 * pacer.piece_bytes();
        assert!(sent <= most, "{sent} of {most}");
    }

    #[test]
    fn nothing_is_held_back_while_the_guest_stands_still() {
        let pacer = Pacer::new(Some(BYTES_PER_SECOND_MIN));
        let now = Duration::from_secs(1);
        pacer.reserve(now, 1 << 30);
        let piece = pacer.reserve(now, 1 << 20);
        assert!(pacer.wait(now, piece) > Duration::from_secs(1000));
        pacer.hurry(true);
        assert!(pacer.wait(now, piece).is_zero() && pacer.is_hurried());
        assert_eq!(pacer.piece_bytes(), BATCH_BYTES_MAX);
        pacer.hurry(false);
        assert!(!pacer.wait(now, piece).is_zero());
    }

    #[test]
    fn a_rate_too_low_to_keep_a_lane_alive_is_raised() {
        assert_eq!(Pacer::new(Some(1)).bytes_per_second(), Some(BYTES_PER_SECOND_MIN));
        assert_eq!(Pacer::new(None).piece_bytes(), BATCH_BYTES_MAX);
    }
}
