//! A tracker for memory of the calling process: for monitors that carry the mover inside them, and
//! for guests without a monitor, which tests and benchmarks use.

use std::fs::File;
use std::sync::Arc;

use super::sys::Uffd;
use super::{ScanPhases, TrackedRange, TrackerError, UffdTracker};
use crate::extent::Extent;
use crate::limits;
use crate::region::Region;
use crate::thp;

impl UffdTracker {
    /// Starts tracking what this process writes through its mappings of `regions`, all of each.
    /// Writes through other mappings of the same files are not seen: whoever moves the memory, and
    /// whoever writes it, need not share one. The rest is as with [`UffdTracker::start`].
    pub fn of_own(
        regions: &[Arc<Region>],
        populated: &[Extent],
        phases: ScanPhases,
    ) -> Result<Self, TrackerError> {
        let host = |call| move |source| TrackerError::Host { call, source };
        let uffd = Uffd::own().map_err(host("userfaultfd"))?;
        let pagemap =
            File::open("/proc/self/pagemap").map_err(host("opening /proc/self/pagemap"))?;
        let ranges = regions.iter().map(|region| {
            let page_bytes = region.page_bytes();
            TrackedRange {
                region: region.index(),
                offset: 0,
                host: region.base().addr() as u64,
                len: region.len(),
                page_bytes,
                may_be_huge: page_bytes == limits::PAGE_BYTES && thp::may_be_huge(region.file()),
            }
        });
        Self::start(uffd.into_fd(), pagemap, regions, ranges.collect(), populated, phases)
    }
}
