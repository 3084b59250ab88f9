//! The source's states, and the one function that takes a migration from one to the next.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::drain::Drain;
use super::ending;
use super::input::{Command, Failure, Input, Outcome};
use super::phase::Phase;
use super::report::SourceReport;
use super::table;
use crate::bitmap::DirtySet;
use crate::control::{Hello, Message, Offer};
use crate::digest::MemoryDigest;
use crate::ids::RoundIndex;
use crate::planner::Goals;

/// What a source is started with.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// First message.
    pub hello: Hello,
    /// Second message.
    pub offer: Offer,
    /// What the operator asked for.
    pub goals: Goals,
    /// Direct I/O escapes the tracker: pause once, with every request finished, before the rounds
    /// that count.
    pub drain: bool,
}

#[derive(Clone, Debug, Hash)]
pub(super) enum State {
    Greeting,
    Offering,
    Opening,
    Attaching,
    Moving(Round),
    Closing(Round),
    Spacing {
        until: Duration,
    },
    Scanning,
    /// `first`: the drain point before the first pass, where there is nothing to scan for yet.
    DrainPausing {
        dirty: DirtySet,
        first: bool,
    },
    DrainScanning {
        dirty: DirtySet,
    },
    DrainResuming {
        dirty: DirtySet,
    },
    Preparing {
        here: bool,
        there: bool,
        dirty: DirtySet,
    },
    Pausing {
        dirty: DirtySet,
    },
    LastScanning {
        dirty: DirtySet,
    },
    Verifying {
        here: Option<MemoryDigest>,
        there: Option<MemoryDigest>,
    },
    Saving {
        sent: bool,
        ready: bool,
    },
    Deciding,
    Committed,
    Releasing,
    Retracting {
        failure: Failure,
    },
    Unwinding {
        failure: Failure,
        untouched: bool,
    },
    Done(Outcome),
}

/// A round on its way.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Round {
    pub(super) round: RoundIndex,
    pub(super) bytes: u64,
    pub(super) pages: u64,
    pub(super) started: Duration,
    pub(super) last: bool,
}

impl State {
    pub(super) fn phase(&self) -> Phase {
        match self {
            Self::Greeting => Phase::Greeting,
            Self::Offering => Phase::Offering,
            Self::Opening => Phase::Opening,
            Self::Attaching => Phase::Attaching,
            Self::Moving(_) => Phase::Moving,
            Self::Closing(_) => Phase::Closing,
            Self::Spacing { .. } => Phase::Spacing,
            Self::Scanning => Phase::Scanning,
            Self::DrainPausing { .. } => Phase::DrainPausing,
            Self::DrainScanning { .. } => Phase::DrainScanning,
            Self::DrainResuming { .. } => Phase::DrainResuming,
            Self::Preparing { .. } => Phase::Preparing,
            Self::Pausing { .. } => Phase::Pausing,
            Self::LastScanning { .. } => Phase::LastScanning,
            Self::Verifying { .. } => Phase::Verifying,
            Self::Saving { .. } => Phase::Saving,
            Self::Deciding => Phase::Deciding,
            Self::Committed => Phase::Committed,
            Self::Releasing => Phase::Releasing,
            Self::Retracting { .. } => Phase::Retracting,
            Self::Unwinding { .. } => Phase::Unwinding,
            Self::Done(_) => Phase::Done,
        }
    }

    /// Whether this round's pages are on their way.
    pub(super) fn moves(&self, round: RoundIndex) -> bool {
        matches!(self, Self::Moving(moving) if moving.round == round)
    }
}

/// The source's state machine.
#[derive(Clone, Debug)]
pub struct Source {
    state: State,
    context: Context,
}

/// What outlives a state.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) config: SourceConfig,
    pub(super) report: SourceReport,
    pub(super) entered: Duration,
    pub(super) rounds: u32,
    /// The quickest close of a round and the quickest scan so far: what they cost inside the pause,
    /// when little is left. One slow one is a hiccup.
    pub(super) closing: Option<Duration>,
    pub(super) scanning: Option<Duration>,
    pub(super) fixed: Duration,
    pub(super) last_scan: Duration,
    pub(super) best_left: Option<u64>,
    pub(super) stalled: u32,
    /// How long after the last scan the next one may be, at the earliest.
    pub(super) spacing: Duration,
    /// Kept where direct I/O escapes the tracker.
    pub(super) drain: Option<Drain>,
}

impl Source {
    /// A source about to say hello. The time is the caller's, from any fixed start.
    pub fn start(config: SourceConfig, now: Duration, out: &mut Vec<Command>) -> Self {
        out.push(Command::Send(Message::Hello(config.hello.clone())));
        let mut report = SourceReport::default();
        report.phases.push((Phase::Greeting, now));
        Self {
            state: State::Greeting,
            context: Context {
                config,
                report,
                entered: now,
                rounds: 0,
                closing: None,
                scanning: None,
                fixed: Duration::ZERO,
                last_scan: now,
                best_left: None,
                stalled: 0,
                spacing: Duration::ZERO,
                drain: None,
            },
        }
    }

    /// Where this source is.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// What it has learned.
    pub fn report(&self) -> &SourceReport {
        &self.context.report
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            State::Done(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// When to come back with [`Input::Tick`], if nothing else happens before.
    pub fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Spacing { until } => Some(until),
            _ => self.context.give_up_at(&self.state),
        }
    }

    /// Feeds `hasher` with what decides what this source does from here on, and not with what only
    /// tells how it came here: two sources that agree in it, given the same inputs at the same
    /// times after they entered their phase, do the same.
    pub fn hash_future(&self, hasher: &mut impl Hasher) {
        let it = &self.context;
        self.state.hash(hasher);
        (it.rounds, it.closing, it.scanning, it.fixed, it.last_scan).hash(hasher);
        (it.best_left, it.stalled, it.spacing, &it.drain, &it.report.rounds).hash(hasher);
    }

    /// Takes one input and says what to do next.
    ///
    /// Never fails: what goes wrong before the decision unwinds the attempt, what goes wrong after
    /// it ends in [`FailureKind::Uncertain`](super::FailureKind::Uncertain).
    pub fn handle(self, input: Input, now: Duration, out: &mut Vec<Command>) -> Self {
        let (from, kind) = (self.phase(), input.kind());
        let Self { state, mut context } = self;
        let state = match state {
            State::Done(_) => state,
            State::Unwinding { .. } => ending::unwinding(state, input),
            State::Retracting { failure } => ending::retracting(failure, input, out),
            State::Releasing => ending::releasing(input),
            State::Committed => ending::committed(&mut context, input, now, out),
            state => {
                let untouched = from < Phase::Attaching;
                match context.forward(state, input, now, out) {
                    Ok(state) => state,
                    Err(failure) if from >= Phase::Saving => ending::retract(failure, out),
                    Err(failure) => ending::unwind(failure, untouched, out),
                }
            }
        };
        let to = state.phase();
        assert!(table::allowed(from, kind, to), "{from:?} -{kind:?}-> {to:?} is not in the table");
        if to != from {
            context.entered = now;
            context.report.phases.push((to, now));
        }
        Self { state, context }
    }
}
