//! Lane framing: what stands on a data connection, byte by byte. Sans-IO.
//!
//! Owned by each lane's worker, one [`LaneWriter`] at the source and one [`LaneReader`] at the
//! target. All numbers are little endian. After the [greeting](hello) the source sends frames:
//!
//! ```text
//! frame    := header (4096 bytes) payload           payload only after a batch header
//! header   := magic "PL" | version u8 | kind u8 | seq u32 | count u16 | 0 u16 | checksum u32
//!             | 255 x entry (16 bytes), unused ones zero
//! entry    := region u16 | kind u16 | len u32 | offset u64      (batch)
//!             round u32, rest zero                              (barrier, first entry)
//! payload  := the bytes of the first data entry, of the second, ... (zeros and holes have none),
//!             then the chunks in the order of their entries
//! chunk    := 0 u16 | coding u16 | packed length u32 | raw length u64            (an entry)
//! ```
//!
//! Where a codec was agreed on, a batch's extents may travel packed: their bytes, one after the
//! other, are cut into chunks, and entries behind the extents' say how each is written down
//! (see [`codec`](crate::codec)). A peer that did not agree to it refuses such a batch.
//!
//! Where holes were agreed on, an entry may say that whole pages of its region are a hole: the target
//! frees them. Such an entry may be longer than a batch, and is no part of the batch's bytes.
//!
//! Headers have one fixed size so that the target can take a batch's payload and the next header
//! with a single system call. They are large so that a round of scattered 4 KiB pages still moves
//! in batches of nearly 1 MiB, and a whole page so that the payload behind stays aligned: on
//! loopback 31 extents a header cost such a round 20 % of its throughput and 27 % more CPU, while
//! long extents don't notice the 0.4 % of headers.
//!
//! The target answers a barrier with an [`Ack`] on the same connection, and only once every byte
//! before the barrier is in guest memory.
//!
//! Deliberately not here: sockets, clocks, memory. The decoder gives out [`Extent`]s that lie
//! inside the agreed regions, and nothing else of the peer's numbers.

pub mod hello;

use xxhash_rust::xxh3::xxh3_64;

use crate::codec::{Chunk, CodecName, Coding};
use crate::extent::Extent;
use crate::ids::{LaneId, RegionIndex, RoundIndex};
use crate::limits::{
    BATCH_BYTES_MAX, BATCH_EXTENTS_MAX, CHUNK_BYTES_MAX, CHUNKS_MAX, HOLE_RUN_BYTES_MAX,
    PAGE_BYTES_MIN,
};
use crate::zero::Sorted;

/// Size of every frame header.
pub const HEADER_BYTES: usize = 4096;
/// Size of a barrier's acknowledgement.
pub const ACK_BYTES: usize = 32;

const HEADER_MAGIC: [u8; 2] = *b"PL";
const ACK_MAGIC: [u8; 4] = *b"PFLA";
/// Version of the framing; a peer of another version is refused at the hello.
pub const VERSION: u8 = 1;

const KIND_BATCH: u8 = 1;
const KIND_BARRIER: u8 = 2;
const KIND_CLOSE: u8 = 3;

/// An extent whose bytes follow as they are.
const EXTENT_DATA: u16 = 0;
/// An extent that is to read as zeros; nothing follows.
const EXTENT_ZERO: u16 = 1;
/// An extent whose bytes are in the chunks.
const EXTENT_PACKED: u16 = 2;
/// An extent of whole pages that is to be a hole; nothing follows.
const EXTENT_HOLE: u16 = 3;
/// A chunk, by its coding.
const CHUNK_STORED: u16 = 16;
const CHUNK_LZ4: u16 = 17;
const CHUNK_ZSTD: u16 = 18;

const ENTRY_BYTES: usize = 16;
const ENTRIES_AT: usize = HEADER_BYTES - BATCH_EXTENTS_MAX * ENTRY_BYTES;
const CHECKSUM_AT: usize = 12;

/// A frame header as it travels.
pub type HeaderBytes = [u8; HEADER_BYTES];

/// Why bytes of a peer are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// The first bytes are not this protocol's.
    #[error("wrong magic bytes")]
    Magic,
    /// The peer speaks another version.
    #[error("framing version {version} is not {VERSION}")]
    Version {
        /// The peer's version.
        version: u16,
    },
    /// The checksum does not cover the bytes.
    #[error("wrong checksum")]
    Checksum,
    /// A kind or code this version does not know.
    #[error("unknown frame kind {kind}")]
    Kind {
        /// The number that stood there.
        kind: u16,
    },
    /// A frame was lost, repeated or reordered.
    #[error("frame {seq} where {expected} was due")]
    Sequence {
        /// The frame's number.
        seq: u32,
        /// The number due.
        expected: u32,
    },
    /// More extents than a header holds, or none.
    #[error("batch of {count} extents")]
    Count {
        /// The count that stood there.
        count: u16,
    },
    /// An extent's kind is not known.
    #[error("unknown extent kind {kind}")]
    ExtentKind {
        /// The number that stood there.
        kind: u16,
    },
    /// An extent is empty, unaligned, or not inside an agreed region.
    #[error("extent {offset}+{len} of region {region} is not whole pages of an agreed region")]
    Extent {
        /// The region that stood there.
        region: u16,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// More memory than a batch may have.
    #[error("batch of {bytes} bytes is above {BATCH_BYTES_MAX}")]
    BatchBytes {
        /// The sum of the lengths.
        bytes: u64,
    },
    /// A chunk is longer than what it stands for, or chunks and packed extents don't add up.
    #[error("chunk of {raw_bytes} bytes in {packed_bytes} does not fit its batch")]
    Chunk {
        /// Its length in guest memory, as it stood there.
        raw_bytes: u64,
        /// Its length on the wire, as it stood there.
        packed_bytes: u32,
    },
    /// A chunk does not become what its header says.
    #[error("a compressed chunk is corrupt")]
    CorruptChunk,
    /// Bytes that must be zero are not.
    #[error("unused bytes are not zero")]
    Reserved,
}

/// What a frame says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Payload follows for the data extents and chunks that the reader filled in, if there are any.
    Batch {
        /// Bytes that follow, at most [`BATCH_BYTES_MAX`]: data extents as they are, then chunks.
        payload_bytes: u64,
    },
    /// Acknowledge when everything before is placed.
    Barrier {
        /// The round it closes.
        round: RoundIndex,
        /// The frame's number, repeated in the acknowledgement.
        seq: u32,
    },
    /// Nothing comes after this.
    Close,
}

/// Numbers and encodes the frames of one lane.
#[derive(Debug, Default)]
pub struct LaneWriter {
    seq: u32,
}

impl LaneWriter {
    /// A writer at the lane's first frame.
    pub fn new() -> Self {
        Self::default()
    }

    /// Encodes the header of a batch: extents whose bytes follow, and extents that are zero.
    ///
    /// # Panics
    /// If both together break the limits of [`RoundWork::next_batch`](crate::work::RoundWork): the
    /// caller's bug, and the target would refuse the lane.
    pub fn batch(&mut self, data: &[Extent], zero: &[Extent], header: &mut HeaderBytes) {
        self.entries([data, zero, &[], &[]], &[], header);
    }

    /// The same for a batch with packed extents or holes; the peer must have agreed to the chunks'
    /// codings, and to holes.
    ///
    /// # Panics
    /// As [`Self::batch`], and if the chunks are not those of the packed extents.
    pub fn sorted(&mut self, batch: &Sorted, header: &mut HeaderBytes) {
        let raw_bytes: u64 = batch.chunks.iter().map(|chunk| chunk.raw_bytes).sum();
        assert_eq!(raw_bytes, batch.packed.iter().map(|extent| extent.len).sum::<u64>());
        let extents: [&[Extent]; 4] = [&batch.data, &batch.zero, &batch.packed, &batch.hole];
        self.entries(extents, &batch.chunks, header);
    }

    fn entries(&mut self, extents: [&[Extent]; 4], chunks: &[Chunk], header: &mut HeaderBytes) {
        let count = extents.iter().map(|kind| kind.len()).sum::<usize>() + chunks.len();
        assert!((1..=BATCH_EXTENTS_MAX).contains(&count));
        let moved = extents[..3].iter().copied().flatten();
        assert!(moved.map(|e| e.len).sum::<u64>() <= BATCH_BYTES_MAX);
        assert!(extents[3].iter().all(|hole| hole.len <= HOLE_RUN_BYTES_MAX));
        header[ENTRIES_AT..].fill(0);
        let kinds = [EXTENT_DATA, EXTENT_ZERO, EXTENT_PACKED, EXTENT_HOLE];
        let extents = extents.into_iter().zip(kinds);
        let extents = extents.flat_map(|(extents, kind)| {
            extents.iter().map(move |e| (e.region.0, kind, e.len as u32, e.offset))
        });
        let chunks = chunks.iter().map(|chunk| {
            let kind = match chunk.coding {
                Coding::Stored => CHUNK_STORED,
                Coding::Lz4 => CHUNK_LZ4,
                Coding::Zstd => CHUNK_ZSTD,
            };
            (0, kind, chunk.packed_bytes as u32, chunk.raw_bytes)
        });
        let entries = header[ENTRIES_AT..].chunks_exact_mut(ENTRY_BYTES);
        for (entry, (region, kind, len, offset)) in entries.zip(extents.chain(chunks)) {
            entry[0..2].copy_from_slice(&region.to_le_bytes());
            entry[2..4].copy_from_slice(&kind.to_le_bytes());
            entry[4..8].copy_from_slice(&len.to_le_bytes());
            entry[8..16].copy_from_slice(&offset.to_le_bytes());
        }
        self.seal(KIND_BATCH, count as u16, header);
    }

    /// Encodes a barrier; returns its number, which the acknowledgement must repeat.
    pub fn barrier(&mut self, round: RoundIndex, header: &mut HeaderBytes) -> u32 {
        header[ENTRIES_AT..].fill(0);
        header[ENTRIES_AT..ENTRIES_AT + 4].copy_from_slice(&round.0.to_le_bytes());
        self.seal(KIND_BARRIER, 0, header)
    }

    /// Encodes the last frame.
    pub fn close(&mut self, header: &mut HeaderBytes) {
        header[ENTRIES_AT..].fill(0);
        self.seal(KIND_CLOSE, 0, header);
    }

    fn seal(&mut self, kind: u8, count: u16, header: &mut HeaderBytes) -> u32 {
        let seq = self.seq;
        self.seq = seq.wrapping_add(1);
        header[0..2].copy_from_slice(&HEADER_MAGIC);
        header[2] = VERSION;
        header[3] = kind;
        header[4..8].copy_from_slice(&seq.to_le_bytes());
        header[8..10].copy_from_slice(&count.to_le_bytes());
        header[10..ENTRIES_AT].fill(0);
        let checksum = xxh3_64(header) as u32;
        header[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        seq
    }
}

/// Checks and decodes the frames of one lane.
#[derive(Debug)]
pub struct LaneReader {
    seq: u32,
    region_bytes: Box<[u64]>,
    codecs: Box<[CodecName]>,
    /// Of each region, the page size that holes are made of; none where holes were not agreed on.
    hole_pages: Box<[u64]>,
}

impl LaneReader {
    /// A reader at the lane's first frame, for regions of these sizes (by index).
    pub fn new(region_bytes: impl Into<Box<[u64]>>) -> Self {
        Self {
            seq: 0,
            region_bytes: region_bytes.into(),
            codecs: Box::default(),
            hole_pages: Box::default(),
        }
    }

    /// Takes holes too, of whole pages of these sizes (by region).
    pub fn punching(mut self, page_bytes: impl Into<Box<[u64]>>) -> Self {
        self.hole_pages = page_bytes.into();
        self
    }

    /// Takes packed extents too, in chunks of these codecs.
    pub fn unpacking(mut self, codecs: impl Into<Box<[CodecName]>>) -> Self {
        self.codecs = codecs.into();
        self
    }

    /// Decodes one header; for a batch, `extents` is replaced with its extents. After an error the
    /// stream can't be trusted any more: the lane must be closed.
    pub fn frame(
        &mut self,
        header: &HeaderBytes,
        extents: &mut Sorted,
    ) -> Result<Frame, FramingError> {
        extents.clear();
        check_seal(header)?;
        let kind = header[3];
        let seq = u32_at(header, 4);
        if seq != self.seq {
            return Err(FramingError::Sequence { seq, expected: self.seq });
        }
        let count = u16_at(header, 8);
        let unused_from = match kind {
            KIND_BATCH if count == 0 || usize::from(count) > BATCH_EXTENTS_MAX => {
                return Err(FramingError::Count { count });
            }
            KIND_BATCH => ENTRIES_AT + usize::from(count) * ENTRY_BYTES,
            KIND_BARRIER | KIND_CLOSE if count != 0 => return Err(FramingError::Count { count }),
            KIND_BARRIER => ENTRIES_AT + 4,
            KIND_CLOSE => ENTRIES_AT,
            other => return Err(FramingError::Kind { kind: other.into() }),
        };
        if header[10..CHECKSUM_AT].iter().chain(&header[unused_from..]).any(|&b| b != 0) {
            return Err(FramingError::Reserved);
        }
        let frame = match kind {
            KIND_BATCH => {
                let entries = &header[ENTRIES_AT..unused_from];
                Frame::Batch { payload_bytes: self.entries(entries, extents)? }
            }
            KIND_BARRIER => Frame::Barrier { round: RoundIndex(u32_at(header, ENTRIES_AT)), seq },
            _ => Frame::Close,
        };
        self.seq = seq.wrapping_add(1);
        Ok(frame)
    }

    fn entries(&self, entries: &[u8], extents: &mut Sorted) -> Result<u64, FramingError> {
        let (mut bytes, mut payload_bytes, mut unpacked) = (0, 0, 0);
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let (region, kind) = (u16_at(entry, 0), u16_at(entry, 2));
            let (len, offset) = (u32_at(entry, 4), u64_at(entry, 8));
            if let Some(coding) = self.coding(kind) {
                let chunk = checked_chunk(coding, region, len, offset)?;
                extents.chunks.push(chunk);
                payload_bytes += chunk.packed_bytes;
                unpacked += chunk.raw_bytes;
                continue;
            }
            if kind > EXTENT_HOLE || (kind == EXTENT_HOLE && self.hole_pages.is_empty()) {
                return Err(FramingError::ExtentKind { kind });
            }
            let region_bytes = self.region_bytes.get(usize::from(region)).copied().unwrap_or(0);
            let page_bytes = match kind {
                EXTENT_HOLE => self.hole_pages.get(usize::from(region)).copied(),
                _ => None,
            };
            let page_bytes = page_bytes.unwrap_or(PAGE_BYTES_MIN);
            let whole_pages = offset % page_bytes == 0 && u64::from(len) % page_bytes == 0;
            let inside = offset.checked_add(len.into()).is_some_and(|end| end <= region_bytes);
            let too_long = kind == EXTENT_HOLE && u64::from(len) > HOLE_RUN_BYTES_MAX;
            if len == 0 || !whole_pages || !inside || too_long {
                return Err(FramingError::Extent { region, offset, len });
            }
            let extent = Extent { region: RegionIndex(region), offset, len: len.into() };
            if kind == EXTENT_HOLE {
                extents.hole.push(extent);
                continue;
            }
            // Cannot overflow: at most 255 lengths of 32 bits.
            bytes += u64::from(len);
            match kind {
                EXTENT_DATA => {
                    payload_bytes += extent.len;
                    extents.data.push(extent);
                }
                EXTENT_ZERO => extents.zero.push(extent),
                EXTENT_PACKED if !self.codecs.is_empty() => extents.packed.push(extent),
                kind => return Err(FramingError::ExtentKind { kind }),
            }
        }
        if bytes > BATCH_BYTES_MAX {
            return Err(FramingError::BatchBytes { bytes });
        }
        let packed: u64 = extents.packed.iter().map(|extent| extent.len).sum();
        if packed != unpacked || extents.chunks.len() > CHUNKS_MAX {
            return Err(FramingError::Chunk { raw_bytes: unpacked, packed_bytes: 0 });
        }
        Ok(payload_bytes)
    }

    /// The coding that a kind stands for, if it was agreed to.
    fn coding(&self, kind: u16) -> Option<Coding> {
        let knows = |codec| self.codecs.contains(&codec);
        match kind {
            CHUNK_STORED if !self.codecs.is_empty() => Some(Coding::Stored),
            CHUNK_LZ4 if knows(CodecName::Lz4) => Some(Coding::Lz4),
            CHUNK_ZSTD if knows(CodecName::Zstd) => Some(Coding::Zstd),
            _ => None,
        }
    }
}

/// A chunk whose lengths may be allocated by: both bounded, and none longer than what it stands for.
fn checked_chunk(
    coding: Coding,
    region: u16,
    packed_bytes: u32,
    raw_bytes: u64,
) -> Result<Chunk, FramingError> {
    let packed = u64::from(packed_bytes);
    let sound = region == 0
        && (1..=CHUNK_BYTES_MAX).contains(&raw_bytes)
        && raw_bytes.is_multiple_of(PAGE_BYTES_MIN)
        && match coding {
            Coding::Stored => packed == raw_bytes,
            Coding::Lz4 | Coding::Zstd => (1..raw_bytes).contains(&packed),
        };
    if !sound {
        return Err(FramingError::Chunk { raw_bytes, packed_bytes });
    }
    Ok(Chunk { coding, packed_bytes: packed, raw_bytes })
}

fn check_seal(header: &HeaderBytes) -> Result<(), FramingError> {
    if header[0..2] != HEADER_MAGIC {
        return Err(FramingError::Magic);
    }
    if header[2] != VERSION {
        return Err(FramingError::Version { version: header[2].into() });
    }
    let mut unsealed = *header;
    unsealed[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
    if xxh3_64(&unsealed) as u32 != u32_at(header, CHECKSUM_AT) {
        return Err(FramingError::Checksum);
    }
    Ok(())
}

/// The target's word that every byte before a barrier is in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The lane it is sent on.
    pub lane: LaneId,
    /// The barrier's round.
    pub round: RoundIndex,
    /// The barrier's frame number.
    pub seq: u32,
}

impl Ack {
    /// `"PFLA" | version u8 | 0 u8 | lane u16 | round u32 | seq u32 | 0 x 12 | checksum u32`.
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        let mut bytes = [0; ACK_BYTES];
        bytes[0..4].copy_from_slice(&ACK_MAGIC);
        bytes[4] = VERSION;
        bytes[6..8].copy_from_slice(&self.lane.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.round.0.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.seq.to_le_bytes());
        let checksum = xxh3_64(&bytes[..28]) as u32;
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The inverse of [`Ack::encode`].
    pub fn decode(bytes: &[u8; ACK_BYTES]) -> Result<Self, FramingError> {
        if bytes[0..4] != ACK_MAGIC {
            return Err(FramingError::Magic);
        }
        if bytes[4] != VERSION {
            return Err(FramingError::Version { version: bytes[4].into() });
        }
        if xxh3_64(&bytes[..28]) as u32 != u32_at(bytes, 28) {
            return Err(FramingError::Checksum);
        }
        if bytes[5] != 0 || bytes[16..28].iter().any(|&b| b != 0) {
            return Err(FramingError::Reserved);
        }
        Ok(Self {
            lane: LaneId(u16_at(bytes, 6)),
            round: RoundIndex(u32_at(bytes, 8)),
            seq: u32_at(bytes, 12),
        })
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
