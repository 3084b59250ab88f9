//! How a migration ends: after the commit, by unwinding, and what is said about it.

use std::time::Duration;

use super::input::{Command, Failure, FailureKind, Input, Outcome};
use super::phase::Phase;
use super::state::{Context, State};
use crate::control::{Abort, AbortReason, Message, Offer};
use crate::digest::MemoryDigest;
use crate::limits;
use crate::planner::{self, Goals, Measured};
use crate::recover::Guest;

/// After the commit left: only the target's word counts.
pub(super) fn committed(
    context: &mut Context,
    input: Input,
    now: Duration,
    out: &mut Vec<Command>,
) -> State {
    let deadline = limits::source_phase_max(Phase::Committed).map(|max| context.entered + max);
    let failure = match input {
        Input::Message(Message::Running(running)) => {
            context.report.running = Some(running);
            out.push(Command::Release);
            return State::Releasing;
        }
        // A target sends this only when its guest never ran and never will.
        Input::Message(Message::Abort(abort)) => return retract(abort.into(), out),
        Input::Message(_) => misbehaved("it answered the commit with something else"),
        Input::PeerLost(failure) => failure,
        // Nothing is asked of this host any more. A lane may well be gone: the target closes them
        // when its guest runs, and that may be heard before its word.
        Input::Tick | Input::Cancelled | Input::Failed(_) | Input::Placed { .. } => {
            if deadline.is_none_or(|deadline| now < deadline) {
                return State::Committed;
            }
            Failure {
                reason: AbortReason::Timeout,
                by_peer: false,
                text: "the target did not confirm that the guest runs".into(),
                hint: None,
            }
        }
        input => unreachable!("no command is out whose answer is {:?}", input.kind()),
    };
    uncertain(failure)
}

/// The guest runs at the target, whatever goes wrong while letting go of it here.
pub(super) fn releasing(input: Input) -> State {
    match input {
        Input::Released => State::Done(Outcome::Migrated),
        _ => State::Releasing,
    }
}

/// The target may have the guest loaded, and the decision may be on its way to the record, or there:
/// before the guest may run here the record has to say that it is this side's, or a later reader of
/// it would let the copy at the target run, too or instead.
pub(super) fn retract(failure: Failure, out: &mut Vec<Command>) -> State {
    out.push(Command::Retract);
    State::Retracting { failure }
}

pub(super) fn retracting(failure: Failure, input: Input, out: &mut Vec<Command>) -> State {
    match input {
        Input::Retracted { durable: true } => unwind(failure, false, out),
        Input::Retracted { durable: false } => uncertain(failure),
        // Answers of commands that were on their way when the attempt ended.
        _ => State::Retracting { failure },
    }
}

fn uncertain(failure: Failure) -> State {
    State::Done(Outcome::Failed { kind: FailureKind::Uncertain, failure })
}

pub(super) fn unwinding(state: State, input: Input) -> State {
    match (state, input) {
        (State::Unwinding { failure, untouched }, Input::Unwound { guest }) => {
            let kind = match (guest, untouched) {
                (Guest::Runs, true) => FailureKind::Refused,
                (Guest::Runs, false) => FailureKind::RunsAtSource,
                (Guest::Whole, _) => FailureKind::PausedAtSource,
                (Guest::Absent, _) => FailureKind::Gone,
            };
            State::Done(Outcome::Failed { kind, failure })
        }
        // Answers of commands that were on their way when the attempt ended.
        (state, _) => state,
    }
}

pub(super) fn unwind(failure: Failure, untouched: bool, out: &mut Vec<Command>) -> State {
    if !failure.by_peer {
        out.push(Command::Send(Message::Abort(Abort {
            reason: failure.reason,
            text: failure.text.clone(),
            hint: None,
        })));
    }
    out.push(Command::Unwind);
    State::Unwinding { failure, untouched }
}

pub(super) fn misbehaved(what: &str) -> Failure {
    Failure {
        reason: AbortReason::PeerMisbehaved,
        by_peer: false,
        text: format!("the target broke the protocol: {what}"),
        hint: None,
    }
}

pub(super) fn too_many_pages(offer: &Offer) -> Failure {
    let pages: u64 = offer.regions.iter().map(|region| region.bytes / region.page_bytes).sum();
    Failure {
        reason: AbortReason::Refused,
        by_peer: false,
        text: format!(
            "the guest has {pages} pages, and a bitmap of them may take more than the {} MiB that \
             fit into a message",
            limits::CONTROL_BODY_BYTES_MAX >> 20
        ),
        hint: Some("back the guest's memory with huge pages".into()),
    }
}

pub(super) fn not_converging(goals: &Goals, measured: &Measured) -> Failure {
    let predicted = planner::predicted_blackout(measured).as_millis();
    let wanted = goals.downtime.as_millis();
    let text = match planner::fixed_part_is_too_long(measured) {
        true => format!(
            "pausing, recording the decision and handing over take {predicted} ms on these hosts, \
             however little is left to move; {wanted} ms were asked for"
        ),
        false => format!(
            "the guest writes faster than the lanes move: {} MiB left after {} rounds, a pause of \
             {predicted} ms where {wanted} ms were asked for",
            measured.left_bytes >> 20,
            measured.rounds,
        ),
    };
    let hint = "allow a longer pause with --downtime-ms, or take it as it comes with \
                --not-converging switch-over";
    Failure { reason: AbortReason::NotConverging, by_peer: false, text, hint: Some(hint.into()) }
}

pub(super) fn differing(ours: &MemoryDigest, theirs: &MemoryDigest) -> Failure {
    let place = match ours.first_difference(theirs) {
        Some(at) => format!(", first in region {} at offset {:#x}", at.region, at.offset),
        None => String::new(),
    };
    Failure {
        reason: AbortReason::VerificationFailed,
        by_peer: false,
        text: format!("the memory at the target differs from the guest's{place}"),
        hint: Some(
            "something writes to guest memory unseen; `pageferry probe` and the guest's devices \
             may tell what"
                .into(),
        ),
    }
}

impl From<Abort> for Failure {
    fn from(abort: Abort) -> Self {
        Self { reason: abort.reason, by_peer: true, text: abort.text, hint: abort.hint }
    }
}
