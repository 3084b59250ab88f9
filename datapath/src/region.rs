//! Guest memory: one mapping per region, and the leases that keep it mapped.
//!
//! Owned by whoever holds the `Arc<Region>`; a [`Lease`] is a clone of that `Arc` with a checked
//! range, so that memory can't be unmapped, deregistered or truncated while an operation on it is
//! in flight (the operation owns the lease). There is never a `&[u8]` over guest memory: the guest
//! writes there. The kernel, the NIC or volatile copies do the access.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::backing::Backing;
use crate::copy::{clear_volatile, copy_volatile, is_zero_volatile, touch_volatile};
use crate::extent::Extent;
use crate::ids::RegionIndex;

/// Why a region could not be mapped, or a range of it not be leased.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A length or offset is not a multiple of the page size, or is zero.
    #[error("{what} of {bytes} bytes is not a multiple of the {page_bytes}-byte page")]
    Unaligned {
        /// What was off.
        what: &'static str,
        /// Its value.
        bytes: u64,
        /// The page size it must be a multiple of.
        page_bytes: u64,
    },
    /// A range reaches past the end of its region.
    #[error("range {offset}+{len} is outside the region of {region_bytes} bytes")]
    OutOfRange {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the region in bytes.
        region_bytes: u64,
    },
    /// A system call failed.
    #[error("{call} on guest memory failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// One contiguous block of guest memory, mapped shared into this process.
#[derive(Debug)]
pub struct Region {
    index: RegionIndex,
    file: File,
    base: NonNull<u8>,
    len: u64,
    page_bytes: u64,
}

// SAFETY:
// - `base` is only handed out as a raw pointer; every access through it is volatile, by the kernel
//   or by a device, which are as free of data races as the guest's own accesses.
// - the mapping is created in `map` and removed in `drop` only.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

impl Region {
    /// Maps all of `backing` shared, readable and writable.
    pub fn open(index: RegionIndex, backing: Backing) -> Result<Arc<Self>, RegionError> {
        let (len, page_bytes) = (backing.len(), backing.page_bytes());
        Self::map(index, backing.into_file(), len, page_bytes)
    }

    /// Maps all of `file` (`len` bytes, pages of `page_bytes`) shared, readable and writable. On
    /// hugetlbfs this reserves the pages that are not there yet, or fails with `ENOMEM`.
    pub fn map(
        index: RegionIndex,
        file: File,
        len: u64,
        page_bytes: u64,
    ) -> Result<Arc<Self>, RegionError> {
        Self::map_with(index, file, len, page_bytes, MapFlags::MAP_SHARED)
    }

    /// As [`Self::map`] without reserving huge pages: for looking only.
    pub(crate) fn map_unreserved(
        index: RegionIndex,
        file: File,
        len: u64,
        page_bytes: u64,
    ) -> Result<Arc<Self>, RegionError> {
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        Self::map_with(index, file, len, page_bytes, flags)
    }

    fn map_with(
        index: RegionIndex,
        file: File,
        len: u64,
        page_bytes: u64,
        flags: MapFlags,
    ) -> Result<Arc<Self>, RegionError> {
        if len == 0 || !len.is_multiple_of(page_bytes) {
            return Err(RegionError::Unaligned { what: "length", bytes: len, page_bytes });
        }
        let size = usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(RegionError::OutOfRange { offset: 0, len, region_bytes: usize::MAX as u64 })?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY:
        // - address hint is None: no existing mapping is replaced.
        // - `size` is not zero and `file` is open.
        // - `flags` asks for neither a fixed address nor a private copy.
        let base = unsafe { mmap(None, size, prot, flags, &file, 0) }
            .map_err(|errno| RegionError::Host { call: "mmap", source: errno.into() })?;
        Ok(Arc::new(Self { index, file, base: base.cast(), len, page_bytes }))
    }

    /// This region's place in the offer.
    pub fn index(&self) -> RegionIndex {
        self.index
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never true: an empty region can't be mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tracking granule: 4096, or the huge page's size on hugetlbfs.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The file behind it, for `SEEK_DATA` and hole punching.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where it is mapped in this process; for registering whole regions.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Frees whole pages, which then read as zeros.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        let Range { start, end } = self.check(offset, len)?;
        for (what, bytes) in [("hole's offset", start), ("hole's length", len)] {
            if !bytes.is_multiple_of(self.page_bytes) {
                let page_bytes = self.page_bytes;
                return Err(RegionError::Unaligned { what, bytes, page_bytes });
            }
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(flags, start..end)
    }

    /// Allocates the pages of `range` in the file, without mapping them; data there stays.
    pub(crate) fn allocate(&self, range: Range<u64>) -> Result<(), RegionError> {
        self.fallocate(FallocateFlags::empty(), range)
    }

    fn fallocate(&self, flags: FallocateFlags, range: Range<u64>) -> Result<(), RegionError> {
        let Range { start, end } = range;
        fallocate(&self.file, flags, start as i64, (end - start) as i64)
            .map_err(|errno| RegionError::Host { call: "fallocate", source: errno.into() })
    }

    /// Faults the pages of `range` in for writing, allocating those that are holes; `EINVAL` on
    /// kernels before 5.14.
    pub(crate) fn populate_write(&self, range: Range<u64>) -> nix::Result<()> {
        self.advise(range, MmapAdvise::MADV_POPULATE_WRITE)
    }

    /// Asks for huge pages where `range` gets populated later; `EINVAL` where there are none.
    pub(crate) fn prefer_huge(&self, range: Range<u64>) -> nix::Result<()> {
        self.advise(range, MmapAdvise::MADV_HUGEPAGE)
    }

    fn advise(&self, range: Range<u64>, advice: MmapAdvise) -> nix::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY:
        // - the range was just checked to lie in this mapping.
        // - the two callers' advice neither unmaps nor discards anything.
        unsafe {
            let start = self.base.add(range.start as usize).cast();
            madvise(start, (range.end - range.start) as usize, advice)
        }
    }

    fn check(&self, offset: u64, len: u64) -> Result<Range<u64>, RegionError> {
        match offset.checked_add(len) {
            Some(end) if len > 0 && end <= self.len => Ok(offset..end),
            _ => Err(RegionError::OutOfRange { offset, len, region_bytes: self.len }),
        }
    }

    /// Leases `len` bytes at `offset`.
    pub fn lease(self: &Arc<Self>, offset: u64, len: u64) -> Result<Lease, RegionError> {
        self.check(offset, len)?;
        Ok(Lease { region: Arc::clone(self), offset, len })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY:
        // - `base` and `len` are those of the mapping made in `map`.
        // - no lease is out: each holds an `Arc` of this region.
        let unmapped = unsafe { munmap(self.base.cast(), self.len as usize) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The right to have an operation in flight on a range of guest memory.
///
/// Posting an operation moves its lease into the table of what is in flight; the completion gives
/// it back. There is one of it, so it can't be dropped too early:
///
/// ```compile_fail,E0382
/// # use pageferry_datapath::region::Lease;
/// fn post(in_flight: &mut Vec<Lease>, lease: Lease) {
///     in_flight.push(lease);
///     drop(lease);
/// }
/// ```
///
/// It can't be copied, nor made but by the region, which checks the range:
///
/// ```compile_fail,E0599
/// # use pageferry_datapath::region::Lease;
/// fn twice(lease: &Lease) -> Lease {
///     Lease::clone(lease)
/// }
/// ```
///
/// And no slice leads to guest memory, which others write:
///
/// ```compile_fail,E0308
/// # use pageferry_datapath::region::Lease;
/// fn slice(lease: &Lease) -> &[u8] {
///     lease
/// }
/// ```
#[derive(Debug)]
pub struct Lease {
    region: Arc<Region>,
    offset: u64,
    len: u64,
}

impl Lease {
    /// First byte, in this process. Valid until the lease is dropped.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `offset + len <= region.len` was checked when the lease was made.
        unsafe { self.region.base.as_ptr().add(self.offset as usize) }
    }

    /// The leased range.
    pub fn extent(&self) -> Extent {
        Extent { region: self.region.index, offset: self.offset, len: self.len }
    }

    /// The region leased from.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Copies the bytes from `at` (counted from the lease's first) into `bytes`. Where the guest
    /// writes at the same time, old and new bytes may mix.
    pub fn copy_out(&self, at: u64, bytes: &mut [u8]) -> Result<(), RegionError> {
        let from = self.inside(at, bytes.len())?;
        // SAFETY:
        // - `from` is valid for reads of `bytes.len()`: `inside` checked it, the lease keeps it.
        // - `bytes` is borrowed mutably, so it does not overlap guest memory (of which there is
        //   never a slice).
        unsafe { copy_volatile(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies `bytes` to guest memory at `at`, counted from the lease's first byte.
    pub fn copy_in(&self, at: u64, bytes: &[u8]) -> Result<(), RegionError> {
        let into = self.inside(at, bytes.len())?;
        // SAFETY: as in `copy_out`, with the sides exchanged.
        unsafe { copy_volatile(bytes.as_ptr(), into, bytes.len()) };
        Ok(())
    }

    /// Reads from `file` straight into guest memory at `at`: the bytes read, at most `len`.
    pub fn read_in(&self, at: u64, len: usize, file: BorrowedFd<'_>) -> Result<usize, RegionError> {
        let into = self.inside(at, len)?;
        // SAFETY: `into` is valid for writes of `len`: `inside` checked it, the lease keeps it.
        let read = unsafe { libc::read(file.as_raw_fd(), into.cast(), len) };
        usize::try_from(read)
            .map_err(|_| RegionError::Host { call: "read", source: io::Error::last_os_error() })
    }

    /// Writes the byte at `at` with the value it has, atomically: a write for whoever tracks this
    /// mapping, and nothing for the guest.
    pub fn touch(&self, at: u64) -> Result<(), RegionError> {
        let byte = self.inside(at, 1)?;
        // SAFETY: valid for reads and writes: `inside` checked it, the lease keeps it mapped.
        unsafe { touch_volatile(byte) };
        Ok(())
    }

    /// Whether the `len` bytes at `at` are zero; both are multiples of 8.
    pub fn is_zero(&self, at: u64, len: usize) -> Result<bool, RegionError> {
        let from = self.inside(at, len)?;
        assert!(from.addr().is_multiple_of(8) && len.is_multiple_of(8));
        // SAFETY:
        // - readable for `len`: `inside` checked it, the lease keeps it mapped.
        // - aligned: just asserted.
        Ok(unsafe { is_zero_volatile(from.cast(), len / 8) })
    }

    /// Writes zeros over the `len` bytes at `at`.
    pub fn clear(&self, at: u64, len: usize) -> Result<(), RegionError> {
        let into = self.inside(at, len)?;
        // SAFETY: writable for `len`: `inside` checked it, the lease keeps it mapped.
        unsafe { clear_volatile(into, len) };
        Ok(())
    }

    fn inside(&self, at: u64, len: usize) -> Result<*mut u8, RegionError> {
        match at.checked_add(len as u64) {
            // SAFETY: `at <= self.len`, so this stays within the leased range or one past it.
            Some(end) if end <= self.len => Ok(unsafe { self.as_ptr().add(at as usize) }),
            _ => {
                Err(RegionError::OutOfRange { offset: at, len: len as u64, region_bytes: self.len })
            }
        }
    }
}

/// All regions of one guest, by index.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Takes regions whose index is their place in the vector.
    pub fn new(regions: Vec<Arc<Region>>) -> Self {
        assert!(regions.iter().enumerate().all(|(i, r)| r.index.0 as usize == i));
        Self { regions }
    }

    /// The regions, in order of their index.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Leases an extent, as named by this side or by the peer: unknown regions and ranges outside
    /// are errors, never panics.
    pub fn lease(&self, extent: Extent) -> Result<Lease, RegionError> {
        let Extent { region, offset, len } = extent;
        self.regions
            .get(region.0 as usize)
            .ok_or(RegionError::OutOfRange { offset, len, region_bytes: 0 })?
            .lease(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn region(pages: u64) -> Arc<Region> {
        let backing = Backing::memfd("region-test", pages * PAGE, None).unwrap();
        Region::open(RegionIndex(0), backing).unwrap()
    }

    #[test]
    fn bytes_go_in_and_come_out_and_never_past_the_lease() {
        let lease = region(4).lease(PAGE, 2 * PAGE).unwrap();
        let mut bytes = [0; 5];
        lease.copy_in(2 * PAGE - 5, b"ferry").unwrap();
        lease.touch(2 * PAGE - 1).unwrap();
        lease.copy_out(2 * PAGE - 5, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ferry");
        assert!(lease.copy_in(2 * PAGE - 4, b"ferry").is_err());
        assert!(lease.copy_out(u64::MAX, &mut bytes).is_err());
        assert!(lease.touch(2 * PAGE).is_err());
        let zero = File::open("/dev/zero").unwrap();
        assert!(lease.read_in(PAGE, 2 * PAGE as usize, zero.as_fd()).is_err());
        assert_eq!(lease.read_in(2 * PAGE - 5, 4, zero.as_fd()).unwrap(), 4);
        lease.copy_out(2 * PAGE - 5, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0\0\0\0y");
    }

    #[test]
    fn memory_is_alive_as_long_as_a_lease_of_it() {
        let region = region(1);
        let lease = region.lease(0, PAGE).unwrap();
        drop(region);
        lease.copy_in(0, &[7]).unwrap();
        let mut byte = [0];
        lease.copy_out(0, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn a_hole_reads_as_zeros_and_takes_whole_pages() {
        let region = region(4);
        let lease = region.lease(0, 4 * PAGE).unwrap();
        lease.copy_in(0, &[1; 4 * PAGE as usize]).unwrap();
        region.punch(PAGE, PAGE).unwrap();
        let mut bytes = [9; 4 * PAGE as usize];
        lease.copy_out(0, &mut bytes).unwrap();
        let ones = bytes.chunks(PAGE as usize).map(|page| page.iter().all(|byte| *byte == 1));
        assert_eq!(ones.collect::<Vec<_>>(), [true, false, true, true]);
        assert!(bytes[PAGE as usize..2 * PAGE as usize].iter().all(|byte| *byte == 0));
        assert!(region.punch(PAGE, PAGE / 2).is_err());
        assert!(region.punch(1, PAGE).is_err());
        assert!(region.punch(4 * PAGE, PAGE).is_err());
    }

    #[test]
    fn ranges_outside_are_not_leased() {
        let region = region(4);
        for (offset, len) in [(0, 0), (4 * PAGE, 1), (0, 4 * PAGE + 1), (u64::MAX, 2)] {
            assert!(region.lease(offset, len).is_err());
        }
        let memory = GuestMemory::new(vec![region]);
        let extent = Extent { region: RegionIndex(1), offset: 0, len: PAGE };
        assert!(memory.lease(extent).is_err());
    }
}
