//! What agents ask each other about a session of which one has lost track.

use serde::{Deserialize, Serialize};

use crate::ids::SessionId;

/// What a side's record says of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// There is none: the session ended in a way that both sides knew, or it never was.
    None,
    /// Begun; nothing was decided.
    Attempting,
    /// Source: the guest is the target's.
    HandedOver,
    /// Target: the guest is loaded, and runs when the commit comes: it may have, if nothing else is
    /// to be found there.
    Ready,
    /// Target: the guest runs.
    Running,
    /// The guest is the source's, for good.
    Aborted,
}

/// Asks the other side of a session what its record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recover {
    /// Which.
    pub session: SessionId,
    /// What the record of the side that asks says.
    pub word: Word,
}

/// The answer: what the record of the other side says now, with the question taken into account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// Its word.
    pub word: Word,
}
