//! What is said after a connection was cut: on control connections, and about lanes.
//!
//! ```text
//! source                                   target
//!   │ ── Hello { rejoins } ──────────────────> │
//!   │ <───────────── Welcome { rejoin_key } ── │
//!   │ ── messages, each counted ─────────────> │      Heard { received }: now and then, both ways;
//!   │ <──────────── messages, each counted ─── │      what was heard need not be kept any longer
//!   ╳                  cut                     ╳
//!   │ ── Rejoin { session, key, received } ──> │      on a new connection
//!   │ <──────────────── Rejoined { received } ─│
//!   │ ── what the target had not heard ──────> │
//!   │ <────── what the source had not heard ── │
//! ```
//!
//! These messages themselves are not counted.

use serde::{Deserialize, Serialize};

use super::offer::Choice;
use super::ticket::Ticket;
use crate::ids::{RoundIndex, SessionId};
use crate::lane::LanePath;

/// Source, first on a new connection: goes on with a session that was cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejoin {
    /// Which.
    pub session: SessionId,
    /// What the target's [`Welcome`](super::Welcome) gave.
    pub key: Ticket,
    /// Messages heard from the target, of all connections.
    pub received: u64,
}

/// How many messages were heard so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Of all connections of the session.
    pub received: u64,
}

/// Source: its lanes are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanesLost {
    /// The round that was on them, if one was.
    pub round: Option<RoundIndex>,
    /// Transports for the new ones, best first.
    pub paths: Vec<LanePath>,
}

/// Target: the old lanes are fenced, new ones may come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewLanes {
    /// As many lanes as before, with new tickets.
    pub choice: Choice,
    /// All of the round is placed: its last acknowledgements were lost, nothing else.
    pub round_placed: bool,
    /// [`DirtySet::encode`](crate::bitmap::DirtySet::encode) of the pages of the round that are
    /// placed; empty if the lanes can't tell. Travels as the body.
    #[serde(skip)]
    pub placed: Vec<u8>,
}
