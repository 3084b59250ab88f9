//! What guest memory is made of: huge pages from a pool of our own, or tmpfs; warm or fresh.
//!
//! Room for two guests: the one that runs and the one that waits. Who moves without a waiting
//! guest (the ceiling) takes the second place.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pageferry_ctl::lab::hugepages::HUGE_PAGE_BYTES;
use pageferry_ctl::lab::{HugePages, HugetlbMount, Memory, Workplace, is_root};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::limits::PAGE_BYTES;
use pageferry_datapath::region::{GuestMemory, Region};

use crate::args::MemoryKind;
use crate::error::BenchError;

/// Memory for two guests of one size.
pub(crate) struct MemoryPool {
    // Drop order: the mount before the pages.
    mount: Option<HugetlbMount>,
    _first: Option<HugePages>,
    second: Option<HugePages>,
    workplace: Arc<Workplace>,
    guest_bytes: u64,
    fresh_after: Duration,
}

impl MemoryPool {
    /// Reserves it. `fresh_after` is how long memory given back stays away before it is taken
    /// anew, so that a hypervisor that takes free memory back has had the time to.
    pub(crate) fn new(
        kind: Option<MemoryKind>,
        guest_bytes: u64,
        fresh_after: Duration,
        workplace: &Arc<Workplace>,
    ) -> Result<Self, BenchError> {
        let default = if is_root() { MemoryKind::Hugetlbfs } else { MemoryKind::Tmpfs };
        let huge = kind.unwrap_or(default) == MemoryKind::Hugetlbfs;
        let reserve = || huge.then(|| HugePages::reserve(workplace, guest_bytes)).transpose();
        let (first, second) = (reserve()?, reserve()?);
        let mount = huge.then(|| HugetlbMount::new(workplace)).transpose()?;
        let workplace = Arc::clone(workplace);
        Ok(Self { mount, _first: first, second, workplace, guest_bytes, fresh_after })
    }

    /// What to tell QEMU.
    pub(crate) fn for_qemu(&self) -> Memory {
        self.mount.as_ref().map_or_else(Memory::tmpfs, |mount| Memory::hugetlbfs(mount.path()))
    }

    /// `hugetlbfs` or `tmpfs`.
    pub(crate) fn name(&self) -> &'static str {
        if self.mount.is_some() { "hugetlbfs, 2 MiB pages" } else { "tmpfs, 4 KiB pages" }
    }

    /// Gives the second place's memory back to the machine, waits, and takes memory anew. Nobody
    /// may have it.
    pub(crate) fn make_second_fresh(&mut self) -> Result<(), BenchError> {
        let huge = self.second.take().is_some();
        std::thread::sleep(self.fresh_after);
        if huge {
            self.second = Some(self.reserve_scattered()?);
        }
        Ok(())
    }

    /// A file in the second place, mapped here, all holes; gone when it is dropped.
    pub(crate) fn map_second(&self, name: &str) -> Result<ScratchMemory, BenchError> {
        let folder = match &self.mount {
            Some(mount) => mount.path().to_owned(),
            None => PathBuf::from("/dev/shm"),
        };
        let path = folder.join(format!("{}-{name}.ram", self.workplace.unique_word()));
        // As QEMU does it: whole pages.
        let page_bytes = if self.mount.is_some() { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let backing = Backing::create(&path, self.guest_bytes.next_multiple_of(page_bytes))?;
        let region = Region::open(RegionIndex(0), backing);
        // The mapping keeps it; nothing is left behind however this ends.
        std::fs::remove_file(&path).map_err(BenchError::io("remove", path.display()))?;
        Ok(ScratchMemory { memory: GuestMemory::new(vec![region?]) })
    }

    /// Memory given back a moment ago may have come apart.
    fn reserve_scattered(&self) -> Result<HugePages, BenchError> {
        let mut tries = 0;
        loop {
            match HugePages::reserve(&self.workplace, self.guest_bytes) {
                Ok(pages) => return Ok(pages),
                Err(error) if tries == 5 => return Err(error.into()),
                Err(_) => {
                    tries += 1;
                    // Best effort: the next try shows whether it helped.
                    let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }
}

/// Memory that is nobody's guest.
pub(crate) struct ScratchMemory {
    memory: GuestMemory,
}

impl ScratchMemory {
    /// The memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Has every page be there and mapped.
    pub(crate) fn touch(&self) -> Result<(), BenchError> {
        for region in self.memory.regions() {
            let lease = region.lease(0, region.len())?;
            let step = region.page_bytes().max(PAGE_BYTES) as usize;
            for offset in (0..region.len()).step_by(step) {
                lease.touch(offset)?;
            }
        }
        Ok(())
    }
}
