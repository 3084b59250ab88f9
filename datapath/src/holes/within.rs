//! Which of some dirty pages hold data, at a cost that goes with their number.
//!
//! `SEEK_HOLE` walks on to the next hole, gigabytes away perhaps, which has no place in the pause.
//! `cachestat` (Linux 6.5) counts a range's pages and nothing else: where all are there, and that
//! is nearly everywhere, one call for every few MiB is enough; where some are, the count tells when
//! to stop seeking. Files on hugetlbfs have no such count; there a look at all of the region costs less
//! than a run of seeks.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::{HolesError, data_extents, host};
use crate::bitmap::{DirtyBitmap, DirtySet};
use crate::limits::{self, HOLE_PIECE_BYTES};
use crate::region::{GuestMemory, Region};

/// The number of `cachestat`, the same on all architectures that Linux runs KVM on.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

/// `struct cachestat`: counts of pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Those pages of `dirty` that hold data. The others are holes: they read as zeros, and reading
/// them through a mapping would allocate them. `dirty` has the shape of `memory`.
pub fn data_within(memory: &GuestMemory, dirty: &DirtySet) -> Result<DirtySet, HolesError> {
    let mut data = dirty.empty_like();
    for region in memory.regions() {
        let (Some(dirty), Some(data)) = (dirty.get(region.index()), data.get_mut(region.index()))
        else {
            continue;
        };
        let fs = fstatfs(region.file()).map_err(|errno| host("fstatfs", errno.into()))?;
        if fs.filesystem_type() == HUGETLBFS_MAGIC {
            for extent in data_extents(region)? {
                data.set_bytes(extent.offset..extent.end());
            }
            data.intersect(dirty);
            continue;
        }
        for run in dirty.runs() {
            let page_bytes = dirty.page_bytes();
            mark_data(region, run.start * page_bytes..run.end * page_bytes, data)?;
        }
        data.intersect(dirty);
    }
    Ok(data)
}

/// Marks in `data` what of `bytes` is no hole.
fn mark_data(region: &Region, bytes: Range<u64>, data: &mut DirtyBitmap) -> Result<(), HolesError> {
    let mut at = bytes.start;
    while at < bytes.end {
        // Whole pieces: nothing is counted twice, however many holes there are.
        let end = bytes.end.min((at / HOLE_PIECE_BYTES + 1) * HOLE_PIECE_BYTES);
        match present_bytes(region.file(), at..end)? {
            Some(present) => mark_piece(region, at..end, present, data)?,
            None => mark_piece(region, at..end, u64::MAX, data)?,
        }
        at = end;
    }
    Ok(())
}

/// The same of a piece of which so many bytes are there.
fn mark_piece(
    region: &Region,
    piece: Range<u64>,
    mut present: u64,
    data: &mut DirtyBitmap,
) -> Result<(), HolesError> {
    let mut at = piece.start;
    while at < piece.end && present > 0 {
        if present == piece.end - at {
            data.set_bytes(at..piece.end);
            break;
        }
        // There are data and a hole in what is left, so neither of these goes far beyond it; unless
        // that has changed since they were counted, or nobody counts.
        let Some(start) = seek(region, at, Whence::SeekData)?.filter(|start| *start < piece.end)
        else {
            break;
        };
        let end = seek(region, start, Whence::SeekHole)?.unwrap_or(piece.end).min(piece.end);
        data.set_bytes(start..end);
        present = present.saturating_sub(end - start);
        at = end.max(start + 1);
    }
    Ok(())
}

/// Whether each page of `bytes` is in the page cache or in swap; "no" where the kernel can't say.
pub(super) fn is_all_data(file: BorrowedFd<'_>, bytes: Range<u64>) -> Result<bool, HolesError> {
    let len = bytes.end - bytes.start;
    Ok(present_bytes(file, bytes)?.is_some_and(|present| present >= len))
}

/// How much of `bytes`, which are whole pages, is in the page cache or in swap; nothing where the
/// kernel can't say.
fn present_bytes(file: BorrowedFd<'_>, bytes: Range<u64>) -> Result<Option<u64>, HolesError> {
    let range = CachestatRange { offset: bytes.start, len: bytes.end - bytes.start };
    let mut stat = Cachestat::default();
    // SAFETY: `range` and `stat` are the structures this call reads and writes, and outlive it.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0)
    };
    match result {
        0 => Ok(Some((stat.cache + stat.evicted) * limits::PAGE_BYTES)),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(None),
            error => Err(host("cachestat", error)),
        },
    }
}

pub(super) fn seek(region: &Region, at: u64, whence: Whence) -> Result<Option<u64>, HolesError> {
    match lseek(region.file(), at as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(host("lseek", errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;
    use crate::testing::HugePages;

    fn memory(pages: u64, page_bytes: u64, written: &[bool]) -> GuestMemory {
        let huge = (page_bytes != limits::PAGE_BYTES).then_some(page_bytes);
        let backing = Backing::memfd("within-test", pages * page_bytes, huge).unwrap();
        let region = Region::open(RegionIndex(0), backing).unwrap();
        for (page, _) in written.iter().enumerate().filter(|(_, written)| **written) {
            region.lease(page as u64 * page_bytes, 1).unwrap().touch(0).unwrap();
        }
        GuestMemory::new(vec![region])
    }

    fn set(memory: &GuestMemory, flags: impl Iterator<Item = bool>) -> DirtySet {
        let mut set = DirtySet::for_memory(memory);
        let bitmap = set.get_mut(RegionIndex(0)).unwrap();
        for (page, _) in flags.enumerate().filter(|(_, flag)| *flag) {
            bitmap.set_range(page as u64..page as u64 + 1);
        }
        set
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_is_what_is_dirty_and_written(
            // A few pieces that are counted, and part of one.
            pages in vec((prop::bool::weighted(0.9), prop::bool::weighted(0.8)), 1..1300),
        ) {
            let (dirty, written): (Vec<bool>, Vec<bool>) = pages.iter().copied().unzip();
            let memory = memory(pages.len() as u64, 4096, &written);
            let dirty = set(&memory, dirty.into_iter());
            let both = set(&memory, pages.iter().map(|(dirty, written)| *dirty && *written));
            prop_assert_eq!(data_within(&memory, &dirty).unwrap(), both);
        }
    }

    #[test]
    fn on_hugetlbfs_too() {
        let Some(_pages) = HugePages::reserve(2 << 20, 4) else { return };
        let memory = memory(4, 2 << 20, &[true, false, true, false]);
        let dirty = set(&memory, [true, true, false, false].into_iter());
        let both = set(&memory, [true, false, false, false].into_iter());
        assert_eq!(data_within(&memory, &dirty).unwrap(), both);
    }
}
