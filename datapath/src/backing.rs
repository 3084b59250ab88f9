//! The file behind a region of guest memory: where it comes from, and what kind it is.
//!
//! Guest memory that can be moved is shared and lives in a file: on tmpfs, in a memfd, or on
//! hugetlbfs. A [`Backing`] is such a file, open for reading and writing, with its size and page
//! size looked up from the file itself rather than believed. It maps nothing: a
//! [`Region`](crate::region::Region) does.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

use crate::limits;

/// What kind of file guest memory lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// A file with a name on tmpfs.
    Tmpfs,
    /// An anonymous file of 4 KiB pages.
    Memfd,
    /// A file with a name on hugetlbfs.
    Hugetlbfs,
    /// An anonymous file of huge pages.
    HugetlbMemfd,
}

impl MemoryKind {
    /// Whether its pages are huge pages from the reserved pool.
    pub fn is_hugetlb(self) -> bool {
        matches!(self, Self::Hugetlbfs | Self::HugetlbMemfd)
    }

    /// Whether it is a memfd: QEMU from 8.1 on sends such memory itself, whatever was agreed.
    pub fn is_memfd(self) -> bool {
        matches!(self, Self::Memfd | Self::HugetlbMemfd)
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tmpfs => "tmpfs",
            Self::Memfd => "memfd",
            Self::Hugetlbfs => "hugetlbfs",
            Self::HugetlbMemfd => "hugetlb-memfd",
        })
    }
}

/// Why a file can't be taken as guest memory.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// A file on something else than tmpfs or hugetlbfs.
    #[error("guest memory lies in a file system of type {fs_type:#x}, not on tmpfs or hugetlbfs")]
    NotMemory {
        /// `f_type` of `fstatfs`.
        fs_type: i64,
    },
    /// Nothing in it, or not made of whole pages.
    #[error("guest memory of {len} bytes is not made of whole pages of {page_bytes} bytes")]
    Unaligned {
        /// Its length in bytes.
        len: u64,
        /// Its page size in bytes.
        page_bytes: u64,
    },
    /// A file could not be opened or made.
    #[error("opening guest memory {path:?} failed")]
    Open {
        /// Which.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("{call} on the file of guest memory failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// A file that holds guest memory.
#[derive(Debug)]
pub struct Backing {
    file: File,
    kind: MemoryKind,
    len: u64,
    page_bytes: u64,
}

impl Backing {
    /// Opens guest memory by its name, as the monitor's `mem-path` gives it.
    pub fn open(path: &Path) -> Result<Self, BackingError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Self::from_file(file.map_err(|source| open_error(path, source))?)
    }

    /// Takes an open file: from `pidfd_getfd`, or one of `/proc/PID/map_files`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, BackingError> {
        Self::from_file(File::from(fd))
    }

    /// Takes an open file.
    pub fn from_file(file: File) -> Result<Self, BackingError> {
        let fs = fstatfs(&file).map_err(|errno| host("fstatfs", errno.into()))?;
        let len = file.metadata().map_err(|error| host("fstat", error))?.len();
        let (kind, page_bytes) = match (fs.filesystem_type(), is_memfd(&file)) {
            (TMPFS_MAGIC, false) => (MemoryKind::Tmpfs, limits::PAGE_BYTES),
            (TMPFS_MAGIC, true) => (MemoryKind::Memfd, limits::PAGE_BYTES),
            // On hugetlbfs the block is the huge page.
            (HUGETLBFS_MAGIC, false) => (MemoryKind::Hugetlbfs, fs.block_size() as u64),
            (HUGETLBFS_MAGIC, true) => (MemoryKind::HugetlbMemfd, fs.block_size() as u64),
            (FsType(fs_type), _) => return Err(BackingError::NotMemory { fs_type }),
        };
        if len == 0 || !page_bytes.is_power_of_two() || !len.is_multiple_of(page_bytes) {
            return Err(BackingError::Unaligned { len, page_bytes });
        }
        Ok(Self { file, kind, len, page_bytes })
    }

    /// Makes the file that a target's guest memory will lie in: new, of `len` bytes, all holes. The
    /// directory's file system decides the page size.
    pub fn create(path: &Path, len: u64) -> Result<Self, BackingError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(|source| open_error(path, source))?;
        let made = file
            .set_len(len)
            .map_err(|error| host("ftruncate", error))
            .and_then(|()| Self::from_file(file));
        if made.is_err() {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Makes an anonymous file of `len` bytes, all holes, of 4 KiB pages or of huge pages of
    /// `huge_page_bytes`.
    pub fn memfd(name: &str, len: u64, huge_page_bytes: Option<u64>) -> Result<Self, BackingError> {
        let mut flags = MFdFlags::MFD_CLOEXEC;
        if let Some(bytes) = huge_page_bytes {
            // The page size's logarithm stands above the flags (MFD_HUGE_SHIFT).
            let log2 = (bytes.max(1).ilog2() as libc::c_uint) << libc::MFD_HUGE_SHIFT;
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(log2);
        }
        let fd = memfd_create(name, flags).map_err(|errno| host("memfd_create", errno.into()))?;
        let file = File::from(fd);
        file.set_len(len).map_err(|error| host("ftruncate", error))?;
        Self::from_file(file)
    }

    /// What kind of file it is.
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// Size in bytes: whole pages, not zero.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never true: an empty file is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Page size in bytes: 4096, or the huge page's size on hugetlbfs.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Device and inode: the same file, however it was opened, has the same.
    pub fn identity(&self) -> Result<(u64, u64), BackingError> {
        let metadata = self.file.metadata().map_err(|error| host("fstat", error))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// The file itself.
    pub fn into_file(self) -> File {
        self.file
    }
}

/// Whether `file` came from `memfd_create`; the kernel names those so.
fn is_memfd(file: &File) -> bool {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::read_link(link)
        .is_ok_and(|name| name.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
}

fn open_error(path: &Path, source: io::Error) -> BackingError {
    BackingError::Open { path: path.to_owned(), source }
}

fn host(call: &'static str, source: io::Error) -> BackingError {
    BackingError::Host { call, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_and_the_page_size_come_from_the_file() {
        let backing = Backing::memfd("backing-test", 8192, None).unwrap();
        assert_eq!(
            (backing.kind(), backing.page_bytes(), backing.len()),
            (MemoryKind::Memfd, 4096, 8192)
        );

        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("ram");
        let made = Backing::create(&path, 4096).unwrap();
        assert_eq!(made.kind(), MemoryKind::Tmpfs);
        assert!(matches!(Backing::create(&path, 4096), Err(BackingError::Open { .. })));
        assert_eq!(Backing::open(&path).unwrap().identity().unwrap(), made.identity().unwrap());
    }

    #[test]
    fn other_files_and_odd_sizes_are_refused() {
        let error = Backing::from_file(File::open("/proc/self/status").unwrap()).unwrap_err();
        assert!(matches!(error, BackingError::NotMemory { fs_type: 0x9fa0 }));
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("ram");
        let error = Backing::create(&path, 4097).unwrap_err();
        assert!(matches!(error, BackingError::Unaligned { len: 4097, page_bytes: 4096 }));
        assert!(!path.exists(), "a file that can't be used is not left behind");
        assert!(Backing::memfd("backing-test", 0, None).is_err());
    }
}
