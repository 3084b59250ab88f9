//! What a lane has placed at the target, so that after a cut only the rest is sent again.
//!
//! Kept by a lane's worker, read by the target's driver once the lane is fenced. In pages of 4 KiB,
//! whatever the region's: a batch may end within a huge page.

use crate::bitmap::DirtySet;
use crate::extent::Extent;
use crate::ids::RoundIndex;
use crate::limits::PAGE_BYTES;
use crate::region::{GuestMemory, RegionError};

/// What one lane has placed of the round it is in, and of the one before.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Since the last barrier.
    open: DirtySet,
    /// Up to the last barrier, and which round's that was.
    closed: Option<(RoundIndex, DirtySet)>,
}

impl Placed {
    /// Of a lane that has placed nothing.
    pub fn new(memory: &GuestMemory) -> Self {
        let regions = memory.regions().iter();
        let open = DirtySet::new(regions.map(|region| (region.len() / PAGE_BYTES, PAGE_BYTES)));
        Self { open, closed: None }
    }

    /// These bytes are in the target's memory.
    ///
    /// # Errors
    /// If the extent lies outside of the memory.
    pub fn extent(&mut self, extent: Extent) -> Result<(), RegionError> {
        self.open.set_extent(extent)
    }

    /// A barrier: what comes after it belongs to another round.
    pub fn barrier(&mut self, round: RoundIndex) {
        let mut next = match self.closed.take() {
            Some((_, set)) => set,
            None => self.open.empty_like(),
        };
        next.clear();
        self.closed = Some((round, std::mem::replace(&mut self.open, next)));
    }

    /// What was placed of `round`, which is the one on its way or the newest that was closed.
    fn of(&self, round: RoundIndex) -> &DirtySet {
        match &self.closed {
            Some((closed, pages)) if *closed == round => pages,
            _ => &self.open,
        }
    }
}

/// The whole pages of `shape` that `lanes` together have placed of `round`.
pub fn placed_by<'a>(
    lanes: impl IntoIterator<Item = &'a Placed>,
    round: RoundIndex,
    shape: &DirtySet,
) -> DirtySet {
    let mut whole = shape.empty_like();
    let mut lanes = lanes.into_iter();
    let Some(first) = lanes.next() else { return whole };
    let mut all = first.of(round).clone();
    for lane in lanes {
        all.union_with(lane.of(round));
    }
    let page_bytes: Vec<u64> = shape.shape().map(|(_, page_bytes)| page_bytes).collect();
    for extent in all.extents() {
        let page = page_bytes[usize::from(extent.region.0)];
        let begin = extent.offset.next_multiple_of(page);
        let end = extent.end() / page * page;
        if begin < end {
            let pages = Extent { offset: begin, len: end - begin, ..extent };
            whole.set_extent(pages).expect("it is part of an extent of the same memory");
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RegionIndex;

    const HUGE: u64 = 2 << 20;

    fn lane() -> Placed {
        let open = DirtySet::new([(4 * HUGE / PAGE_BYTES, PAGE_BYTES), (16, PAGE_BYTES)]);
        Placed { open, closed: None }
    }

    fn shape() -> DirtySet {
        DirtySet::new([(4, HUGE), (16, PAGE_BYTES)])
    }

    fn extent(region: u16, offset: u64, len: u64) -> Extent {
        Extent { region: RegionIndex(region), offset, len }
    }

    #[test]
    fn huge_pages_count_when_the_lanes_together_have_all_of_them() {
        let (mut one, mut other) = (lane(), lane());
        one.extent(extent(0, 0, HUGE + HUGE / 2)).expect("inside");
        other.extent(extent(0, HUGE + HUGE / 2, HUGE / 2 - PAGE_BYTES)).expect("inside");
        other.extent(extent(1, 8192, 4096)).expect("inside");
        let placed = placed_by([&one, &other], RoundIndex(0), &shape());
        assert_eq!(placed.to_extents(), [extent(0, 0, HUGE), extent(1, 8192, 4096)]);
        other.extent(extent(0, 2 * HUGE - PAGE_BYTES, PAGE_BYTES)).expect("inside");
        let placed = placed_by([&one, &other], RoundIndex(0), &shape());
        assert_eq!(placed.to_extents(), [extent(0, 0, 2 * HUGE), extent(1, 8192, 4096)]);
    }

    #[test]
    fn a_lane_past_its_barrier_still_counts_in_the_round_on_its_way() {
        let (mut past, mut within) = (lane(), lane());
        past.extent(extent(1, 0, 4096)).expect("inside");
        past.barrier(RoundIndex(0));
        past.extent(extent(1, 4096, 4096)).expect("inside");
        past.barrier(RoundIndex(1));
        within.extent(extent(1, 0, 8192)).expect("inside");
        within.barrier(RoundIndex(0));
        within.extent(extent(1, 12288, 4096)).expect("inside");
        let placed = placed_by([&past, &within], RoundIndex(1), &shape());
        assert_eq!(placed.to_extents(), [extent(1, 4096, 4096), extent(1, 12288, 4096)]);
    }

    #[test]
    fn without_a_lane_that_can_tell_nothing_counts() {
        assert!(placed_by([], RoundIndex(0), &shape()).is_empty());
    }
}
