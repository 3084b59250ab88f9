//! Self-verifying guest pages: what a page holds, how it is rewritten and how it is checked.
//!
//! Owned by the guest program; each page has one writer at a time, named by the caller. The words
//! are atomics so that a page lost in a migration is a wrong number and not undefined behaviour.
//! This file knows nothing of threads, rates or the console.
//!
//! ```text
//! word     0       1          2 ..= 510                                      511
//!      +-------+----------+---------------------------------------------+----------+
//!      | index | sequence | fill(index, sequence or 0), incompressible  | seal     |
//!      +-------+----------+---------------------------------------------+----------+
//! ```
//! With stride 1 every fill word depends on the sequence, so a page mixed of two versions is
//! found wherever the seam lies. A larger stride rewrites every n-th word only: the page is as
//! dirty for the tracker and takes a fraction of the processor.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes of the pages that the guest program writes and checks.
pub const PAGE_BYTES: usize = 4096;
/// 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
const SEAL_WORD: usize = PAGE_WORDS - 1;
const FIRST_FILL_WORD: usize = 2;

/// Why a page is not what was last written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The page that was checked.
    pub page: usize,
    /// The first word that is wrong.
    pub word: usize,
    /// What it should hold.
    pub expected: u64,
    /// What it holds.
    pub found: u64,
}

/// A run of page-aligned memory filled with self-verifying pages.
pub struct PageStore {
    words: Vec<AtomicU64>,
    first_word: usize,
    page_count: usize,
    stride: usize,
    /// From this word on all of a page's fill is the same word.
    noise_until: usize,
}

impl PageStore {
    /// Allocates `page_count` pages, not yet filled. `stride` is in words, at least 1.
    pub fn new(page_count: usize, stride: usize) -> Self {
        let mut words = Vec::new();
        // One page more than asked, so that the pages can start where the processor's do.
        words.resize_with((page_count + 1) * PAGE_WORDS, || AtomicU64::new(0));
        let past = words.as_ptr().addr() % PAGE_BYTES;
        let first_word = if past == 0 { 0 } else { (PAGE_BYTES - past) / 8 };
        let (stride, noise_until) = (stride.max(1), PAGE_WORDS);
        Self { words, first_word, page_count, stride, noise_until }
    }

    /// The same with pages of whose fill this part, in percent, is one word over and over: what a
    /// codec makes next to nothing of.
    pub fn packing(mut self, percent: usize) -> Self {
        self.noise_until = PAGE_WORDS - PAGE_WORDS * percent.min(100) / 100;
        self
    }

    /// Number of pages.
    pub fn page_count(&self) -> usize {
        self.page_count
    }

    /// Writes the whole of `page` with sequence 0.
    pub fn fill(&self, page: usize) {
        let key = key(page, 0);
        let words = self.page(page);
        words[0].store(page as u64, Relaxed);
        words[1].store(0, Relaxed);
        for (word, cell) in words.iter().enumerate().take(SEAL_WORD).skip(FIRST_FILL_WORD) {
            cell.store(self.content(key, word), Relaxed);
        }
        words[SEAL_WORD].store(!key, Relaxed);
    }

    /// Writes `page` anew with `sequence`: every `stride`-th fill word, the header and the seal.
    pub fn rewrite(&self, page: usize, sequence: u64) {
        let key = key(page, sequence);
        let words = self.page(page);
        words[0].store(page as u64, Relaxed);
        words[1].store(sequence, Relaxed);
        for word in (FIRST_FILL_WORD..SEAL_WORD).step_by(self.stride) {
            words[word].store(self.content(key, word), Relaxed);
        }
        words[SEAL_WORD].store(!key, Relaxed);
    }

    /// Checks the words that [`PageStore::rewrite`] writes.
    pub fn verify_rewritten(&self, page: usize, sequence: u64) -> Result<(), PageFault> {
        let key = key(page, sequence);
        let words = self.page(page);
        let check = |word: usize, expected: u64| {
            let found = words[word].load(Relaxed);
            if found == expected { Ok(()) } else { Err(PageFault { page, word, expected, found }) }
        };
        check(1, sequence)?;
        check(0, page as u64)?;
        for word in (FIRST_FILL_WORD..SEAL_WORD).step_by(self.stride) {
            check(word, self.content(key, word))?;
        }
        check(SEAL_WORD, !key)
    }

    /// Checks every word of `page`.
    pub fn verify_whole(&self, page: usize, sequence: u64) -> Result<(), PageFault> {
        self.verify_rewritten(page, sequence)?;
        if self.stride == 1 {
            return Ok(());
        }
        let initial = key(page, 0);
        let words = self.page(page);
        for (word, cell) in words.iter().enumerate().take(SEAL_WORD).skip(FIRST_FILL_WORD) {
            if (word - FIRST_FILL_WORD).is_multiple_of(self.stride) {
                continue;
            }
            let (expected, found) = (self.content(initial, word), cell.load(Relaxed));
            if found != expected {
                return Err(PageFault { page, word, expected, found });
            }
        }
        Ok(())
    }

    fn content(&self, key: u64, word: usize) -> u64 {
        fill_word(key, word.min(self.noise_until))
    }

    fn page(&self, page: usize) -> &[AtomicU64] {
        assert!(page < self.page_count, "page {page} of {}", self.page_count);
        let first = self.first_word + page * PAGE_WORDS;
        &self.words[first..first + PAGE_WORDS]
    }
}

fn key(page: usize, sequence: u64) -> u64 {
    mix((page as u64).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ mix(sequence))
}

/// One word of incompressible fill; stateless, so that any word can be checked by itself.
pub(in crate::lab) fn fill_word(key: u64, word: usize) -> u64 {
    // xorshift over a Weyl step: no table, few operations for the emulator, no visible pattern.
    let mut x = key.wrapping_add((word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x ^= x >> 29;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 32)
}

/// splitmix64's finaliser: neighbouring inputs share no bits.
pub(in crate::lab) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_start_on_page_boundaries() {
        let store = PageStore::new(3, 1);
        for page in 0..3 {
            assert_eq!(store.page(page).as_ptr().addr() % PAGE_BYTES, 0);
        }
    }

    #[test]
    fn a_part_that_packs_is_checked_like_all_else() {
        let store = PageStore::new(1, 1).packing(75);
        store.fill(0);
        store.rewrite(0, 3);
        assert_eq!(store.verify_whole(0, 3), Ok(()));
        let bytes: Vec<u8> =
            store.page(0).iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        let packed = lz4_flex::block::compress(&bytes).len();
        assert!((PAGE_BYTES / 5..PAGE_BYTES / 3).contains(&packed), "{packed}");
        store.page(0)[400].fetch_xor(1, Relaxed);
        assert!(store.verify_whole(0, 3).is_err());
    }

    #[test]
    fn a_rewritten_page_verifies_at_its_sequence_only() {
        for stride in [1, 8, 64] {
            let store = PageStore::new(2, stride);
            store.fill(1);
            assert_eq!(store.verify_whole(1, 0), Ok(()));
            store.rewrite(1, 7);
            assert_eq!(store.verify_whole(1, 7), Ok(()));
            assert_eq!(store.verify_rewritten(1, 7), Ok(()));
            assert!(store.verify_rewritten(1, 6).is_err(), "a stale page must be found");
        }
    }

    #[test]
    fn any_flipped_word_is_found() {
        for stride in [1, 8] {
            let store = PageStore::new(1, stride);
            store.fill(0);
            store.rewrite(0, 3);
            for word in 0..PAGE_WORDS {
                let good = store.page(0)[word].load(Relaxed);
                store.page(0)[word].store(good ^ 1, Relaxed);
                let fault = store.verify_whole(0, 3).expect_err("a flipped word must be found");
                assert_eq!(fault.word, word);
                store.page(0)[word].store(good, Relaxed);
            }
        }
    }

    #[test]
    fn fill_does_not_compress() {
        let store = PageStore::new(64, 1);
        let mut bytes = Vec::new();
        for page in 0..64 {
            store.fill(page);
            bytes.extend(store.page(page).iter().flat_map(|w| w.load(Relaxed).to_le_bytes()));
        }
        let packed = lz4_flex::block::compress(&bytes);
        assert!(packed.len() > bytes.len() * 99 / 100, "{} of {}", packed.len(), bytes.len());
    }
}
