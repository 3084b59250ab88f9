//! Zero pages, found before they are sent: they travel as entries of a header, without bytes.
//!
//! Called by each lane's worker on its own batches. The guest may write meanwhile: a page that
//! stops being zero after it was looked at is dirty, and moves again.
//!
//! To look at a page that is not zero costs a cache miss, an eighth of a source lane's work where
//! every page was looked at. So only one of [`STRIDE`] is, until one is found to be zero: longer runs
//! are found whole, shorter ones now and then, and after one was found the next batch is looked at
//! page by page.

use std::io::ErrorKind;
use std::ops::Range;

use crate::codec::Chunk;
use crate::extent::Extent;
use crate::limits::{BATCH_EXTENTS_MAX, CHUNKS_MAX, PAGE_BYTES_MIN};
use crate::region::{GuestMemory, Lease, RegionError};

/// Where there were no zero pages lately, one page of so many is looked at.
const STRIDE: u64 = 16;

/// A batch, sorted by what has to travel.
#[derive(Clone, Debug, Default)]
pub struct Sorted {
    /// Extents whose bytes travel.
    pub data: Vec<Extent>,
    /// Extents that are zero throughout.
    pub zero: Vec<Extent>,
    /// Extents, of whole pages of their region, that are holes and shall be holes at the target.
    pub hole: Vec<Extent>,
    /// Extents whose bytes travel in `chunks`.
    pub packed: Vec<Extent>,
    /// What the packed extents became.
    pub chunks: Vec<Chunk>,
    /// The batch before this one had zero pages.
    dense: bool,
}

impl Sorted {
    /// Room for the largest batch.
    pub fn new() -> Self {
        Self {
            data: Vec::with_capacity(BATCH_EXTENTS_MAX),
            zero: Vec::with_capacity(BATCH_EXTENTS_MAX),
            hole: Vec::new(),
            packed: Vec::new(),
            chunks: Vec::new(),
            dense: false,
        }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.data.clear();
        self.zero.clear();
        self.hole.clear();
        self.packed.clear();
        self.chunks.clear();
    }

    /// Sorts a batch of at most [`BATCH_EXTENTS_MAX`] extents into at most as many, none of them
    /// packed: where zero and other pages alternate more often, zero ones travel as data. A header
    /// has room left for chunks if the batch leaves it.
    ///
    /// # Errors
    /// If an extent lies outside of `memory`.
    pub fn sort(&mut self, memory: &GuestMemory, batch: &[Extent]) -> Result<(), RegionError> {
        self.clear();
        self.sort_more(memory, batch)
    }

    /// Adds another batch to what is there; both together are within the limits.
    ///
    /// # Errors
    /// If an extent lies outside of `memory`.
    pub fn sort_more(&mut self, memory: &GuestMemory, batch: &[Extent]) -> Result<(), RegionError> {
        let (entries, zero_before) = (self.entries() + batch.len(), self.zero.len());
        assert!(entries <= BATCH_EXTENTS_MAX);
        let mut spare = (BATCH_EXTENTS_MAX - entries).saturating_sub(CHUNKS_MAX);
        for &extent in batch {
            self.split(&memory.lease(extent)?, extent, &mut spare)?;
        }
        self.dense = self.zero.len() > zero_before;
        Ok(())
    }

    /// Entries that its extents take in a header.
    pub fn entries(&self) -> usize {
        self.data.len() + self.zero.len() + self.hole.len() + self.packed.len()
    }

    /// Bytes of guest memory that its extents are, holes not counted.
    pub fn bytes(&self) -> u64 {
        let extents = self.data.iter().chain(&self.zero).chain(&self.packed);
        extents.map(|extent| extent.len).sum()
    }

    /// Bytes of the zero extents, holes among them.
    pub fn zero_bytes(&self) -> u64 {
        self.zero.iter().map(|extent| extent.len).sum::<u64>() + self.hole_bytes()
    }

    /// Bytes of the holes.
    pub fn hole_bytes(&self) -> u64 {
        self.hole.iter().map(|extent| extent.len).sum()
    }

    /// Cuts one extent at each change between zero and data. Each cut takes one of `spare`, and a
    /// zero run is cut out only if the cut at its end can be had too.
    fn split(
        &mut self,
        lease: &Lease,
        extent: Extent,
        spare: &mut usize,
    ) -> Result<(), RegionError> {
        let stride = if self.dense { 1 } else { STRIDE } * PAGE_BYTES_MIN;
        let mut from = 0;
        while let Some(run) = zero_run(lease, from..extent.len, stride)? {
            let cuts = if run.start == 0 { 1 } else { 2 };
            if *spare < cuts {
                break;
            }
            *spare -= cuts;
            self.push(extent, from, run.start, false);
            self.push(extent, run.start, run.end, true);
            from = run.end;
        }
        self.push(extent, from, extent.len, false);
        Ok(())
    }

    fn push(&mut self, of: Extent, from: u64, to: u64, is_zero: bool) {
        let extent = Extent { region: of.region, offset: of.offset + from, len: to - from };
        match (from == to, is_zero) {
            (true, _) => {}
            (false, true) => self.zero.push(extent),
            (false, false) => self.data.push(extent),
        }
    }
}

/// The next run of zero pages in `range`, whole, if one of its pages is among those looked at.
fn zero_run(
    lease: &Lease,
    range: Range<u64>,
    stride: u64,
) -> Result<Option<Range<u64>>, RegionError> {
    let is_zero = |at| lease.is_zero(at, PAGE_BYTES_MIN as usize);
    for at in range.clone().step_by(stride as usize) {
        if !is_zero(at)? {
            continue;
        }
        let (mut start, mut end) = (at, at + PAGE_BYTES_MIN);
        while start > range.start && is_zero(start - PAGE_BYTES_MIN)? {
            start -= PAGE_BYTES_MIN;
        }
        while end < range.end && is_zero(end)? {
            end += PAGE_BYTES_MIN;
        }
        return Ok(Some(start..end));
    }
    Ok(None)
}

/// Makes an extent read as zeros; pages that do already are left alone.
pub fn clear(memory: &GuestMemory, extent: Extent) -> Result<(), RegionError> {
    let lease = memory.lease(extent)?;
    for at in (0..extent.len).step_by(PAGE_BYTES_MIN as usize) {
        if !lease.is_zero(at, PAGE_BYTES_MIN as usize)? {
            lease.clear(at, PAGE_BYTES_MIN as usize)?;
        }
    }
    Ok(())
}

/// Makes an extent of whole pages a hole. The guest does not run here yet, and no device has the
/// memory registered: a NIC would go on writing to the pages that were freed. Where the file system
/// knows no holes it is cleared.
pub fn punch(memory: &GuestMemory, extent: Extent) -> Result<(), RegionError> {
    let lease = memory.lease(extent)?;
    match lease.region().punch(extent.offset, extent.len) {
        Err(RegionError::Host { source, .. }) if source.kind() == ErrorKind::Unsupported => {
            drop(lease);
            clear(memory, extent)
        }
        punched => punched,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;
    use crate::region::Region;

    const PAGE: u64 = PAGE_BYTES_MIN;

    fn memory(pages: u64) -> GuestMemory {
        let backing = Backing::memfd("zero-test", pages * PAGE, None).unwrap();
        GuestMemory::new(vec![Region::open(RegionIndex(0), backing).unwrap()])
    }

    fn extent(page: u64, pages: u64) -> Extent {
        Extent { region: RegionIndex(0), offset: page * PAGE, len: pages * PAGE }
    }

    /// Writes the last byte of each page that is not to be zero.
    fn set(memory: &GuestMemory, data: &[bool]) {
        let lease = memory.lease(extent(0, data.len() as u64)).unwrap();
        for (page, _) in data.iter().enumerate().filter(|(_, is_data)| **is_data) {
            lease.copy_in((page as u64 + 1) * PAGE - 1, &[1]).unwrap();
        }
    }

    #[test]
    fn runs_are_cut_where_zero_begins_and_ends() {
        let memory = memory(8);
        set(&memory, &[false, false, true, true, false, true, false, false]);
        let mut sorted = Sorted { dense: true, ..Sorted::new() };
        sorted.sort(&memory, &[extent(0, 4), extent(4, 4)]).unwrap();
        assert_eq!(sorted.zero, [extent(0, 2), extent(4, 1), extent(6, 2)]);
        assert_eq!(sorted.data, [extent(2, 2), extent(5, 1)]);
        assert_eq!(sorted.zero_bytes(), 5 * PAGE);
    }

    #[test]
    fn runs_as_long_as_the_stride_are_found_whole_and_then_every_page_is_looked_at() {
        let memory = memory(64);
        let mut data = [true; 64];
        data[5..22].fill(false);
        data[40] = false;
        set(&memory, &data);
        let mut sorted = Sorted::new();
        sorted.sort(&memory, &[extent(0, 64)]).unwrap();
        assert_eq!(sorted.zero, [extent(5, 17)]);
        sorted.sort(&memory, &[extent(0, 64)]).unwrap();
        assert_eq!(sorted.zero, [extent(5, 17), extent(40, 1)]);
        sorted.sort(&memory, &[extent(41, 23)]).unwrap();
        sorted.sort(&memory, &[extent(30, 34)]).unwrap();
        assert_eq!((&sorted.zero[..], &sorted.data[..]), (&[][..], &[extent(30, 34)][..]));
    }

    #[test]
    fn cleared_memory_is_zero_and_the_rest_is_left_alone() {
        let memory = memory(4);
        set(&memory, &[true; 4]);
        clear(&memory, extent(1, 2)).unwrap();
        let lease = memory.lease(extent(0, 4)).unwrap();
        let zero: Vec<_> =
            (0..4).map(|page| lease.is_zero(page * PAGE, PAGE as usize).unwrap()).collect();
        assert_eq!(zero, [false, true, true, false]);
        assert!(lease.is_zero(3 * PAGE, 2 * PAGE as usize).is_err());
        assert!(lease.clear(4 * PAGE, 8).is_err());
    }

    proptest! {
        #[test]
        fn every_page_is_sorted_once_and_no_data_is_called_zero(
            data in prop::collection::vec(prop::bool::weighted(0.5), 1..600),
            cuts in prop::collection::btree_set(1..600u64, 0..250),
            dense: bool,
        ) {
            let memory = memory(data.len() as u64);
            set(&memory, &data);
            let pages = data.len() as u64;
            let ends = cuts.into_iter().filter(|cut| *cut < pages).chain([pages]);
            let mut begin = 0;
            let batch: Vec<_> = ends
                .map(|end| {
                    let part = extent(begin, end - begin);
                    begin = end;
                    part
                })
                .collect();
            let mut sorted = Sorted { dense, ..Sorted::new() };
            sorted.sort(&memory, &batch).unwrap();
            prop_assert!(sorted.data.len() + sorted.zero.len() <= BATCH_EXTENTS_MAX);
            let mut seen = vec![0; data.len()];
            for (extents, is_data) in [(&sorted.data, true), (&sorted.zero, false)] {
                for extent in extents {
                    for page in extent.offset / PAGE..extent.end() / PAGE {
                        seen[page as usize] += 1;
                        prop_assert!(is_data || !data[page as usize]);
                    }
                }
            }
            prop_assert!(seen.iter().all(|times| *times == 1));
        }
    }
}
