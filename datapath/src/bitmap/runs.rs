//! Runs of set bits, found a word at a time.

use std::ops::Range;

use super::{WORD_BITS, word_of};

/// Iterator over the runs of dirty pages of one bitmap: in order, non-empty, no two touching.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    pages: u64,
    next: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn new(words: &'a [u64], pages: u64) -> Self {
        Self { words, pages, next: 0 }
    }

    /// The first page at or after `from` whose bit, flipped by `flip`, is set; else the end.
    fn seek(&self, from: u64, flip: u64) -> u64 {
        let mut index = word_of(from);
        let Some(first) = self.words.get(index) else { return self.pages };
        let mut word = (first ^ flip) & (u64::MAX << (from % WORD_BITS));
        while word == 0 {
            index += 1;
            match self.words.get(index) {
                Some(next) => word = next ^ flip,
                None => return self.pages,
            }
        }
        (index as u64 * WORD_BITS + u64::from(word.trailing_zeros())).min(self.pages)
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.seek(self.next, 0);
        if start >= self.pages {
            self.next = self.pages;
            return None;
        }
        self.next = self.seek(start, u64::MAX);
        Some(start..self.next)
    }
}

impl std::iter::FusedIterator for Runs<'_> {}
