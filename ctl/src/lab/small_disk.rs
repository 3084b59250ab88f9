//! A file system that is easily filled: a full disk, or a hugetlbfs without a free page.
//!
//! What is full is this mount alone; the machine's own disks and huge pages are never used up.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount};

use super::error::{LabError, call, io};
use super::hugepages::HUGE_PAGE_BYTES;
use super::workplace::{Undo, Workplace};

/// The file that takes what is left.
const FILLER: &str = "filler";

/// A small file system of our own; dropped, it is unmounted.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
    unit_bytes: u64,
    _workplace: Arc<Workplace>,
}

impl SmallDisk {
    /// Mounts a tmpfs of so many bytes in the workplace.
    pub fn tmpfs(workplace: &Arc<Workplace>, name: &str, bytes: u64) -> Result<Self, LabError> {
        Self::mount(workplace, name, "tmpfs", &format!("size={bytes}"), 4096)
    }

    /// Mounts a hugetlbfs of 2 MiB pages that gives out so many bytes at most.
    pub fn hugetlbfs(workplace: &Arc<Workplace>, name: &str, bytes: u64) -> Result<Self, LabError> {
        let options = format!("pagesize=2M,size={bytes}");
        Self::mount(workplace, name, "hugetlbfs", &options, HUGE_PAGE_BYTES)
    }

    fn mount(
        workplace: &Arc<Workplace>,
        name: &str,
        kind: &str,
        options: &str,
        unit_bytes: u64,
    ) -> Result<Self, LabError> {
        let folder = workplace.file(name);
        fs::create_dir(&folder).map_err(io("create", &folder))?;
        workplace.promise(&Undo::Unmount { path: folder.clone() })?;
        mount(Some(kind), &folder, Some(kind), MsFlags::empty(), Some(options))
            .map_err(call("mount"))?;
        Ok(Self { folder, unit_bytes, _workplace: Arc::clone(workplace) })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Takes all that is left of it.
    pub fn fill(&self) -> Result<(), LabError> {
        let path = self.folder.join(FILLER);
        let filler = File::create(&path).map_err(io("create", &path))?;
        let mut at = 0;
        loop {
            let unit = self.unit_bytes as i64;
            match fallocate(filler.as_fd(), FallocateFlags::empty(), at, unit) {
                Ok(()) => at += unit,
                Err(Errno::ENOSPC | Errno::ENOMEM) => return Ok(()),
                Err(errno) => return Err(call("fallocate")(errno)),
            }
        }
    }

    /// Gives back what [`SmallDisk::fill`] took.
    pub fn empty(&self) {
        let _it_may_not_be_full = fs::remove_file(self.folder.join(FILLER));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Undo::Unmount { path: self.folder.clone() }.undo();
        let _ = fs::remove_dir(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::skip::{is_root, skip};

    #[test]
    fn a_full_disk_takes_nothing_until_it_is_emptied() {
        if !is_root() {
            skip("a_full_disk_takes_nothing_until_it_is_emptied", "needs root to mount");
            return;
        }
        let workplace = Workplace::new().expect("a workplace");
        let disk = SmallDisk::tmpfs(&workplace, "small", 1 << 20).expect("mounted");
        let file = disk.path().join("file");
        fs::write(&file, [1; 10_000]).expect("there is room");
        disk.fill().expect("filled");
        assert!(fs::write(disk.path().join("other"), [1; 10_000]).is_err());
        disk.empty();
        fs::write(disk.path().join("other"), [1; 10_000]).expect("there is room again");
        let folder = disk.path().to_owned();
        drop(disk);
        assert!(!folder.exists());
    }
}
