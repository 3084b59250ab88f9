//! Holds an agent in a phase, so that a test can do something to it there.
//!
//! `PAGEFERRY_HOLD=saving:20000` keeps the first agent that reads it in its phase `saving` for up
//! to 20 s: what the phase has asked for is done, and the answer waits here. What ends an attempt
//! (a cancel, a failure, a lost peer, a deadline) is heard all the same. `last-moving` and
//! `last-closing` mean those of the last round, with the guest paused; `moving#2` is that phase when
//! it is entered for the second time. `saving:20000:/tmp/go` ends as soon as there is such a file.
//!
//! For tests: a build without debug assertions never looks at the variable. Owned by an agent's
//! loop, on its thread.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::path::PathBuf;
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
    /// Which time that it is entered; how often it was; whether it is just now.
    entry: u32,
    entered: u32,
    inside: bool,
    length: Duration,
    until: Option<Duration>,
    ends_with: Option<PathBuf>,
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
            wanted.inside = false;
            return false;
        }
        wanted.entered += u32::from(!wanted.inside);
        wanted.inside = true;
        if wanted.entered != wanted.entry {
            return false;
        }
        let until = *wanted.until.get_or_insert_with(|| {
            eprintln!("held in {phase}");
            now + wanted.length
        });
        now < until && !wanted.ends_with.as_ref().is_some_and(|file| file.exists())
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
        let (phase, rest) = text.split_once(':')?;
        let (ms, ends_with) = match rest.split_once(':') {
            Some((ms, file)) => (ms, Some(file.into())),
            None => (rest, None),
        };
        let (phase, last_round) = match phase.strip_prefix("last-") {
            Some(phase) => (phase, true),
            None => (phase, false),
        };
        let (phase, entry) = match phase.split_once('#') {
            Some((phase, entry)) => (phase, entry.parse().ok()?),
            None => (phase, 1),
        };
        Some(Self {
            phase: phase.to_lowercase(),
            last_round,
            entry,
            entered: 0,
            inside: false,
            length: Duration::from_millis(ms.parse().ok()?),
            until: None,
            ends_with,
        })
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
    fn a_later_entry_is_told_from_the_first() {
        let mut hold = hold("moving#2:100");
        assert!(!hold.holds(Phase::Moving, at(0)) && !hold.holds(Phase::Moving, at(1)));
        assert!(!hold.holds(Phase::LastScanning, at(2)));
        assert!(hold.holds(Phase::Moving, at(3)) && !hold.holds(Phase::Moving, at(103)));
    }

    #[test]
    fn a_file_ends_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().to_owned();
        let mut hold = hold(&format!("moving:100:{}", path.display()));
        assert!(!hold.holds(Phase::Moving, at(0)));
        drop(file);
        assert!(hold.holds(Phase::Moving, at(1)));
    }

    #[test]
    fn nonsense_holds_nothing() {
        for text in ["", "moving", "moving:soon", "moving#x:1"] {
            assert!(!hold(text).holds(Phase::Moving, at(0)), "{text}");
        }
    }
}
