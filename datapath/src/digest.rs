//! Digests of guest memory: one number per chunk, so that a difference can be located.
//!
//! A hole and a page of zeros count the same: the digest is of content, not of allocation.

mod compute;

pub use compute::DigestError;

use crate::extent::Extent;
use crate::ids::RegionIndex;

/// Bytes of guest memory behind one chunk's number; a region's last chunk may be shorter.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// The digest of all regions of a guest: xxh3-64 per chunk, 0 for a chunk of zeros.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemoryDigest {
    regions: Vec<Vec<u64>>,
}

/// Bytes that are no digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a memory digest of {bytes} bytes does not decode")]
pub struct DigestDecodeError {
    /// How many bytes there were.
    pub bytes: usize,
}

impl MemoryDigest {
    /// From each region's chunk numbers.
    pub fn new(regions: Vec<Vec<u64>>) -> Self {
        Self { regions }
    }

    /// Where the first chunk that differs lies; `None` if all are equal. A region that is missing
    /// or longer on one side differs from its first missing chunk on.
    pub fn first_difference(&self, other: &Self) -> Option<Extent> {
        let regions = self.regions.len().max(other.regions.len());
        (0..regions).find_map(|region| {
            let ours = self.regions.get(region).map_or(&[][..], Vec::as_slice);
            let theirs = other.regions.get(region).map_or(&[][..], Vec::as_slice);
            let chunk =
                (0..ours.len().max(theirs.len())).find(|i| ours.get(*i) != theirs.get(*i))?;
            Some(Extent {
                region: RegionIndex(region as u16),
                offset: chunk as u64 * CHUNK_BYTES,
                len: CHUNK_BYTES,
            })
        })
    }

    /// The wire form: per region its number of chunks and the chunks, little-endian `u64`s.
    pub fn encode(&self) -> Vec<u8> {
        let numbers = self
            .regions
            .iter()
            .flat_map(|chunks| std::iter::once(chunks.len() as u64).chain(chunks.iter().copied()));
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    /// Reads the wire form; allocates no more than there are bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DigestDecodeError> {
        let error = DigestDecodeError { bytes: bytes.len() };
        let (words, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(error);
        }
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        let mut regions = Vec::new();
        while let Some(chunks) = words.next() {
            if chunks > words.len() as u64 {
                return Err(error);
            }
            regions.push(words.by_ref().take(chunks as usize).collect());
        }
        Ok(Self { regions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_of_encode_is_the_identity_and_garbage_is_refused() {
        let digest = MemoryDigest::new(vec![vec![1, 2, 3], vec![], vec![u64::MAX]]);
        assert_eq!(MemoryDigest::decode(&digest.encode()), Ok(digest));
        assert!(MemoryDigest::decode(&[1; 9]).is_err());
        assert!(MemoryDigest::decode(&u64::MAX.to_le_bytes()).is_err());
    }

    #[test]
    fn a_difference_is_located() {
        let ours = MemoryDigest::new(vec![vec![1, 2], vec![3, 4]]);
        let theirs = MemoryDigest::new(vec![vec![1, 2], vec![3, 5]]);
        let at = Extent { region: RegionIndex(1), offset: CHUNK_BYTES, len: CHUNK_BYTES };
        assert_eq!(ours.first_difference(&theirs), Some(at));
        assert_eq!(ours.first_difference(&ours), None);
    }
}
