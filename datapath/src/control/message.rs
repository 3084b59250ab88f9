//! The messages, and their way to and from header and body.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cut::{Heard, LanesLost, NewLanes, Rejoin};
use super::frame::MalformedWhat;
use super::offer::{Choice, Offer, checked_choice, checked_offer};
use super::queues::LanesPlaced;
use super::recover::{Recover, Recovered};
use super::ticket::Ticket;
use crate::ids::{RoundIndex, SessionId};
use crate::limits;

/// Source's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The migration this connection is about.
    pub session: SessionId,
    /// Name and version of the source agent, for people.
    pub software: String,
    /// The source's host name, for people.
    pub host: String,
    /// The kernel's boot id: equal on both sides means one machine, and then both ends of a lane
    /// belong on one core.
    pub boot_id: String,
    /// The source comes back after a cut, where the target lets it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejoins: bool,
}

/// Target's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Name and version of the target agent, for people.
    pub software: String,
    /// The target's host name, for people.
    pub host: String,
    /// The target's boot id.
    pub boot_id: String,
    /// Shown by a source that comes back after a cut; `None` where it may not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejoin_key: Option<Ticket>,
}

/// A round begins: these pages are stale at the target until the round has closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundStart {
    /// Which round.
    pub round: RoundIndex,
    /// The guest is paused: nothing comes after this round.
    pub last: bool,
    /// [`DirtySet::encode`](crate::bitmap::DirtySet::encode); travels as the body.
    #[serde(skip)]
    pub bitmap: Vec<u8>,
}

/// Digest of all guest memory at the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestReport {
    /// Time it took in microseconds.
    pub took_us: u64,
    /// [`MemoryDigest::encode`](crate::digest::MemoryDigest::encode); travels as the body.
    #[serde(skip)]
    pub digest: Vec<u8>,
}

/// The guest runs at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Loading the device state, in microseconds.
    pub load_us: u64,
    /// From the commit's arrival until the guest ran, in microseconds.
    pub resume_us: u64,
    /// From then until this was written, in microseconds: the guest's first instructions compete
    /// with the agent for the CPUs, and what the agent waits for them is no part of the pause.
    #[serde(default)]
    pub late_us: u64,
    /// CPU time the target agent has used, in microseconds.
    pub cpu_us: u64,
}

/// Either side gives up; the guest runs on at the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// What kind of reason.
    pub reason: AbortReason,
    /// The reason in words, for the other side's people.
    pub text: String,
    /// What to do about it, if known.
    pub hint: Option<String>,
}

/// Why a side gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AbortReason {
    /// Somebody asked for it.
    Cancelled,
    /// The offer can't be taken here.
    Refused,
    /// Something failed on the sender's host.
    HostFailed,
    /// The receiver of this message broke the protocol.
    PeerMisbehaved,
    /// Something took too long.
    Timeout,
    /// Digests differed.
    VerificationFailed,
    /// The guest writes faster than the link carries.
    NotConverging,
    /// A reason of a newer peer.
    #[serde(other)]
    Other,
}

#[derive(Serialize, Deserialize)]
struct RoundNumber {
    round: RoundIndex,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// A message's number on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum MessageKind {
            $($(#[$doc])* $name = $number,)*
        }

        impl MessageKind {
            /// Every kind, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Those of the state machines; the agents answer the others themselves.
            pub const OF_MACHINES: &'static [Self] = Self::ALL.split_at(18).0;

            /// The kind with this number.
            pub fn from_number(number: u8) -> Option<Self> {
                Self::ALL.iter().copied().find(|kind| *kind as u8 == number)
            }
        }
    };
}

messages! {
    /// Source: who is calling, and about which session.
    Hello = 1,
    /// Target: who answers.
    Welcome = 2,
    /// Source: regions, lanes, trackers, limits.
    Offer = 3,
    /// Target: what will be used, and why the rest will not.
    Choice = 4,
    /// Source: make ready for the device state.
    Prepare = 5,
    /// Source: these pages are stale until the round has closed.
    RoundStart = 6,
    /// Source: every lane's barrier was acknowledged.
    RoundEnd = 7,
    /// Target: the round's pages are fresh.
    RoundClosed = 8,
    /// Source: compute the digest of all guest memory.
    Verify = 9,
    /// Target: here it is.
    DigestReport = 10,
    /// Source: a piece of the monitor's own device state.
    DeviceState = 11,
    /// Source: that was all of it.
    DeviceStateEnd = 12,
    /// Target: a piece of what the target's monitor answers to the source's.
    ReturnPath = 13,
    /// Target: device state loaded, everything verified, waiting for the commit.
    Ready = 14,
    /// Source: the hand-over is decided and recorded; run.
    Commit = 15,
    /// Target: the guest runs here.
    Running = 16,
    /// Either: giving up.
    Abort = 17,
    /// Target: ready for the device state.
    Prepared = 18,
    /// Source, first on a new connection: this goes on with a session that was cut.
    Rejoin = 19,
    /// Target: it does; what each side has not heard is sent again.
    Rejoined = 20,
    /// Source: the lanes are gone; new ones, please.
    LanesLost = 21,
    /// Target: the old ones are fenced; here are new tickets, and what had arrived.
    NewLanes = 22,
    /// Either, first on a new connection: what has become of a session?
    Recover = 23,
    /// The answer.
    Recovered = 24,
    /// Target, to a source that asked for it: which queues the lanes arrive at.
    LanesPlaced = 25,
    /// Either, now and then: how many messages were heard so far, and that this side is there.
    Heard = 128,
}

/// One control message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Documented at `MessageKind` and at each payload.
pub enum Message {
    Hello(Hello),
    Welcome(Welcome),
    Offer(Offer),
    Choice(Choice),
    Prepare,
    Prepared,
    RoundStart(RoundStart),
    RoundEnd(RoundIndex),
    RoundClosed(RoundIndex),
    Verify,
    DigestReport(DigestReport),
    DeviceState(Vec<u8>),
    DeviceStateEnd,
    ReturnPath(Vec<u8>),
    Ready,
    Commit,
    Running(Running),
    Abort(Abort),
    Rejoin(Rejoin),
    Rejoined(Heard),
    LanesLost(LanesLost),
    NewLanes(NewLanes),
    Recover(Recover),
    Recovered(Recovered),
    LanesPlaced(LanesPlaced),
    Heard(Heard),
}

impl Message {
    /// This message's kind.
    pub fn kind(&self) -> MessageKind {
        match self {
            Self::Hello(_) => MessageKind::Hello,
            Self::Welcome(_) => MessageKind::Welcome,
            Self::Offer(_) => MessageKind::Offer,
            Self::Choice(_) => MessageKind::Choice,
            Self::Prepare => MessageKind::Prepare,
            Self::Prepared => MessageKind::Prepared,
            Self::RoundStart(_) => MessageKind::RoundStart,
            Self::RoundEnd(_) => MessageKind::RoundEnd,
            Self::RoundClosed(_) => MessageKind::RoundClosed,
            Self::Verify => MessageKind::Verify,
            Self::DigestReport(_) => MessageKind::DigestReport,
            Self::DeviceState(_) => MessageKind::DeviceState,
            Self::DeviceStateEnd => MessageKind::DeviceStateEnd,
            Self::ReturnPath(_) => MessageKind::ReturnPath,
            Self::Ready => MessageKind::Ready,
            Self::Commit => MessageKind::Commit,
            Self::Running(_) => MessageKind::Running,
            Self::Abort(_) => MessageKind::Abort,
            Self::Rejoin(_) => MessageKind::Rejoin,
            Self::Rejoined(_) => MessageKind::Rejoined,
            Self::LanesLost(_) => MessageKind::LanesLost,
            Self::NewLanes(_) => MessageKind::NewLanes,
            Self::Recover(_) => MessageKind::Recover,
            Self::Recovered(_) => MessageKind::Recovered,
            Self::LanesPlaced(_) => MessageKind::LanesPlaced,
            Self::Heard(_) => MessageKind::Heard,
        }
    }

    /// Header object and body.
    pub(super) fn to_parts(&self) -> (Map<String, Value>, Vec<u8>) {
        let none = Vec::new;
        match self {
            Self::Hello(it) => (object(it), none()),
            Self::Welcome(it) => (object(it), none()),
            Self::Offer(it) => (object(it), none()),
            Self::Choice(it) => (object(it), none()),
            Self::RoundStart(it) => (object(it), it.bitmap.clone()),
            Self::RoundEnd(round) | Self::RoundClosed(round) => {
                (object(&RoundNumber { round: *round }), none())
            }
            Self::DigestReport(it) => (object(it), it.digest.clone()),
            Self::DeviceState(bytes) | Self::ReturnPath(bytes) => (Map::new(), bytes.clone()),
            Self::Running(it) => (object(it), none()),
            Self::Abort(it) => (object(it), none()),
            Self::NewLanes(it) => (object(it), it.placed.clone()),
            Self::Rejoin(it) => (object(it), none()),
            Self::Rejoined(it) => (object(it), none()),
            Self::LanesLost(it) => (object(it), none()),
            Self::Recover(it) => (object(it), none()),
            Self::Recovered(it) => (object(it), none()),
            Self::LanesPlaced(it) => (object(it), none()),
            Self::Heard(it) => (object(it), none()),
            Self::Prepare
            | Self::Prepared
            | Self::Verify
            | Self::DeviceStateEnd
            | Self::Ready
            | Self::Commit => (Map::new(), none()),
        }
    }

    /// The message of `kind` with this header and body.
    pub(super) fn from_parts(
        kind: MessageKind,
        header: Map<String, Value>,
        body: &[u8],
    ) -> Result<Self, MalformedWhat> {
        let has_body = matches!(
            kind,
            MessageKind::RoundStart
                | MessageKind::DigestReport
                | MessageKind::DeviceState
                | MessageKind::ReturnPath
                | MessageKind::NewLanes
        );
        if !has_body && !body.is_empty() {
            return Err(MalformedWhat::Body);
        }
        Ok(match kind {
            MessageKind::Hello => Self::Hello(fields(header)?),
            MessageKind::Welcome => Self::Welcome(fields(header)?),
            MessageKind::Offer => Self::Offer(checked_offer(fields(header)?)?),
            MessageKind::Choice => Self::Choice(checked_choice(fields(header)?)?),
            MessageKind::Prepare => Self::Prepare,
            MessageKind::Prepared => Self::Prepared,
            MessageKind::RoundStart => {
                Self::RoundStart(RoundStart { bitmap: body.to_vec(), ..fields(header)? })
            }
            MessageKind::RoundEnd => Self::RoundEnd(fields::<RoundNumber>(header)?.round),
            MessageKind::RoundClosed => Self::RoundClosed(fields::<RoundNumber>(header)?.round),
            MessageKind::Verify => Self::Verify,
            MessageKind::DigestReport => {
                Self::DigestReport(DigestReport { digest: body.to_vec(), ..fields(header)? })
            }
            MessageKind::DeviceState => Self::DeviceState(state_chunk(body)?),
            MessageKind::DeviceStateEnd => Self::DeviceStateEnd,
            MessageKind::ReturnPath => Self::ReturnPath(state_chunk(body)?),
            MessageKind::Ready => Self::Ready,
            MessageKind::Commit => Self::Commit,
            MessageKind::Running => Self::Running(fields(header)?),
            MessageKind::Abort => Self::Abort(fields(header)?),
            MessageKind::NewLanes => {
                let NewLanes { choice, round_placed, .. } = fields(header)?;
                let choice = checked_choice(choice)?;
                Self::NewLanes(NewLanes { choice, round_placed, placed: body.to_vec() })
            }
            MessageKind::Rejoin => Self::Rejoin(fields(header)?),
            MessageKind::Rejoined => Self::Rejoined(fields(header)?),
            MessageKind::LanesLost => Self::LanesLost(fields(header)?),
            MessageKind::Recover => Self::Recover(fields(header)?),
            MessageKind::Recovered => Self::Recovered(fields(header)?),
            MessageKind::LanesPlaced => Self::LanesPlaced(checked_placed(fields(header)?)?),
            MessageKind::Heard => Self::Heard(fields(header)?),
        })
    }
}

fn object(payload: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(payload) {
        Ok(Value::Object(fields)) => fields,
        other => unreachable!("payloads are structs of plain fields: {other:?}"),
    }
}

fn fields<T: for<'de> Deserialize<'de>>(header: Map<String, Value>) -> Result<T, MalformedWhat> {
    serde_json::from_value(Value::Object(header)).map_err(|_| MalformedWhat::Fields)
}

fn state_chunk(body: &[u8]) -> Result<Vec<u8>, MalformedWhat> {
    if body.is_empty() || body.len() > limits::STATE_CHUNK_BYTES_MAX {
        return Err(MalformedWhat::Body);
    }
    Ok(body.to_vec())
}

fn checked_placed(placed: LanesPlaced) -> Result<LanesPlaced, MalformedWhat> {
    if placed.is_sound() { Ok(placed) } else { Err(MalformedWhat::Fields) }
}
