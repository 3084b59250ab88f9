//! The messages, and their way to and from header and body.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cut::{Heard, LanesLost, NewLanes, Rejoin};
use super::frame::MalformedWhat;
use super::queues::{LanesPlaced, NicQueues};
use super::recover::{Recover, Recovered};
use crate::bitmap::DirtySet;
use crate::codec::CodecName;
use crate::ids::{RoundIndex, SessionId};
use crate::lane::LanePath;
use crate::limits;

/// A one-time secret that binds a data connection to its session. Not printed by `Debug`.
#[derive(Clone, Copy)]
pub struct Ticket(pub [u8; 32]);

impl PartialEq for Ticket {
    /// Takes the same time wherever the first difference is: timing must not help to guess one.
    fn eq(&self, other: &Self) -> bool {
        let differing = self.0.iter().zip(&other.0).fold(0, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(differing) == 0
    }
}

impl Eq for Ticket {}

impl Ticket {
    /// A fresh random ticket.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket(..)")
    }
}

impl Serialize for Ticket {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for Ticket {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bad = || serde::de::Error::custom("a ticket is 64 hexadecimal digits");
        let hex = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        // `from_str_radix` would take a sign.
        if hex.len() != 64 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

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

/// What the source has and asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Regions, in the order that numbers them.
    pub regions: Vec<RegionOffer>,
    /// The monitor's name and version.
    pub monitor: String,
    /// The machine type, which both sides must share.
    pub machine: String,
    /// The lanes the source would open.
    pub lanes: LaneOffer,
    /// How writes are tracked at the source, for the report.
    pub tracker: String,
    /// QMP socket at the target, when the target was not started with one.
    pub target_qmp: Option<String>,
    /// Digests will be compared inside the pause.
    pub verify: bool,
    /// What the source was told about time.
    pub limits: SourceLimits,
}

impl Offer {
    /// Whether a dirty bitmap of all regions fits into one message, whatever is dirty.
    pub fn bitmap_fits(&self) -> bool {
        let pages = |region: &RegionOffer| region.bytes / region.page_bytes.max(1);
        let bytes = self.regions.iter().map(|region| DirtySet::encoded_max_bytes(pages(region)));
        bytes.fold(0, u64::saturating_add) <= limits::CONTROL_BODY_BYTES_MAX
    }
}

/// One region of the offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionOffer {
    /// The monitor's name of it (RAMBlock id), equal on both sides.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Tracking granule in bytes: a power of two from 4096.
    pub page_bytes: u64,
    /// `tmpfs`, `memfd`, `hugetlbfs`: for people and for refusals.
    pub backing: String,
    /// Bytes that are not holes, when the offer was made.
    pub populated_bytes: u64,
}

/// The lanes the source would open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneOffer {
    /// How many; `None` leaves it to the target.
    pub count: Option<u16>,
    /// Transports the source can speak, best first.
    pub paths: Vec<LanePath>,
    /// Cores the source may use.
    pub cpus: u16,
    /// They are encrypted, or not opened.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypt: bool,
    /// Codecs the source would pack chunks with; none of a source that packs nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub codecs: Vec<CodecName>,
    /// NICs that the source could spread them over; 0 of one that does not.
    #[serde(default, skip_serializing_if = "is_none_or_one")]
    pub nics: u16,
    /// The source puts each on a receive queue of its own, and wants to be told where they arrived.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rss: bool,
    /// The source tells of holes, where the target takes them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holes: bool,
}

fn is_none_or_one(nics: &u16) -> bool {
    *nics <= 1
}

/// Times the target should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceLimits {
    /// Downtime target in milliseconds.
    pub downtime_ms: u64,
}

/// What will be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// One ticket for each lane to open.
    pub lanes: Vec<LaneTicket>,
    /// For everything of the offer that is not used, the reason.
    pub refused: Vec<Refused>,
    /// Where lanes over RDMA are taken, beside those over TCP: a port at the address that the
    /// control connection leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_port: Option<u16>,
    /// Of the codecs offered, those the target unpacks; none of a target that knows none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub codecs: Vec<CodecName>,
    /// Where lanes over TCP are taken, all at the port that the control connection leads to; none
    /// of a target that takes them nowhere but there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<LaneAddress>,
    /// How the NICs that take lanes spread them over queues, for a source that asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<NicQueues>,
    /// Lanes over TCP may carry holes, which the target frees.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holes: bool,
}

/// An address of the target that takes lanes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneAddress {
    /// Its NIC, by the target's name.
    pub device: String,
    /// The address.
    pub address: IpAddr,
    /// What the NIC's link carries, if it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_second: Option<u64>,
    /// Receive queues that flows are spread over; 1 without RSS.
    pub queues: u32,
    /// The NIC has an RDMA device, and lanes over RDMA are taken here too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rdma: bool,
}

/// The right to open one lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneTicket {
    /// Transport of this lane.
    pub path: LanePath,
    /// Shown by the data connection.
    pub ticket: Ticket,
    /// Core of the lane's worker at the target, if pinned.
    pub cpu: Option<u16>,
    /// The right to open the same lane over TCP, should RDMA not come about: each is good once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_tcp: Option<Ticket>,
    /// The right to open it over TCP while other lanes of the same choice are over RDMA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside_rdma: Option<Ticket>,
}

/// Something of the offer that is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// What.
    pub what: String,
    /// Why.
    pub reason: String,
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

/// Sizes that later code multiplies and allocates by are right from here on.
fn checked_offer(offer: Offer) -> Result<Offer, MalformedWhat> {
    let mut guest_bytes = 0u64;
    for region in &offer.regions {
        let page_bytes = region.page_bytes;
        let sound = page_bytes.is_power_of_two()
            && (4096..=1 << 30).contains(&page_bytes)
            && region.bytes > 0
            && region.bytes % page_bytes == 0
            && region.populated_bytes <= region.bytes;
        guest_bytes = guest_bytes.saturating_add(region.bytes);
        if !sound {
            return Err(MalformedWhat::Fields);
        }
    }
    let regions = offer.regions.len();
    if regions == 0
        || regions > limits::REGIONS_MAX
        || guest_bytes > limits::GUEST_BYTES_MAX
        || !offer.bitmap_fits()
    {
        return Err(MalformedWhat::Fields);
    }
    Ok(offer)
}

fn checked_choice(choice: Choice) -> Result<Choice, MalformedWhat> {
    let sound = (1..=limits::LANES_MAX).contains(&choice.lanes.len())
        && choice.queues.len() <= limits::RSS_NICS_MAX
        && choice.queues.iter().all(NicQueues::is_sound);
    if sound { Ok(choice) } else { Err(MalformedWhat::Fields) }
}

fn checked_placed(placed: LanesPlaced) -> Result<LanesPlaced, MalformedWhat> {
    if placed.is_sound() { Ok(placed) } else { Err(MalformedWhat::Fields) }
}
