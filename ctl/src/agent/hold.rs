//! Holds an agent in a phase, so that a test can do something to it there.
//!
//! `PAGEFERRY_HOLD=saving:20000` keeps the first agent that reads it in its phase `saving` for up
//! to 20 s: what the phase has asked for is done, and the answer waits here. What ends an attempt
//! (a cancel, a failure, a lost peer, a deadline) is heard all the same. `last-moving` and
//! `last-closing` mean those of the last round, with the guest paused.
//!
//! For tests: a build without debug assertions never looks at the variable. Owned by an agent's
//! loop, on its thread.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::time::Duration;

const VARIABLE: &str = "PAGEFERRY_HOLD";
/// Phases after it, at the source, are those of the last round.
const BEFORE_LAST_ROUND: &str = "lastscanning";

/// A phase to stay in, and the inputs that wait until it is over.
#[derive(Debug)]
pub(super) struct Hold<I> {
    wanted: Option<Wanted>,
    waiting: VecDeque<I>,
}

#[derive(Debug)]
struct Wanted {
    phase: String,
    last_round: bool,
    length: Duration,
    until: Option<Duration>,
}

impl<I> Hold<I> {
    /// What the environment asks for.
    pub(super) fn from_environment() -> Self {
        let asked = cfg!(debug_assertions).then(|| std::env::var(VARIABLE).ok()).flatten();
        Self { wanted: asked.and_then(|text| Wanted::parse(&text)), waiting: VecDeque::new() }
    }

    /// Whether the agent, which is in `phase`, is to stay there.
    pub(super) fn holds(&mut self, phase: impl Debug, now: Duration) -> bool {
        let Some(wanted) = &mut self.wanted else { return false };
        let phase = format!("{phase:?}").to_lowercase();
        wanted.last_round &= phase != BEFORE_LAST_ROUND;
        if wanted.last_round || phase != wanted.phase {
            return false;
        }
        let until = *wanted.until.get_or_insert_with(|| {
            eprintln!("held in {phase}");
            now + wanted.length
        });
        now < until
    }

    /// Keeps an input for when the phase is over.
    pub(super) fn keep(&mut self, input: I) {
        self.waiting.push_back(input);
    }

    /// Ends the hold now: something came that must follow what is kept.
    pub(super) fn end(&mut self) {
        self.wanted = None;
    }

    /// The next input that was kept.
    pub(super) fn pop(&mut self) -> Option<I> {
        self.waiting.pop_front()
    }
}

impl Wanted {
    fn parse(text: &str) -> Option<Self> {
        let (phase, ms) = text.split_once(':')?;
        let (phase, last_round) = match phase.strip_prefix("last-") {
            Some(phase) => (phase, true),
            None => (phase, false),
        };
        let length = Duration::from_millis(ms.parse().ok()?);
        Some(Self { phase: phase.to_lowercase(), last_round, length, until: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(text: &str) -> Hold<u8> {
        Hold { wanted: Wanted::parse(text), waiting: VecDeque::new() }
    }

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[derive(Debug)]
    enum Phase {
        Moving,
        LastScanning,
    }

    #[test]
    fn a_phase_is_held_once_and_for_its_time() {
        let mut hold = hold("moving:100");
        assert!(!hold.holds(Phase::LastScanning, at(0)));
        assert!(hold.holds(Phase::Moving, at(10)) && hold.holds(Phase::Moving, at(109)));
        assert!(!hold.holds(Phase::Moving, at(110)));
        hold.end();
        assert!(!hold.holds(Phase::Moving, at(50)));
    }

    #[test]
    fn the_last_round_is_told_from_those_before_it() {
        let mut hold = hold("last-moving:100");
        assert!(!hold.holds(Phase::Moving, at(0)));
        assert!(!hold.holds(Phase::LastScanning, at(1)));
        assert!(hold.holds(Phase::Moving, at(2)));
    }

    #[test]
    fn nonsense_holds_nothing() {
        for text in ["", "moving", "moving:soon"] {
            assert!(!hold(text).holds(Phase::Moving, at(0)), "{text}");
        }
    }
}
