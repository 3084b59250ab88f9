//! Proof, before a guest is touched, that tracking reports writes on this kernel and page size.
//!
//! Kernels have offered the interface and yet never protected a page (1 GiB pages before May 2026),
//! so it is tried: write, scan, compare, on a small mapping of the same page size in this process.
//! Where no page is left for that, one page of the guest itself serves: a byte is written with the
//! value it has, through this process's mapping. Nothing of the probe outlives it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::sys::Uffd;
use super::{DirtyTracker, ScanPhases, TrackedRange, TrackerError, UffdTracker};
use crate::backing::{Backing, BackingError};
use crate::bitmap::DirtySet;
use crate::extent::Extent;
use crate::ids::RegionIndex;
use crate::limits;
use crate::region::{GuestMemory, Region, RegionError};
use crate::thp;

/// Whose memory the probe wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbedMemory {
    /// A mapping of its own.
    Own,
    /// A byte of the guest, with the value it had.
    Guest,
}

/// A way in which a page gets written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeWrite {
    /// By the CPU, to a page that has data.
    Cpu,
    /// By the kernel, in a `read` into the page.
    Kernel,
    /// By the CPU, to a page that did not exist before.
    FirstTouch,
}

impl fmt::Display for ProbeWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "a write of the CPU",
            Self::Kernel => "a write of the kernel",
            Self::FirstTouch => "a first write",
        })
    }
}

/// Tracking works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// The page size it was tried with.
    pub page_bytes: u64,
    /// How scans report and protect.
    pub phases: ScanPhases,
    /// Whose memory was written to.
    pub memory: ProbedMemory,
    /// How long it took.
    pub elapsed: Duration,
}

/// Tracking can't be trusted here.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No userfaultfd to be had, not even one for user-mode faults only.
    #[error("creating a userfaultfd failed")]
    Userfaultfd {
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// No file of such pages to be had: the kernel does not know the size.
    #[error("no file of {page_bytes}-byte pages to try tracking on")]
    NoFile {
        /// The page size.
        page_bytes: u64,
        /// Why.
        #[source]
        source: BackingError,
    },
    /// No page of this size is free.
    #[error("no {page_bytes}-byte page is free to try tracking on")]
    NoPage {
        /// The page size.
        page_bytes: u64,
        /// Why.
        #[source]
        source: RegionError,
    },
    /// The guest has no memory populated yet that a probe could use.
    #[error("region {region} holds no page to try tracking on")]
    EmptyRegion {
        /// The region.
        region: RegionIndex,
    },
    /// The tracker does not start, or its scan fails.
    #[error("trying dirty tracking on {page_bytes}-byte pages failed")]
    Tracker {
        /// The page size.
        page_bytes: u64,
        /// Why.
        #[source]
        source: TrackerError,
    },
    /// A write was not reported: the guest would be corrupted.
    #[error("tracking {page_bytes}-byte pages misses {write}")]
    Missed {
        /// The page size.
        page_bytes: u64,
        /// Which write.
        write: ProbeWrite,
    },
    /// Pages that nobody wrote were reported: rounds would not get smaller.
    #[error("tracking {page_bytes}-byte pages reports pages that nobody wrote")]
    Imagined {
        /// The page size.
        page_bytes: u64,
    },
    /// The probe's own memory can't be used.
    #[error("writing to the probe's memory failed")]
    Memory {
        /// Why.
        #[source]
        source: RegionError,
    },
}

/// Tries tracking on memory of its own: for 4 KiB pages, or huge pages of the size given.
pub fn probe(page_bytes: u64, phases: ScanPhases) -> Result<ProbeReport, ProbeError> {
    let started = Instant::now();
    let huge = (page_bytes != limits::PAGE_BYTES).then_some(page_bytes);
    // A page with data and one without, under two page tables if the pages are small. Pages larger
    // than that are scarce and slow to zero: one has to do.
    let second = match page_bytes {
        limits::PAGE_BYTES => Some(2 * limits::PAGE_TABLE_BYTES),
        limits::THP_BYTES => Some(page_bytes),
        _ => None,
    };
    let len = second.unwrap_or(0) + page_bytes;
    let backing = Backing::memfd("pageferry-probe", len, huge)
        .map_err(|source| ProbeError::NoFile { page_bytes, source })?;
    let region = Region::open(RegionIndex(0), backing)
        .map_err(|source| ProbeError::NoPage { page_bytes, source })?;
    let trial = Trial::start(&region, 0, len, phases)?;
    trial.run(second, ProbedMemory::Own)?;
    Ok(ProbeReport { page_bytes, phases, memory: ProbedMemory::Own, elapsed: started.elapsed() })
}

/// Tries tracking on one page of a guest's region, the first of `populated` that lies in it.
pub fn probe_region(
    region: &Arc<Region>,
    populated: &[Extent],
    phases: ScanPhases,
) -> Result<ProbeReport, ProbeError> {
    let started = Instant::now();
    let page_bytes = region.page_bytes();
    let extent = populated
        .iter()
        .find(|extent| extent.region == region.index() && extent.len >= page_bytes)
        .ok_or(ProbeError::EmptyRegion { region: region.index() })?;
    let trial = Trial::start(region, extent.offset, page_bytes, phases)?;
    trial.run(None, ProbedMemory::Guest)?;
    Ok(ProbeReport { page_bytes, phases, memory: ProbedMemory::Guest, elapsed: started.elapsed() })
}

/// Tries tracking for a guest's region: on own memory of the same page size, or, where no such
/// page is free or they are larger than 2 MiB, on a page of the region itself.
pub fn probe_for(
    region: &Arc<Region>,
    populated: &[Extent],
    phases: ScanPhases,
) -> Result<ProbeReport, ProbeError> {
    if region.page_bytes() <= limits::THP_BYTES {
        match probe(region.page_bytes(), phases) {
            Err(ProbeError::NoFile { .. } | ProbeError::NoPage { .. }) => {}
            other => return other,
        }
    }
    match probe_region(region, populated, phases) {
        // Nothing there yet: then the pages it will get are free, and one is for the probe.
        Err(ProbeError::EmptyRegion { .. }) => probe(region.page_bytes(), phases),
        other => other,
    }
}

/// Tries tracking, as [`probe_for`] does, once for each page size that a guest's memory has.
/// `populated` is where it holds data.
pub fn probe_guest(
    memory: &GuestMemory,
    populated: &[Extent],
    phases: ScanPhases,
) -> Result<Vec<ProbeReport>, ProbeError> {
    let mut reports: Vec<ProbeReport> = Vec::new();
    // Regions with data first: a probe may need a page of theirs.
    let has_data = |region: &&Arc<Region>| populated.iter().any(|e| e.region == region.index());
    let (first, last): (Vec<_>, Vec<_>) = memory.regions().iter().partition(has_data);
    for region in first.into_iter().chain(last) {
        if reports.iter().all(|report| report.page_bytes != region.page_bytes()) {
            reports.push(probe_for(region, populated, phases)?);
        }
    }
    Ok(reports)
}

/// Memory under tracking, and what the next scan has to report.
struct Trial {
    region: Arc<Region>,
    offset: u64,
    tracker: UffdTracker,
}

impl Trial {
    /// Tracks `len` bytes at `offset`, whose first page gets touched before.
    fn start(
        region: &Arc<Region>,
        offset: u64,
        len: u64,
        phases: ScanPhases,
    ) -> Result<Self, ProbeError> {
        let page_bytes = region.page_bytes();
        let uffd = Uffd::own().map_err(|source| ProbeError::Userfaultfd { source })?;
        let pagemap = File::open("/proc/self/pagemap").map_err(|source| ProbeError::Tracker {
            page_bytes,
            source: TrackerError::Host { call: "opening /proc/self/pagemap", source },
        })?;
        touch(region, offset)?;
        let host = region.base().addr() as u64 + offset;
        let may_be_huge = page_bytes == limits::PAGE_BYTES && thp::may_be_huge(region.file());
        let range =
            TrackedRange { region: region.index(), offset, host, len, page_bytes, may_be_huge };
        let populated = [Extent { region: region.index(), offset, len: page_bytes }];
        let tracker = UffdTracker::start(
            uffd.into_fd(),
            pagemap,
            &[Arc::clone(region)],
            vec![range],
            &populated,
            phases,
        )
        .map_err(|source| ProbeError::Tracker { page_bytes, source })?;
        Ok(Self { region: Arc::clone(region), offset, tracker })
    }

    /// Each kind of write is reported once, and nothing else ever.
    fn run(mut self, second: Option<u64>, memory: ProbedMemory) -> Result<(), ProbeError> {
        self.expect(None)?;
        let first = self.offset;
        for _ in 0..2 {
            touch(&self.region, first)?;
            self.expect(Some((ProbeWrite::Cpu, first)))?;
            self.expect(None)?;
        }
        if memory == ProbedMemory::Own {
            self.read_zeros(first)?;
            self.expect(Some((ProbeWrite::Kernel, first)))?;
        }
        if let Some(second) = second {
            touch(&self.region, second)?;
            self.expect(Some((ProbeWrite::FirstTouch, second)))?;
        }
        self.expect(None)
    }

    fn expect(&mut self, write: Option<(ProbeWrite, u64)>) -> Result<(), ProbeError> {
        let page_bytes = self.region.page_bytes();
        let shape = (0..=self.region.index().0).map(|index| match index == self.region.index().0 {
            true => (self.region.len() / page_bytes, page_bytes),
            false => (0, page_bytes),
        });
        let mut dirty = DirtySet::new(shape);
        let mut expected = dirty.empty_like();
        self.tracker
            .scan(&mut dirty)
            .map_err(|source| ProbeError::Tracker { page_bytes, source })?;
        if let Some((write, offset)) = write {
            let extent = Extent { region: self.region.index(), offset, len: page_bytes };
            expected.set_extent(extent).map_err(|source| ProbeError::Memory { source })?;
            let mut missed = expected.clone();
            missed.subtract(&dirty);
            if !missed.is_empty() {
                return Err(ProbeError::Missed { page_bytes, write });
            }
        }
        // Beside a page touched for the first time its neighbours may be reported, once, as their
        // page table is new.
        let first_touch = matches!(write, Some((ProbeWrite::FirstTouch, _)));
        match dirty == expected || first_touch {
            true => Ok(()),
            false => Err(ProbeError::Imagined { page_bytes }),
        }
    }

    fn read_zeros(&self, offset: u64) -> Result<(), ProbeError> {
        let memory = |source| ProbeError::Memory { source };
        let zeros = File::open("/dev/zero")
            .map_err(|source| memory(RegionError::Host { call: "opening /dev/zero", source }))?;
        let lease = self.region.lease(offset, limits::PAGE_BYTES).map_err(memory)?;
        lease.read_in(0, limits::PAGE_BYTES as usize, zeros.as_fd()).map_err(memory)?;
        Ok(())
    }
}

fn touch(region: &Arc<Region>, offset: u64) -> Result<(), ProbeError> {
    let lease = region.lease(offset, limits::PAGE_BYTES);
    lease.and_then(|lease| lease.touch(0)).map_err(|source| ProbeError::Memory { source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::HugePages;

    const PHASES: [ScanPhases; 2] = [ScanPhases::One, ScanPhases::Two];

    fn works(page_bytes: u64) {
        for phases in PHASES {
            let report = probe(page_bytes, phases).unwrap();
            assert_eq!((report.page_bytes, report.memory), (page_bytes, ProbedMemory::Own));
        }
    }

    #[test]
    fn small_pages_are_tracked() {
        works(4096);
    }

    #[test]
    fn huge_pages_are_tracked() {
        let page = 2 << 20;
        let Some(_pages) = HugePages::reserve(page, 2) else { return };
        works(page);
    }

    #[test]
    fn a_guests_page_serves_and_keeps_its_bytes() {
        let backing = Backing::memfd("probe-test", 1 << 20, None).unwrap();
        let region = Region::open(RegionIndex(2), backing).unwrap();
        let extent = Extent { region: RegionIndex(2), offset: 8192, len: 8192 };
        let lease = region.lease(8192, 4096).unwrap();
        lease.copy_in(0, b"guest").unwrap();
        for phases in PHASES {
            let report = probe_region(&region, &[extent], phases).unwrap();
            assert_eq!(report.memory, ProbedMemory::Guest);
        }
        let mut bytes = [0; 5];
        lease.copy_out(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"guest");
        let empty = probe_region(&region, &[], ScanPhases::One);
        assert!(matches!(empty, Err(ProbeError::EmptyRegion { region: RegionIndex(2) })));
        assert_eq!(probe_for(&region, &[], ScanPhases::One).unwrap().memory, ProbedMemory::Own);
    }

    #[test]
    fn each_page_size_of_a_guest_is_tried_once() {
        let region = |index, len| {
            let backing = Backing::memfd("probe-test", len, None).unwrap();
            Region::open(RegionIndex(index), backing).unwrap()
        };
        let memory = GuestMemory::new(vec![region(0, 4096), region(1, 8192)]);
        let reports = probe_guest(&memory, &[], ScanPhases::One).unwrap();
        assert_eq!(reports.iter().map(|r| r.page_bytes).collect::<Vec<_>>(), [4096]);
    }

    #[test]
    fn a_page_size_the_kernel_does_not_have_is_said_to_be() {
        let error = probe(1 << 22, ScanPhases::One).unwrap_err();
        assert!(matches!(error, ProbeError::NoFile { page_bytes: 4194304, .. }), "{error:?}");
    }

    #[test]
    #[ignore = "takes a 1 GiB page, and seconds to zero it"]
    fn gigantic_pages_are_proved_or_refused_for_a_reason() {
        let page = 1 << 30;
        let Some(_page) = HugePages::reserve(page, 1) else { return };
        match probe(page, ScanPhases::One) {
            Ok(report) => {
                println!("gigantic pages are tracked, tried in {:?}", report.elapsed);
                assert_eq!(report.page_bytes, page);
            }
            Err(error) => {
                assert!(matches!(error, ProbeError::Missed { .. } | ProbeError::Imagined { .. }))
            }
        }
    }
}
