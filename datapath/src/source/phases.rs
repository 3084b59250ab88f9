//! The migration up to the recorded decision: what each phase makes of its input.

use std::time::Duration;

use super::drain::Drain;
use super::ending::{misbehaved, not_converging, too_many_pages};
use super::input::{Command, Failure, Input};
use super::phase::Phase;
use super::report::RoundReport;
use super::state::{Context, Round, State};
use crate::bitmap::DirtySet;
use crate::control::{AbortReason, Message, RoundStart};
use crate::ids::RoundIndex;
use crate::limits;
use crate::planner::{self, Measured, Plan};

pub(super) type Step = Result<State, Failure>;

impl Context {
    /// The migration, phase by phase, until the decision is recorded.
    pub(super) fn forward(
        &mut self,
        state: State,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        let input = self.failures(&state, input, now)?;
        match state {
            State::Greeting => self.greeting(input, out),
            State::Offering => self.offering(input, out),
            State::Opening => self.opening(input, out),
            State::Attaching => self.attaching(input, now, out),
            State::Moving(round) => self.moving(round, input, now, out),
            State::Closing(round) => self.closing(round, input, now, out),
            State::Spacing { until } => self.spacing(until, input, now, out),
            State::Scanning => self.scanning(input, now, out),
            State::DrainPausing { dirty, first } => self.drain_pausing(dirty, first, input, out),
            State::DrainScanning { dirty } => self.drain_scanning(dirty, input, now, out),
            State::DrainResuming { dirty } => self.drain_resuming(dirty, input, now, out),
            State::Preparing { here, there, dirty } => {
                self.preparing(here, there, dirty, input, out)
            }
            State::Pausing { dirty } => self.pausing(dirty, input, out),
            State::LastScanning { dirty } => self.last_scanning(dirty, input, now, out),
            State::Verifying { here, there } => self.verifying(here, there, input, out),
            State::Saving { sent, ready } => self.saving(sent, ready, input, now, out),
            State::Deciding => self.deciding(input, out),
            State::Committed
            | State::Releasing
            | State::Retracting { .. }
            | State::Unwinding { .. }
            | State::Done(_) => unreachable!("handled before"),
        }
    }

    /// What ends an attempt in any phase before the decision; everything else passes.
    fn failures(&self, state: &State, input: Input, now: Duration) -> Result<Input, Failure> {
        let phase = state.phase();
        match input {
            // The target has all of it, and so the guest even if the monitor here has ended.
            Input::Failed(_) if matches!(state, State::Saving { sent: true, .. }) => {
                Ok(Input::Tick)
            }
            Input::Failed(failure) | Input::PeerLost(failure) => Err(failure),
            Input::Cancelled if phase < Phase::Deciding => Err(Failure {
                reason: AbortReason::Cancelled,
                by_peer: false,
                text: format!("cancelled while {}", phase.doing()),
                hint: None,
            }),
            Input::Message(Message::Abort(abort)) => Err(abort.into()),
            Input::Placed { round, .. } if !state.moves(round) => {
                Err(misbehaved("its lanes acknowledged a round that was not on its way"))
            }
            Input::Tick if self.give_up_at(state).is_some_and(|at| now >= at) => Err(Failure {
                reason: AbortReason::Timeout,
                by_peer: false,
                text: format!(
                    "nothing came back for {} ms while {}",
                    now.saturating_sub(self.entered).as_millis(),
                    phase.doing()
                ),
                hint: Some("look at the target agent's output, and at the link".into()),
            }),
            input => Ok(input),
        }
    }

    /// When to stop waiting for what this state waits for.
    pub(super) fn give_up_at(&self, state: &State) -> Option<Duration> {
        let max = match state {
            State::Closing(round) if round.last => Some(limits::LAST_CLOSING_MAX),
            state => limits::source_phase_max(state.phase()),
        };
        max.map(|max| self.entered + max)
    }

    fn greeting(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Message(Message::Welcome(_)) => {
                if !self.config.offer.bitmap_fits() {
                    return Err(too_many_pages(&self.config.offer));
                }
                out.push(Command::Send(Message::Offer(self.config.offer.clone())));
                Ok(State::Offering)
            }
            input => stay(State::Greeting, input),
        }
    }

    fn offering(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Message(Message::Choice(choice)) => {
                out.push(Command::OpenLanes(choice));
                Ok(State::Opening)
            }
            input => stay(State::Offering, input),
        }
    }

    fn opening(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::LanesOpen => {
                out.push(Command::Attach);
                Ok(State::Attaching)
            }
            input => stay(State::Opening, input),
        }
    }

    fn attaching(&mut self, input: Input, now: Duration, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Attached { populated, fixed } => {
                self.fixed = fixed;
                self.last_scan = now;
                self.report.populated_bytes = populated.bytes();
                if !self.config.drain {
                    return Ok(self.start_round(populated, false, now, out));
                }
                // What devices were writing to when tracking was armed is reported by nobody.
                self.drain = Some(Drain::new(&populated, now));
                Ok(self.drain_point(populated, true, now, out))
            }
            input => stay(State::Attaching, input),
        }
    }

    fn moving(
        &mut self,
        round: Round,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Placed { round: placed, zero_bytes } if placed == round.round => {
                let took = now.saturating_sub(round.started);
                self.report.rounds.push(RoundReport {
                    round: round.round,
                    bytes: round.bytes,
                    zero_bytes,
                    pages: round.pages,
                    took,
                    last: round.last,
                });
                out.push(Command::Send(Message::RoundEnd(round.round)));
                Ok(State::Closing(round))
            }
            input => stay(State::Moving(round), input),
        }
    }

    fn closing(
        &mut self,
        round: Round,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Message(Message::RoundClosed(closed)) if closed == round.round => {
                // In the first one the target also clears what its memory held before.
                if round.round.0 > 0 {
                    self.closing = shortest(self.closing, now.saturating_sub(self.entered));
                }
                if round.last {
                    return Ok(self.last_round_closed(out));
                }
                let until = self.last_scan + self.spacing;
                if until > now {
                    return Ok(State::Spacing { until });
                }
                out.push(Command::Scan);
                Ok(State::Scanning)
            }
            input => stay(State::Closing(round), input),
        }
    }

    fn spacing(
        &mut self,
        until: Duration,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        if now < until || !matches!(input, Input::Tick) {
            return stay(State::Spacing { until }, input);
        }
        out.push(Command::Scan);
        Ok(State::Scanning)
    }

    fn scanning(&mut self, input: Input, now: Duration, out: &mut Vec<Command>) -> Step {
        let Input::Scanned(dirty) = input else { return stay(State::Scanning, input) };
        self.scanning = shortest(self.scanning, now.saturating_sub(self.entered));
        if let Some(drain) = &mut self.drain {
            drain.reported.union_with(&dirty);
        }
        let measured = self.measure(&dirty, now);
        self.note_scan(&measured, now);
        let plan = planner::plan(&self.config.goals, &measured);
        self.spacing = match plan {
            Plan::AnotherRound { spaced: true } => {
                planner::scan_spacing(&self.config.goals, dirty.count())
            }
            _ => Duration::ZERO,
        };
        match (plan, &mut self.drain) {
            (Plan::GiveUp, _) => Err(not_converging(&self.config.goals, &measured)),
            // All that was reported would have to move again inside the pause: let it move now,
            // after a drain point, and inside the pause only what is reported from there on.
            (Plan::SwitchOver, Some(drain)) if drain.reported != dirty => {
                drain.to_switch_over = true;
                Ok(self.drain_point(dirty, false, now, out))
            }
            (Plan::SwitchOver, _) => {
                self.report.predicted_blackout = Some(planner::predicted_blackout(&measured));
                out.push(Command::Send(Message::Prepare));
                out.push(Command::PrepareSwitchover);
                Ok(State::Preparing { here: false, there: false, dirty })
            }
            // A drain point before a long round is cheap, and saves moving this round's pages
            // again after a later one.
            (Plan::AnotherRound { .. }, Some(drain))
                if planner::drain_pays(&measured, drain.cost) =>
            {
                drain.to_switch_over = false;
                Ok(self.drain_point(dirty, false, now, out))
            }
            (Plan::AnotherRound { .. }, drain) => {
                if let Some(drain) = drain {
                    drain.to_switch_over = false;
                }
                Ok(self.start_round(dirty, false, now, out))
            }
        }
    }

    pub(super) fn start_round(
        &mut self,
        pages: DirtySet,
        last: bool,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> State {
        let round = RoundIndex(self.rounds);
        self.rounds += 1;
        let moving =
            Round { round, bytes: pages.bytes(), pages: pages.count(), started: now, last };
        let bitmap = pages.encode();
        out.push(Command::Send(Message::RoundStart(RoundStart { round, last, bitmap })));
        out.push(Command::MoveRound { round, pages });
        State::Moving(moving)
    }

    fn measure(&self, dirty: &DirtySet, now: Duration) -> Measured {
        let bytes = dirty.bytes();
        let (moved_bytes, moved_time) = self.report.bandwidth(bytes);
        Measured {
            rounds: self.rounds,
            // Nothing else, also with drain points: what was reported before the last one has
            // moved since, or moves after another one before the pause.
            left_bytes: bytes,
            dirty_bytes: bytes,
            dirty_time: now.saturating_sub(self.last_scan),
            moved_bytes,
            moved_time,
            best_left_bytes: self.best_left,
            stalled_rounds: self.stalled,
            shrinking: self.drain.as_ref().is_none_or(|drain| !drain.to_switch_over),
            fixed: self.fixed
                + self.scanning.unwrap_or_default()
                + self.closing.unwrap_or_default(),
        }
    }

    fn note_scan(&mut self, measured: &Measured, now: Duration) {
        // The round after a drain point taken to switch over may be longer than the one before it.
        if measured.shrinking {
            self.stalled = if planner::is_stalled(measured) { self.stalled + 1 } else { 0 };
        }
        self.best_left =
            Some(self.best_left.map_or(measured.left_bytes, |b| b.min(measured.left_bytes)));
        self.last_scan = now;
        let per_second = u128::from(measured.dirty_bytes) * 1_000_000_000
            / measured.dirty_time.as_nanos().max(1);
        self.report.left_bytes = Some(measured.left_bytes);
        self.report.dirty_bytes_per_second = Some(u64::try_from(per_second).unwrap_or(u64::MAX));
    }
}

fn shortest(so_far: Option<Duration>, took: Duration) -> Option<Duration> {
    Some(so_far.map_or(took, |so_far| so_far.min(took)))
}

/// An input that changes nothing here, or must not come here.
pub(super) fn stay(state: State, input: Input) -> Step {
    match input {
        Input::Tick | Input::Cancelled => Ok(state),
        Input::Message(message) => Err(Failure {
            text: format!(
                "the target broke the protocol: it sent {:?} while we were {}",
                message.kind(),
                state.phase().doing()
            ),
            ..misbehaved("")
        }),
        input => unreachable!("{:?} while {}", input.kind(), state.phase().doing()),
    }
}
