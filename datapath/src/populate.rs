//! Fills a target's memory with pages before the data comes.
//!
//! First touch of fresh memory costs several times what writing to it does, and must not sit in the
//! data path. Threads walk the extents that data will come for, in their order and in bounded
//! steps, and have the kernel put (zeroed) pages there; data that is there already stays. Holes
//! stay holes: huge pages on tmpfs are asked for only where a whole one will be filled.
//!
//! ```text
//!   extents ──▶ cursor (one lock) ──▶ step of 8 MiB ──▶ thread: MADV_POPULATE_WRITE
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::extent::Extent;
use crate::limits;
use crate::priority;
use crate::region::{GuestMemory, Lease, RegionError};

/// By which call the pages came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PopulateWay {
    /// `MADV_POPULATE_WRITE`: allocated and mapped here.
    Madvise,
    /// `fallocate`, as the kernel is older than 5.14: allocated, each mapped on first touch.
    Fallocate,
}

/// What was populated.
#[derive(Clone, Copy, Debug)]
pub struct PopulateReport {
    /// Bytes whose pages are there.
    pub bytes: u64,
    /// From the start until the last thread ended.
    pub elapsed: Duration,
    /// By which call.
    pub way: PopulateWay,
    /// Bytes for which huge pages were asked on tmpfs; whether there were any is the kernel's.
    pub huge_asked_bytes: u64,
    /// Whether it ended early because it was told to.
    pub cancelled: bool,
}

/// Why pages could not be put where data will come.
#[derive(Debug, thiserror::Error)]
pub enum PopulateError {
    /// An extent outside of the guest's memory.
    #[error("an extent to populate is outside of guest memory")]
    Extent {
        /// In which way.
        #[source]
        source: RegionError,
    },
    /// No page left: the pool of huge pages, the tmpfs size limit, or the machine's memory.
    #[error("no memory left at {offset:#x} of region {region}", region = extent.region)]
    NoMemory {
        /// The extent being populated.
        extent: Extent,
        /// How far it got in the region, in bytes.
        offset: u64,
    },
    /// A thread could not be started.
    #[error("starting a thread to populate memory failed")]
    Thread {
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("populating guest memory failed")]
    Host {
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// Threads that are populating; dropping it cancels and waits for them.
#[derive(Debug)]
pub struct Populate {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    started: Instant,
}

#[derive(Debug)]
struct Shared {
    cursor: Mutex<Cursor>,
    failed: Mutex<Option<PopulateError>>,
    stop: AtomicBool,
    finished: AtomicBool,
    by_fallocate: AtomicBool,
    done_bytes: AtomicU64,
    huge_asked_bytes: u64,
}

/// What is left to do: leases, so that the memory stays mapped.
#[derive(Debug)]
struct Cursor {
    left: std::vec::IntoIter<Lease>,
    current: Option<(Arc<Lease>, u64)>,
}

impl Populate {
    /// Starts `threads` threads that populate `extents`, in their order. Extents of hugetlbfs grow
    /// to whole pages.
    pub fn start(
        memory: &GuestMemory,
        extents: &[Extent],
        threads: usize,
    ) -> Result<Self, PopulateError> {
        let started = Instant::now();
        let leases: Result<Vec<Lease>, RegionError> =
            extents.iter().map(|extent| memory.lease(whole_pages(memory, extent))).collect();
        let leases = leases.map_err(|source| PopulateError::Extent { source })?;
        let shared = Arc::new(Shared {
            huge_asked_bytes: ask_for_huge_pages(&leases),
            cursor: Mutex::new(Cursor { left: leases.into_iter(), current: None }),
            failed: Mutex::new(None),
            stop: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            by_fallocate: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
        });
        let mut populate = Self { shared, threads: Vec::new(), started };
        for _ in 0..threads.max(1) {
            let shared = Arc::clone(&populate.shared);
            let thread = std::thread::Builder::new().name("populate".into());
            // On failure the threads there are already are joined by the drop.
            let thread = thread.spawn(move || {
                priority::give_way();
                shared.work()
            });
            populate.threads.push(thread.map_err(|source| PopulateError::Thread { source })?);
        }
        Ok(populate)
    }

    /// Bytes whose pages are there so far.
    pub fn bytes_done(&self) -> u64 {
        self.shared.done_bytes.load(Ordering::Relaxed)
    }

    /// Whether all threads came to their end, so that [`Self::join`] does not wait.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Makes the threads end after the step they are in.
    pub fn cancel(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for the threads.
    pub fn join(mut self) -> Result<PopulateReport, PopulateError> {
        self.wait();
        let elapsed = self.started.elapsed();
        if let Some(error) = lock(&self.shared.failed).take() {
            return Err(error);
        }
        let way = match self.shared.by_fallocate.load(Ordering::Relaxed) {
            true => PopulateWay::Fallocate,
            false => PopulateWay::Madvise,
        };
        Ok(PopulateReport {
            bytes: self.bytes_done(),
            elapsed,
            way,
            huge_asked_bytes: self.shared.huge_asked_bytes,
            cancelled: !self.shared.finished.load(Ordering::Relaxed),
        })
    }

    fn wait(&mut self) {
        for thread in self.threads.drain(..) {
            // A thread that panicked is our mistake: don't go on as if the memory were there.
            if thread.join().is_err() {
                panic!("a thread that populates memory panicked");
            }
        }
    }
}

impl Drop for Populate {
    fn drop(&mut self) {
        self.cancel();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let Some((lease, offset, len)) = lock(&self.cursor).step() else {
                self.finished.store(true, Ordering::Relaxed);
                return;
            };
            match self.populate(&lease, offset, len) {
                Ok(()) => self.done_bytes.fetch_add(len, Ordering::Relaxed),
                Err(error) => {
                    lock(&self.failed).get_or_insert(error);
                    return self.stop.store(true, Ordering::Relaxed);
                }
            };
        }
    }

    fn populate(&self, lease: &Lease, offset: u64, len: u64) -> Result<(), PopulateError> {
        let (region, extent) = (lease.region(), lease.extent());
        let no_memory = PopulateError::NoMemory { extent, offset };
        while !self.by_fallocate.load(Ordering::Relaxed) {
            match region.populate_write(offset..offset + len) {
                Ok(()) => return Ok(()),
                Err(Errno::EINVAL) => self.by_fallocate.store(true, Ordering::Relaxed),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                // What would be SIGBUS for a thread that touches the page.
                Err(Errno::ENOMEM | Errno::EFAULT) => return Err(no_memory),
                Err(errno) => return Err(PopulateError::Host { source: errno.into() }),
            }
        }
        match region.allocate(offset..offset + len) {
            Ok(()) => Ok(()),
            Err(RegionError::Host { source, .. }) => match source.raw_os_error() {
                Some(libc::ENOMEM | libc::ENOSPC) => Err(no_memory),
                _ => Err(PopulateError::Host { source }),
            },
            Err(source) => Err(PopulateError::Extent { source }),
        }
    }
}

impl Cursor {
    /// The next step: a lease, and the bytes of its region to populate.
    fn step(&mut self) -> Option<(Arc<Lease>, u64, u64)> {
        if self.current.is_none() {
            let lease = self.left.next()?;
            let offset = lease.extent().offset;
            self.current = Some((Arc::new(lease), offset));
        }
        let (lease, offset) = self.current.take()?;
        let end = lease.extent().end();
        // Steps end on their own multiples, so that no huge page is in two of them.
        let step = limits::POPULATE_STEP_BYTES.max(lease.region().page_bytes());
        let until = end.min((offset / step + 1) * step);
        if until < end {
            self.current = Some((Arc::clone(&lease), until));
        }
        Some((lease, offset, until - offset))
    }
}

/// `extent`, grown to the pages of its region; what is outside stays for the lease to refuse.
fn whole_pages(memory: &GuestMemory, extent: &Extent) -> Extent {
    let Some(region) = memory.regions().get(usize::from(extent.region.0)) else { return *extent };
    let page_bytes = region.page_bytes();
    let offset = extent.offset / page_bytes * page_bytes;
    match extent.end().checked_next_multiple_of(page_bytes) {
        Some(end) if extent.len > 0 => Extent { offset, len: end - offset, ..*extent },
        _ => *extent,
    }
}

/// Asks for huge pages on tmpfs where whole ones will be filled; the bytes asked for. Each asking
/// may split the mapping, so there is a bound; not getting any is not an error.
fn ask_for_huge_pages(leases: &[Lease]) -> u64 {
    let (mut bytes, mut asked) = (0, 0);
    for lease in leases {
        let (region, extent) = (lease.region(), lease.extent());
        let start = extent.offset.next_multiple_of(limits::THP_BYTES);
        let end = extent.end() / limits::THP_BYTES * limits::THP_BYTES;
        if region.page_bytes() != limits::PAGE_BYTES || start >= end {
            continue;
        }
        if asked == limits::THP_RANGES_MAX {
            break;
        }
        asked += 1;
        if region.prefer_huge(start..end).is_ok() {
            bytes += end - start;
        }
    }
    bytes
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::backing::Backing;
    use crate::holes::data_extents;
    use crate::ids::RegionIndex;
    use crate::region::Region;

    fn memory(bytes: u64, huge: Option<u64>) -> GuestMemory {
        let backing = Backing::memfd("populate-test", bytes, huge).unwrap();
        GuestMemory::new(vec![Region::open(RegionIndex(0), backing).unwrap()])
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent { region: RegionIndex(0), offset, len }
    }

    fn data(memory: &GuestMemory) -> Vec<Extent> {
        data_extents(&memory.regions()[0]).unwrap()
    }

    #[test]
    fn just_the_extents_are_populated_and_data_stays() {
        let memory = memory(64 << 20, None);
        let extents = [extent(4096, 12 << 20), extent(20 << 20, 4096), extent(32 << 20, 9 << 20)];
        memory.lease(extents[0]).unwrap().copy_in(5, b"stays").unwrap();
        let populate = Populate::start(&memory, &extents, 2).unwrap();
        let report = populate.join().unwrap();
        assert_eq!(data(&memory), extents);
        assert_eq!(report.bytes, extents.iter().map(|e| e.len).sum::<u64>());
        assert!(!report.cancelled);
        let mut bytes = [0; 5];
        memory.lease(extents[0]).unwrap().copy_out(5, &mut bytes).unwrap();
        assert_eq!(&bytes, b"stays");
    }

    #[test]
    fn a_part_of_a_huge_page_takes_the_whole_one_and_an_empty_pool_is_an_error() {
        let page = 2 << 20;
        let Some(_pages) = crate::testing::HugePages::reserve(page, 4) else { return };
        let memory = memory(4 * page, Some(page));
        let populate = Populate::start(&memory, &[extent(page + 4096, 4096)], 2).unwrap();
        assert_eq!(populate.join().unwrap().bytes, page);
        assert_eq!(data(&memory), [extent(page, page)]);
    }

    #[test]
    fn an_older_kernel_gets_fallocate() {
        let memory = memory(32 << 20, None);
        let populate = Populate::start(&memory, &[], 1).unwrap();
        populate.shared.by_fallocate.store(true, Ordering::Relaxed);
        let lease = memory.lease(extent(8 << 20, 4 << 20)).unwrap();
        populate.shared.populate(&lease, 8 << 20, 4 << 20).unwrap();
        assert_eq!(populate.join().unwrap().way, PopulateWay::Fallocate);
        // Allocated, and no data yet for SEEK_DATA.
        let file = memory.regions()[0].file().try_clone_to_owned().unwrap();
        let blocks = std::fs::File::from(file).metadata().unwrap().blocks();
        assert_eq!(blocks * 512, 4 << 20);
    }

    #[test]
    fn cancelling_ends_it_early() {
        let memory = memory(1 << 30, None);
        let populate = Populate::start(&memory, &[extent(0, 1 << 30)], 1).unwrap();
        populate.cancel();
        let report = populate.join().unwrap();
        assert!(report.cancelled && report.bytes < 1 << 30);
    }

    #[test]
    fn extents_outside_are_refused() {
        let memory = memory(1 << 20, None);
        for bad in [extent(1 << 20, 4096), extent(0, u64::MAX), extent(0, 0)] {
            assert!(matches!(
                Populate::start(&memory, &[bad], 1),
                Err(PopulateError::Extent { .. })
            ));
        }
    }
}
