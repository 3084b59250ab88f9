//! The dirty bitmaps of a whole guest: one per region.

use std::ops::Range;

use super::{DecodeError, DirtyBitmap, wire};
use crate::extent::Extent;
use crate::ids::RegionIndex;
use crate::region::{GuestMemory, RegionError};

/// One [`DirtyBitmap`] per region, by the region's index.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
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

    proptest! {
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
