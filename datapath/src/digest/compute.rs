//! Computes the digest of all guest memory, in parallel: it runs while the guest stands still.
//!
//! ```text
//!   where data is ──▶ chunks that hold any ──▶ threads: copy 64 KiB into a buffer that stays in
//!                     (the others are 0)                cache, hash it, next
//! ```
//!
//! Holes are neither read nor allocated; they count as the zeros they would read as. Copying into a
//! small buffer beats `pread` by 1.1 (huge pages) to 1.7 times (4 KiB pages), and both beat a
//! buffer of a chunk's size. The threads are the caller's to count; they end with the call.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use xxhash_rust::xxh3::Xxh3;

use super::{CHUNK_BYTES, MemoryDigest};
use crate::extent::Extent;
use crate::holes::{HolesError, guest_data_extents};
use crate::limits;
use crate::region::{GuestMemory, Lease, RegionError};

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub enum DigestError {
    /// Where the data lies could not be found.
    #[error("finding the data to digest failed")]
    Holes {
        /// Why.
        #[source]
        source: HolesError,
    },
    /// A range of guest memory could not be read.
    #[error("reading guest memory to digest it failed")]
    Read {
        /// Why.
        #[source]
        source: RegionError,
    },
    /// The caller's flag was raised.
    #[error("the digest was cancelled")]
    Cancelled,
}

impl MemoryDigest {
    /// Digests all of `memory` with `threads` threads (this one among them). `cancel`, once raised,
    /// ends it within a chunk per thread.
    pub fn of_memory(
        memory: &GuestMemory,
        threads: usize,
        cancel: &AtomicBool,
    ) -> Result<Self, DigestError> {
        let data = guest_data_extents(memory).map_err(|source| DigestError::Holes { source })?;
        let jobs = jobs(memory, &data);
        let next = AtomicUsize::new(0);
        let work = || work(memory, &jobs, &next, cancel);
        let results: Result<Vec<Vec<(usize, u64)>>, DigestError> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut results = vec![work()];
            results.extend(others.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }));
            results.into_iter().collect()
        });
        let mut regions: Vec<Vec<u64>> = memory
            .regions()
            .iter()
            .map(|region| vec![0; region.len().div_ceil(CHUNK_BYTES) as usize])
            .collect();
        for (job, number) in results?.into_iter().flatten() {
            let Job { region, chunk, .. } = jobs[job];
            regions[region][chunk] = number;
        }
        Ok(Self::new(regions))
    }
}

/// One chunk that holds data.
#[derive(Debug)]
struct Job {
    region: usize,
    chunk: usize,
    /// Where in the region the data is: one range at least, in order.
    data: Vec<Range<u64>>,
}

/// Cuts `data`, in order, at the borders of chunks.
fn jobs(memory: &GuestMemory, data: &[Extent]) -> Vec<Job> {
    let bytes: u64 = data.iter().map(|extent| extent.len).sum();
    let mut jobs: Vec<Job> = Vec::with_capacity((bytes / CHUNK_BYTES) as usize + data.len());
    for extent in data {
        let region = usize::from(extent.region.0);
        let (mut at, end) = (extent.offset, extent.end().min(memory.regions()[region].len()));
        while at < end {
            let chunk = (at / CHUNK_BYTES) as usize;
            let until = end.min((at / CHUNK_BYTES + 1) * CHUNK_BYTES);
            match jobs.last_mut() {
                Some(job) if job.region == region && job.chunk == chunk => job.data.push(at..until),
                _ => jobs.push(Job { region, chunk, data: std::iter::once(at..until).collect() }),
            }
            at = until;
        }
    }
    jobs
}

/// Takes jobs until there are none: their index and number.
fn work(
    memory: &GuestMemory,
    jobs: &[Job],
    next: &AtomicUsize,
    cancel: &AtomicBool,
) -> Result<Vec<(usize, u64)>, DigestError> {
    let mut numbers = Vec::new();
    let mut piece = vec![0; limits::DIGEST_PIECE_BYTES];
    let mut hash = Xxh3::new();
    let zeros = zeros_number(CHUNK_BYTES, &piece);
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(DigestError::Cancelled);
        }
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(job) = jobs.get(index) else { return Ok(numbers) };
        let region = &memory.regions()[job.region];
        let start = job.chunk as u64 * CHUNK_BYTES;
        let len = CHUNK_BYTES.min(region.len() - start);
        let lease = region.lease(start, len).map_err(|source| DigestError::Read { source })?;
        hash.reset();
        let number = digest_chunk(&lease, &job.data, &mut hash, &mut piece)
            .map_err(|source| DigestError::Read { source })?;
        let is_zeros = match len {
            CHUNK_BYTES => number == zeros,
            len => number == zeros_number(len, &vec![0; piece.len()]),
        };
        numbers.push((index, if is_zeros { 0 } else { number }));
    }
}

fn digest_chunk(
    lease: &Lease,
    data: &[Range<u64>],
    hash: &mut Xxh3,
    piece: &mut [u8],
) -> Result<u64, RegionError> {
    let Extent { offset: start, len, .. } = lease.extent();
    let mut at = 0;
    while at < len {
        let bytes = piece.len().min((len - at) as usize);
        let bytes = &mut piece[..bytes];
        let here = start + at..start + at + bytes.len() as u64;
        let whole = data.iter().any(|data| data.start <= here.start && here.end <= data.end);
        if whole {
            lease.copy_out(at, bytes)?;
        } else {
            bytes.fill(0);
            for data in data {
                let (first, end) = (data.start.max(here.start), data.end.min(here.end));
                if first < end {
                    let into = (first - here.start) as usize..(end - here.start) as usize;
                    lease.copy_out(first - start, &mut bytes[into])?;
                }
            }
        }
        hash.update(bytes);
        at += bytes.len() as u64;
    }
    Ok(hash.digest())
}

/// What `len` bytes of zeros hash to; `zeros` holds nothing else.
fn zeros_number(len: u64, zeros: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    let mut left = len;
    while left > 0 {
        let bytes = zeros.len().min(left as usize);
        hash.update(&zeros[..bytes]);
        left -= bytes as u64;
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;
    use crate::region::Region;

    static RUNS: AtomicBool = AtomicBool::new(false);

    fn memory(bytes: &[u64]) -> GuestMemory {
        let region = |(index, bytes): (usize, &u64)| {
            let backing = Backing::memfd("digest-test", *bytes, None).unwrap();
            Region::open(RegionIndex(index as u16), backing).unwrap()
        };
        GuestMemory::new(bytes.iter().enumerate().map(region).collect())
    }

    fn write(memory: &GuestMemory, region: u16, offset: u64, bytes: &[u8]) {
        let extent = Extent { region: RegionIndex(region), offset, len: bytes.len() as u64 };
        memory.lease(extent).unwrap().copy_in(0, bytes).unwrap();
    }

    fn digest(memory: &GuestMemory, threads: usize) -> MemoryDigest {
        MemoryDigest::of_memory(memory, threads, &RUNS).unwrap()
    }

    #[test]
    fn holes_and_zeros_count_the_same_and_holes_stay() {
        let (empty, zeros) = (memory(&[3 << 20, 40 << 10]), memory(&[3 << 20, 40 << 10]));
        write(&zeros, 0, 1 << 20, &[0; 8192]);
        write(&zeros, 1, 0, &[0; 40 << 10]);
        assert_eq!(digest(&empty, 1), digest(&zeros, 2));
        assert_eq!(digest(&empty, 1), MemoryDigest::new(vec![vec![0; 3], vec![0]]));
        let file = File::from(empty.regions()[0].file().try_clone_to_owned().unwrap());
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn a_changed_byte_is_found_in_its_chunk() {
        let (ours, theirs) = (memory(&[5 << 20, 40 << 10]), memory(&[5 << 20, 40 << 10]));
        for memory in [&ours, &theirs] {
            write(memory, 0, (1 << 20) - 5, b"across a border");
            write(memory, 1, 7777, b"in a short last chunk");
        }
        assert_eq!(digest(&ours, 2).first_difference(&digest(&theirs, 1)), None);
        write(&theirs, 1, 7777, b"!");
        let at = digest(&ours, 2).first_difference(&digest(&theirs, 1)).unwrap();
        assert_eq!((at.region, at.offset), (RegionIndex(1), 0));
        write(&theirs, 0, (3 << 20) - 1, b"!");
        let at = digest(&ours, 2).first_difference(&digest(&theirs, 1)).unwrap();
        assert_eq!((at.region, at.offset), (RegionIndex(0), 2 << 20));
    }

    #[test]
    fn a_raised_flag_ends_it() {
        let memory = memory(&[1 << 20]);
        write(&memory, 0, 0, b"data");
        let raised = AtomicBool::new(true);
        let result = MemoryDigest::of_memory(&memory, 2, &raised);
        assert!(matches!(result, Err(DigestError::Cancelled)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn numbers_are_those_of_the_whole_chunk_read_plainly(
            writes in prop::collection::vec((0..(3u64 << 20) - 9000, 1..9000usize, any::<u8>()), 0..8),
        ) {
            const LEN: u64 = (3 << 20) - 4096;
            let memory = memory(&[LEN]);
            let mut plain = vec![0u8; LEN as usize];
            for (offset, len, byte) in writes {
                let offset = offset.min(LEN - len as u64);
                plain[offset as usize..][..len].fill(byte);
                write(&memory, 0, offset, &vec![byte; len]);
            }
            let number = |chunk: &[u8]| match chunk.iter().all(|byte| *byte == 0) {
                true => 0,
                false => xxhash_rust::xxh3::xxh3_64(chunk),
            };
            let numbers = plain.chunks(CHUNK_BYTES as usize).map(number).collect();
            prop_assert_eq!(digest(&memory, 2), MemoryDigest::new(vec![numbers]));
        }
    }
}
