//! Huge pages narrowed to what changed in them: the 4 KiB pages that the target does not hold yet.
//!
//! ```text
//!   guest memory --volatile copy--> private buffer --> tag --> held already? --no--> wire
//! ```
//!
//! On hugetlbfs one byte written makes a whole huge page dirty. So a tag of each 4 KiB page that
//! travels is kept, taken from a private copy, and that copy is what is sent: the guest may write
//! meanwhile, and what was hashed is still what the target gets. When the page is sent again, and
//! its tag is that of what was sent in a round before, it is left out.
//!
//! Shared by all lanes of a pool, and gone with it: nothing is known of what other lanes brought to
//! the target. Within a pool a round begins when every lane has had its barrier acknowledged
//! ([`Held::begin`] sees to it), so what was sent in an earlier round is in the target's memory.
//! Whatever is sent goes through [`Held::narrow`], [`Held::forget`] or [`Held::zero`], or a page
//! that became something else and then what it was before would be left out wrongly.
//!
//! A tag is a page's authentication tag of AES-128-GCM under a key that nobody else has, with one
//! nonce for all. Two pages have the same one if a polynomial of degree 257 at most, whose
//! coefficients are their differences, is zero at a point that follows from the key: for any two
//! pages chosen without the key that is a chance of 257 in 2^128, and 2^-103 with the 16 bits
//! that make room for the round. Tags leave this process neither as such nor as ciphertext, so a
//! guest learns nothing to choose pages by; it can't do better than that. (The XXH3 of the digests
//! has no such bound: two flipped bits meet with a chance of about 2^-32 under any secret.)
//!
//! Deliberately not here: when it pays (see [`Gauge`]), and sending.

mod gauge;

pub use gauge::Gauge;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::extent::Extent;
use crate::ids::{RegionIndex, RoundIndex};
use crate::limits::{NARROW_TABLE_BYTES_MAX, PAGE_BYTES_MIN};
use crate::region::{GuestMemory, RegionError};

/// Memory behind one lock: a huge page of the usual size.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Pages of a block.
const BLOCK_PAGES: usize = (BLOCK_BYTES / PAGE_BYTES_MIN) as usize;
/// A page.
const PAGE: usize = PAGE_BYTES_MIN as usize;

/// Of a page: the round it was sent in, from 1 on in the lowest 16 bits, and its tag; 0 if nothing
/// is known.
type Slot = u128;

/// The slots of a block, once one of its pages was sent.
type Block = Option<Box<[Slot; BLOCK_PAGES]>>;

/// What became of the pages that were to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Narrowed {
    /// Bytes left in the buffer, of the extents that remain.
    pub used: usize,
    /// Bytes of huge pages that were hashed.
    pub hashed_bytes: u64,
    /// Of these, what something was known of.
    pub known_bytes: u64,
    /// Of these, what the target holds already.
    pub spared_bytes: u64,
}

/// See the [module](self).
pub struct Held {
    key: LessSafeKey,
    zero: u128,
    /// Of each region with huge pages.
    regions: Vec<Option<Box<[Mutex<Block>]>>>,
    table_bytes: AtomicU64,
    lanes: usize,
    /// Rounds begun, and lanes that have acknowledged since.
    begun: AtomicBool,
    acknowledged: AtomicUsize,
    /// A round began before the one before was acknowledged by all: nothing is left out any more.
    distrusted: AtomicBool,
}

impl Held {
    /// For `lanes` lanes that have sent nothing; `None` if there are no huge pages, or no randomness.
    pub fn new(memory: &GuestMemory, lanes: usize) -> Option<Self> {
        let regions = memory.regions().iter().map(|it| (it.len(), it.page_bytes()));
        Self::over(regions, lanes)
    }

    /// The same for regions of these sizes and pages.
    fn over(regions: impl Iterator<Item = (u64, u64)>, lanes: usize) -> Option<Self> {
        let blocks = |bytes: u64| (0..bytes.div_ceil(BLOCK_BYTES)).map(|_| Mutex::new(None));
        let regions: Vec<Option<Box<[Mutex<Block>]>>> = regions
            .map(|(bytes, page)| (page > PAGE_BYTES_MIN).then(|| blocks(bytes).collect()))
            .collect();
        regions.iter().any(Option::is_some).then_some(())?;
        let mut secret = [0; 16];
        getrandom::fill(&mut secret).ok()?;
        let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &secret).ok()?);
        let zero = tag(&key, &[0; PAGE]);
        Some(Self {
            key,
            zero,
            regions,
            table_bytes: AtomicU64::new(0),
            lanes,
            begun: AtomicBool::new(false),
            acknowledged: AtomicUsize::new(0),
            distrusted: AtomicBool::new(false),
        })
    }

    /// A round begins. Called before any of its work is handed out.
    pub fn begin(&self) {
        let acknowledged = self.acknowledged.swap(0, Ordering::AcqRel);
        if self.begun.swap(true, Ordering::AcqRel) && acknowledged != self.lanes {
            self.distrusted.store(true, Ordering::Release);
        }
    }

    /// The target has said to one lane that all of the round is placed.
    pub fn acknowledged(&self) {
        self.acknowledged.fetch_add(1, Ordering::AcqRel);
    }

    /// Bytes of memory that the tags take.
    pub fn table_bytes(&self) -> u64 {
        self.table_bytes.load(Ordering::Relaxed)
    }

    /// Whether the extent is of huge pages.
    pub fn covers(&self, extent: Extent) -> bool {
        self.blocks(extent.region).is_some()
    }

    /// Copies the bytes of the extents from `from` on, which are sent next, into `buffer` behind its
    /// first `used`, without those pages that the target holds; the extents become what remains.
    /// At most `spare` extents come to them: where more cuts would be needed, pages stay that could
    /// be left out.
    ///
    /// # Errors
    /// If an extent lies outside of `memory`.
    ///
    /// # Panics
    /// If `buffer` is too small.
    pub fn narrow(
        &self,
        round: RoundIndex,
        memory: &GuestMemory,
        (extents, from): (&mut Vec<Extent>, usize),
        (buffer, used): (&mut [u8], usize),
        mut spare: usize,
    ) -> Result<Narrowed, RegionError> {
        let mut narrowed = Narrowed { used, ..Narrowed::default() };
        let whole = extents.split_off(from);
        for extent in whole {
            let lease = memory.lease(extent)?;
            let mut run: Option<Extent> = None;
            let mut runs = 0;
            for at in (0..extent.len).step_by(PAGE) {
                let page = Extent { offset: extent.offset + at, len: PAGE_BYTES_MIN, ..extent };
                let copy = &mut buffer[narrowed.used..narrowed.used + PAGE];
                lease.copy_out(at, copy)?;
                let is_held = self.note(round, page, copy, &mut narrowed);
                // To leave it out is to cut, unless nothing was begun.
                let may_cut = run.is_none() || spare > 0;
                if is_held && may_cut {
                    narrowed.spared_bytes += PAGE_BYTES_MIN;
                    extents.extend(run.take());
                    continue;
                }
                narrowed.used += PAGE;
                match &mut run {
                    Some(run) => run.len += PAGE_BYTES_MIN,
                    None => {
                        if runs > 0 {
                            spare -= 1;
                        }
                        runs += 1;
                        run = Some(page);
                    }
                }
            }
            extents.extend(run);
        }
        Ok(narrowed)
    }

    /// Notes that this page is sent now, and tells whether the target holds just that.
    fn note(&self, round: RoundIndex, page: Extent, bytes: &[u8], narrowed: &mut Narrowed) -> bool {
        let Some(mut block) = self.block(page) else { return false };
        let Some(slots) = self.grown(&mut block) else { return false };
        let slot = &mut slots[index(page.offset)];
        let sent = slot_of(round, tag(&self.key, bytes));
        let before = std::mem::replace(slot, sent);
        narrowed.hashed_bytes += PAGE_BYTES_MIN;
        // What was sent in this round may be on its way still.
        let is_known = before != 0 && round_of(before) != round_of(sent);
        if !is_known || self.distrusted.load(Ordering::Acquire) {
            return false;
        }
        narrowed.known_bytes += PAGE_BYTES_MIN;
        before & TAG_MASK == sent & TAG_MASK
    }

    /// These bytes are sent, and nobody looked at them.
    pub fn forget(&self, extent: Extent) {
        self.set(extent, 0, false);
    }

    /// These pages are sent as zeros.
    pub fn zero(&self, round: RoundIndex, extent: Extent) {
        self.set(extent, slot_of(round, self.zero), true);
    }

    fn set(&self, extent: Extent, value: Slot, grow: bool) {
        let mut offset = extent.offset;
        while offset < extent.end() {
            let end = ((offset / BLOCK_BYTES + 1) * BLOCK_BYTES).min(extent.end());
            let Some(mut block) = self.block(Extent { offset, ..extent }) else { return };
            let slots = match grow {
                true => self.grown(&mut block),
                false => block.as_deref_mut(),
            };
            if let Some(slots) = slots {
                let (first, pages) = (index(offset), (end - offset) / PAGE_BYTES_MIN);
                slots[first..first + pages as usize].fill(value);
            }
            offset = end;
        }
    }

    /// The slots of a block, made if there is room for them.
    fn grown<'a>(&self, block: &'a mut Block) -> Option<&'a mut [Slot; BLOCK_PAGES]> {
        const BYTES: u64 = (BLOCK_PAGES * size_of::<Slot>()) as u64;
        if block.is_none() {
            let bytes = self.table_bytes.fetch_add(BYTES, Ordering::Relaxed);
            if bytes + BYTES > NARROW_TABLE_BYTES_MAX {
                self.table_bytes.fetch_sub(BYTES, Ordering::Relaxed);
                return None;
            }
            *block = Some(Box::new([0; BLOCK_PAGES]));
        }
        block.as_deref_mut()
    }

    fn blocks(&self, region: RegionIndex) -> Option<&[Mutex<Block>]> {
        self.regions.get(usize::from(region.0))?.as_deref()
    }

    fn block(&self, at: Extent) -> Option<MutexGuard<'_, Block>> {
        let block = self.blocks(at.region)?.get((at.offset / BLOCK_BYTES) as usize)?;
        Some(block.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("table_bytes", &self.table_bytes).finish_non_exhaustive()
    }
}

/// All but the bits that say which round.
const TAG_MASK: u128 = !0xffff;

fn slot_of(round: RoundIndex, tag: u128) -> Slot {
    // Rounds 65535 apart look like one: then a page is sent that need not be.
    (tag & TAG_MASK) | u128::from(round.0 % 0xffff + 1)
}

fn round_of(slot: Slot) -> u16 {
    slot as u16
}

/// Place of a page in its block.
fn index(offset: u64) -> usize {
    (offset % BLOCK_BYTES / PAGE_BYTES_MIN) as usize
}

/// See the [module](self). Sealing a copy is many times as fast as authenticating the page alone,
/// for which `ring` has no wide code; the copy is thrown away.
fn tag(key: &LessSafeKey, page: &[u8]) -> u128 {
    let mut copy = [0; PAGE];
    copy.copy_from_slice(page);
    let nonce = Nonce::assume_unique_for_key([0; 12]);
    let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut copy);
    let tag = tag.expect("a page is far shorter than what a key may seal");
    u128::from_le_bytes(tag.as_ref().try_into().expect("a tag of AES-GCM has 16 bytes"))
}

#[cfg(test)]
mod tests;
