//! Dirty bitmaps: one bit per tracking granule of one region, worked on 64 pages at a time.
//!
//! ```text
//!   words[0]                     words[1]
//!   bit 0 = page 0 … bit 63      bit 0 = page 64 …        (KVM's dirty-log layout)
//! ```
//!
//! Bits past the last page are always zero: [`DirtyBitmap::count`], the runs and the wire form rely
//! on it. Two bitmaps meet only if they have the same shape; a different one is our own mistake and
//! panics (what the peer sends is checked against the agreed shape by [`DirtyBitmap::decode`]).
//! Plain values without locks: whoever owns one may change it.

mod runs;
mod set;
mod wire;

pub use runs::Runs;
pub use set::DirtySet;
pub use wire::{DecodeError, encoded_max_bytes};

use std::ops::Range;

use crate::extent::Extent;
use crate::ids::RegionIndex;

const WORD_BITS: u64 = u64::BITS as u64;

/// Which pages of one region are dirty.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DirtyBitmap {
    pages: u64,
    page_bytes: u64,
    words: Vec<u64>,
}

/// A dirty log whose length does not fit the region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "a dirty log of {log_bytes} bytes does not cover {region_bytes} bytes in pages of \
     {log_page_bytes}"
)]
pub struct LogShapeError {
    /// Length of the log given.
    pub log_bytes: usize,
    /// Size of the region's bitmap, in bytes of guest memory.
    pub region_bytes: u64,
    /// Guest bytes that one bit of the log stands for.
    pub log_page_bytes: u64,
}

impl DirtyBitmap {
    /// A bitmap of `pages` clean pages of `page_bytes` bytes each.
    pub fn new(pages: u64, page_bytes: u64) -> Self {
        assert!(page_bytes.is_power_of_two() && pages.checked_mul(page_bytes).is_some());
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).expect("a bitmap fits in memory");
        Self { pages, page_bytes, words: vec![0; words] }
    }

    /// Number of pages covered, dirty or not.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of guest memory that one bit stands for.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The words, bit n of the whole being page n.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether `page` is dirty; pages outside are not.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[word_of(page)] >> (page % WORD_BITS) & 1 == 1
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Bytes of guest memory that are dirty.
    pub fn bytes(&self) -> u64 {
        self.count() * self.page_bytes
    }

    /// Whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Marks the pages of `range` dirty.
    pub fn set_range(&mut self, range: Range<u64>) {
        self.change(range, |word, mask| *word |= mask);
    }

    /// Marks the pages of `range` clean.
    pub fn clear_range(&mut self, range: Range<u64>) {
        self.change(range, |word, mask| *word &= !mask);
    }

    /// Marks dirty every page that the bytes of `range` touch; what lies past the end is ignored.
    pub fn set_bytes(&mut self, range: Range<u64>) {
        let first = (range.start / self.page_bytes).min(self.pages);
        let last = range.end.div_ceil(self.page_bytes).min(self.pages);
        self.set_range(first..last.max(first));
    }

    /// Marks every page clean.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Marks dirty what is dirty in `other`.
    pub fn union_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine | theirs);
    }

    /// Marks clean what is dirty in `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & !theirs);
    }

    /// Keeps dirty only what is dirty in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & theirs);
    }

    /// Marks dirty what a log in KVM's layout reports: little-endian 64-bit words, bit n of the
    /// whole being the n-th page of `log_page_bytes`. The log's granule may be finer or coarser
    /// than this bitmap's. Bits past the region's end are ignored, as KVM pads its logs.
    pub fn union_with_kvm_log(
        &mut self,
        log: &[u8],
        log_page_bytes: u64,
    ) -> Result<(), LogShapeError> {
        let region_bytes = self.pages * self.page_bytes;
        let refused = LogShapeError { log_bytes: log.len(), region_bytes, log_page_bytes };
        if !log_page_bytes.is_power_of_two() {
            return Err(refused);
        }
        let log_pages = region_bytes.div_ceil(log_page_bytes);
        let log_words = log_pages.div_ceil(WORD_BITS);
        if log.len() as u64 != log_words * 8 {
            return Err(refused);
        }
        let (words, _) = log.as_chunks::<8>();
        if log_page_bytes == self.page_bytes {
            for (word, bytes) in self.words.iter_mut().zip(words) {
                *word |= u64::from_le_bytes(*bytes);
            }
            self.trim();
            return Ok(());
        }
        let words: Vec<u64> = words.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        for run in Runs::new(&words, log_words * WORD_BITS) {
            self.set_bytes(run.start * log_page_bytes..run.end.saturating_mul(log_page_bytes));
        }
        Ok(())
    }

    /// The runs of dirty pages, in order, no two of them touching.
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(&self.words, self.pages)
    }

    /// The runs as extents of region `region`, in order.
    pub fn to_extents(&self, region: RegionIndex) -> Vec<Extent> {
        self.extents(region).collect()
    }

    /// As [`Self::to_extents`], without the vector.
    pub fn extents(&self, region: RegionIndex) -> impl Iterator<Item = Extent> + '_ {
        self.runs().map(move |run| Extent {
            region,
            offset: run.start * self.page_bytes,
            len: (run.end - run.start) * self.page_bytes,
        })
    }

    fn change(&mut self, range: Range<u64>, mut apply: impl FnMut(&mut u64, u64)) {
        assert!(range.end <= self.pages, "{range:?} of {} pages", self.pages);
        if range.is_empty() {
            return;
        }
        let (first, last) = (word_of(range.start), word_of(range.end - 1));
        let head = u64::MAX << (range.start % WORD_BITS);
        let tail = u64::MAX >> (WORD_BITS - 1 - (range.end - 1) % WORD_BITS);
        if first == last {
            return apply(&mut self.words[first], head & tail);
        }
        apply(&mut self.words[first], head);
        for word in &mut self.words[first + 1..last] {
            apply(word, u64::MAX);
        }
        apply(&mut self.words[last], tail);
    }

    fn combine(&mut self, other: &Self, op: impl Fn(u64, u64) -> u64) {
        assert!(self.pages == other.pages && self.page_bytes == other.page_bytes);
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine = op(*mine, *theirs);
        }
    }

    /// Clears the bits past the last page.
    fn trim(&mut self) {
        let used = self.pages % WORD_BITS;
        if let (1.., Some(last)) = (used, self.words.last_mut()) {
            *last &= (1 << used) - 1;
        }
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pages, page_bytes, .. } = self;
        write!(f, "DirtyBitmap({} of {pages} pages of {page_bytes} bytes)", self.count())
    }
}

fn word_of(page: u64) -> usize {
    (page / WORD_BITS) as usize
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    /// Bitmaps around word borders, sparse and dense, as page flags.
    pub(super) fn flags() -> impl Strategy<Value = Vec<bool>> {
        let dense = prop_oneof![Just(0.02), Just(0.5), Just(0.98)];
        (0..300usize, dense)
            .prop_flat_map(|(pages, share)| vec(prop::bool::weighted(share), pages..=pages))
    }

    pub(super) fn bitmap(flags: &[bool]) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::new(flags.len() as u64, PAGE);
        for (page, _) in flags.iter().enumerate().filter(|(_, dirty)| **dirty) {
            bitmap.set_range(page as u64..page as u64 + 1);
        }
        bitmap
    }

    fn naive_runs(flags: &[bool]) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (page, _) in flags.iter().enumerate().filter(|(_, dirty)| **dirty) {
            let page = page as u64;
            match runs.last_mut() {
                Some(run) if run.end == page => run.end = page + 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn runs_equal_the_naive_loop(flags in flags()) {
            let bitmap = bitmap(&flags);
            prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), naive_runs(&flags));
            prop_assert_eq!(bitmap.count(), flags.iter().filter(|dirty| **dirty).count() as u64);
            prop_assert_eq!(bitmap.is_empty(), !flags.contains(&true));
        }

        #[test]
        fn set_and_clear_ranges_equal_the_naive_loop(
            flags in flags(), a in 0..301u64, b in 0..301u64, set: bool,
        ) {
            let mut bitmap = bitmap(&flags);
            let (a, b) = (a.min(bitmap.pages()), b.min(bitmap.pages()));
            let range = a.min(b)..a.max(b);
            if set { bitmap.set_range(range.clone()) } else { bitmap.clear_range(range.clone()) }
            for (page, before) in flags.iter().enumerate() {
                let page = page as u64;
                let expected = if range.contains(&page) { set } else { *before };
                prop_assert_eq!(bitmap.contains(page), expected);
            }
        }

        #[test]
        fn words_combine_as_flags_do(pairs in vec((any::<bool>(), any::<bool>()), 0..300)) {
            let (left, right): (Vec<bool>, Vec<bool>) = pairs.iter().copied().unzip();
            let (left, right) = (bitmap(&left), bitmap(&right));
            let combined = |op: fn(&mut DirtyBitmap, &DirtyBitmap), bit: fn(bool, bool) -> bool| {
                let mut result = left.clone();
                op(&mut result, &right);
                result == bitmap(&pairs.iter().map(|(a, b)| bit(*a, *b)).collect::<Vec<_>>())
            };
            prop_assert!(combined(DirtyBitmap::union_with, |a, b| a | b));
            prop_assert!(combined(DirtyBitmap::subtract, |a, b| a & !b));
            prop_assert!(combined(DirtyBitmap::intersect, |a, b| a & b));
        }

        #[test]
        fn a_kvm_log_of_any_granule_marks_the_pages_it_covers(
            flags in flags(), log_shift in 10..15u32,
        ) {
            let log_page = 1u64 << log_shift;
            let region_bytes = flags.len() as u64 * PAGE;
            let log_pages = region_bytes.div_ceil(log_page);
            let mut log = DirtyBitmap::new(log_pages, log_page);
            for (page, _) in flags.iter().enumerate().filter(|(_, dirty)| **dirty) {
                log.set_bytes(page as u64 * PAGE..page as u64 * PAGE + 1);
            }
            let bytes: Vec<u8> = log.words().iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut bitmap = DirtyBitmap::new(flags.len() as u64, PAGE);
            bitmap.union_with_kvm_log(&bytes, log_page).unwrap();
            for page in 0..bitmap.pages() {
                let covered = log_page.div_ceil(PAGE);
                let first = page / covered * covered;
                let end = flags.len().min((first + covered) as usize);
                let expected = flags[first as usize..end].contains(&true);
                prop_assert_eq!(bitmap.contains(page), expected);
            }
        }
    }

    #[test]
    fn a_log_of_the_wrong_length_is_refused_and_padding_bits_are_ignored() {
        let mut bitmap = DirtyBitmap::new(3, PAGE);
        assert!(bitmap.union_with_kvm_log(&[0xff; 7], PAGE).is_err());
        assert!(bitmap.union_with_kvm_log(&[0xff; 16], PAGE).is_err());
        assert!(bitmap.union_with_kvm_log(&[0xff; 8], 0).is_err());
        assert!(bitmap.is_empty());
        bitmap.union_with_kvm_log(&[0xff; 8], PAGE).unwrap();
        assert_eq!(bitmap.count(), 3);
    }

    #[test]
    fn bytes_mark_every_page_they_touch() {
        let mut bitmap = DirtyBitmap::new(4, PAGE);
        bitmap.set_bytes(PAGE - 1..PAGE + 1);
        assert!(bitmap.contains(0) && bitmap.contains(1) && bitmap.count() == 2);
        bitmap.set_bytes(3 * PAGE..u64::MAX);
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), [0..2, 3..4]);
        bitmap.set_bytes(u64::MAX - 1..u64::MAX);
        assert_eq!(bitmap.count(), 3);
        let extents = bitmap.to_extents(RegionIndex(2));
        assert_eq!(extents[1], Extent { region: RegionIndex(2), offset: 3 * PAGE, len: PAGE });
    }
}
