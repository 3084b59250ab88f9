//! The kernel's side of write tracking: userfaultfd and `PAGEMAP_SCAN`, as thin safe wrappers.
//!
//! The structures and numbers are those of `linux/userfaultfd.h` and `linux/fs.h` (documented in
//! `Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst`). Nothing is decided here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use bitflags::bitflags;

bitflags! {
    /// `UFFD_FEATURE_*`: what a userfaultfd can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct UffdFeatures: u64 {
        const PAGEFAULT_FLAG_WP = 1 << 0;
        const MINOR_HUGETLBFS = 1 << 9;
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        const WP_UNPOPULATED = 1 << 13;
        const WP_ASYNC = 1 << 15;
    }
}

bitflags! {
    /// `UFFDIO_REGISTER_MODE_*`: which faults a range is registered for.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct RegisterMode: u64 {
        const WP = 1 << 1;
        const MINOR = 1 << 2;
    }
}

bitflags! {
    /// `PM_SCAN_*`: what a scan does beside reporting.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct ScanFlags: u64 {
        const WP_MATCHING = 1 << 0;
        const CHECK_WPASYNC = 1 << 1;
    }
}

/// Bit of `UFFDIO_WRITEPROTECT` in the operations that a registered range offers.
pub(crate) const OP_WRITEPROTECT: u64 = 1 << 6;

/// Bit of `UFFDIO_CONTINUE` in the same.
pub(crate) const OP_CONTINUE: u64 = 1 << 7;

/// The category every scan asks for. Exactly this one: with any other bit in the mask a matching
/// scan takes a slower path that also visits hugetlb holes, and can deadlock there on kernels
/// without the fixes of May 2026.
const PAGE_IS_WRITTEN: u64 = 1 << 1;

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const WRITEPROTECT_MODE_WP: u64 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}

/// One run of pages found by a scan (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, UffdioApi);
nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, UffdioRegister);
nix::ioctl_read!(uffdio_unregister, 0xAA, 0x01, UffdioRange);
nix::ioctl_read!(uffdio_wake, 0xAA, 0x02, UffdioRange);
nix::ioctl_readwrite!(uffdio_writeprotect, 0xAA, 0x06, UffdioWriteprotect);
nix::ioctl_readwrite!(uffdio_continue, 0xAA, 0x07, UffdioContinue);
nix::ioctl_readwrite!(pagemap_scan_ioctl, b'f', 16, PmScanArg);

/// A userfaultfd, acting on the address space of whichever process created it.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Takes a descriptor that is a userfaultfd; any other answers each call with an error.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// One for this process's own memory. Faults of the kernel need a privilege that tracking can
    /// do without, so the lesser kind is taken when the full one is refused.
    pub(crate) fn own() -> io::Result<Self> {
        let create = |flags: libc::c_int| {
            // SAFETY: userfaultfd takes flags only and creates a descriptor.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            if fd == -1 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: a descriptor that the kernel just returned is owned by nobody else.
            Ok(Self::new(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) }))
        };
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        match create(flags) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                create(flags | UFFD_USER_MODE_ONLY)
            }
            other => other,
        }
    }

    /// The descriptor itself.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Agrees on `features`; works once per descriptor. The features that the kernel has.
    pub(crate) fn api(&self, features: UffdFeatures) -> io::Result<u64> {
        let mut arg = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
        // SAFETY: `arg` is the structure this ioctl reads and writes, and outlives the call.
        unsafe { uffdio_api(self.fd.as_raw_fd(), &mut arg) }?;
        Ok(arg.features)
    }

    /// Whether nobody has agreed on features yet. Asking changes nothing: an operation that its own
    /// owner can't mean is refused for the one reason or for the other.
    pub(crate) fn is_unused(&self) -> bool {
        // SAFETY: the kernel copies from the null pointer, which fails, or does not come that far.
        let refused = unsafe { uffdio_wake(self.fd.as_raw_fd(), std::ptr::null_mut()) };
        refused == Err(nix::errno::Errno::EINVAL)
    }

    /// Registers `range` of host virtual addresses; the operations it offers, as bits.
    pub(crate) fn register(&self, range: Range<u64>, mode: RegisterMode) -> io::Result<u64> {
        let mut arg = UffdioRegister { range: uffdio_range(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: `arg` is the structure this ioctl reads and writes, and outlives the call.
        unsafe { uffdio_register(self.fd.as_raw_fd(), &mut arg) }?;
        Ok(arg.ioctls)
    }

    /// Takes the registration, and with it any protection, off `range`.
    pub(crate) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = uffdio_range(range);
        // SAFETY: `arg` is the structure this ioctl reads (its direction is misnamed in the
        // kernel's header, hence `mut`), and outlives the call.
        unsafe { uffdio_unregister(self.fd.as_raw_fd(), &mut arg) }?;
        Ok(())
    }

    /// Write-protects `range`; with `WP_ASYNC` a write then lifts the protection by itself.
    pub(crate) fn write_protect(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = UffdioWriteprotect { range: uffdio_range(range), mode: WRITEPROTECT_MODE_WP };
        // SAFETY: `arg` is the structure this ioctl reads, and outlives the call.
        unsafe { uffdio_writeprotect(self.fd.as_raw_fd(), &mut arg) }?;
        Ok(())
    }

    /// Maps the pages of `range` that are in the file's page cache, up to the first that is not:
    /// the bytes mapped, and the error that stopped it (`EFAULT` for a hole).
    pub(crate) fn continue_range(&self, range: Range<u64>) -> (u64, io::Result<()>) {
        let mut arg = UffdioContinue { range: uffdio_range(range), mode: 0, mapped: 0 };
        // SAFETY: `arg` is the structure this ioctl reads and writes, and outlives the call.
        let result = unsafe { uffdio_continue(self.fd.as_raw_fd(), &mut arg) };
        (u64::try_from(arg.mapped).unwrap_or(0), result.map(drop).map_err(io::Error::from))
    }
}

/// Scans `range` of the address space behind `pagemap` for written pages; fills `found` from its
/// beginning. How many were filled, and where the walk ended (the end of `range`, or where `found`
/// was full).
pub(crate) fn pagemap_scan(
    pagemap: &File,
    range: Range<u64>,
    flags: ScanFlags,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: flags.bits(),
        start: range.start,
        end: range.end,
        walk_end: range.start,
        // Without room for any there is no report, and the pointer has to be null.
        vec: if found.is_empty() { 0 } else { found.as_mut_ptr() as u64 },
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
    };
    // SAFETY:
    // - `arg` is the structure this ioctl reads and writes; it says its own size.
    // - `vec` and `vec_len` are `found`, borrowed mutably for the call; any bytes are a valid
    //   `PageRegion`.
    let filled = unsafe { pagemap_scan_ioctl(pagemap.as_raw_fd(), &mut arg) }?;
    Ok((usize::try_from(filled).unwrap_or(0).min(found.len()), arg.walk_end))
}

/// Write-protects what is written in `range`, reporting nothing: the kernel has a shorter way for
/// that than for [`Uffd::write_protect`], which looks at every page.
pub(crate) fn pagemap_protect(pagemap: &File, range: Range<u64>) -> io::Result<()> {
    let flags = ScanFlags::CHECK_WPASYNC | ScanFlags::WP_MATCHING;
    match pagemap_scan(pagemap, range.clone(), flags, &mut [])? {
        (_, walked) if walked == range.end => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn uffdio_range(range: Range<u64>) -> UffdioRange {
    UffdioRange { start: range.start, len: range.end - range.start }
}
