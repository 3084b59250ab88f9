//! Faults on real guests: what is done to a migration, when, and what has to be true after it.
//!
//! ```text
//! Rig          two hosts, a self-checking guest on one of them, and disks that can be filled
//! Fault        what is done: a kill, a cut, a full disk, …
//! Moment       when: one of twelve phases in which an agent is held, or after some milliseconds
//! trial        one migration with one fault; the guest goes on from where it is then
//! judge        who runs, is memory right, what was told, is anything left behind; recovers
//! Tally        outcomes of many, as a table
//! ```
//! Driven by `tests/src/bin/torture.rs` (`make torture`) and, for a minute, by
//! `tests/tests/torture.rs`. Nothing here knows how a migration works: it sees what an operator
//! sees, and does what the documentation tells one to do.

mod chance;
mod fault;
mod inject;
mod judge;
mod moment;
mod rig;
mod tally;
mod trial;

pub use chance::{Chance, draw};
pub use fault::Fault;
pub use judge::{Outcome, Verdict};
pub use moment::Moment;
pub use rig::{Backing, Rig};
pub use tally::Tally;
pub use trial::{Trial, When};
