//! Every transition of the source, in one table.
//!
//! Failures, cancels and lost peers are not listed one by one: [`allowed`] adds them from where a
//! phase lies relative to the decision.

use super::input::InputKind as I;
use super::phase::Phase::{self, *};
use crate::limits;

/// `(from, input, to)`: what moves a migration forward.
pub const FORWARD: &[(Phase, I, Phase)] = &[
    (Greeting, I::Message, Offering),
    (Offering, I::Message, Opening),
    (Opening, I::LanesOpen, Attaching),
    (Attaching, I::Attached, Moving),
    (Moving, I::Placed, Closing),
    (Closing, I::Message, Spacing),
    (Spacing, I::Tick, Scanning),
    (Closing, I::Message, Scanning),
    (Scanning, I::Scanned, Moving),
    (Scanning, I::Scanned, DrainPausing),
    (Attaching, I::Attached, DrainPausing),
    (DrainPausing, I::Paused, DrainResuming),
    (DrainPausing, I::Paused, DrainScanning),
    (DrainScanning, I::Scanned, DrainResuming),
    (DrainResuming, I::Resumed, Moving),
    (Scanning, I::Scanned, Preparing),
    (Preparing, I::Message, Preparing),
    (Preparing, I::SwitchoverPrepared, Preparing),
    (Preparing, I::Message, Pausing),
    (Preparing, I::SwitchoverPrepared, Pausing),
    (Pausing, I::Paused, LastScanning),
    (LastScanning, I::Scanned, Moving),
    (Closing, I::Message, Verifying),
    (Verifying, I::Message, Verifying),
    (Verifying, I::Digested, Verifying),
    (Verifying, I::Message, Saving),
    (Verifying, I::Digested, Saving),
    (Closing, I::Message, Saving),
    (Saving, I::DeviceStateSent, Saving),
    (Saving, I::Message, Saving),
    (Saving, I::DeviceStateSent, Deciding),
    (Saving, I::Message, Deciding),
    (Deciding, I::Recorded, Committed),
    (Committed, I::Message, Releasing),
    (Releasing, I::Released, Done),
    (Retracting, I::Retracted, Unwinding),
    (Retracting, I::Retracted, Done),
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
            I::Cancelled => from >= Deciding,
            // After the commit left, no command is out: a lane may go, the monitor may end.
            I::Placed => from >= Committed,
            // Nor is it where the target has all of the device state.
            I::Failed => from == Saving || from >= Committed,
            _ => from >= Releasing,
        }
}

/// What ends an attempt: before the device state leaves by unwinding, until the decision by making
/// sure first that no record lets the target have the guest, after it only in uncertainty.
fn failing(from: Phase, input: I, to: Phase) -> bool {
    match (to, input) {
        (Unwinding, I::Cancelled | I::Message | I::PeerLost | I::Failed) => from < Saving,
        (Unwinding, I::Tick) => has_deadline(from) && from < Saving,
        (Unwinding, I::Scanned) => from == Scanning, // It does not converge.
        (Unwinding, I::Digested) => from == Verifying, // Memory differs.
        (Unwinding, I::Placed) => (Attaching..Saving).contains(&from), // Not on its way.
        (Retracting, I::PeerLost | I::Failed | I::Placed) => matches!(from, Saving | Deciding),
        (Retracting, I::Cancelled | I::Tick) => from == Saving,
        // After the commit left: the target's word that the guest never ran there and never will.
        (Retracting, I::Message) => matches!(from, Saving | Deciding | Committed),
        (Done, I::PeerLost | I::Tick | I::Message) => from == Committed,
        // However often else it is disturbed, the wait ends.
        (Done, I::Failed | I::Cancelled | I::Placed) => from == Committed,
        _ => false,
    }
}

fn has_deadline(phase: Phase) -> bool {
    limits::source_phase_max(phase).is_some()
}
