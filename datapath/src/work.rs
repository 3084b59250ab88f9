//! One round's extents, pulled by the lanes at their own pace.
//!
//! Lanes pull rather than being dealt to: a fast lane takes more, a slow one delays only its own
//! last batch. Owned by `Arc`, shared by every lane worker; the lock is held for a few additions.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::extent::Extent;
use crate::holes::{HoleLook, HolesError, Run};
use crate::ids::RoundIndex;
use crate::limits;
use crate::zero::Sorted;

/// What is left to hand out of one round.
#[derive(Debug)]
pub struct RoundWork {
    round: RoundIndex,
    left: Mutex<VecDeque<Extent>>,
    total_bytes: AtomicU64,
    taken_bytes: AtomicU64,
}

impl RoundWork {
    /// Work over `extents`, handed out in the order given.
    pub fn new(round: RoundIndex, extents: impl IntoIterator<Item = Extent>) -> Self {
        let left: VecDeque<Extent> = extents.into_iter().collect();
        let total_bytes = left.iter().map(|e| e.len).sum();
        Self {
            round,
            left: Mutex::new(left),
            total_bytes: AtomicU64::new(total_bytes),
            taken_bytes: AtomicU64::new(0),
        }
    }

    /// The round this work belongs to.
    pub fn round(&self) -> RoundIndex {
        self.round
    }

    /// Bytes of the whole round, requeued ones counted again.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// Bytes handed out so far.
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes.load(Ordering::Relaxed)
    }

    /// What was not handed out yet, for whoever prepares for it.
    pub fn left(&self) -> Vec<Extent> {
        let left = self.left.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        left.iter().copied().collect()
    }

    /// Replaces `batch` with the next extents, at most [`limits::BATCH_EXTENTS_MAX`] of them and
    /// [`limits::BATCH_BYTES_MAX`] bytes; empty when nothing is left.
    pub fn next_batch(&self, batch: &mut Vec<Extent>) {
        self.next_batch_within(batch, limits::BATCH_EXTENTS_MAX, limits::BATCH_BYTES_MAX);
    }

    /// The same with limits of the lane's own: chunks need room in the header, and a lane that is
    /// held to a rate sends less at a time.
    pub fn next_batch_within(&self, batch: &mut Vec<Extent>, extents: usize, bytes: u64) {
        batch.clear();
        let most = whole_pages(bytes);
        let mut room = most;
        let mut left = self.left.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while room > 0 && batch.len() < extents.min(limits::BATCH_EXTENTS_MAX) {
            let Some(front) = left.front_mut() else { break };
            let len = front.len.min(room);
            batch.push(Extent { len, ..*front });
            front.offset += len;
            front.len -= len;
            room -= len;
            if front.len == 0 {
                left.pop_front();
            }
        }
        self.taken_bytes.fetch_add(most - room, Ordering::Relaxed);
    }

    /// The same, but holes are kept apart, so that nobody reads them: those that the target shall
    /// make holes too go to `sorted.hole` (if it `punches`), in whole pages and however long they
    /// are; others, and what is left of a huge page that became a hole half-way, to `sorted.zero`.
    ///
    /// Looked at under the lock: whoever takes the first part of a huge page takes all of it if it
    /// is a hole, so that one lane punches it and no other places bytes of it in the same round.
    ///
    /// # Errors
    /// If the kernel does not tell what is there.
    pub fn next_batch_around(
        &self,
        batch: &mut Vec<Extent>,
        sorted: &mut Sorted,
        (extents, bytes): (usize, u64),
        (look, punches): (&HoleLook, bool),
    ) -> Result<(), HolesError> {
        batch.clear();
        let mut room = whole_pages(bytes);
        let before = sorted.zero.len() + sorted.hole.len();
        let mut left = self.left.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        loop {
            let taken = batch.len() + sorted.zero.len() + sorted.hole.len() - before;
            if room == 0 || taken >= extents.min(limits::BATCH_EXTENTS_MAX) {
                return Ok(());
            }
            let Some(front) = left.front_mut() else { return Ok(()) };
            let len = front.len.min(limits::HOLE_RUN_BYTES_MAX);
            let run = look.first_run(Extent { len, ..*front }, room);
            // A hole that is punched is no part of the batch's bytes.
            let (into, len, takes_room) = match run? {
                Run::Hole { bytes, whole: true } if punches => (&mut sorted.hole, bytes, false),
                Run::Hole { bytes, .. } => (&mut sorted.zero, bytes.min(room), true),
                Run::Data { bytes } => (&mut *batch, bytes.min(room), true),
            };
            into.push(Extent { len, ..*front });
            room -= if takes_room { len } else { 0 };
            front.offset += len;
            front.len -= len;
            self.taken_bytes.fetch_add(len, Ordering::Relaxed);
            if front.len == 0 {
                left.pop_front();
            }
        }
    }

    /// Puts back what a failed lane had taken and never got acknowledged. Only after that lane was
    /// fenced at the target: otherwise its late bytes could overwrite newer ones.
    pub fn requeue(&self, extents: impl IntoIterator<Item = Extent>) {
        let mut left = self.left.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for extent in extents {
            self.total_bytes.fetch_add(extent.len, Ordering::Relaxed);
            left.push_back(extent);
        }
    }
}

fn whole_pages(bytes: u64) -> u64 {
    let bytes = bytes.clamp(limits::PAGE_BYTES_MIN, limits::BATCH_BYTES_MAX);
    bytes / limits::PAGE_BYTES_MIN * limits::PAGE_BYTES_MIN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RegionIndex;

    #[test]
    fn batches_cover_every_byte_once_and_keep_to_the_limits() {
        let extents = (0..100u64).map(|i| Extent {
            region: RegionIndex(0),
            offset: (i * 8) << 20,
            len: if i % 3 == 0 { 3 << 20 } else { 4096 },
        });
        let work = RoundWork::new(RoundIndex(0), extents.clone());
        let (mut batch, mut bytes) = (Vec::new(), 0);
        loop {
            work.next_batch(&mut batch);
            if batch.is_empty() {
                break;
            }
            assert!(batch.len() <= limits::BATCH_EXTENTS_MAX);
            assert!(batch.iter().map(|e| e.len).sum::<u64>() <= limits::BATCH_BYTES_MAX);
            bytes += batch.iter().map(|e| e.len).sum::<u64>();
        }
        assert_eq!(bytes, extents.map(|e| e.len).sum::<u64>());
        assert_eq!(work.taken_bytes(), work.total_bytes());
    }
}
