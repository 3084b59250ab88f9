//! A tracker fed from outside, for monitors that have a dirty log of their own, and for tests.
//!
//! ```text
//!   monitor's thread ── FedHandle::feed_kvm_log ──▶ pending set ──▶ FedTracker::scan
//! ```
//!
//! "Protect before read" is the feeder's part of the contract: a log is handed in after its pages
//! are tracked again (what `KVM_GET_DIRTY_LOG` does by itself). A feeder that keeps its log until
//! asked gives [`FedTracker::with_fetch`] a function, which every scan calls first; one that pushes
//! has to have pushed everything before the last scan.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{DirtyTracker, ScanStats, TrackerError, TrackerKind};
use crate::bitmap::{DirtySet, LogShapeError};
use crate::ids::RegionIndex;

/// Why a log was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FeedError {
    /// No such region.
    #[error("region {region} is not tracked")]
    UnknownRegion {
        /// The region asked for.
        region: RegionIndex,
    },
    /// The log does not cover the region.
    #[error("log of region {region} refused")]
    Shape {
        /// The region asked for.
        region: RegionIndex,
        /// In which way.
        #[source]
        source: LogShapeError,
    },
}

/// Where a monitor hands in what its guest wrote; may be cloned and used from any thread.
#[derive(Clone, Debug)]
pub struct FedHandle {
    pending: Arc<Mutex<DirtySet>>,
}

impl FedHandle {
    /// Hands in a dirty log of all of `region` in KVM's layout (little-endian 64-bit words, bit n
    /// being the n-th page of `log_page_bytes`).
    pub fn feed_kvm_log(
        &self,
        region: RegionIndex,
        log: &[u8],
        log_page_bytes: u64,
    ) -> Result<(), FeedError> {
        let mut pending = lock(&self.pending);
        let bitmap = pending.get_mut(region).ok_or(FeedError::UnknownRegion { region })?;
        bitmap
            .union_with_kvm_log(log, log_page_bytes)
            .map_err(|source| FeedError::Shape { region, source })
    }

    /// Hands in that the `bytes` of `region` were written, as a dirty ring reports it.
    pub fn feed_bytes(&self, region: RegionIndex, bytes: Range<u64>) -> Result<(), FeedError> {
        let mut pending = lock(&self.pending);
        let bitmap = pending.get_mut(region).ok_or(FeedError::UnknownRegion { region })?;
        bitmap.set_bytes(bytes);
        Ok(())
    }
}

/// Called by every scan before it looks; hands in what the monitor's log holds at that moment.
pub type Fetch = Box<dyn FnMut(&FedHandle) -> io::Result<()> + Send>;

/// The tracker on the other end of a [`FedHandle`].
pub struct FedTracker {
    handle: FedHandle,
    fetch: Option<Fetch>,
}

impl FedTracker {
    /// A tracker for regions shaped like those of `shape`, with nothing dirty yet.
    pub fn new(shape: &DirtySet) -> (Self, FedHandle) {
        let handle = FedHandle { pending: Arc::new(Mutex::new(shape.empty_like())) };
        (Self { handle: handle.clone(), fetch: None }, handle)
    }

    /// As [`Self::new`], with a function that each scan calls first.
    pub fn with_fetch(shape: &DirtySet, fetch: Fetch) -> Self {
        let (tracker, _) = Self::new(shape);
        Self { fetch: Some(fetch), ..tracker }
    }
}

impl DirtyTracker for FedTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Fed
    }

    fn page_bytes(&self, region: RegionIndex) -> Option<u64> {
        lock(&self.handle.pending).get(region).map(|bitmap| bitmap.page_bytes())
    }

    fn scan(&mut self, into: &mut DirtySet) -> Result<ScanStats, TrackerError> {
        let started = Instant::now();
        let mut calls = 0;
        if let Some(fetch) = &mut self.fetch {
            fetch(&self.handle).map_err(|source| TrackerError::Feed { source })?;
            calls += 1;
        }
        let mut pending = lock(&self.handle.pending);
        let (reported_bytes, runs) = (pending.bytes(), pending.extents().count() as u64);
        into.union_with(&pending);
        pending.clear();
        Ok(ScanStats { reported_bytes, runs, calls, elapsed: started.elapsed() })
    }

    fn stop(self: Box<Self>) -> Result<(), TrackerError> {
        Ok(())
    }
}

/// A feeder that panicked left whole words behind: what they say is still true.
fn lock(pending: &Mutex<DirtySet>) -> MutexGuard<'_, DirtySet> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;

    const REGION: RegionIndex = RegionIndex(0);

    #[test]
    fn a_scan_takes_what_was_fed_once() {
        let shape = DirtySet::new([(128, 4096)]);
        let (mut tracker, handle) = FedTracker::new(&shape);
        let mut log = [0; 16];
        log[8] = 0b110;
        handle.feed_kvm_log(REGION, &log, 4096).unwrap();
        handle.feed_bytes(REGION, 0..1).unwrap();
        let mut dirty = shape.empty_like();
        let stats = tracker.scan(&mut dirty).unwrap();
        assert_eq!((stats.reported_bytes, stats.runs), (3 * 4096, 2));
        let extent = Extent { region: REGION, offset: 65 * 4096, len: 8192 };
        assert_eq!(dirty.to_extents()[1], extent);
        assert_eq!(tracker.scan(&mut dirty).unwrap().reported_bytes, 0);
        assert_eq!(dirty.count(), 3);
    }

    #[test]
    fn a_fetch_runs_before_each_scan_and_its_failure_is_reported() {
        let shape = DirtySet::new([(8, 4096)]);
        let mut page = 0;
        let fetch: Fetch = Box::new(move |handle| {
            page += 1;
            if page == 3 {
                return Err(io::Error::from(io::ErrorKind::NotConnected));
            }
            handle.feed_bytes(REGION, page * 4096..page * 4096 + 1).map_err(io::Error::other)
        });
        let mut tracker = FedTracker::with_fetch(&shape, fetch);
        let mut dirty = shape.empty_like();
        tracker.scan(&mut dirty).unwrap();
        tracker.scan(&mut dirty).unwrap();
        assert_eq!(dirty.get(REGION).unwrap().runs().next(), Some(1..3));
        assert!(matches!(tracker.scan(&mut dirty), Err(TrackerError::Feed { .. })));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let (_, handle) = FedTracker::new(&DirtySet::new([(8, 4096)]));
        let region = RegionIndex(1);
        assert_eq!(
            handle.feed_kvm_log(region, &[0; 8], 4096),
            Err(FeedError::UnknownRegion { region })
        );
        assert!(matches!(
            handle.feed_kvm_log(REGION, &[0; 9], 4096),
            Err(FeedError::Shape { region: REGION, .. })
        ));
    }
}
