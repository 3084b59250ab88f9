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
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

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
    /// Maps all of `file` (`len` bytes, pages of `page_bytes`) shared, readable and writable.
    pub fn map(
        index: RegionIndex,
        file: File,
        len: u64,
        page_bytes: u64,
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
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &file, 0) }
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

    /// Leases `len` bytes at `offset`.
    pub fn lease(self: &Arc<Self>, offset: u64, len: u64) -> Result<Lease, RegionError> {
        match offset.checked_add(len) {
            Some(end) if len > 0 && end <= self.len => {
                Ok(Lease { region: Arc::clone(self), offset, len })
            }
            _ => Err(RegionError::OutOfRange { offset, len, region_bytes: self.len }),
        }
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
