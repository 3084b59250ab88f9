//! Where in QEMU's address space each block of guest RAM lies, and the file behind it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry_datapath::attach::{Access, Mapping, Process};
use pageferry_datapath::backing::Backing;

use super::blocks::hva_by_guest_address;
use super::{BackendKind, GuestRam, MemoryError};
use crate::qemu::Execute;

/// Where one block lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The block's name.
    pub name: String,
    /// Its first host virtual address in QEMU.
    pub hva: u64,
    /// Size in bytes: whole pages.
    pub bytes: u64,
    /// Device and inode of its file, as `st_dev` and `st_ino`.
    pub identity: (u64, u64),
    /// The first of the mappings that it consists of: QEMU's `madvise` calls may have split it.
    first: Mapping,
    /// `mem-path`, as seen from here.
    path: Option<PathBuf>,
}

/// Finds each block of `ram`, in their order.
///
/// # Errors
/// [`MemoryError::NotLocated`] if where a block lies is not beyond doubt.
pub fn locate(
    qemu: &dyn Execute,
    process: &Process,
    ram: &[GuestRam],
) -> Result<Vec<Place>, MemoryError> {
    let runs = runs(process.maps()?);
    ram.iter().map(|block| locate_one(qemu, process.pid(), block, &runs)).collect()
}

/// Shared mappings of one file that continue each other.
#[derive(Clone, Debug)]
struct Run {
    first: Mapping,
    bytes: u64,
}

fn runs(mappings: Vec<Mapping>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let shared = |mapping: &Mapping| mapping.access.contains(Access::SHARED) && mapping.inode != 0;
    for next in mappings.into_iter().filter(shared) {
        match runs.last_mut() {
            Some(Run { first, bytes })
                if first.range.start + *bytes == next.range.start
                    && first.offset + *bytes == next.offset
                    && (first.device, first.inode) == (next.device, next.inode) =>
            {
                *bytes += next.len();
            }
            _ => runs.push(Run { bytes: next.len(), first: next }),
        }
    }
    runs
}

fn locate_one(
    qemu: &dyn Execute,
    pid: i32,
    block: &GuestRam,
    runs: &[Run],
) -> Result<Place, MemoryError> {
    // The guard page that QEMU maps behind a block is private: a run has the block's exact size, in
    // whole pages.
    let mut fitting: Vec<&Run> =
        runs.iter().filter(|run| run.bytes == block.mapped_bytes()).collect();
    let path = match &block.kind {
        BackendKind::File { path } => Some(seen_by(pid, path)),
        BackendKind::Memfd | BackendKind::Other { .. } => None,
    };
    if let Some(hva) = block.hva {
        fitting.retain(|run| run.first.range.start == hva);
    } else {
        let of_file: Vec<&Run> = fitting
            .iter()
            .copied()
            .filter(|run| is_of_backend(block, path.as_deref(), &run.first))
            .collect();
        // A path that leads nowhere any more (removed after the start) says nothing.
        if !of_file.is_empty() {
            fitting = of_file;
        }
    }
    if fitting.len() > 1
        && let Some(hva) = hva_by_guest_address(qemu, &block.name)?
    {
        fitting.retain(|run| run.first.range.start == hva);
    }
    let [run] = fitting[..] else {
        return Err(MemoryError::NotLocated {
            name: block.name.clone(),
            bytes: block.bytes,
            candidates: fitting.len(),
        });
    };
    let (major, minor) = run.first.device;
    Ok(Place {
        name: block.name.clone(),
        hva: run.first.range.start,
        bytes: run.bytes,
        identity: (nix::sys::stat::makedev(major.into(), minor.into()), run.first.inode),
        first: run.first.clone(),
        path,
    })
}

/// Whether the mapping is of the file that `mem-path` names, or of the temporary one that QEMU
/// makes if it names a folder.
fn is_of_backend(block: &GuestRam, path: Option<&Path>, mapping: &Mapping) -> bool {
    let Some(path) = path else { return mapping.name.starts_with("/memfd:") };
    let Ok(file) = path.metadata() else { return false };
    if !file.is_dir() {
        return mapping.is_of((file.dev(), file.ino()));
    }
    // As QEMU names it: qemu_back_mem.NAME.XXXXXX, with NAME's slashes made underscores.
    let prefix = format!("/qemu_back_mem.{}.", block.name.replace('/', "_"));
    mapping.is_of((file.dev(), mapping.inode)) && mapping.name.contains(&prefix)
}

/// A path of process `pid`, which may live in another mount namespace.
fn seen_by(pid: i32, path: &Path) -> PathBuf {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    match path.strip_prefix("/") {
        Ok(below_root) => proc.join("root").join(below_root),
        Err(_) => proc.join("cwd").join(path),
    }
}

impl Place {
    /// The file as QEMU has it mapped: `/dev/hugepages/vm1`, `/memfd:memory-backend-memfd (deleted)`.
    pub fn file(&self) -> &str {
        &self.first.name
    }

    /// Opens the file behind it, for reading and writing: through QEMU's mapping, by one of QEMU's
    /// descriptors, or by its name. Each way needs other privileges; whatever is opened is compared
    /// with what QEMU has mapped.
    pub fn open(&self, process: &Process) -> Result<Backing, MemoryError> {
        let denied = match process.open_mapping(&self.first) {
            Ok(file) => return self.checked(Backing::from_file(file)),
            Err(error) => error,
        };
        let same_name =
            |(_, name): &(i32, PathBuf)| name.as_os_str().to_str() == Some(&self.first.name);
        let by_fd = process.fds().unwrap_or_default().into_iter().filter(same_name);
        let by_fd = by_fd.filter_map(|(fd, _)| Some(Backing::from_fd(process.take_fd(fd).ok()?)));
        let by_path = self.path.iter().map(|path| Backing::open(path));
        for backing in by_fd.chain(by_path) {
            if let Ok(backing) = self.checked(backing) {
                return Ok(backing);
            }
        }
        Err(MemoryError::Open { name: self.name.clone(), source: denied })
    }

    fn checked(
        &self,
        backing: Result<Backing, pageferry_datapath::backing::BackingError>,
    ) -> Result<Backing, MemoryError> {
        let of_block = |source| MemoryError::Backing { name: self.name.clone(), source };
        let backing = backing.map_err(of_block)?;
        if backing.identity().map_err(of_block)? == self.identity {
            Ok(backing)
        } else {
            let source =
                io::Error::new(io::ErrorKind::NotFound, "not the file that QEMU has mapped");
            Err(of_block(pageferry_datapath::backing::BackingError::Host { call: "open", source }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::recorded::Recording;

    /// What `info ramblock`, 7.2 or 8.2, and the process's mappings have of a guest of 725 MiB.
    fn odd_block(hva: Option<u64>) -> GuestRam {
        GuestRam {
            name: "ram".into(),
            backend: "/objects/ram".into(),
            kind: BackendKind::File { path: "/no/such/file".into() },
            bytes: 725 << 20,
            page_bytes: 2 << 20,
            shared: true,
            preallocated: false,
            hva,
        }
    }

    /// One mapping fits, so nothing is asked.
    fn no_monitor() -> Recording {
        let nothing = serde_json::json!({ "version": [7, 2, 0], "exchanges": [] });
        serde_json::from_value(nothing).expect("a recording")
    }

    #[test]
    fn a_block_that_ends_within_a_huge_page_is_mapped_to_the_page_s_end() {
        let text = "\
7f0000000000-7f002d600000 rw-s 00000000 00:1b 901   /dev/hugepages/ram
7f002d600000-7f002d800000 ---p 00000000 00:00 0
7f0100000000-7f012d500000 rw-s 00000000 00:1c 902   /dev/shm/other
";
        let runs = runs(text.lines().filter_map(Mapping::parse).collect());
        for hva in [None, Some(0x7f00_0000_0000)] {
            let place = locate_one(&no_monitor(), 1, &odd_block(hva), &runs).unwrap();
            assert_eq!((place.hva, place.bytes), (0x7f00_0000_0000, 726 << 20));
        }
        let mut whole = odd_block(None);
        whole.bytes = 728 << 20;
        let error = locate_one(&no_monitor(), 1, &whole, &runs).unwrap_err();
        assert!(matches!(error, MemoryError::NotLocated { candidates: 0, .. }), "{error}");
    }

    #[test]
    fn split_blocks_are_joined_and_private_ones_left_out() {
        let text = "\
55d0c0000000-55d0c0400000 r-xp 00000000 08:01 99    /usr/bin/qemu-system-x86_64
7f0000000000-7f0000200000 rw-s 00000000 00:1b 901   /dev/shm/a b/ram
7f0000200000-7f0000400000 rw-s 00200000 00:1b 901   /dev/shm/a b/ram
7f0000400000-7f0000600000 rw-s 00000000 00:01 210   /memfd:memory-backend-memfd (deleted)
7f0000600000-7f0000700000 rw-p 00000000 00:00 0
";
        let runs = runs(text.lines().filter_map(Mapping::parse).collect());
        let found: Vec<_> = runs.iter().map(|run| (run.first.range.start, run.bytes)).collect();
        assert_eq!(found, [(0x7f00_0000_0000, 4 << 20), (0x7f00_0040_0000, 2 << 20)]);
    }
}
