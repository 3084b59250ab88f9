//! Huge pages for as long as an experiment needs them.
//!
//! The pool is the machine's: we add to its current number and take the same number away again,
//! so that several laboratories and whoever else uses it do not disturb each other.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::Flock;
use nix::mount::{MsFlags, mount};

use super::error::{LabError, call, io};
use super::skip::lock_file;
use super::workplace::{Undo, Workplace};

/// Bytes of the huge pages that the laboratory uses.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages added to the machine's pool; dropped, they are given back.
#[derive(Debug)]
pub struct HugePages {
    workplace: Arc<Workplace>,
    count: u64,
}

impl HugePages {
    /// Adds `bytes`, rounded up to whole huge pages, to the pool. Fails without root, and where
    /// the machine's free memory is too little or too scattered.
    pub fn reserve(workplace: &Arc<Workplace>, bytes: u64) -> Result<Self, LabError> {
        let count = bytes.div_ceil(HUGE_PAGE_BYTES);
        let _lock = lock_pool();
        let before = pool()?;
        set_pool(before + count)?;
        let came = pool()?.saturating_sub(before);
        if came < count {
            set_pool(before)?;
            return Err(LabError::Missing {
                what: format!("room for {count} huge pages ({came} could be had)"),
                hint: "free memory, then: echo 1 > /proc/sys/vm/compact_memory",
            });
        }
        workplace.promise(&Undo::HugePages { count })?;
        Ok(Self { workplace: Arc::clone(workplace), count })
    }

    /// How many were added.
    pub fn count(&self) -> u64 {
        self.count
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        self.workplace.strike_out(&Undo::HugePages { count: self.count });
        give_back(self.count);
    }
}

/// A hugetlbfs of our own; dropped, it is unmounted.
#[derive(Debug)]
pub struct HugetlbMount {
    folder: PathBuf,
    _workplace: Arc<Workplace>,
}

impl HugetlbMount {
    /// Mounts a hugetlbfs of 2 MiB pages in the workplace.
    pub fn new(workplace: &Arc<Workplace>) -> Result<Self, LabError> {
        let folder = workplace.file("hugetlbfs");
        fs::create_dir(&folder).map_err(io("create", &folder))?;
        workplace.promise(&Undo::Unmount { path: folder.clone() })?;
        mount(Some("hugetlbfs"), &folder, Some("hugetlbfs"), MsFlags::empty(), Some("pagesize=2M"))
            .map_err(call("mount hugetlbfs"))?;
        Ok(Self { folder, _workplace: Arc::clone(workplace) })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for HugetlbMount {
    fn drop(&mut self) {
        Undo::Unmount { path: self.folder.clone() }.undo();
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Takes `count` pages from the pool, as far as they are there.
pub(super) fn give_back(count: u64) {
    let _lock = lock_pool();
    if let Ok(now) = pool() {
        let _ = set_pool(now.saturating_sub(count));
    }
}

/// Reading and writing the pool's number are two steps: one process at a time.
fn lock_pool() -> Option<Flock<File>> {
    lock_file("pageferry-hugepages.lock")
}

fn pool() -> Result<u64, LabError> {
    let text = fs::read_to_string(POOL).map_err(io("read", Path::new(POOL)))?;
    text.trim()
        .parse()
        .map_err(|_| LabError::Unexpected { what: "the number of huge pages", found: text })
}

fn set_pool(count: u64) -> Result<(), LabError> {
    fs::write(POOL, count.to_string()).map_err(io("write", Path::new(POOL)))
}
