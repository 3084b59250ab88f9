//! The source's side of a migration, as decisions only.
//!
//! What completed comes in as an [`Input`] with the time; what to do next goes out as
//! [`Command`]s. No socket, thread, sleep or clock in here: the agent of `ctl` carries the
//! commands out on a real guest, the simulation on an imagined one, and both run this code.
//!
//! ```text
//! Greeting ─ Offering ─ Opening ─ Attaching ──┬─> Moving ─ Closing ─ Spacing ─ Scanning ─┐
//!    (refusals end here, guest untouched)     │      └──<─ another round ───────<────────┤
//!                                             │      └──<─ DrainResuming ─ DrainScanning │
//!                if direct I/O escapes the    │               ^                 ^        │
//!                tracker: once before it all, └──────> DrainPausing ────────────┘        │
//!                and before switching over                 ^────────────────────<────────┤
//!   ┌─────────────────────────────────────────────────────────────── switch over ──<─────┘
//!   └> Preparing ─ Pausing ─ LastScanning ─ Moving ─ Closing ─ [Verifying] ─ Saving
//!                  |<───────────────────── blackout ──────────────────────────────
//!      ─ Deciding ─ Committed ─ Releasing ─ Done
//!      ──────────────>|
//! any failure or cancel before Saving:                             ─ Unwinding ─ Done
//! a failure in Saving or Deciding, or the target gives it back: ─ Retracting ─ Unwinding ─ Done
//! no answer to the commit, or it can't be taken back:            ─ Done (uncertain)
//! ```
//!
//! The `const` table of [`table`] has every transition; each one taken is checked against it.
//!
//! Who owns the guest, after a crash of either agent at any moment, is in the records: the target,
//! if its own says `running`, or if the source's says `handed-over` and the target's does not say
//! `aborted`; the source in every other case. Each side keeps to it: the source's record says
//! `handed-over` before the commit leaves, until the target has said that the guest runs there, and
//! no longer says it when the guest runs here again; the target never lets the guest run without
//! the commit, its record says `running` before it tells the source so, and `aborted` before it
//! drops what was loaded. (No record on either side: the session ended, and both knew how.)

mod drain;
mod ending;
mod handover;
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
