//! The target's side of a migration, as decisions only.
//!
//! The twin of [`source`](crate::source): inputs and times in, commands out, no I/O. The target
//! knows at every moment which of its pages are stale, and loads device state only when none is.
//!
//! ```text
//! Greeting ─ Offered ─ Inspecting ─ Receiving <─ rounds, prepare, digests ─┐
//!                                       └──────────────>───────────────────┘
//!            ─ Loading ─ Ready ─ Resuming ─ Done (runs here)
//! a failure, a cancel, an abort, a lost peer up to Loading: ─ Unwinding ─ Done (runs at the source)
//! a lost peer in Ready: ─ Done (uncertain: paused here, and never run without the source's word)
//! ```

mod input;
mod receiving;
mod state;
pub mod table;

pub use input::{Command, Input, InputKind, Outcome};
pub use state::{Phase, Target, TargetConfig};
