//! The dirty bitmaps of a whole guest: one per region.

use std::ops::Range;

use super::{DecodeError, DirtyBitmap, wire};
use crate::extent::Extent;
use crate::ids::RegionIndex;
use crate::region::{GuestMemory, RegionError};

/// One [`DirtyBitmap`] per region, by the region's index.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct DirtySet {
    bitmaps: Vec<DirtyBitmap>,
}

impl DirtySet {
    /// Clean bitmaps for regions of `(pages, page_bytes)`, in order of their index.
    pub fn new(shape: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let bitmaps =
            shape.into_iter().map(|(pages, page_bytes)| DirtyBitmap::new(pages, page_bytes));
        Self { bitmaps: bitmaps.collect() }
    }

    /// As [`Self::new`], with every page dirty.
    pub fn full(shape: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut set = Self::new(shape);
        for bitmap in &mut set.bitmaps {
            bitmap.set_range(0..bitmap.pages());
        }
        set
    }

    /// Clean bitmaps in the granule of each region of `memory`.
    pub fn for_memory(memory: &GuestMemory) -> Self {
        Self::new(memory.regions().iter().map(|r| (r.len() / r.page_bytes(), r.page_bytes())))
    }

    /// Clean bitmaps of the same shape as these.
    pub fn empty_like(&self) -> Self {
        Self::new(self.shape())
    }

    /// `(pages, page_bytes)` of each region.
    pub fn shape(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.bitmaps.iter().map(|bitmap| (bitmap.pages(), bitmap.page_bytes()))
    }

    /// The bitmaps, in order of their region's index.
    pub fn bitmaps(&self) -> &[DirtyBitmap] {
        &self.bitmaps
    }

    /// The bitmap of one region, if there is such a region.
    pub fn get(&self, region: RegionIndex) -> Option<&DirtyBitmap> {
        self.bitmaps.get(usize::from(region.0))
    }

    /// The bitmap of one region, to change, if there is such a region.
    pub fn get_mut(&mut self, region: RegionIndex) -> Option<&mut DirtyBitmap> {
        self.bitmaps.get_mut(usize::from(region.0))
    }

    /// Marks dirty every page that `extent` touches; an extent of an unknown region or past the
    /// region's end is an error and changes nothing.
    pub fn set_extent(&mut self, extent: Extent) -> Result<(), RegionError> {
        let (bitmap, range) = self.checked(extent)?;
        bitmap.set_bytes(range);
        Ok(())
    }

    /// Marks clean every page that lies within `extent`; pages only partly inside stay as they
    /// are. Errors as [`Self::set_extent`].
    pub fn clear_extent(&mut self, extent: Extent) -> Result<(), RegionError> {
        let (bitmap, range) = self.checked(extent)?;
        let page_bytes = bitmap.page_bytes();
        let (first, end) = (range.start.div_ceil(page_bytes), range.end / page_bytes);
        bitmap.clear_range(first..end.max(first));
        Ok(())
    }

    /// Marks dirty what is dirty in `other`.
    pub fn union_with(&mut self, other: &Self) {
        self.zip(other, DirtyBitmap::union_with);
    }

    /// Marks clean what is dirty in `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.zip(other, DirtyBitmap::subtract);
    }

    /// Keeps dirty only what is dirty in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        self.zip(other, DirtyBitmap::intersect);
    }

    /// Marks every page of every region clean.
    pub fn clear(&mut self) {
        self.bitmaps.iter_mut().for_each(DirtyBitmap::clear);
    }

    /// Number of dirty pages, each of its region's granule.
    pub fn count(&self) -> u64 {
        self.bitmaps.iter().map(DirtyBitmap::count).sum()
    }

    /// Bytes of guest memory that are dirty.
    pub fn bytes(&self) -> u64 {
        self.bitmaps.iter().map(DirtyBitmap::bytes).sum()
    }

    /// Whether nothing is dirty.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.iter().all(DirtyBitmap::is_empty)
    }

    /// The runs of all regions as extents, in order of region and offset.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let indices = (0..).map(RegionIndex);
        indices.zip(&self.bitmaps).flat_map(|(region, bitmap)| bitmap.extents(region))
    }

    /// As [`Self::extents`], as a vector.
    pub fn to_extents(&self) -> Vec<Extent> {
        self.extents().collect()
    }

    /// The wire form: each region's bitmap with its length before it.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for bitmap in &self.bitmaps {
            let encoded = bitmap.encode();
            wire::put_varint(&mut bytes, encoded.len() as u64);
            bytes.extend_from_slice(&encoded);
        }
        bytes
    }

    /// The longest that one region of `pages` pages makes the wire form, in bytes.
    pub fn encoded_max_bytes(pages: u64) -> u64 {
        wire::encoded_max_bytes(pages) + wire::VARINT_BYTES_MAX as u64
    }

    /// Reads the wire form of a set of the agreed `shape`: `(pages, page_bytes)` per region.
    /// Allocates what that shape needs, whatever the bytes say.
    pub fn decode(
        mut bytes: &[u8],
        shape: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, DecodeError> {
        let mut bitmaps = Vec::new();
        for (pages, page_bytes) in shape {
            let len = wire::take_varint(&mut bytes)?;
            let len = usize::try_from(len).map_err(|_| DecodeError::Truncated)?;
            let (bitmap, rest) = bytes.split_at_checked(len).ok_or(DecodeError::Truncated)?;
            bitmaps.push(DirtyBitmap::decode(bitmap, pages, page_bytes)?);
            bytes = rest;
        }
        match bytes.len() {
            0 => Ok(Self { bitmaps }),
            extra_bytes => Err(DecodeError::TrailingBytes { extra_bytes }),
        }
    }

    fn checked(&mut self, extent: Extent) -> Result<(&mut DirtyBitmap, Range<u64>), RegionError> {
        let Extent { region, offset, len } = extent;
        let out_of_range = |region_bytes| RegionError::OutOfRange { offset, len, region_bytes };
        let bitmap = self.get_mut(region).ok_or(out_of_range(0))?;
        let region_bytes = bitmap.pages() * bitmap.page_bytes();
        match offset.checked_add(len) {
            Some(end) if len > 0 && end <= region_bytes => Ok((bitmap, offset..end)),
            _ => Err(out_of_range(region_bytes)),
        }
    }

    fn zip(&mut self, other: &Self, op: impl Fn(&mut DirtyBitmap, &DirtyBitmap)) {
        assert_eq!(self.bitmaps.len(), other.bitmaps.len());
        for (mine, theirs) in self.bitmaps.iter_mut().zip(&other.bitmaps) {
            op(mine, theirs);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::tests::{bitmap, flags};
    use super::*;

    const SHAPE: [(u64, u64); 2] = [(10, 4096), (3, 2 << 20)];

    fn extent(region: u16, offset: u64, len: u64) -> Extent {
        Extent { region: RegionIndex(region), offset, len }
    }

    #[test]
    fn extents_go_in_and_come_out_merged_and_counted() {
        let mut set = DirtySet::new(SHAPE);
        set.set_extent(extent(0, 4096, 4096)).unwrap();
        set.set_extent(extent(0, 8192, 4096)).unwrap();
        set.set_extent(extent(1, 4 << 20, 4096)).unwrap();
        assert_eq!(set.to_extents(), [extent(0, 4096, 8192), extent(1, 4 << 20, 2 << 20)]);
        assert_eq!((set.count(), set.bytes()), (3, 8192 + (2 << 20)));

        // A part of a huge page that arrived does not make the page clean.
        set.clear_extent(extent(1, 4 << 20, 4096)).unwrap();
        assert_eq!(set.count(), 3);
        set.clear_extent(extent(1, 4 << 20, 2 << 20)).unwrap();
        assert_eq!(set.count(), 2);
    }

    #[test]
    fn extents_outside_are_refused_and_change_nothing() {
        let mut set = DirtySet::new(SHAPE);
        for bad in [
            extent(2, 0, 4096),
            extent(0, 0, 0),
            extent(0, 36 << 10, 8192),
            extent(0, u64::MAX, 4096),
            extent(0, 4096, u64::MAX),
        ] {
            set.set_extent(bad).unwrap_err();
            set.clear_extent(bad).unwrap_err();
        }
        assert!(set.is_empty());
    }

    /// An extent of any of the regions of [`SHAPE`], whole pages or not.
    fn any_extent() -> impl Strategy<Value = Extent> {
        (0..2u16, any::<u64>(), any::<u64>()).prop_map(|(region, start, len)| {
            let (pages, page_bytes) = SHAPE[usize::from(region)];
            let region_bytes = pages * page_bytes;
            let offset = start % region_bytes;
            extent(region, offset, 1 + len % (region_bytes - offset))
        })
    }

    /// Each page of [`SHAPE`], as its region and range of bytes.
    fn every_page() -> impl Iterator<Item = (u16, Range<u64>)> {
        (0..).zip(SHAPE).flat_map(|(region, (pages, page_bytes))| {
            (0..pages).map(move |page| (region, page * page_bytes..(page + 1) * page_bytes))
        })
    }

    fn pages_where(keep: impl Fn(&(u16, Range<u64>)) -> bool) -> Vec<(u16, Range<u64>)> {
        every_page().filter(|page| keep(page)).collect()
    }

    /// The pages of `set`, one by one.
    fn pages_of(set: &DirtySet) -> Vec<(u16, Range<u64>)> {
        let holds = |(region, range): &(u16, Range<u64>)| {
            let bitmap = set.get(RegionIndex(*region)).expect("a region");
            bitmap.contains(range.start / bitmap.page_bytes())
        };
        every_page().filter(holds).collect()
    }

    fn set_of(extents: &[Extent]) -> DirtySet {
        let mut set = DirtySet::new(SHAPE);
        extents.iter().for_each(|extent| set.set_extent(*extent).unwrap());
        set
    }

    #[test]
    fn a_full_set_holds_every_page() {
        assert_eq!(pages_of(&DirtySet::full(SHAPE)), every_page().collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn extents_set_and_clear_pages_as_the_naive_loop_does(
            set in vec(any_extent(), 0..6), cleared in vec(any_extent(), 0..6),
        ) {
            let mut changed = set_of(&set);
            cleared.iter().for_each(|extent| changed.clear_extent(*extent).unwrap());
            let touched = |(region, page): &(u16, Range<u64>)| set.iter().any(|extent| {
                let end = extent.offset + extent.len;
                extent.region.0 == *region && extent.offset < page.end && page.start < end
            });
            let covered = |(region, page): &(u16, Range<u64>)| cleared.iter().any(|extent| {
                let end = extent.offset + extent.len;
                extent.region.0 == *region && extent.offset <= page.start && page.end <= end
            });
            let expected: Vec<_> =
                every_page().filter(|page| touched(page) && !covered(page)).collect();
            prop_assert_eq!(changed.count(), expected.len() as u64);
            let bytes: u64 = expected.iter().map(|(_, page)| page.end - page.start).sum();
            prop_assert_eq!(changed.bytes(), bytes);
            prop_assert_eq!(pages_of(&changed), expected);
        }

        #[test]
        fn sets_combine_page_by_page(
            left in vec(any_extent(), 0..6), right in vec(any_extent(), 0..6),
        ) {
            let (left, right) = (set_of(&left), set_of(&right));
            let (mine, theirs) = (pages_of(&left), pages_of(&right));
            let combined = |op: fn(&mut DirtySet, &DirtySet)| {
                let mut result = left.clone();
                op(&mut result, &right);
                pages_of(&result)
            };
            let either = |page: &_| mine.contains(page) || theirs.contains(page);
            let both = |page: &_| mine.contains(page) && theirs.contains(page);
            let only = |page: &_| mine.contains(page) && !theirs.contains(page);
            prop_assert_eq!(combined(DirtySet::union_with), pages_where(either));
            prop_assert_eq!(combined(DirtySet::intersect), pages_where(both));
            prop_assert_eq!(combined(DirtySet::subtract), pages_where(only));
        }

        #[test]
        fn extents_are_the_pages_in_order_and_as_few_as_can_be(set in vec(any_extent(), 0..8)) {
            let set = set_of(&set);
            let extents = set.to_extents();
            prop_assert_eq!(set_of(&extents), set);
            for two in extents.windows(2) {
                let apart = two[0].region < two[1].region
                    || two[0].offset + two[0].len < two[1].offset;
                prop_assert!(apart, "{:?}", two);
            }
        }

        #[test]
        fn harm_to_the_wire_form_is_found_or_gives_a_set_of_the_same_shape(
            set in vec(any_extent(), 0..6),
            at in any::<prop::sample::Index>(), bit in 0..8u8, cut: bool,
        ) {
            let mut bytes = set_of(&set).encode();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            match DirtySet::decode(&bytes, SHAPE) {
                Err(_) => {}
                Ok(_) if cut => return Err(TestCaseError::fail("half a set was taken")),
                Ok(set) => prop_assert!(set.shape().eq(SHAPE)),
            }
        }

        #[test]
        fn the_wire_form_is_never_longer_than_announced(regions in vec(flags(), 0..4)) {
            let set = DirtySet { bitmaps: regions.iter().map(|flags| bitmap(flags)).collect() };
            let max: u64 = set.shape().map(|(pages, _)| DirtySet::encoded_max_bytes(pages)).sum();
            prop_assert!(set.encode().len() as u64 <= max);
        }

        #[test]
        fn decode_of_encode_is_the_identity(regions in vec(flags(), 0..4)) {
            let set = DirtySet { bitmaps: regions.iter().map(|flags| bitmap(flags)).collect() };
            prop_assert_eq!(DirtySet::decode(&set.encode(), set.shape()), Ok(set));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in vec(any::<u8>(), 0..64)) {
            let _ = DirtySet::decode(&bytes, SHAPE);
        }
    }
}
