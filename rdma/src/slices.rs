//! Guest memory cut into slices, the same at both ends: what is registered at once.
//!
//! A slice never crosses a region, begins at a multiple of its size within it, and is a whole
//! number of the region's pages: a huge page is never in two of them.

use std::collections::BTreeSet;

use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::GuestMemory;

use crate::error::RdmaError;
use crate::limits::{SLICE_BYTES_ALL, SLICE_BYTES_MIN, SLICE_BYTES_TOUCHED, SLICES_MAX};
use crate::plan::Pin;

#[derive(Debug)]
struct Cut {
    /// Number of the region's first slice.
    first: u32,
    slice_bytes: u64,
    region_bytes: u64,
}

/// The cut of one guest's memory.
#[derive(Debug)]
pub(crate) struct Slices {
    cuts: Vec<Cut>,
    count: u32,
    slice_bytes: u64,
}

impl Slices {
    /// The cut a target chooses, for a device that registers at most `region_bytes_max` at once.
    pub(crate) fn choose(memory: &GuestMemory, pin: Pin, region_bytes_max: u64) -> Self {
        let wanted = match pin {
            Pin::All => SLICE_BYTES_ALL,
            Pin::Touched => SLICE_BYTES_TOUCHED,
        };
        // Some devices say 0 for "no limit".
        let most = 1 << region_bytes_max.checked_ilog2().unwrap_or(63);
        let mut slice_bytes = wanted.min(most).max(SLICE_BYTES_MIN);
        loop {
            match Self::cut(memory, slice_bytes) {
                Ok(slices) => return slices,
                Err(_) => slice_bytes *= 2,
            }
        }
    }

    /// The cut of slices of this size, which may be a peer's number.
    pub(crate) fn cut(memory: &GuestMemory, slice_bytes: u64) -> Result<Self, RdmaError> {
        let refused = RdmaError::SliceBytes { bytes: slice_bytes };
        if !slice_bytes.is_power_of_two() || slice_bytes < SLICE_BYTES_MIN {
            return Err(refused);
        }
        let (mut cuts, mut count) = (Vec::new(), 0u64);
        for region in memory.regions() {
            // Both are powers of two, so the larger is a multiple of the smaller.
            let of_region = slice_bytes.max(region.page_bytes());
            let (first, region_bytes) = (count as u32, region.len());
            cuts.push(Cut { first, slice_bytes: of_region, region_bytes });
            count += region_bytes.div_ceil(of_region);
            // Regions smaller than a slice can't be cut less: they don't count.
            if count > SLICES_MAX + memory.regions().len() as u64 {
                return Err(refused);
            }
        }
        Ok(Self { cuts, count: count as u32, slice_bytes })
    }

    /// The size told to the peer.
    pub(crate) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// The slice in which an extent begins, where in it, and how much of the extent it holds.
    ///
    /// # Panics
    /// If the extent does not begin in guest memory.
    pub(crate) fn locate(&self, extent: &Extent) -> Place {
        let cut = &self.cuts[usize::from(extent.region.0)];
        assert!(extent.offset < cut.region_bytes);
        let (index, offset) = (extent.offset / cut.slice_bytes, extent.offset % cut.slice_bytes);
        let len = extent.len.min(cut.slice_bytes - offset);
        Place { slice: cut.first + index as u32, offset, len }
    }

    /// All of one slice.
    ///
    /// # Panics
    /// If there is no such slice.
    pub(crate) fn extent(&self, slice: u32) -> Extent {
        assert!(slice < self.count);
        let region = self.cuts.partition_point(|cut| cut.first <= slice) - 1;
        let cut = &self.cuts[region];
        let offset = u64::from(slice - cut.first) * cut.slice_bytes;
        let len = cut.slice_bytes.min(cut.region_bytes - offset);
        Extent { region: RegionIndex(region as u16), offset, len }
    }

    /// Bytes of all slices that these runs touch, each counted once.
    pub(crate) fn bytes_of(&self, extents: &[Extent]) -> u64 {
        let touched: BTreeSet<u32> = extents.iter().flat_map(|it| self.of_extent(it)).collect();
        touched.into_iter().map(|slice| self.extent(slice).len).sum()
    }

    /// Every slice that a run of bytes touches.
    pub(crate) fn of_extent(&self, extent: &Extent) -> std::ops::RangeInclusive<u32> {
        let last = Extent { offset: extent.end() - 1, len: 1, ..*extent };
        self.locate(extent).slice..=self.locate(&last).slice
    }
}

/// Where bytes of guest memory lie among the slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slice: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

#[cfg(test)]
mod tests {
    use pageferry_datapath::backing::Backing;
    use pageferry_datapath::region::Region;

    use super::*;

    fn memory(sizes: &[u64]) -> GuestMemory {
        let regions = sizes.iter().enumerate().map(|(index, bytes)| {
            let backing = Backing::memfd("slices-test", *bytes, None).unwrap();
            Region::open(RegionIndex(index as u16), backing).unwrap()
        });
        GuestMemory::new(regions.collect())
    }

    #[test]
    fn slices_cover_every_byte_once_and_keep_to_their_region() {
        let memory = memory(&[5 << 20, 4096, 4 << 20]);
        let slices = Slices::cut(&memory, 2 << 20).unwrap();
        assert_eq!(slices.count(), 3 + 1 + 2);
        let mut covered = vec![0; 3];
        for slice in 0..slices.count() {
            let extent = slices.extent(slice);
            assert_eq!(extent.offset, covered[usize::from(extent.region.0)]);
            covered[usize::from(extent.region.0)] += extent.len;
            assert_eq!(slices.locate(&extent), Place { slice, offset: 0, len: extent.len });
            assert_eq!(slices.of_extent(&extent), slice..=slice);
        }
        assert_eq!(covered, [5 << 20, 4096, 4 << 20]);
    }

    #[test]
    fn an_extent_is_cut_where_a_slice_ends() {
        let memory = memory(&[8 << 20]);
        let slices = Slices::cut(&memory, 2 << 20).unwrap();
        let extent = Extent { region: RegionIndex(0), offset: (2 << 20) - 4096, len: 3 << 20 };
        assert_eq!(slices.locate(&extent), Place { slice: 0, offset: (2 << 20) - 4096, len: 4096 });
        assert_eq!(slices.of_extent(&extent), 0..=2);
    }

    #[test]
    fn slices_that_several_extents_touch_are_counted_once() {
        let memory = memory(&[5 << 20, 4096]);
        let slices = Slices::cut(&memory, 2 << 20).unwrap();
        let page = |region, offset| Extent { region: RegionIndex(region), offset, len: 4096 };
        assert_eq!(slices.bytes_of(&[page(0, 0), page(0, 8192)]), 2 << 20);
        assert_eq!(slices.bytes_of(&[page(0, 0), page(0, 4 << 20), page(1, 0)]), (3 << 20) + 4096);
        assert_eq!(slices.bytes_of(&[]), 0);
    }

    #[test]
    fn no_slice_is_larger_than_a_device_registers_at_once() {
        let memory = memory(&[40 << 20]);
        for (most, count) in [(8 << 20, 5), (9 << 20, 5), (16 << 20, 3), (0, 3), (u64::MAX, 3)] {
            let slices = Slices::choose(&memory, Pin::Touched, most);
            assert_eq!(slices.count(), count, "{most}");
            let longest = (0..count).map(|slice| slices.extent(slice).len).max();
            assert!(most == 0 || longest <= Some(most), "{most}");
        }
    }

    #[test]
    fn a_peers_slices_are_not_believed() {
        let memory = memory(&[8 << 20]);
        for bad in [0, 4096, 3 << 20, u64::MAX] {
            assert!(Slices::cut(&memory, bad).is_err(), "{bad}");
        }
        assert_eq!(Slices::cut(&memory, 1 << 63).unwrap().count(), 1);
    }
}
