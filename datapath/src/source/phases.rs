//! The migration up to the recorded decision: what each phase makes of its input.

use std::time::Duration;

use super::ending::{differing, misbehaved, not_converging};
use super::input::{Command, Failure, Input};
use super::phase::Phase;
use super::report::RoundReport;
use super::state::{Context, Round, State};
use crate::bitmap::DirtySet;
use crate::control::{AbortReason, DigestReport, Message, RoundStart};
use crate::digest::MemoryDigest;
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
            State::DrainPausing { dirty } => self.drain_pausing(dirty, input, out),
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
            State::Committed | State::Releasing | State::Unwinding { .. } | State::Done(_) => {
                unreachable!("handled before")
            }
        }
    }

    /// What ends an attempt in any phase before the decision; everything else passes.
    fn failures(&self, state: &State, input: Input, now: Duration) -> Result<Input, Failure> {
        let phase = state.phase();
        match input {
            Input::Failed(failure) | Input::PeerLost(failure) => Err(failure),
            Input::Cancelled if phase < Phase::Deciding => Err(Failure {
                reason: AbortReason::Cancelled,
                by_peer: false,
                text: format!("cancelled while {}", phase.doing()),
                hint: None,
            }),
            Input::Message(Message::Abort(abort)) => Err(abort.into()),
            Input::Tick
                if limits::source_phase_max(phase).is_some_and(|m| now >= self.entered + m) =>
            {
                Err(Failure {
                    reason: AbortReason::Timeout,
                    by_peer: false,
                    text: format!(
                        "nothing came back for {} ms while {}",
                        now.saturating_sub(self.entered).as_millis(),
                        phase.doing()
                    ),
                    hint: Some("look at the target agent's output, and at the link".into()),
                })
            }
            input => Ok(input),
        }
    }

    fn greeting(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Message(Message::Welcome(_)) => {
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
                Ok(self.start_round(populated, false, now, out))
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
            Input::Placed(placed) if placed == round.round => {
                let took = now.saturating_sub(round.started);
                self.moved_bytes += round.bytes;
                self.moved_time += took;
                self.report.rounds.push(RoundReport {
                    round: round.round,
                    bytes: round.bytes,
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
                self.closing = now.saturating_sub(self.entered);
                if round.last {
                    return Ok(self.last_round_closed(out));
                }
                let spacing = planner::scan_spacing(&self.config.goals, round.pages);
                let until = self.last_scan + spacing;
                // The first pass is long enough by itself, and nothing was scanned before it.
                if round.round.0 > 0 && until > now {
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
        self.scanning = now.saturating_sub(self.entered);
        if let Some(since_drain) = &mut self.since_drain {
            since_drain.union_with(&dirty);
        }
        let measured = self.measure(&dirty, now);
        self.note_scan(&measured, now);
        match planner::plan(&self.config.goals, &measured) {
            Plan::GiveUp => Err(not_converging(&self.config.goals, &measured)),
            Plan::AnotherRound => {
                // What moves now is no longer all that device writes in flight may still change.
                self.since_drain = None;
                Ok(self.start_round(dirty, false, now, out))
            }
            Plan::SwitchOver if self.config.drain && self.since_drain.is_none() => {
                out.push(Command::Pause);
                Ok(State::DrainPausing { dirty })
            }
            Plan::SwitchOver => {
                self.report.predicted_blackout = Some(planner::predicted_blackout(&measured));
                out.push(Command::Send(Message::Prepare));
                out.push(Command::PrepareSwitchover);
                Ok(State::Preparing { here: false, there: false, dirty })
            }
        }
    }

    fn drain_pausing(&mut self, dirty: DirtySet, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Paused => {
                out.push(Command::Scan);
                Ok(State::DrainScanning { dirty })
            }
            input => stay(State::DrainPausing { dirty }, input),
        }
    }

    fn drain_scanning(
        &mut self,
        mut dirty: DirtySet,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Scanned(found) => {
                dirty.union_with(&found);
                self.last_scan = now;
                self.since_drain = Some(dirty.empty_like());
                out.push(Command::Resume);
                Ok(State::DrainResuming { dirty })
            }
            input => stay(State::DrainScanning { dirty }, input),
        }
    }

    fn drain_resuming(
        &mut self,
        dirty: DirtySet,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Resumed => Ok(self.start_round(dirty, false, now, out)),
            input => stay(State::DrainResuming { dirty }, input),
        }
    }

    fn preparing(
        &mut self,
        here: bool,
        there: bool,
        dirty: DirtySet,
        input: Input,
        out: &mut Vec<Command>,
    ) -> Step {
        let (here, there) = match input {
            Input::SwitchoverPrepared => (true, there),
            Input::Message(Message::Prepared) => (here, true),
            input => return stay(State::Preparing { here, there, dirty }, input),
        };
        if !(here && there) {
            return Ok(State::Preparing { here, there, dirty });
        }
        out.push(Command::Pause);
        Ok(State::Pausing { dirty })
    }

    fn pausing(&mut self, dirty: DirtySet, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Paused => {
                out.push(Command::Scan);
                Ok(State::LastScanning { dirty })
            }
            input => stay(State::Pausing { dirty }, input),
        }
    }

    fn last_scanning(
        &mut self,
        mut dirty: DirtySet,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Scanned(found) => {
                dirty.union_with(&found);
                if let Some(since_drain) = self.since_drain.take() {
                    dirty.union_with(&since_drain);
                }
                Ok(self.start_round(dirty, true, now, out))
            }
            input => stay(State::LastScanning { dirty }, input),
        }
    }

    fn last_round_closed(&mut self, out: &mut Vec<Command>) -> State {
        if self.config.offer.verify {
            out.push(Command::Send(Message::Verify));
            out.push(Command::Digest);
            return State::Verifying { here: None, there: None };
        }
        out.push(Command::SaveDeviceState);
        State::Saving { sent: false, ready: false }
    }

    fn verifying(
        &mut self,
        here: Option<MemoryDigest>,
        there: Option<MemoryDigest>,
        input: Input,
        out: &mut Vec<Command>,
    ) -> Step {
        let (here, there) = match input {
            Input::Digested(digest) => (Some(digest), there),
            Input::Message(Message::DigestReport(DigestReport { digest, .. })) => (
                here,
                Some(
                    MemoryDigest::decode(&digest)
                        .map_err(|_| misbehaved("its digest does not decode"))?,
                ),
            ),
            input => return stay(State::Verifying { here, there }, input),
        };
        let (Some(ours), Some(theirs)) = (&here, &there) else {
            return Ok(State::Verifying { here, there });
        };
        if ours != theirs {
            return Err(differing(ours, theirs));
        }
        self.report.verified = true;
        out.push(Command::SaveDeviceState);
        Ok(State::Saving { sent: false, ready: false })
    }

    fn saving(
        &mut self,
        sent: bool,
        ready: bool,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        let (sent, ready) = match input {
            Input::DeviceStateSent => {
                self.report.state_sent = Some(now);
                (true, ready)
            }
            Input::Message(Message::Ready) => (sent, true),
            input => return stay(State::Saving { sent, ready }, input),
        };
        // The monitor's own word that all is sent is not enough: it says so even when nobody
        // took it. Only the target's `Ready` says that the state is loaded.
        if !(sent && ready) {
            return Ok(State::Saving { sent, ready });
        }
        out.push(Command::Record);
        Ok(State::Deciding)
    }

    fn deciding(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Recorded => {
                out.push(Command::Send(Message::Commit));
                Ok(State::Committed)
            }
            input => stay(State::Deciding, input),
        }
    }

    fn start_round(
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
        let left = self.since_drain.as_ref().unwrap_or(dirty);
        Measured {
            rounds: self.rounds,
            left_bytes: left.bytes(),
            dirty_bytes: dirty.bytes(),
            dirty_time: now.saturating_sub(self.last_scan),
            moved_bytes: self.moved_bytes,
            moved_time: self.moved_time,
            best_left_bytes: self.best_left,
            stalled_rounds: self.stalled,
            shrinking: self.since_drain.is_none(),
            fixed: self.fixed + self.scanning + self.closing,
        }
    }

    fn note_scan(&mut self, measured: &Measured, now: Duration) {
        self.stalled = if planner::is_stalled(measured) { self.stalled + 1 } else { 0 };
        self.best_left =
            Some(self.best_left.map_or(measured.left_bytes, |b| b.min(measured.left_bytes)));
        self.last_scan = now;
        let per_second = u128::from(measured.dirty_bytes) * 1_000_000_000
            / measured.dirty_time.as_nanos().max(1);
        self.report.left_bytes = Some(measured.left_bytes);
        self.report.dirty_bytes_per_second = Some(u64::try_from(per_second).unwrap_or(u64::MAX));
    }
}

/// An input that changes nothing here, or must not come here.
fn stay(state: State, input: Input) -> Step {
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
