//! The source's side of a migration, as decisions only.
//!
//! What completed comes in as an [`Input`] with the time; what to do next goes out as
//! [`Command`]s. No socket, thread, sleep or clock in here: the agent of `ctl` carries the
//! commands out on a real guest, the simulation on an imagined one, and both run this code.
//!
//! ```text
//! Greeting ─ Offering ─ Opening ─ Attaching ─┬─> Moving ─ Closing ─ Spacing ─ Scanning ─┐
//!    (refusals end here, guest untouched)    └───<─ another round ────────────<─────────┤
//!                                                 ^                                     │
//!                       DrainPausing ─ DrainScanning ─ DrainResuming                    │
//!                             ^ (once, if direct I/O escapes the tracker) ──────────────┤
//!   ┌─────────────────────────────────────────────────────────────── switch over ──<────┘
//!   └> Preparing ─ Pausing ─ LastScanning ─ Moving ─ Closing ─ [Verifying] ─ Saving
//!                  |<───────────────────── blackout ──────────────────────────────
//!      ─ Deciding ─ Committed ─ Releasing ─ Done
//!      ──────────────>|
//! any failure or cancel before the decision is recorded: ─ Unwinding ─ Done
//! ```
//!
//! The `const` table of [`table`] has every transition; each one taken is checked against it.

mod ending;
mod input;
mod phase;
mod phases;
mod report;
mod state;
pub mod table;

pub use input::{Command, Failure, FailureKind, Input, InputKind, Outcome};
pub use phase::Phase;
pub use report::{RoundReport, SourceReport};
pub use state::{Source, SourceConfig};
