//! What the two ends of a lane say beside the WRITEs, byte by byte. Sans-IO.
//!
//! ```text
//! connecting  source: LaneRequest (who, with which ticket)      in the private data of the request
//!             target: LaneAccept (slices, scratch page), or a refusal          in that of the answer
//! then        source: WRITE and READ of the scratch page: does it work at all?
//!             source: Want slice ----------->  target: Keys of it and of others that are ready,
//!                                              or NoKey and why, after any number of Patience
//!             source: Zeros (runs) --------->  target: Zeroed, once they read as zeros
//!             source: WRITE ... WRITE, Barrier ->  target: Placed
//!             source: Close
//! ```
//!
//! All numbers are little endian. The source speaks first and the target only answers, one answer
//! to one question: iWARP wants the connecting side to begin, and a receive is always posted for
//! what comes. Tickets are shown before a queue pair exists; keys are given out only after that.

use pageferry_datapath::control::Ticket;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::FramingError;
use pageferry_datapath::framing::hello::{Hello, Refusal, Reply};
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::limits::PAGE_BYTES_MIN;
use xxhash_rust::xxh3::xxh3_64;

use crate::limits::MESSAGE_BYTES;
use crate::qp_sys::RemoteAddr;

/// Version of this protocol; a peer of another one is refused when it connects.
pub(crate) const VERSION: u8 = 1;

/// What a connection request carries: as much as the connection manager takes on every transport
/// (92 bytes of InfiniBand's, less 36 of rdma_cm's own header).
pub(crate) const REQUEST_BYTES: usize = 56;
/// What an answer carries.
pub(crate) const ACCEPT_BYTES: usize = 32;

const REQUEST_MAGIC: [u8; 4] = *b"PFRL";
const ACCEPT_MAGIC: [u8; 4] = *b"PFRA";
const MESSAGE_MAGIC: [u8; 2] = *b"PR";

const HEADER_BYTES: usize = 20;
const CHECKSUM_AT: usize = 16;
const KEY_BYTES: usize = 16;
/// Keys in one message.
pub(crate) const KEYS_MAX: usize = (MESSAGE_BYTES - HEADER_BYTES) / KEY_BYTES;
const RUN_BYTES: usize = 16;
/// Runs of zero pages in one message.
pub(crate) const RUNS_MAX: usize = (MESSAGE_BYTES - HEADER_BYTES) / RUN_BYTES;

/// `"PFRL" | version u8 | 0 u8 | lane u16 | session u128 | ticket 32 bytes`.
pub(crate) fn encode_request(hello: &Hello) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&REQUEST_MAGIC);
    bytes[4] = VERSION;
    bytes[6..8].copy_from_slice(&hello.lane.0.to_le_bytes());
    bytes[8..24].copy_from_slice(&hello.session.0.to_le_bytes());
    bytes[24..56].copy_from_slice(&hello.ticket.0);
    bytes
}

/// The inverse of [`encode_request`]; some transports pad with zeros. The ticket is only carried
/// over, not judged.
pub(crate) fn decode_request(bytes: &[u8]) -> Result<Hello, FramingError> {
    let bytes = bytes.first_chunk::<REQUEST_BYTES>().ok_or(FramingError::Magic)?;
    if bytes[0..4] != REQUEST_MAGIC {
        return Err(FramingError::Magic);
    }
    check_version(bytes[4])?;
    if bytes[5] != 0 {
        return Err(FramingError::Reserved);
    }
    let mut ticket = [0; 32];
    ticket.copy_from_slice(&bytes[24..56]);
    Ok(Hello {
        session: SessionId(u128::from(u64_at(bytes, 8)) | u128::from(u64_at(bytes, 16)) << 64),
        lane: LaneId(u16_at(bytes, 6)),
        ticket: Ticket(ticket),
    })
}

/// What a target says when it takes a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LaneAccept {
    /// Size of the slices in which its memory is registered.
    pub(crate) slice_bytes: u64,
    /// A page to try WRITE and READ on.
    pub(crate) scratch: RemoteAddr,
}

impl LaneAccept {
    /// `"PFRA" | version u8 | 0 x 3 | slice_bytes u64 | scratch addr u64 | scratch rkey u32 | 0 u32`.
    pub(crate) fn encode(&self) -> [u8; ACCEPT_BYTES] {
        let mut bytes = [0; ACCEPT_BYTES];
        bytes[0..4].copy_from_slice(&ACCEPT_MAGIC);
        bytes[4] = VERSION;
        bytes[8..16].copy_from_slice(&self.slice_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.scratch.addr.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.scratch.rkey.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FramingError> {
        let bytes = bytes.first_chunk::<ACCEPT_BYTES>().ok_or(FramingError::Magic)?;
        if bytes[0..4] != ACCEPT_MAGIC {
            return Err(FramingError::Magic);
        }
        check_version(bytes[4])?;
        Ok(Self {
            slice_bytes: u64_at(bytes, 8),
            scratch: RemoteAddr { addr: u64_at(bytes, 16), rkey: u32_at(bytes, 24) },
        })
    }
}

/// A refusal of ours in the private data of a rejection; `None` if it is not ours.
pub(crate) fn refusal_in(bytes: &[u8]) -> Option<Refusal> {
    match Reply::decode(bytes.first_chunk()?) {
        Ok(Reply::Refused(refusal)) => Some(refusal),
        _ => None,
    }
}

/// The right to WRITE to one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SliceKey {
    pub(crate) slice: u32,
    /// Of its first byte.
    pub(crate) at: RemoteAddr,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Source: the key of this slice is needed.
    Want { slice: u32 },
    /// Source: say so when every byte before this is placed. `seq` is repeated in the answer.
    Barrier { round: RoundIndex, seq: u32 },
    /// Source: nothing comes after this.
    Close,
    /// Target: the first key is the one wanted; others are ready too.
    Keys(Vec<SliceKey>),
    /// Target: every byte before that barrier is placed.
    Placed { round: RoundIndex, seq: u32 },
    /// Source: these pages are zero; they are not written. Whole pages of 4 KiB, fewer than 2^32
    /// in a run, at least one run.
    Zeros(Vec<Extent>),
    /// Target: they read as zeros.
    Zeroed,
    /// Target: that slice can't be registered; the errno tells why.
    NoKey { slice: u32, errno: i32 },
    /// Target: the key that was asked for is still to come.
    Patience,
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Self::Want { .. } => 1,
            Self::Barrier { .. } => 2,
            Self::Close => 3,
            Self::Keys(_) => 4,
            Self::Placed { .. } => 5,
            Self::Zeros(_) => 6,
            Self::Zeroed => 7,
            Self::NoKey { .. } => 8,
            Self::Patience => 9,
        }
    }

    /// `"PR" | version u8 | kind u8 | first u32 | second u32 | count u32 | checksum u32`, and of
    /// keys `slice u32 | rkey u32 | addr u64` each, of zero runs
    /// `region u16 | 0 u16 | pages u32 | first page u64` each.
    ///
    /// # Panics
    /// With more keys than [`KEYS_MAX`] or runs than [`RUNS_MAX`].
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (first, second) = match self {
            Self::Want { slice } => (*slice, 0),
            Self::Barrier { round, seq } | Self::Placed { round, seq } => (round.0, *seq),
            Self::NoKey { slice, errno } => (*slice, errno.cast_unsigned()),
            Self::Close | Self::Keys(_) | Self::Zeros(_) | Self::Zeroed | Self::Patience => (0, 0),
        };
        let count = match self {
            Self::Keys(keys) => keys.len(),
            Self::Zeros(runs) => runs.len(),
            _ => 0,
        };
        assert!(count <= KEYS_MAX.min(RUNS_MAX));
        let mut bytes = Vec::with_capacity(HEADER_BYTES + count * KEY_BYTES);
        bytes.extend(MESSAGE_MAGIC);
        bytes.extend([VERSION, self.kind()]);
        bytes.extend(first.to_le_bytes());
        bytes.extend(second.to_le_bytes());
        bytes.extend((count as u32).to_le_bytes());
        bytes.extend([0; 4]);
        match self {
            Self::Keys(keys) => keys.iter().for_each(|key| bytes.extend(key_bytes(key))),
            Self::Zeros(runs) => runs.iter().for_each(|run| bytes.extend(run_bytes(run))),
            _ => {}
        }
        let checksum = xxh3_64(&bytes) as u32;
        bytes[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FramingError> {
        if bytes.len() < HEADER_BYTES || bytes[0..2] != MESSAGE_MAGIC {
            return Err(FramingError::Magic);
        }
        check_version(bytes[2])?;
        let mut unsealed = bytes.to_vec();
        unsealed[CHECKSUM_AT..HEADER_BYTES].fill(0);
        if xxh3_64(&unsealed) as u32 != u32_at(bytes, CHECKSUM_AT) {
            return Err(FramingError::Checksum);
        }
        let (kind, first, second) = (bytes[3], u32_at(bytes, 4), u32_at(bytes, 8));
        let (count, items) = (u32_at(bytes, 12) as usize, &bytes[HEADER_BYTES..]);
        let has_items = matches!(kind, 4 | 6);
        const { assert!(KEY_BYTES == RUN_BYTES) };
        if items.len() != count.saturating_mul(KEY_BYTES) || has_items != (count > 0) {
            return Err(FramingError::Count { count: count.min(u16::MAX.into()) as u16 });
        }
        let (round, seq) = (RoundIndex(first), second);
        let unused_is_zero = match kind {
            1 => second == 0,
            3 | 4 | 6 | 7 | 9 => first == 0 && second == 0,
            _ => true,
        };
        if !unused_is_zero {
            return Err(FramingError::Reserved);
        }
        Ok(match kind {
            1 => Self::Want { slice: first },
            2 => Self::Barrier { round, seq },
            3 => Self::Close,
            4 => Self::Keys(items.chunks_exact(KEY_BYTES).map(key).collect()),
            5 => Self::Placed { round, seq },
            6 => Self::Zeros(items.chunks_exact(RUN_BYTES).map(run).collect::<Result<_, _>>()?),
            7 => Self::Zeroed,
            8 => Self::NoKey { slice: first, errno: second.cast_signed() },
            9 => Self::Patience,
            other => return Err(FramingError::Kind { kind: other.into() }),
        })
    }
}

fn key(bytes: &[u8]) -> SliceKey {
    let at = RemoteAddr { addr: u64_at(bytes, 8), rkey: u32_at(bytes, 4) };
    SliceKey { slice: u32_at(bytes, 0), at }
}

fn key_bytes(key: &SliceKey) -> [u8; KEY_BYTES] {
    let mut bytes = [0; KEY_BYTES];
    bytes[0..4].copy_from_slice(&key.slice.to_le_bytes());
    bytes[4..8].copy_from_slice(&key.at.rkey.to_le_bytes());
    bytes[8..16].copy_from_slice(&key.at.addr.to_le_bytes());
    bytes
}

fn run_bytes(run: &Extent) -> [u8; RUN_BYTES] {
    let pages = u32::try_from(run.len / PAGE_BYTES_MIN).expect("runs are cut before");
    let mut bytes = [0; RUN_BYTES];
    bytes[0..2].copy_from_slice(&run.region.0.to_le_bytes());
    bytes[4..8].copy_from_slice(&pages.to_le_bytes());
    bytes[8..16].copy_from_slice(&(run.offset / PAGE_BYTES_MIN).to_le_bytes());
    bytes
}

/// Whether it lies in guest memory is for whoever has that to check.
fn run(bytes: &[u8]) -> Result<Extent, FramingError> {
    let (pages, first) = (u64::from(u32_at(bytes, 4)), u64_at(bytes, 8));
    let offset = first.checked_mul(PAGE_BYTES_MIN).ok_or(FramingError::Reserved)?;
    match (u16_at(bytes, 2), pages) {
        (0, 1..) => Ok(Extent {
            region: RegionIndex(u16_at(bytes, 0)),
            offset,
            len: pages * PAGE_BYTES_MIN,
        }),
        _ => Err(FramingError::Reserved),
    }
}

fn check_version(version: u8) -> Result<(), FramingError> {
    match version == VERSION {
        true => Ok(()),
        false => Err(FramingError::Version { version: version.into() }),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// For the fuzzers: takes any bytes as everything that comes from the peer of a lane, as they are
/// and with a checksum that is right.
#[doc(hidden)]
pub fn fuzz_message(bytes: &[u8]) {
    let mut sealed = bytes.to_vec();
    if let Some(header) = sealed.first_chunk_mut::<HEADER_BYTES>() {
        header[CHECKSUM_AT..].fill(0);
        let checksum = xxh3_64(&sealed) as u32;
        sealed[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
    }
    for bytes in [bytes, &sealed] {
        if let Ok(message) = Message::decode(bytes) {
            assert_eq!(message.encode(), bytes, "two forms of one message");
        }
    }
    if let Ok(hello) = decode_request(bytes) {
        assert_eq!(encode_request(&hello)[..], bytes[..REQUEST_BYTES], "two forms of one request");
    }
    if let Ok(accept) = LaneAccept::decode(bytes) {
        assert_eq!(LaneAccept::decode(&accept.encode()), Ok(accept));
    }
    let _any_answer = refusal_in(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> impl Strategy<Value = Message> {
        let key = (any::<u32>(), any::<u64>(), any::<u32>())
            .prop_map(|(slice, addr, rkey)| SliceKey { slice, at: RemoteAddr { addr, rkey } });
        let run = (any::<u16>(), 0..1u64 << 50, 1..=u32::MAX).prop_map(|(region, first, pages)| {
            let (offset, len) = (first * PAGE_BYTES_MIN, u64::from(pages) * PAGE_BYTES_MIN);
            Extent { region: RegionIndex(region), offset, len }
        });
        prop_oneof![
            any::<u32>().prop_map(|slice| Message::Want { slice }),
            any::<(u32, u32)>().prop_map(|(r, seq)| Message::Barrier { round: RoundIndex(r), seq }),
            Just(Message::Close),
            prop::collection::vec(key, 1..=KEYS_MAX).prop_map(Message::Keys),
            any::<(u32, u32)>().prop_map(|(r, seq)| Message::Placed { round: RoundIndex(r), seq }),
            prop::collection::vec(run, 1..=RUNS_MAX).prop_map(Message::Zeros),
            Just(Message::Zeroed),
            Just(Message::Patience),
            any::<(u32, i32)>().prop_map(|(slice, errno)| Message::NoKey { slice, errno }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(message in messages()) {
            let bytes = message.encode();
            prop_assert!(bytes.len() <= MESSAGE_BYTES);
            prop_assert_eq!(Message::decode(&bytes), Ok(message));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::decode(&bytes);
            let _ = decode_request(&bytes);
            let _ = LaneAccept::decode(&bytes);
            let _ = refusal_in(&bytes);
        }

        #[test]
        fn a_flipped_bit_is_noticed(message in messages(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut bytes = message.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Message::decode(&bytes).is_err());
        }
    }

    #[test]
    fn bytes_on_the_wire_stay_what_they_are() {
        let hello =
            Hello { session: SessionId(0x0102), lane: LaneId(3), ticket: Ticket([0xab; 32]) };
        let bytes = encode_request(&hello);
        assert_eq!(&bytes[..10], b"PFRL\x01\0\x03\0\x02\x01");
        assert_eq!(decode_request(&[&bytes[..], &[0; 140]].concat()), Ok(hello));
        let accept =
            LaneAccept { slice_bytes: 1 << 21, scratch: RemoteAddr { addr: 0x1000, rkey: 7 } };
        let bytes = accept.encode();
        assert_eq!(&bytes[..8], b"PFRA\x01\0\0\0");
        assert_eq!(LaneAccept::decode(&[&bytes[..], &[0; 164]].concat()), Ok(accept));
        let barrier = Message::Barrier { round: RoundIndex(2), seq: 5 }.encode();
        assert_eq!(&barrier[..16], b"PR\x01\x02\x02\0\0\0\x05\0\0\0\0\0\0\0");
        let zeros = Extent { region: RegionIndex(1), offset: 3 * 4096, len: 2 * 4096 };
        let bytes = Message::Zeros(vec![zeros]).encode();
        assert_eq!(&bytes[..16], b"PR\x01\x06\0\0\0\0\0\0\0\0\x01\0\0\0");
        assert_eq!(&bytes[20..], b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0");
        let refused = Reply::Refused(Refusal::Ticket).encode();
        assert_eq!(refusal_in(&refused), Some(Refusal::Ticket));
        assert_eq!(refusal_in(&[0; 148]), None);
    }
}
