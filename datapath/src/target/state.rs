//! The target's states and what each makes of its inputs.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::input::{Command, Input, Outcome};
use super::receiving::Receiving;
use super::table;
use crate::bitmap::DirtySet;
use crate::control::{Abort, AbortReason, Hello, Message, Offer, Running, Welcome};
use crate::ids::SessionId;
use crate::limits;
use crate::source::Failure;

/// What a target is started with.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// The answer to the source's hello.
    pub welcome: Welcome,
}

/// Where a target is; the order is the order of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Drawn and explained at the top of `target`.
pub enum Phase {
    Greeting,
    Offered,
    Inspecting,
    Receiving,
    Loading,
    Ready,
    Resuming,
    Unwinding,
    Done,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: &'static [Self] = &[
        Self::Greeting,
        Self::Offered,
        Self::Inspecting,
        Self::Receiving,
        Self::Loading,
        Self::Ready,
        Self::Resuming,
        Self::Unwinding,
        Self::Done,
    ];
}

#[derive(Clone, Debug, Hash)]
pub(super) enum State {
    Greeting,
    Offered,
    Inspecting {
        shape: Vec<(u64, u64)>,
    },
    Receiving(Box<Receiving>),
    Loading {
        state_bytes: u64,
        ended: bool,
    },
    /// It runs when that it may is on record, and the source has decided: in either order.
    Ready {
        load: Duration,
        recorded: bool,
        committed: bool,
    },
    Resuming {
        load: Duration,
    },
    Unwinding(Failure),
    Done(Outcome),
}

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Greeting => Phase::Greeting,
            Self::Offered => Phase::Offered,
            Self::Inspecting { .. } => Phase::Inspecting,
            Self::Receiving(_) => Phase::Receiving,
            Self::Loading { .. } => Phase::Loading,
            Self::Ready { .. } => Phase::Ready,
            Self::Resuming { .. } => Phase::Resuming,
            Self::Unwinding(_) => Phase::Unwinding,
            Self::Done(_) => Phase::Done,
        }
    }
}

/// The target's state machine.
#[derive(Clone, Debug)]
pub struct Target {
    state: State,
    config: TargetConfig,
    session: Option<SessionId>,
    entered: Duration,
}

pub(super) type Step = Result<State, Failure>;

impl Target {
    /// A target whose control connection was just accepted.
    pub fn start(config: TargetConfig, now: Duration) -> Self {
        Self { state: State::Greeting, config, session: None, entered: now }
    }

    /// Where this target is.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// The session, once the source has said it.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Pages whose bytes here are older than the guest's, while memory is on its way.
    pub fn stale(&self) -> Option<&DirtySet> {
        match &self.state {
            State::Receiving(receiving) => Some(receiving.stale()),
            _ => None,
        }
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
        limits::target_phase_max(self.phase()).map(|max| self.entered + max)
    }

    /// Feeds `hasher` with what decides what this target does from here on, as the source's
    /// [`hash_future`](crate::source::Source::hash_future).
    pub fn hash_future(&self, hasher: &mut impl Hasher) {
        self.state.hash(hasher);
    }

    /// Takes one input and says what to do next. Never fails: what goes wrong ends the attempt.
    pub fn handle(self, input: Input, now: Duration, out: &mut Vec<Command>) -> Self {
        let (from, kind) = (self.phase(), input.kind());
        let mut target = self;
        let state = std::mem::replace(&mut target.state, State::Greeting);
        let state = match state {
            State::Done(_) => state,
            State::Unwinding(failure) => match input {
                Input::Unwound { dropped: true } => State::Done(Outcome::Failed(failure)),
                Input::Unwound { dropped: false } => State::Done(Outcome::Uncertain(failure)),
                _ => State::Unwinding(failure),
            },
            state => {
                let ready = from == Phase::Ready;
                match target.forward(state, input, now, out) {
                    Ok(state) => state,
                    Err(failure) if ready && kind == super::InputKind::PeerLost => {
                        State::Done(Outcome::Uncertain(failure))
                    }
                    Err(failure) => unwind(failure, out),
                }
            }
        };
        let to = state.phase();
        assert!(table::allowed(from, kind, to), "{from:?} -{kind:?}-> {to:?} is not in the table");
        if to != from {
            target.entered = now;
        }
        Self { state, ..target }
    }

    /// The migration, phase by phase.
    fn forward(
        &mut self,
        state: State,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        let input = self.failures(&state, input, now)?;
        match state {
            State::Greeting => self.greeting(input, out),
            State::Offered => offered(input, out),
            State::Inspecting { shape } => inspecting(shape, input, out),
            State::Receiving(receiving) => receiving.take(input, out),
            State::Loading { state_bytes, ended } => loading(state_bytes, ended, input, out),
            State::Ready { load, recorded, committed } => {
                ready(load, recorded, committed, input, out)
            }
            State::Resuming { load } => resuming(load, input, out),
            State::Unwinding(_) | State::Done(_) => unreachable!("handled before"),
        }
    }

    /// What ends an attempt in any phase; everything else passes.
    fn failures(&self, state: &State, input: Input, now: Duration) -> Result<Input, Failure> {
        let phase = state.phase();
        match input {
            // The guest may run by now: only the answer about that can end this.
            Input::Failed(_) | Input::PeerLost(_) | Input::Cancelled
                if phase >= Phase::Resuming =>
            {
                Ok(Input::Tick)
            }
            // The memory was compared, or loaded from, as the last round left it.
            Input::Placed(_) if (Phase::Loading..=Phase::Ready).contains(&phase) => {
                Err(misbehaved("its lanes went on after the last round"))
            }
            Input::Placed(_) if phase == Phase::Resuming => Ok(Input::Tick),
            Input::Failed(failure) | Input::PeerLost(failure) => Err(failure),
            Input::Cancelled => Err(Failure {
                reason: AbortReason::Cancelled,
                by_peer: false,
                text: "cancelled at the target".into(),
                hint: None,
            }),
            Input::Message(Message::Abort(abort)) if phase <= Phase::Ready => Err(abort.into()),
            Input::Tick
                if limits::target_phase_max(phase).is_some_and(|max| now >= self.entered + max) =>
            {
                Err(Failure {
                    reason: AbortReason::Timeout,
                    by_peer: false,
                    text: format!(
                        "nothing came from the source for {} ms",
                        now.saturating_sub(self.entered).as_millis()
                    ),
                    hint: Some("look at the source agent's output, and at the link".into()),
                })
            }
            input => Ok(input),
        }
    }

    fn greeting(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Message(Message::Hello(Hello { session, .. })) => {
                self.session = Some(session);
                out.push(Command::Send(Message::Welcome(self.config.welcome.clone())));
                Ok(State::Offered)
            }
            input => stay(State::Greeting, input),
        }
    }
}

fn offered(input: Input, out: &mut Vec<Command>) -> Step {
    match input {
        Input::Message(Message::Offer(offer)) => {
            let shape = shape_of(&offer);
            out.push(Command::Inspect(offer));
            Ok(State::Inspecting { shape })
        }
        input => stay(State::Offered, input),
    }
}

/// `(pages, page_bytes)` per region; the offer's sizes were checked when it was decoded.
fn shape_of(offer: &Offer) -> Vec<(u64, u64)> {
    offer.regions.iter().map(|r| (r.bytes / r.page_bytes, r.page_bytes)).collect()
}

fn inspecting(shape: Vec<(u64, u64)>, input: Input, out: &mut Vec<Command>) -> Step {
    match input {
        Input::Inspected(choice) => {
            out.push(Command::Send(Message::Choice(choice)));
            Ok(State::Receiving(Box::new(Receiving::new(shape))))
        }
        input => stay(State::Inspecting { shape }, input),
    }
}

pub(super) fn feed(state_bytes: u64, bytes: Vec<u8>, out: &mut Vec<Command>) -> Step {
    let state_bytes = state_bytes + bytes.len() as u64;
    if state_bytes > limits::STATE_BYTES_MAX {
        return Err(misbehaved("its device state has no end"));
    }
    out.push(Command::FeedDeviceState(bytes));
    Ok(State::Loading { state_bytes, ended: false })
}

fn loading(state_bytes: u64, ended: bool, input: Input, out: &mut Vec<Command>) -> Step {
    match input {
        Input::Message(Message::DeviceState(bytes)) if !ended => feed(state_bytes, bytes, out),
        Input::Message(Message::DeviceStateEnd) if !ended => {
            out.push(Command::EndDeviceState);
            Ok(State::Loading { state_bytes, ended: true })
        }
        Input::Loaded { took } => {
            out.push(Command::Send(Message::Ready));
            out.push(Command::Record);
            Ok(State::Ready { load: took, recorded: false, committed: false })
        }
        input => stay(State::Loading { state_bytes, ended }, input),
    }
}

fn ready(
    load: Duration,
    recorded: bool,
    committed: bool,
    input: Input,
    out: &mut Vec<Command>,
) -> Step {
    let (recorded, committed) = match input {
        Input::Message(Message::Commit) if !committed => (recorded, true),
        Input::Recorded if !recorded => (true, committed),
        input => return stay(State::Ready { load, recorded, committed }, input),
    };
    if !(recorded && committed) {
        return Ok(State::Ready { load, recorded, committed });
    }
    out.push(Command::Resume);
    Ok(State::Resuming { load })
}

fn resuming(load: Duration, input: Input, out: &mut Vec<Command>) -> Step {
    match input {
        Input::Resumed { took, late, cpu } => {
            out.push(Command::Send(Message::Running(Running {
                load_us: load.as_micros() as u64,
                resume_us: took.as_micros() as u64,
                late_us: late.as_micros() as u64,
                cpu_us: cpu.as_micros() as u64,
            })));
            Ok(State::Done(Outcome::Runs))
        }
        Input::NotResumed(failure) => Err(failure),
        // Nothing the source says can call the guest back.
        Input::Message(_) => Ok(State::Resuming { load }),
        input => stay(State::Resuming { load }, input),
    }
}

fn unwind(failure: Failure, out: &mut Vec<Command>) -> State {
    if !failure.by_peer {
        out.push(Command::Send(Message::Abort(Abort {
            reason: failure.reason,
            text: failure.text.clone(),
            hint: failure.hint.clone(),
        })));
    }
    out.push(Command::Unwind);
    State::Unwinding(failure)
}

/// An input that changes nothing here, or must not come here.
pub(super) fn stay(state: State, input: Input) -> Step {
    match input {
        Input::Tick => Ok(state),
        Input::Message(message) => Err(Failure {
            text: format!(
                "the source broke the protocol: it sent {:?} while the target was {:?}",
                message.kind(),
                state.phase()
            ),
            ..misbehaved("")
        }),
        input => unreachable!("{:?} in {:?}", input.kind(), state.phase()),
    }
}

pub(super) fn misbehaved(what: &str) -> Failure {
    Failure {
        reason: AbortReason::PeerMisbehaved,
        by_peer: false,
        text: format!("the source broke the protocol: {what}"),
        hint: None,
    }
}
