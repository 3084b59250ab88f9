//! Tracking from outside the monitor: asynchronous userfaultfd write protection, `PAGEMAP_SCAN`.
//!
//! ```text
//!   page written? ──no──▶ write-protected in the monitor's page table
//!        ▲                     │ the guest writes: the kernel lifts the protection by itself
//!        └── scan protects ◀───┘ and the page counts as written
//! ```
//!
//! Large holes are left alone: the kernel calls them written, would protect them too, and make page
//! tables for all of them that every scan then walks (16 GiB: 47 ms the first time, 10 ms each
//! later one, where 200 MiB of data take half of one). What a file holds in them since the last
//! look is found in the file, armed, and reported.
//!
//! The descriptor was created inside the monitor and taken out (see `attach`); everything
//! here works on the monitor's page tables without it taking part. Tracked are the CPU's writes
//! through these mappings, the kernel's for a system call among them. Not seen:
//!
//! * pages pinned by direct I/O in flight;
//! * writes through other mappings of the same file;
//! * pages that the monitor gives back (a balloon's hole punches): on hugetlbfs never, on tmpfs not
//!   if nothing was written to them since the last scan, or if they came and went in a large hole
//!   between two scans. The kernel keeps the protection of such a
//!   page, and whoever *reads* it gets a new one of zeros, protected, that nobody wrote. Holes have
//!   to be looked for beside each scan; between a hole and a read no look may fall. What a guest
//!   gave back it does not expect to find again, but a digest sees the difference.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::sys::{self, PageRegion, RegisterMode, ScanFlags, Uffd, UffdFeatures};
use super::{DirtyTracker, ScanStats, TrackerError, TrackerKind};
use crate::bitmap::DirtySet;
use crate::extent::Extent;
use crate::holes;
use crate::ids::RegionIndex;
use crate::limits;
use crate::region::Region;

/// Part of a region as it is mapped in the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedRange {
    /// Which region.
    pub region: RegionIndex,
    /// Where in the region the range begins, in bytes.
    pub offset: u64,
    /// Its host virtual address in the monitor.
    pub host: u64,
    /// Length in bytes.
    pub len: u64,
    /// Page size behind it: 4096, or the huge page's size on hugetlbfs.
    pub page_bytes: u64,
    /// Whether transparent huge pages may turn up in it. Then all of it is protected from the
    /// start: protected memory has page tables, so the kernel maps no huge page as one there, and
    /// none can be split later, which would lose the note that it was written.
    pub may_be_huge: bool,
}

impl TrackedRange {
    fn host_range(&self) -> Range<u64> {
        self.host..self.host + self.len
    }

    /// Where it lies in the region.
    fn offsets(&self, host: &Range<u64>) -> Range<u64> {
        let at = |host: u64| self.offset + (host - self.host);
        at(host.start)..at(host.end)
    }

    /// Whether its large holes are left alone. Huge pages have few entries to walk.
    fn is_lazy(&self) -> bool {
        self.page_bytes == limits::PAGE_BYTES && !self.may_be_huge
    }

    /// Whole pages, and nothing wraps.
    fn check(&self) -> Result<(), TrackerError> {
        let Self { offset, host, len, page_bytes, .. } = *self;
        let whole = page_bytes.is_power_of_two()
            && len > 0
            && [offset, host, len].iter().all(|bytes| bytes.is_multiple_of(page_bytes))
            && host.checked_add(len).is_some()
            && offset.checked_add(len).is_some();
        if whole { Ok(()) } else { Err(TrackerError::Unaligned { host, len, page_bytes }) }
    }

    /// Where `extent` lies in the monitor, grown to what one page table covers: pages that were
    /// never touched are reported as written exactly if their page table exists and they are not
    /// protected, so everything near populated memory is protected and the rest costs nothing.
    fn host_span(&self, extent: &Extent) -> Option<Range<u64>> {
        let start = extent.offset.max(self.offset);
        let end = extent.end().min(self.offset + self.len);
        if extent.region != self.region || start >= end {
            return None;
        }
        let table = limits::PAGE_TABLE_BYTES.max(self.page_bytes);
        let at = |offset: u64| self.host + (offset - self.offset);
        let Range { start: first, end: last } = self.host_range();
        let start = (at(start) / table * table).max(first);
        let end = at(end).checked_next_multiple_of(table).map_or(last, |end| end.min(last));
        Some(start..end)
    }
}

/// How a scan reports and protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ScanPhases {
    /// One call does both: cheapest where no MMU notifier listens, so under TCG.
    #[default]
    One,
    /// Report first, then protect only the reported runs: a matching scan tells KVM to drop its
    /// shadow of everything it walks over.
    Two,
}

/// See the [module](self).
#[derive(Debug)]
pub struct UffdTracker {
    uffd: Uffd,
    pagemap: File,
    /// Those that ranges lie in.
    regions: Vec<Arc<Region>>,
    ranges: Vec<TrackedRange>,
    /// Of each range, what scans walk: host addresses, in order, apart.
    armed: Vec<Vec<Range<u64>>>,
    phases: ScanPhases,
    found: Vec<PageRegion>,
    registered: usize,
}

impl UffdTracker {
    /// Starts tracking `ranges`, parts of `regions`, of the monitor whose userfaultfd and
    /// `/proc/PID/pagemap` these are.
    ///
    /// `populated` is where the regions' files hold data, so that it gets protected whether or not
    /// the monitor has touched it. What happened before this returns is never reported: the first
    /// pass has to look up where data is *afterwards*, and take all of it.
    ///
    /// Later, a page that is touched for the first time may be reported together with neighbours
    /// that are still holes, once (their page table is new). What a scan reports and the file does
    /// not hold is zeros, and reading it through a mapping would allocate it.
    pub fn start(
        uffd: OwnedFd,
        pagemap: File,
        regions: &[Arc<Region>],
        ranges: Vec<TrackedRange>,
        populated: &[Extent],
        phases: ScanPhases,
    ) -> Result<Self, TrackerError> {
        ranges.iter().try_for_each(TrackedRange::check)?;
        let found = vec![PageRegion::default(); limits::SCAN_RUNS_MAX];
        let mut tracker = Self {
            uffd: Uffd::new(uffd),
            pagemap,
            regions: regions.to_vec(),
            armed: Vec::new(),
            ranges,
            phases,
            found,
            registered: 0,
        };
        tracker.agree()?;
        // From here on a failure drops the tracker, and that unregisters what was registered.
        tracker.register()?;
        tracker.protect(populated)?;
        tracker.settle()?;
        Ok(tracker)
    }

    /// Scans once and forgets the result: holes that happen to have a page table already (from
    /// what was mapped there before, or punched out since) would be reported for no reason.
    fn settle(&mut self) -> Result<(), TrackerError> {
        let regions = self.ranges.iter().map(|range| usize::from(range.region.0) + 1).max();
        let mut shape = vec![(0, limits::PAGE_BYTES); regions.unwrap_or(0)];
        for TrackedRange { region, offset, len, page_bytes, .. } in &self.ranges {
            let (pages, granule) = &mut shape[usize::from(region.0)];
            *granule = *page_bytes;
            *pages = (*pages).max((offset + len) / page_bytes);
        }
        self.scan(&mut DirtySet::new(shape)).map(drop)
    }

    fn agree(&self) -> Result<(), TrackerError> {
        let wanted = UffdFeatures::WP_ASYNC
            | UffdFeatures::WP_HUGETLBFS_SHMEM
            | UffdFeatures::WP_UNPOPULATED
            | UffdFeatures::PAGEFAULT_FLAG_WP;
        match self.uffd.api(wanted) {
            Ok(offered) if offered & wanted.bits() == wanted.bits() => Ok(()),
            Ok(offered) => Err(TrackerError::Features { wanted: wanted.bits(), offered }),
            // The kernel says no more than this about a feature it does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(TrackerError::Features { wanted: wanted.bits(), offered: 0 })
            }
            Err(error) => Err(host("UFFDIO_API", error)),
        }
    }

    fn register(&mut self) -> Result<(), TrackerError> {
        for range in &self.ranges {
            let operations = self
                .uffd
                .register(range.host_range(), RegisterMode::WP)
                .map_err(|error| host("UFFDIO_REGISTER", error))?;
            self.registered += 1;
            if operations & sys::OP_WRITEPROTECT == 0 {
                return Err(TrackerError::NotProtectable { host: range.host });
            }
        }
        Ok(())
    }

    fn protect(&mut self, populated: &[Extent]) -> Result<(), TrackerError> {
        for range in &self.ranges {
            let spans = populated.iter().filter_map(|extent| range.host_span(extent)).collect();
            let spans = match range.may_be_huge {
                true => vec![range.host_range()],
                false => joined(spans),
            };
            for step in spans.iter().cloned().flat_map(steps) {
                protect_range(&self.uffd, step)?;
            }
            self.armed.push(if range.is_lazy() { spans } else { vec![range.host_range()] });
        }
        Ok(())
    }

    /// Arms what holds data in the holes that were left alone, and notes what it is: looked up once
    /// more when it is armed, so that nothing can be written there unseen.
    fn arm_new_data(&mut self, into: &mut DirtySet) -> Result<u64, TrackerError> {
        let mut reported_bytes = 0;
        for (range, armed) in self.ranges.iter().zip(&mut self.armed) {
            if !range.is_lazy() {
                continue;
            }
            let unknown = || TrackerError::UnknownRegion { region: range.region };
            let mut regions = self.regions.iter();
            let region = regions.find(|it| it.index() == range.region).ok_or_else(unknown)?;
            let data = |offsets| {
                holes::data_between(region, offsets)
                    .map_err(|source| TrackerError::Holes { source })
            };
            let mut new = Vec::new();
            for gap in gaps(range.host_range(), armed) {
                let spans = data(range.offsets(&gap))?;
                let spans = spans.iter().filter_map(|extent| range.host_span(extent));
                // A page table at the edge may be armed already.
                new.extend(spans.map(|span| span.start.max(gap.start)..span.end.min(gap.end)));
            }
            for span in joined(new) {
                for gap in gaps(span.clone(), armed) {
                    for step in steps(gap.clone()) {
                        protect_range(&self.uffd, step)?;
                    }
                    for extent in data(range.offsets(&gap))? {
                        let bitmap = into.get_mut(range.region).ok_or_else(unknown)?;
                        bitmap.set_bytes(extent.offset..extent.end());
                        reported_bytes += extent.len;
                    }
                }
                armed.push(span);
                *armed = joined(std::mem::take(armed));
            }
        }
        Ok(reported_bytes)
    }

    fn unregister(&mut self) -> Result<(), TrackerError> {
        let mut result = Ok(());
        for range in self.ranges.drain(..).take(std::mem::take(&mut self.registered)) {
            if let Err(error) = self.uffd.unregister(range.host_range()) {
                result = result.and(Err(host("UFFDIO_UNREGISTER", error)));
            }
        }
        result
    }
}

impl DirtyTracker for UffdTracker {
    fn kind(&self) -> TrackerKind {
        match self.phases {
            ScanPhases::One => TrackerKind::UffdOnePhase,
            ScanPhases::Two => TrackerKind::UffdTwoPhase,
        }
    }

    fn page_bytes(&self, region: RegionIndex) -> Option<u64> {
        self.ranges.iter().find(|range| range.region == region).map(|range| range.page_bytes)
    }

    fn scan(&mut self, into: &mut DirtySet) -> Result<ScanStats, TrackerError> {
        let started = Instant::now();
        // A report that can't be noted would be lost, so look before the first call.
        for TrackedRange { region, offset, len, .. } in &self.ranges {
            let bitmap = into.get(*region);
            let covered = bitmap.map_or(0, |bitmap| bitmap.pages() * bitmap.page_bytes());
            if covered < offset + len {
                return Err(TrackerError::UnknownRegion { region: *region });
            }
        }
        let mut stats =
            ScanStats { reported_bytes: self.arm_new_data(into)?, ..ScanStats::default() };
        for (range, armed) in self.ranges.iter().zip(&self.armed) {
            for span in armed {
                let mut scan = RangeScan {
                    pagemap: &self.pagemap,
                    range,
                    found: &mut self.found,
                    stats: &mut stats,
                };
                scan.run(span.clone(), self.phases, into)?;
            }
        }
        stats.elapsed = started.elapsed();
        Ok(stats)
    }

    fn stop(mut self: Box<Self>) -> Result<(), TrackerError> {
        self.unregister()
    }
}

impl Drop for UffdTracker {
    fn drop(&mut self) {
        // Closing the last descriptor would unregister too, but another holder may exist.
        if let Err(error) = self.unregister() {
            tracing::warn!(%error, "could not take write protection off the guest's memory");
        }
    }
}

/// The scan of one range.
struct RangeScan<'a> {
    pagemap: &'a File,
    range: &'a TrackedRange,
    found: &'a mut [PageRegion],
    stats: &'a mut ScanStats,
}

impl RangeScan<'_> {
    fn run(
        &mut self,
        span: Range<u64>,
        phases: ScanPhases,
        into: &mut DirtySet,
    ) -> Result<(), TrackerError> {
        let flags = match phases {
            ScanPhases::One => ScanFlags::CHECK_WPASYNC | ScanFlags::WP_MATCHING,
            ScanPhases::Two => ScanFlags::CHECK_WPASYNC,
        };
        let Range { start: mut at, end } = span;
        while at < end {
            let (filled, walked) = sys::pagemap_scan(self.pagemap, at..end, flags, self.found)
                .map_err(|error| self.scan_error(at, error))?;
            self.stats.calls += 1;
            self.note(filled, into)?;
            if phases == ScanPhases::Two {
                for run in &self.found[..filled] {
                    // Not merged over gaps: what was written in a gap since the report would be
                    // protected without having been reported.
                    sys::pagemap_protect(self.pagemap, run.start..run.end)
                        .map_err(|error| self.scan_error(run.start, error))?;
                    self.stats.calls += 1;
                }
            }
            if walked <= at || walked > end {
                return Err(TrackerError::NoProgress { host: at });
            }
            at = walked;
        }
        Ok(())
    }

    /// Marks what was found before anything else can fail.
    fn note(&mut self, filled: usize, into: &mut DirtySet) -> Result<(), TrackerError> {
        let region = self.range.region;
        let bitmap = into.get_mut(region).ok_or(TrackerError::UnknownRegion { region })?;
        let Range { start: first, end } = self.range.host_range();
        for run in &self.found[..filled] {
            assert!(first <= run.start && run.start < run.end && run.end <= end);
            let offset = self.range.offset + (run.start - first);
            let len = run.end - run.start;
            bitmap.set_bytes(offset..offset + len);
            self.stats.reported_bytes += len;
        }
        self.stats.runs += filled as u64;
        Ok(())
    }

    fn scan_error(&self, at: u64, error: io::Error) -> TrackerError {
        match error.raw_os_error() {
            // PM_SCAN_CHECK_WPASYNC met memory that is not registered.
            Some(libc::EPERM) => TrackerError::MappingChanged { host: at },
            _ => host("PAGEMAP_SCAN", error),
        }
    }
}

/// In order, and those together that touch or have only a small hole between them: each is a call
/// a scan, and so is each look into what is between.
fn joined(mut spans: Vec<Range<u64>>) -> Vec<Range<u64>> {
    spans.sort_unstable_by_key(|span| span.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(spans.len());
    for span in spans {
        match joined.last_mut() {
            Some(last) if span.start <= last.end + limits::HOLE_BYTES_MIN => {
                last.end = last.end.max(span.end);
            }
            _ => joined.push(span),
        }
    }
    joined
}

/// What of `range` is in none of `spans`, which are in order and apart.
fn gaps(range: Range<u64>, spans: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut gaps = Vec::new();
    let mut at = range.start;
    for span in spans.iter().filter(|span| span.end > range.start && span.start < range.end) {
        if at < span.start {
            gaps.push(at..span.start);
        }
        at = at.max(span.end);
    }
    if at < range.end {
        gaps.push(at..range.end);
    }
    gaps
}

fn protect_range(uffd: &Uffd, range: Range<u64>) -> Result<(), TrackerError> {
    let mut left = limits::PROTECT_RETRIES_MAX;
    loop {
        match uffd.write_protect(range.clone()) {
            Ok(()) => return Ok(()),
            // The monitor is changing its mappings this moment.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && left > 0 => {
                left -= 1;
                std::thread::yield_now();
            }
            // No longer mapped, or no longer registered.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                return Err(TrackerError::MappingChanged { host: range.start });
            }
            Err(error) => return Err(host("UFFDIO_WRITEPROTECT", error)),
        }
    }
}

/// Pieces small enough not to hold the monitor's memory map for long.
fn steps(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let step = limits::PROTECT_STEP_BYTES;
    (range.start..range.end)
        .step_by(step as usize)
        .map(move |start| start..range.end.min(start + step))
}

fn host(call: &'static str, source: io::Error) -> TrackerError {
    match source.raw_os_error() {
        Some(libc::ESRCH) => TrackerError::MonitorGone,
        _ => TrackerError::Host { call, source },
    }
}
