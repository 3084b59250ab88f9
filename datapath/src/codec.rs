//! Compressed chunks: packed at the source, unpacked at the target. Sans-IO.
//!
//! ```text
//!   guest memory --volatile copy--> raw buffer --codec--> packed payload --> wire
//!   wire --> packed payload --codec--> raw buffer --volatile copy--> guest memory
//! ```
//!
//! The extents of a batch are read as one stream and cut into chunks of [`CHUNK_BYTES_MAX`]; each
//! chunk stands for itself. Both buffers are private: a codec never sees memory that the guest
//! writes, or it would read one thing and write down another. Owned by a lane's worker.
//!
//! Deliberately not here: whether packing pays (see [`governor`](crate::governor)), and how a chunk
//! is described on the wire (see [`framing`](crate::framing)).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::extent::Extent;
use crate::limits::{BATCH_BYTES_MAX, CHUNK_BYTES_MAX, CHUNKS_MAX};
use crate::region::{GuestMemory, RegionError};

/// A way to write bytes down shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// LZ4's block format: fast, and no level.
    Lz4,
    /// Zstandard.
    Zstd {
        /// 1 (fast) to 19 (small).
        level: i32,
    },
}

/// What a peer can unpack, as it stands in an offer. Levels are the packer's own affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CodecName {
    /// LZ4 blocks.
    Lz4,
    /// Zstandard frames.
    Zstd,
    /// A codec of a newer peer.
    #[serde(other)]
    Unknown,
}

impl CodecName {
    /// What this version can unpack.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];
}

impl Codec {
    /// Zstandard's level where none is named: its fastest, because a lane is waiting.
    pub const ZSTD_LEVEL: i32 = 1;

    /// Its name in an offer.
    pub fn name(self) -> CodecName {
        match self {
            Self::Lz4 => CodecName::Lz4,
            Self::Zstd { .. } => CodecName::Zstd,
        }
    }

    fn coding(self) -> Coding {
        match self {
            Self::Lz4 => Coding::Lz4,
            Self::Zstd { .. } => Coding::Zstd,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

/// Not the name of a codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a codec is lz4, zstd or zstd:LEVEL with a level from 1 to 19")]
pub struct CodecError;

impl FromStr for Codec {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        match text.split_once(':') {
            None if text == "lz4" => Ok(Self::Lz4),
            None if text == "zstd" => Ok(Self::Zstd { level: Self::ZSTD_LEVEL }),
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ 1..=19) => Ok(Self::Zstd { level }),
                _ => Err(CodecError),
            },
            _ => Err(CodecError),
        }
    }
}

/// How one chunk is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// As it is: it did not get shorter.
    Stored,
    /// An LZ4 block.
    Lz4,
    /// A Zstandard frame.
    Zstd,
}

/// One chunk of a batch's packed payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// How it is written down.
    pub coding: Coding,
    /// Its length on the wire.
    pub packed_bytes: u64,
    /// Its length in guest memory.
    pub raw_bytes: u64,
}

/// Why a packed payload is not the memory that was announced.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The peer's chunk does not decode to exactly its length.
    #[error("a chunk of {packed_bytes} bytes does not unpack to {raw_bytes}")]
    Corrupt {
        /// Its length on the wire.
        packed_bytes: u64,
        /// What it should have become.
        raw_bytes: u64,
    },
    /// An extent outside of guest memory.
    #[error("unpacking outside guest memory")]
    Memory {
        /// The range.
        #[source]
        source: RegionError,
    },
}

/// Bytes that a packed payload may need while it is made: a full batch, and one chunk that grew.
pub const PAYLOAD_BYTES_MAX: usize = BATCH_BYTES_MAX as usize + CHUNK_BYTES_MAX as usize / 8 + 1024;

/// Packs batches; owns the buffer that guest memory is copied into first.
#[derive(Default)]
pub struct Packer {
    raw: Vec<u8>,
    zstd: Zstd,
}

impl Packer {
    /// A packer that has used no memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Packs the bytes of `extents`, together at most a batch's, into the front of `payload` (at
    /// least [`PAYLOAD_BYTES_MAX`] long) and lists the chunks. Returns the bytes used.
    ///
    /// # Errors
    /// If an extent lies outside of `memory`.
    pub fn pack(
        &mut self,
        codec: Codec,
        memory: &GuestMemory,
        extents: &[Extent],
        payload: &mut [u8],
        chunks: &mut Vec<Chunk>,
    ) -> Result<usize, RegionError> {
        assert!(extents.iter().map(|e| e.len).sum::<u64>() <= BATCH_BYTES_MAX);
        assert!(payload.len() >= PAYLOAD_BYTES_MAX);
        chunks.clear();
        let mut used = 0;
        let mut stream = Stream::new(extents);
        while let Some(raw_bytes) = self.fill(memory, &mut stream)? {
            let (raw, into) = (&self.raw[..raw_bytes], &mut payload[used..]);
            let (coding, packed) = pack_chunk(&mut self.zstd, codec, raw, into);
            let (packed_bytes, raw_bytes) = (packed as u64, raw_bytes as u64);
            chunks.push(Chunk { coding, packed_bytes, raw_bytes });
            used += packed;
        }
        assert!(chunks.len() <= CHUNKS_MAX);
        Ok(used)
    }

    /// The same for bytes that are a batch's data already: those of its extents, one after the other.
    pub fn pack_bytes(
        &mut self,
        codec: Codec,
        bytes: &[u8],
        payload: &mut [u8],
        chunks: &mut Vec<Chunk>,
    ) -> usize {
        assert!(bytes.len() as u64 <= BATCH_BYTES_MAX && payload.len() >= PAYLOAD_BYTES_MAX);
        chunks.clear();
        let mut used = 0;
        for raw in bytes.chunks(CHUNK_BYTES_MAX as usize) {
            let (coding, packed) = pack_chunk(&mut self.zstd, codec, raw, &mut payload[used..]);
            let (packed_bytes, raw_bytes) = (packed as u64, raw.len() as u64);
            chunks.push(Chunk { coding, packed_bytes, raw_bytes });
            used += packed;
        }
        used
    }

    /// Packs the first chunk of `extents` and throws the result away: its length before and after.
    pub fn try_out(
        &mut self,
        codec: Codec,
        memory: &GuestMemory,
        extents: &[Extent],
        payload: &mut [u8],
    ) -> Result<(usize, usize), RegionError> {
        match self.fill(memory, &mut Stream::new(extents))? {
            None => Ok((0, 0)),
            Some(raw_bytes) => {
                let raw = &self.raw[..raw_bytes];
                Ok((raw_bytes, pack_chunk(&mut self.zstd, codec, raw, payload).1))
            }
        }
    }

    /// Copies the next chunk of the stream into the private buffer.
    fn fill(
        &mut self,
        memory: &GuestMemory,
        stream: &mut Stream<'_>,
    ) -> Result<Option<usize>, RegionError> {
        self.raw.resize(CHUNK_BYTES_MAX as usize, 0);
        let mut filled = 0;
        while let Some(piece) = stream.next(CHUNK_BYTES_MAX - filled as u64) {
            let len = piece.len as usize;
            memory.lease(piece)?.copy_out(0, &mut self.raw[filled..filled + len])?;
            filled += len;
        }
        Ok(Some(filled).filter(|&filled| filled > 0))
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").field("raw", &self.raw.len()).finish_non_exhaustive()
    }
}

type Zstd = Option<(i32, zstd::bulk::Compressor<'static>)>;

fn pack_chunk(zstd: &mut Zstd, codec: Codec, raw: &[u8], into: &mut [u8]) -> (Coding, usize) {
    let packed = match codec {
        Codec::Lz4 => lz4_flex::block::compress_into(raw, into).ok(),
        Codec::Zstd { level } => pack_zstd(zstd, level, raw, into),
    };
    match packed {
        Some(packed) if packed < raw.len() => (codec.coding(), packed),
        _ => {
            into[..raw.len()].copy_from_slice(raw);
            (Coding::Stored, raw.len())
        }
    }
}

fn pack_zstd(zstd: &mut Zstd, level: i32, raw: &[u8], into: &mut [u8]) -> Option<usize> {
    if zstd.as_ref().is_none_or(|(have, _)| *have != level) {
        // Fails without memory only; the chunk is stored then.
        *zstd = Some((level, zstd::bulk::Compressor::new(level).ok()?));
    }
    let (_, compressor) = zstd.as_mut()?;
    compressor.compress_to_buffer(raw, into).ok()
}

/// Unpacks batches; owns the buffer that a chunk becomes before it is copied to guest memory.
#[derive(Default)]
pub struct Unpacker {
    raw: Vec<u8>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Unpacker {
    /// An unpacker that has used no memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Unpacks a payload into its extents. Lengths were checked against each other and against the
    /// limits when the header was decoded; what the chunks contain is checked here. After an error
    /// part of the batch may have been placed.
    pub fn unpack(
        &mut self,
        payload: &[u8],
        chunks: &[Chunk],
        memory: &GuestMemory,
        extents: &[Extent],
    ) -> Result<(), UnpackError> {
        self.raw.resize(CHUNK_BYTES_MAX as usize, 0);
        let mut stream = Stream::new(extents);
        let mut at = 0;
        for chunk in chunks {
            let corrupt = || UnpackError::Corrupt {
                packed_bytes: chunk.packed_bytes,
                raw_bytes: chunk.raw_bytes,
            };
            let raw_bytes = usize::try_from(chunk.raw_bytes).map_err(|_| corrupt())?;
            let end = usize::try_from(chunk.packed_bytes).ok().and_then(|len| len.checked_add(at));
            let packed = payload.get(at..end.ok_or_else(corrupt)?).ok_or_else(corrupt)?;
            let raw = self.raw.get_mut(..raw_bytes).ok_or_else(corrupt)?;
            if unpack_chunk(&mut self.zstd, chunk.coding, packed, raw) != Some(raw_bytes) {
                return Err(corrupt());
            }
            at += packed.len();
            let mut from = 0;
            while let Some(piece) = stream.next((raw_bytes - from) as u64) {
                let bytes = &self.raw[from..from + piece.len as usize];
                memory
                    .lease(piece)
                    .and_then(|lease| lease.copy_in(0, bytes))
                    .map_err(|source| UnpackError::Memory { source })?;
                from += bytes.len();
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").field("raw", &self.raw.len()).finish_non_exhaustive()
    }
}

/// Unpacks into all of `raw` at most; the bytes written, `None` if it can't be.
fn unpack_chunk(
    zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
    coding: Coding,
    packed: &[u8],
    raw: &mut [u8],
) -> Option<usize> {
    match coding {
        Coding::Stored if packed.len() == raw.len() => {
            raw.copy_from_slice(packed);
            Some(raw.len())
        }
        Coding::Stored => None,
        Coding::Lz4 => lz4_flex::block::decompress_into(packed, raw).ok(),
        Coding::Zstd => {
            let decompressor = match zstd {
                Some(decompressor) => decompressor,
                none => none.insert(zstd::bulk::Decompressor::new().ok()?),
            };
            // One pass into a buffer: no window is allocated, whatever the frame asks for.
            decompressor.decompress_to_buffer(packed, raw).ok()
        }
    }
}

/// Extents read one after the other, in pieces.
#[derive(Debug)]
struct Stream<'a> {
    extents: &'a [Extent],
    /// Bytes already taken of the first.
    taken: u64,
}

impl<'a> Stream<'a> {
    fn new(extents: &'a [Extent]) -> Self {
        Self { extents, taken: 0 }
    }

    /// The next piece, of at most `room` bytes; never an empty one.
    fn next(&mut self, room: u64) -> Option<Extent> {
        let first = self.extents.first().filter(|_| room > 0)?;
        let len = (first.len - self.taken).min(room);
        let piece = Extent { region: first.region, offset: first.offset + self.taken, len };
        self.taken += len;
        if self.taken == first.len {
            (self.extents, self.taken) = (&self.extents[1..], 0);
        }
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;
    use crate::region::Region;

    const CODECS: [Codec; 3] = [Codec::Lz4, Codec::Zstd { level: 1 }, Codec::Zstd { level: 9 }];

    fn memory(bytes: u64) -> GuestMemory {
        let backing = Backing::memfd("codec-test", bytes, None).unwrap();
        GuestMemory::new(vec![Region::open(RegionIndex(0), backing).unwrap()])
    }

    fn extent(page: u64, pages: u64) -> Extent {
        Extent { region: RegionIndex(0), offset: page * 4096, len: pages * 4096 }
    }

    /// Pages of which every other one can be packed and the rest is noise.
    fn fill(memory: &GuestMemory, pages: u64, noise: u64) {
        let lease = memory.lease(extent(0, pages)).unwrap();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for page in 0..pages {
            let mut bytes = [page as u8; 4096];
            if page % 4 < noise {
                for word in bytes.chunks_exact_mut(8) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
                }
            }
            lease.copy_in(page * 4096, &bytes).unwrap();
        }
    }

    fn bytes(memory: &GuestMemory) -> Vec<u8> {
        let region = &memory.regions()[0];
        let mut bytes = vec![0; region.len() as usize];
        region.lease(0, region.len()).unwrap().copy_out(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_packed_comes_out_as_it_was() {
        let extents = [extent(3, 1), extent(200, 56), extent(10, 100), extent(5, 2)];
        for codec in CODECS {
            for noise in [0, 2, 4] {
                let (from, to) = (memory(1 << 20), memory(1 << 20));
                fill(&from, 256, noise);
                let (mut payload, mut chunks) = (vec![0; PAYLOAD_BYTES_MAX], Vec::new());
                let used =
                    Packer::new().pack(codec, &from, &extents, &mut payload, &mut chunks).unwrap();
                assert_eq!(used as u64, chunks.iter().map(|c| c.packed_bytes).sum::<u64>());
                assert_eq!(159 * 4096, chunks.iter().map(|c| c.raw_bytes).sum::<u64>());
                match noise {
                    0 => assert!(used < 159 * 4096 / 20, "{codec}: {used}"),
                    4 => assert!(chunks.iter().all(|chunk| chunk.coding == Coding::Stored)),
                    _ => assert!(used < 159 * 4096 * 6 / 10, "{codec}: {used}"),
                }
                Unpacker::new().unpack(&payload[..used], &chunks, &to, &extents).unwrap();
                let (from, to) = (bytes(&from), bytes(&to));
                for page in 0..256 {
                    let inside =
                        extents.iter().any(|e| (e.offset..e.end()).contains(&(page as u64 * 4096)));
                    let range = page * 4096..(page + 1) * 4096;
                    let expected =
                        if inside { from[range.clone()].to_vec() } else { vec![0; 4096] };
                    assert_eq!(to[range], expected, "{codec}, page {page}");
                }
            }
        }
    }

    #[test]
    fn a_chunk_that_says_too_much_or_too_little_is_corrupt() {
        let extents = [extent(0, 2)];
        for codec in CODECS {
            let (from, to) = (memory(8192), memory(8192));
            fill(&from, 2, 0);
            let (mut payload, mut chunks) = (vec![0; PAYLOAD_BYTES_MAX], Vec::new());
            let used =
                Packer::new().pack(codec, &from, &extents, &mut payload, &mut chunks).unwrap();
            let whole = chunks[0];
            // The peer says one page less or more than the chunk holds, or cuts it.
            for raw_bytes in [4096, 12288] {
                let chunk = Chunk { raw_bytes, ..whole };
                let unpacked = Unpacker::new().unpack(&payload[..used], &[chunk], &to, &extents);
                assert!(matches!(unpacked, Err(UnpackError::Corrupt { .. })), "{codec}");
            }
            for packed_bytes in [0, 1, whole.packed_bytes - 1, u64::MAX] {
                let chunk = Chunk { packed_bytes, ..whole };
                let unpacked = Unpacker::new().unpack(&payload[..used], &[chunk], &to, &extents);
                assert!(matches!(unpacked, Err(UnpackError::Corrupt { .. })), "{codec}");
            }
            let chunk = Chunk { raw_bytes: u64::MAX, ..whole };
            assert!(Unpacker::new().unpack(&payload[..used], &[chunk], &to, &extents).is_err());
        }
    }

    #[test]
    fn codecs_are_named() {
        assert_eq!("lz4".parse(), Ok(Codec::Lz4));
        assert_eq!("zstd".parse(), Ok(Codec::Zstd { level: 1 }));
        assert_eq!("zstd:7".parse::<Codec>().unwrap().to_string(), "zstd:7");
        for bad in ["", "LZ4", "zstd:0", "zstd:20", "zstd:-3", "lz4:2", "zstd:"] {
            assert_eq!(bad.parse::<Codec>(), Err(CodecError), "{bad}");
        }
    }

    proptest! {
        /// Nothing that stands in a payload makes an unpacker panic or write elsewhere.
        #[test]
        fn no_bytes_are_trusted(
            payload in prop::collection::vec(any::<u8>(), 1..9000),
            coding in 0..3u8,
            pages in 1..4u64,
            whole: bool,
        ) {
            let memory = memory(8 * 4096);
            let coding = [Coding::Stored, Coding::Lz4, Coding::Zstd][usize::from(coding)];
            let packed_bytes = payload.len() as u64 - u64::from(!whole);
            let chunk = Chunk { coding, packed_bytes, raw_bytes: pages * 4096 };
            let _corrupt_mostly =
                Unpacker::new().unpack(&payload, &[chunk], &memory, &[extent(1, pages)]);
            let bytes = bytes(&memory);
            prop_assert!(bytes[..4096].iter().all(|b| *b == 0));
            prop_assert!(bytes[(1 + pages as usize) * 4096..].iter().all(|b| *b == 0));
        }
    }
}
