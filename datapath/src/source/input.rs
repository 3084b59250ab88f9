//! What the source's state machine is told, and what it asks for.

use std::time::Duration;

use crate::bitmap::DirtySet;
use crate::control::{AbortReason, Choice, Message};
use crate::digest::MemoryDigest;
use crate::ids::RoundIndex;
use crate::recover::Guest;

/// Something that completed, arrived, or went wrong.
#[derive(Clone, Debug)]
pub enum Input {
    /// A control message from the target.
    Message(Message),
    /// [`Command::OpenLanes`] is done: every lane is connected and accepted.
    LanesOpen,
    /// [`Command::Attach`] is done: tracking is armed on every page, and `populated` was read from
    /// the files' extents after that.
    Attached {
        /// Every page that is not a hole.
        populated: DirtySet,
        /// What pausing, recording and resuming are expected to cost together, as measured.
        fixed: Duration,
    },
    /// Every lane's barrier of the round was acknowledged: its bytes are in the target's memory.
    Placed {
        /// Which round.
        round: RoundIndex,
        /// Of its bytes, those that were zero and did not travel.
        zero_bytes: u64,
    },
    /// [`Command::Scan`] is done: these pages were written since the scan before, and are
    /// protected again.
    Scanned(DirtySet),
    /// The guest is paused, every block request finished.
    Paused,
    /// The guest runs again.
    Resumed,
    /// [`Command::PrepareSwitchover`] is done.
    SwitchoverPrepared,
    /// [`Command::Digest`] is done.
    Digested(MemoryDigest),
    /// The monitor reported its whole device state as sent.
    DeviceStateSent,
    /// [`Command::Record`] is done: the decision is on disk.
    Recorded,
    /// [`Command::Release`] is done.
    Released,
    /// [`Command::Retract`] is done, or could not be.
    Retracted {
        /// No record says any more that the guest is handed over, also after a crash.
        durable: bool,
    },
    /// [`Command::Unwind`] is done; the guest's state after it.
    Unwound {
        /// At the source; absent if its monitor has ended.
        guest: Guest,
    },
    /// A command failed on this host, or a lane is gone.
    Failed(Failure),
    /// The control connection is gone.
    PeerLost(Failure),
    /// The operator wants the guest left where it is.
    Cancelled,
    /// Time has passed; nothing else happened.
    Tick,
}

/// An input without its data, for the transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Each is documented at `Input`.
pub enum InputKind {
    Message,
    LanesOpen,
    Attached,
    Placed,
    Scanned,
    Paused,
    Resumed,
    SwitchoverPrepared,
    Digested,
    DeviceStateSent,
    Recorded,
    Released,
    Retracted,
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
        Self::LanesOpen,
        Self::Attached,
        Self::Placed,
        Self::Scanned,
        Self::Paused,
        Self::Resumed,
        Self::SwitchoverPrepared,
        Self::Digested,
        Self::DeviceStateSent,
        Self::Recorded,
        Self::Released,
        Self::Retracted,
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
            Self::LanesOpen => InputKind::LanesOpen,
            Self::Attached { .. } => InputKind::Attached,
            Self::Placed { .. } => InputKind::Placed,
            Self::Scanned(_) => InputKind::Scanned,
            Self::Paused => InputKind::Paused,
            Self::Resumed => InputKind::Resumed,
            Self::SwitchoverPrepared => InputKind::SwitchoverPrepared,
            Self::Digested(_) => InputKind::Digested,
            Self::DeviceStateSent => InputKind::DeviceStateSent,
            Self::Recorded => InputKind::Recorded,
            Self::Released => InputKind::Released,
            Self::Retracted { .. } => InputKind::Retracted,
            Self::Unwound { .. } => InputKind::Unwound,
            Self::Failed(_) => InputKind::Failed,
            Self::PeerLost(_) => InputKind::PeerLost,
            Self::Cancelled => InputKind::Cancelled,
            Self::Tick => InputKind::Tick,
        }
    }
}

/// What the agent is to do. Carried out in the order given; each answers with its input, or with
/// [`Input::Failed`]. [`Command::Release`], [`Command::Retract`] and [`Command::Unwind`] never fail:
/// their answers say how far they came.
#[derive(Clone, Debug)]
pub enum Command {
    /// Send this to the target.
    Send(Message),
    /// Connect the lanes of the choice. Answer: [`Input::LanesOpen`].
    OpenLanes(Choice),
    /// Take hold of the guest's memory and arm tracking. Answer: [`Input::Attached`].
    Attach,
    /// Have the lanes move these pages. Answer: [`Input::Placed`].
    MoveRound {
        /// Which round.
        round: RoundIndex,
        /// What to move.
        pages: DirtySet,
    },
    /// Report and protect again what was written. Answer: [`Input::Scanned`].
    Scan,
    /// Make ready whatever can be before the pause. Answer: [`Input::SwitchoverPrepared`].
    PrepareSwitchover,
    /// Pause the guest. Answer: [`Input::Paused`].
    Pause,
    /// Let the guest go on after a drain point. Answer: [`Input::Resumed`].
    Resume,
    /// Digest all guest memory. Answer: [`Input::Digested`].
    Digest,
    /// Have the monitor save its device state, relayed over the control connection and closed with
    /// [`Message::DeviceStateEnd`]. Answer: [`Input::DeviceStateSent`].
    SaveDeviceState,
    /// Write down, durably, that the guest is handed over. Answer: [`Input::Recorded`].
    Record,
    /// Handed over: let go of the paused guest's memory, close lanes. Answer: [`Input::Released`].
    Release,
    /// Make durably sure that no record says that the guest is handed over, whether or not
    /// [`Command::Record`] came to its end: by another record, or by removing it. The commit has
    /// not left, or the target gave the guest back. Answer: [`Input::Retracted`].
    Retract,
    /// Leave everything as it was before the attempt: guest running, tracking removed,
    /// capabilities set back. Answer: [`Input::Unwound`].
    Unwind,
}

/// Why a migration did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind of reason, as told to the peer.
    pub reason: AbortReason,
    /// The target said it, not this side.
    pub by_peer: bool,
    /// In words: `what failed: why`.
    pub text: String,
    /// The knob to turn.
    pub hint: Option<String>,
}

/// The words in which something is told decide nothing: two failures that differ in no more are
/// one to who searches the states.
impl std::hash::Hash for Failure {
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        self.by_peer.hash(hasher);
    }
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the target.
    Migrated,
    /// It does not.
    Failed {
        /// Where that leaves the guest.
        kind: FailureKind,
        /// Why.
        failure: Failure,
    },
}

/// Where a failure leaves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// Refused before the guest was touched: it runs at the source.
    Refused,
    /// It runs at the source, as before.
    RunsAtSource,
    /// It is whole at the source, paused, and did not resume when asked to.
    PausedAtSource,
    /// It is gone: its monitor ended before it was loaded elsewhere.
    Gone,
    /// The hand-over was decided and the target did not confirm, or the decision could not be taken
    /// back: it is paused at the source and may run at the target.
    Uncertain,
}
