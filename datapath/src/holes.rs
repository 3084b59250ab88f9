//! Where a region holds data, found without touching the holes.
//!
//! Reading a hole through a mapping allocates it, so what was never populated must not even be
//! looked at. On tmpfs `SEEK_DATA` and `SEEK_HOLE` tell. On hugetlbfs they don't (the kernel calls
//! the whole file data), so there each page is offered to a short-lived second mapping with
//! `UFFDIO_CONTINUE`, which maps pages that exist and refuses holes, allocating nothing.
//!
//! The answer is of its moment: what the guest populates later is the tracker's to report.

mod look;
mod within;

pub use look::{HoleLook, Run};
pub use within::data_within;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use crate::bitmap::DirtySet;
use crate::extent::Extent;
use crate::limits;
use crate::region::{GuestMemory, Region, RegionError};
use crate::tracker::sys::{OP_CONTINUE, RegisterMode, Uffd, UffdFeatures};

/// Why the data of a region could not be found.
#[derive(Debug, thiserror::Error)]
pub enum HolesError {
    /// The region can't be mapped a second time.
    #[error("mapping the region to look for holes failed")]
    Map {
        /// Why.
        #[source]
        source: RegionError,
    },
    /// The kernel can't tell holes on hugetlbfs: `UFFD_FEATURE_MINOR_HUGETLBFS` is missing (5.13).
    #[error("the kernel has no minor faults on hugetlbfs (Linux 5.13), holes can't be told there")]
    NoMinorFaults,
    /// A system call failed.
    #[error("{call} in search of holes failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// The extents of `region` that hold data, in order, made of whole pages, no two touching.
pub fn data_extents(region: &Region) -> Result<Vec<Extent>, HolesError> {
    let fs = fstatfs(region.file()).map_err(|errno| host("fstatfs", errno.into()))?;
    let mut data = Merged { region, extents: Vec::new() };
    let stat = fstat(region.file()).map_err(|errno| host("fstat", errno.into()))?;
    // `st_blocks` counts what is there, also in swap: often this is all there is to find out.
    match u64::try_from(stat.st_blocks).unwrap_or(0) * 512 {
        0 => return Ok(data.extents),
        allocated if allocated >= region.len() => {
            data.add(0, region.len());
            return Ok(data.extents);
        }
        _ => {}
    }
    match fs.filesystem_type() {
        HUGETLBFS_MAGIC => hugetlb_data(region, &mut data)?,
        _ => seek_data(region, 0..region.len(), &mut data)?,
    }
    Ok(data.extents)
}

/// The same for all regions of a guest, in order of region and offset.
pub fn guest_data_extents(memory: &GuestMemory) -> Result<Vec<Extent>, HolesError> {
    let mut all = Vec::new();
    for region in memory.regions() {
        all.extend(data_extents(region)?);
    }
    Ok(all)
}

/// The same as bitmaps, in the granule of each region. For a few dirty pages, inside the pause,
/// [`data_within`] is the cheaper question.
pub fn guest_data(memory: &GuestMemory) -> Result<DirtySet, HolesError> {
    let mut data = DirtySet::for_memory(memory);
    for extent in guest_data_extents(memory)? {
        data.set_extent(extent).expect("data lies within its region");
    }
    Ok(data)
}

/// Grows what it is given to whole pages and joins what touches.
struct Merged<'a> {
    region: &'a Region,
    extents: Vec<Extent>,
}

impl Merged<'_> {
    fn add(&mut self, start: u64, end: u64) {
        let page_bytes = self.region.page_bytes();
        let start = start / page_bytes * page_bytes;
        let end = end.next_multiple_of(page_bytes).min(self.region.len());
        match self.extents.last_mut() {
            Some(last) if start <= last.end() => last.len = last.len.max(end - last.offset),
            _ => {
                let (region, len) = (self.region.index(), end - start);
                self.extents.push(Extent { region, offset: start, len });
            }
        }
    }
}

/// The extents of `region` within `range` that hold data. Not for hugetlbfs, where seeking tells
/// nothing.
pub(crate) fn data_between(region: &Region, range: Range<u64>) -> Result<Vec<Extent>, HolesError> {
    let mut data = Merged { region, extents: Vec::new() };
    seek_data(region, range, &mut data)?;
    Ok(data.extents)
}

fn seek_data(region: &Region, range: Range<u64>, data: &mut Merged<'_>) -> Result<(), HolesError> {
    // The descriptor may be shared with the monitor, and so may its position; nobody reads there.
    let seek = |at: u64, whence| match lseek(region.file(), at as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(host("lseek", errno.into())),
    };
    let mut at = range.start;
    while at < range.end {
        let Some(start) = seek(at, Whence::SeekData)?.filter(|start| *start < range.end) else {
            break;
        };
        // Another thread's punch can make this fail between the two; nothing is there then.
        let Some(end) = seek(start, Whence::SeekHole)? else { break };
        data.add(start, end.min(range.end));
        at = end.max(start + 1);
    }
    Ok(())
}

fn hugetlb_data(region: &Region, data: &mut Merged<'_>) -> Result<(), HolesError> {
    let view = View::of(region)?;
    let (len, mut at) = (region.len(), 0);
    while at < len {
        let (mapped, result) = view.map(at..len);
        if mapped > 0 {
            data.add(at, at + mapped);
            at += mapped;
            continue;
        }
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Err((Some(libc::EFAULT), _)) => at += view.page_bytes(),
            Err((_, error)) => return Err(host("UFFDIO_CONTINUE", error)),
            Ok(()) => return Err(host("UFFDIO_CONTINUE", io::ErrorKind::UnexpectedEof.into())),
        }
    }
    Ok(())
}

/// A second mapping of a region on hugetlbfs, into which pages come only by [`View::map`].
#[derive(Debug)]
struct View {
    // Unregistered before it is unmapped.
    uffd: Uffd,
    region: Arc<Region>,
}

impl View {
    fn of(region: &Region) -> Result<Self, HolesError> {
        let file = region.file().try_clone_to_owned().map(File::from);
        let file = file.map_err(|error| host("dup", error))?;
        let (len, page_bytes) = (region.len(), region.page_bytes());
        let region = Region::map_unreserved(region.index(), file, len, page_bytes)
            .map_err(|source| HolesError::Map { source })?;
        let base = region.base().addr() as u64;
        let uffd = Uffd::own().map_err(|error| host("userfaultfd", error))?;
        match uffd.api(UffdFeatures::MINOR_HUGETLBFS) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(HolesError::NoMinorFaults);
            }
            Err(error) => return Err(host("UFFDIO_API", error)),
        }
        let operations = uffd
            .register(base..base + len, RegisterMode::MINOR)
            .map_err(|error| host("UFFDIO_REGISTER", error))?;
        if operations & OP_CONTINUE == 0 {
            return Err(HolesError::NoMinorFaults);
        }
        Ok(Self { uffd, region })
    }

    fn page_bytes(&self) -> u64 {
        self.region.page_bytes()
    }

    /// Maps what is there of `offsets`, up to the first page that is not (`EFAULT`) or that is mapped
    /// already (`EEXIST`): the bytes mapped, and why no more.
    fn map(&self, offsets: Range<u64>) -> (u64, io::Result<()>) {
        let base = self.region.base().addr() as u64;
        let mut retries = 0;
        loop {
            let (mapped, result) =
                self.uffd.continue_range(base + offsets.start..base + offsets.end);
            match &result {
                Err(error)
                    if mapped == 0
                        && error.raw_os_error() == Some(libc::EAGAIN)
                        && retries < limits::PROTECT_RETRIES_MAX =>
                {
                    retries += 1;
                }
                _ => return (mapped, result),
            }
        }
    }
}

fn host(call: &'static str, source: io::Error) -> HolesError {
    HolesError::Host { call, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;

    fn touched(backing: Backing, pages: &[u64]) -> (std::sync::Arc<Region>, u64) {
        let region = Region::open(RegionIndex(3), backing).unwrap();
        let page_bytes = region.page_bytes();
        for page in pages {
            region.lease(page * page_bytes, page_bytes).unwrap().copy_in(17, &[1]).unwrap();
        }
        (region, page_bytes)
    }

    fn check(region: &Region, page_bytes: u64) {
        let blocks = |region: &Region| {
            File::from(region.file().try_clone_to_owned().unwrap()).metadata().unwrap().blocks()
        };
        let before = blocks(region);
        let extent = |first: u64, pages: u64| Extent {
            region: RegionIndex(3),
            offset: first * page_bytes,
            len: pages * page_bytes,
        };
        assert_eq!(data_extents(region).unwrap(), [extent(1, 2), extent(5, 1)]);
        assert_eq!(blocks(region), before, "looking allocated something");
    }

    #[test]
    fn data_on_tmpfs_is_found_and_holes_stay_holes() {
        let (region, page_bytes) =
            touched(Backing::memfd("holes-test", 8 * 4096, None).unwrap(), &[1, 2, 5]);
        check(&region, page_bytes);
        region.punch(0, region.len()).unwrap();
        assert!(data_extents(&region).unwrap().is_empty());
    }

    #[test]
    fn data_on_hugetlbfs_is_found_and_holes_stay_holes() {
        let page_bytes = 2 << 20;
        let Some(_pages) = crate::testing::HugePages::reserve(page_bytes, 8) else { return };
        let backing = Backing::memfd("holes-test", 8 * page_bytes, Some(page_bytes)).unwrap();
        let (region, page_bytes) = touched(backing, &[1, 2, 5]);
        check(&region, page_bytes);
        region.punch(0, region.len()).unwrap();
        assert!(data_extents(&region).unwrap().is_empty());
        let whole = region.lease(0, region.len()).unwrap();
        (0..8).for_each(|page| whole.touch(page * page_bytes).unwrap());
        assert_eq!(data_extents(&region).unwrap(), [whole.extent()]);
    }
}
