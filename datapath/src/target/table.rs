//! Every transition of the target, in one table.

use super::input::InputKind as I;
use super::state::Phase::{self, *};
use crate::limits;

/// `(from, input, to)`: what moves a migration forward.
pub const FORWARD: &[(Phase, I, Phase)] = &[
    (Greeting, I::Message, Offered),
    (Offered, I::Message, Inspecting),
    (Inspecting, I::Inspected, Receiving),
    (Receiving, I::Message, Receiving),
    (Receiving, I::Cleared, Receiving),
    (Receiving, I::Placed, Receiving),
    (Receiving, I::IncomingPrepared, Receiving),
    (Receiving, I::Digested, Receiving),
    (Receiving, I::Message, Loading),
    (Loading, I::Message, Loading),
    (Loading, I::Loaded, Ready),
    (Ready, I::Message, Ready),
    (Ready, I::Recorded, Ready),
    (Ready, I::Message, Resuming),
    (Ready, I::Recorded, Resuming),
    (Resuming, I::Resumed, Done),
    (Unwinding, I::Unwound, Done),
];

/// Whether this transition is one of the protocol's.
pub fn allowed(from: Phase, input: I, to: Phase) -> bool {
    FORWARD.contains(&(from, input, to)) || unforced(from, input, to) || failing(from, input, to)
}

/// What leaves a phase as it was: time passing, and what can't matter any more.
fn unforced(from: Phase, input: I, to: Phase) -> bool {
    from == to
        && match input {
            I::Tick => true,
            // The commit has come: the guest runs here, whoever is still listening.
            I::Cancelled | I::PeerLost | I::Placed | I::Message | I::Failed => from >= Resuming,
            _ => from >= Unwinding,
        }
}

/// What ends an attempt. In `Ready` a lost peer leaves it open: the commit may have been on its
/// way.
fn failing(from: Phase, input: I, to: Phase) -> bool {
    match (to, input) {
        (Unwinding, I::Cancelled | I::Message) => from <= Ready,
        (Unwinding, I::Placed) => (Receiving..=Ready).contains(&from), // A round too many.
        (Unwinding, I::PeerLost) => from < Ready,
        (Done, I::PeerLost) => from == Ready,
        (Unwinding, I::Failed) => from <= Ready,
        (Unwinding, I::NotResumed) => from == Resuming,
        (Unwinding, I::Tick) => limits::target_phase_max(from).is_some(),
        _ => false,
    }
}
