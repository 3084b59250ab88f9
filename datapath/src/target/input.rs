//! What the target's state machine is told, and what it asks for.

use std::time::Duration;

use crate::bitmap::DirtySet;
use crate::control::{Choice, Message, Offer};
use crate::digest::MemoryDigest;
use crate::ids::RoundIndex;
use crate::source::Failure;

/// Something that completed, arrived, or went wrong.
#[derive(Clone, Debug)]
pub enum Input {
    /// A control message from the source.
    Message(Message),
    /// [`Command::Inspect`] is done: the monitor here matches, memory is mapped, lanes may come.
    Inspected(Choice),
    /// [`Command::BeginRound`] is done: what the round must not find there is gone.
    Cleared(RoundIndex),
    /// Every lane has placed everything up to its barrier of this round.
    Placed(RoundIndex),
    /// [`Command::PrepareIncoming`] is done.
    IncomingPrepared,
    /// [`Command::Digest`] is done.
    Digested {
        /// Of all guest memory.
        digest: MemoryDigest,
        /// Time it took.
        took: Duration,
    },
    /// [`Command::EndDeviceState`] is done: the monitor has loaded its state and is paused.
    Loaded {
        /// Time from the last piece of state.
        took: Duration,
    },
    /// [`Command::Record`] is done: that the guest may run here is on disk.
    Recorded,
    /// [`Command::Resume`] is done: the guest runs here.
    Resumed {
        /// Time until it ran.
        took: Duration,
        /// Time from then until the agent saw it.
        late: Duration,
        /// CPU time this agent has used.
        cpu: Duration,
    },
    /// [`Command::Resume`] failed: the guest does not run here and never will. An answer of its own,
    /// since a lane may go while the guest is on its way to running, and must not take it back.
    NotResumed(Failure),
    /// [`Command::Unwind`] is done.
    Unwound {
        /// Nothing is left of the attempt. If not, device state was loaded, and that it will never
        /// run here could not be written down: it stands here, paused.
        dropped: bool,
    },
    /// A command failed on this host, or a lane is gone.
    Failed(Failure),
    /// The control connection is gone.
    PeerLost(Failure),
    /// The operator of this side wants no more of it.
    Cancelled,
    /// Time has passed; nothing else happened.
    Tick,
}

/// An input without its data, for the transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Each is documented at `Input`.
pub enum InputKind {
    Message,
    Inspected,
    Cleared,
    Placed,
    IncomingPrepared,
    Digested,
    Loaded,
    Recorded,
    Resumed,
    NotResumed,
    Unwound,
    Failed,
    PeerLost,
    Cancelled,
    Tick,
}

impl InputKind {
    /// Every kind.
    pub const ALL: &'static [Self] = &[
        Self::Message,
        Self::Inspected,
        Self::Cleared,
        Self::Placed,
        Self::IncomingPrepared,
        Self::Digested,
        Self::Loaded,
        Self::Recorded,
        Self::Resumed,
        Self::NotResumed,
        Self::Unwound,
        Self::Failed,
        Self::PeerLost,
        Self::Cancelled,
        Self::Tick,
    ];
}

impl Input {
    /// This input's kind.
    pub fn kind(&self) -> InputKind {
        match self {
            Self::Message(_) => InputKind::Message,
            Self::Inspected(_) => InputKind::Inspected,
            Self::Cleared(_) => InputKind::Cleared,
            Self::Placed(_) => InputKind::Placed,
            Self::IncomingPrepared => InputKind::IncomingPrepared,
            Self::Digested { .. } => InputKind::Digested,
            Self::Loaded { .. } => InputKind::Loaded,
            Self::Recorded => InputKind::Recorded,
            Self::Resumed { .. } => InputKind::Resumed,
            Self::NotResumed(_) => InputKind::NotResumed,
            Self::Unwound { .. } => InputKind::Unwound,
            Self::Failed(_) => InputKind::Failed,
            Self::PeerLost(_) => InputKind::PeerLost,
            Self::Cancelled => InputKind::Cancelled,
            Self::Tick => InputKind::Tick,
        }
    }
}

/// What the agent is to do. Carried out in the order given; each answers with its input, or with
/// [`Input::Failed`]; [`Command::Unwind`] never fails, and [`Command::Resume`] has its own answer for
/// that.
#[derive(Clone, Debug)]
pub enum Command {
    /// Send this to the source.
    Send(Message),
    /// Check the offer against the monitor here, map its memory, choose lanes.
    /// Answer: [`Input::Inspected`].
    Inspect(Offer),
    /// A round begins. On the first, clear whatever the memory holds outside `pages`: it would
    /// stand where the guest has holes. Then have `pages` populated ahead of the data.
    /// Answer, as soon as the clearing is done: [`Input::Cleared`].
    BeginRound {
        /// Which round.
        round: RoundIndex,
        /// What it will write.
        pages: DirtySet,
    },
    /// Have the monitor wait for its device state. Answer: [`Input::IncomingPrepared`].
    PrepareIncoming,
    /// Digest all guest memory. Answer: [`Input::Digested`].
    Digest,
    /// Give the monitor this piece of its device state. No answer unless it fails.
    FeedDeviceState(Vec<u8>),
    /// That was all; wait until the monitor has loaded it. Answer: [`Input::Loaded`].
    EndDeviceState,
    /// Write down durably that the guest may run here from now on, before it does: should this host
    /// lose its power then, nobody may take the paused copy at the source for the guest. Asked for
    /// behind `Ready`, so that the disk works while the source's does.
    /// Answer: [`Input::Recorded`].
    Record,
    /// Let the guest run here, and write down durably that it does: the source, once it hears of it,
    /// keeps no record. Answer: [`Input::Resumed`] or [`Input::NotResumed`].
    Resume,
    /// Leave nothing of the attempt behind. If device state was loaded, first write down durably
    /// that it will never run here, and drop it only then: the source may have decided to hand over,
    /// and whoever reads both records would take it from here.
    /// Answer: [`Input::Unwound`].
    Unwind,
}

/// How a migration ended for the target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs here.
    Runs,
    /// It does not and never will by this attempt: it is the source's.
    Failed(Failure),
    /// Loaded and paused here; the source may have decided to hand over or not.
    Uncertain(Failure),
}
