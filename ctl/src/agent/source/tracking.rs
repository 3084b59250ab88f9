//! The guest's memory at the source: mapped, tracked, scanned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::holes::{self, HoleLook, HolesError};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_datapath::tracker::DirtyTracker;

use super::super::failure;
use super::super::monitor::SourceMonitor;

/// The guest's memory and, once armed, its tracker.
#[derive(Default)]
pub(super) struct Tracking {
    memory: GuestMemory,
    tracker: Option<Box<dyn DirtyTracker>>,
    /// Tells what became a hole.
    look: Option<Arc<HoleLook>>,
    /// Every page of which some content is at the target, or on its way there.
    sent: Option<DirtySet>,
    /// Time of each scan.
    pub(super) scans: Vec<Duration>,
    /// For how long a thread of the monitor was stopped to attach.
    pub(super) attach_stopped: Option<Duration>,
}

impl Tracking {
    /// Maps guest memory. The lanes lease it, so it is mapped before them and tracked after.
    pub(super) fn map(&mut self, monitor: &mut dyn SourceMonitor) -> Result<(), Failure> {
        self.memory = monitor.map_memory()?;
        let gives_back = monitor.facts().gives_memory_back.is_some();
        let look = HoleLook::new(&self.memory, gives_back)
            .map_err(|error| failure::host("guest memory", &error, None))?;
        self.look = Some(Arc::new(look));
        Ok(())
    }

    /// Tells what became a hole, once the memory is mapped.
    pub(super) fn look(&self) -> Option<&Arc<HoleLook>> {
        self.look.as_ref()
    }

    /// Guest memory; empty before it was mapped.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Arms tracking; every page that is not a hole.
    pub(super) fn arm(&mut self, monitor: &mut dyn SourceMonitor) -> Result<DirtySet, Failure> {
        let attached = monitor.attach(&self.memory)?;
        self.tracker = Some(attached.tracker);
        self.attach_stopped = Some(attached.stopped);
        // Only now: what got populated before tracking was armed is seen here, what gets populated
        // after it is reported by the first scan.
        let extents = holes::guest_data_extents(&self.memory)
            .map_err(|error| failure::host("first pass", &error, None))?;
        let mut populated = DirtySet::for_memory(&self.memory);
        for extent in extents {
            populated
                .set_extent(extent)
                .map_err(|error| failure::host("first pass", &error, None))?;
        }
        self.sent = Some(populated.clone());
        Ok(populated)
    }

    /// Pages written since the scan before; they are protected again.
    pub(super) fn scan(&mut self) -> Result<DirtySet, Failure> {
        let tracker = self.tracker.as_mut().expect("tracking is armed before scans");
        let mut found = self.sent.as_ref().expect("set with the tracker").empty_like();
        let stats = tracker
            .scan(&mut found)
            .map_err(|error| failure::host("dirty tracking", &error, None))?;
        self.scans.push(stats.elapsed);
        self.leave_holes(&mut found)
            .and_then(|()| self.find_punched(&mut found))
            .map_err(|error| failure::host("dirty tracking", &error, None))?;
        Ok(found)
    }

    /// A scan may report holes whose page table is new. What was never sent and is a hole is one at
    /// the target too: moving it would only populate it on both sides. (What was sent and became a
    /// hole since moves as zeros.)
    fn leave_holes(&mut self, found: &mut DirtySet) -> Result<(), HolesError> {
        let sent = self.sent.as_mut().expect("set with the tracker");
        for hole in self.look.iter().flat_map(|look| look.take_told()) {
            sent.clear_extent(hole).expect("a hole lies within its region");
        }
        let mut fresh = found.clone();
        fresh.subtract(sent);
        if !fresh.is_empty() {
            fresh.subtract(&holes::data_within(&self.memory, &fresh)?);
            found.subtract(&fresh);
        }
        sent.union_with(found);
        Ok(())
    }

    /// Adds what was sent and is a hole now: no scan reports what the guest gave back.
    fn find_punched(&mut self, found: &mut DirtySet) -> Result<(), HolesError> {
        let sent = self.sent.as_mut().expect("set with the tracker");
        let Some(look) = &self.look else { return Ok(()) };
        let punched = look.find_punched(&self.memory, sent, Instant::now())?;
        if !punched.is_empty() {
            found.union_with(&punched);
            if !look.is_told() {
                // It gets zeros, in parts; nobody says when that is all of a page.
                sent.subtract(&punched);
            }
        }
        Ok(())
    }

    /// Removes the tracking; the memory stays mapped while somebody leases it.
    pub(super) fn disarm(&mut self) {
        self.tracker = None;
    }
}
