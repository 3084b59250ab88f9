//! One lane's narrowing of huge pages: which batches, and the private copy they are sent from.
//!
//! Owned by the lane's worker. What the target holds, and whether looking at it pays, is known to all
//! lanes of a pool together ([`Held`], [`Gauge`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry_datapath::codec::PAYLOAD_BYTES_MAX;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::lane;
use pageferry_datapath::limits::{BATCH_BYTES_MAX, BATCH_EXTENTS_MAX, CHUNKS_MAX, PAGE_BYTES_MIN};
use pageferry_datapath::narrow::{Gauge, Held, Narrowed};
use pageferry_datapath::region::{GuestMemory, RegionError};
use pageferry_datapath::zero::Sorted;

use crate::plan::NarrowingWish;
use crate::sys::Parcel;

/// A batch with less than this in it takes more: a header and a system call for a page or two
/// would be half of the work.
const ENOUGH_BYTES: u64 = BATCH_BYTES_MAX / 2;
/// What one batch may look at: the target hears something every second, and a stop is noticed.
const LOOKED_BYTES_MAX: u64 = 256 << 20;
/// Entries that are left free for what the next batch is cut into; with fewer it waits its turn.
const CUTS_MIN: usize = 64;

/// What all lanes of a pool share.
#[derive(Debug)]
pub(crate) enum Sharing {
    /// Huge pages are sent whole, for this reason.
    Not(String),
    /// They are narrowed while that pays, or always.
    Shared { held: Box<Held>, gauge: Mutex<Gauge>, always: bool },
}

impl Sharing {
    pub(crate) fn new(wish: &NarrowingWish, memory: &GuestMemory, lanes: usize) -> Self {
        let always = match wish {
            NarrowingWish::Not(reason) => return Self::Not(reason.clone()),
            NarrowingWish::Always => true,
            NarrowingWish::Auto => false,
        };
        match Held::new(memory, lanes) {
            None => Self::Not("there are no huge pages".into()),
            Some(held) => Self::Shared { held: Box::new(held), gauge: Mutex::default(), always },
        }
    }

    /// A round begins, and none of its work was handed out yet.
    pub(crate) fn round_begins(&self) {
        if let Self::Shared { held, .. } = self {
            held.begin();
        }
    }

    fn gauge(&self) -> Option<MutexGuard<'_, Gauge>> {
        match self {
            Self::Not(_) => None,
            Self::Shared { gauge, .. } => {
                Some(gauge.lock().unwrap_or_else(PoisonError::into_inner))
            }
        }
    }
}

/// How many extents of each kind there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Before {
    data: usize,
    zero: usize,
    hole: usize,
}

impl Before {
    /// In `sorted` as it is now.
    pub(super) fn of(sorted: &Sorted) -> Self {
        Self { data: sorted.data.len(), zero: sorted.zero.len(), hole: sorted.hole.len() }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct LaneNarrowing {
    sharing: Arc<Sharing>,
    /// The bytes of the batch being made, if it is narrowed.
    copy: Vec<u8>,
    used: usize,
    active: bool,
    /// Hashed for this batch; all of the batch before was held.
    looked_bytes: u64,
    was_empty: bool,
    stats: lane::Narrowing,
}

impl LaneNarrowing {
    pub(super) fn new(sharing: Arc<Sharing>) -> Self {
        let (copy, stats) = (Vec::new(), lane::Narrowing::default());
        Self { sharing, copy, used: 0, active: false, looked_bytes: 0, was_empty: false, stats }
    }

    /// A batch begins, with this extent.
    pub(super) fn begin(&mut self, round: RoundIndex, first: Extent) {
        self.used = 0;
        let looked_bytes = std::mem::take(&mut self.looked_bytes);
        self.active = match &*self.sharing {
            Sharing::Not(_) => false,
            Sharing::Shared { held, .. } if !held.covers(first) => false,
            // A target that hears nothing for long takes the lane for dead.
            Sharing::Shared { .. } if self.was_empty && looked_bytes >= LOOKED_BYTES_MAX => false,
            Sharing::Shared { always: true, .. } => true,
            Sharing::Shared { .. } => {
                self.sharing.gauge().is_some_and(|mut gauge| gauge.wants(round, first))
            }
        };
    }

    /// The batch's bytes, if it was narrowed: they are sent, and not what guest memory holds by now.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        self.active.then(|| &self.copy[..self.used])
    }

    /// Whether another batch may be added to what is sorted.
    pub(super) fn takes_more(&self, sorted: &Sorted) -> bool {
        let room = self.room(sorted);
        let may_look = self.looked_bytes < LOOKED_BYTES_MAX;
        self.active && may_look && sorted.bytes() < ENOUGH_BYTES && room >= 2 * CUTS_MIN
    }

    /// The most extents and bytes of that batch.
    pub(super) fn limits(&self, sorted: &Sorted) -> (usize, u64) {
        (self.room(sorted) - CUTS_MIN, BATCH_BYTES_MAX - sorted.bytes())
    }

    fn room(&self, sorted: &Sorted) -> usize {
        (BATCH_EXTENTS_MAX - CHUNKS_MAX).saturating_sub(sorted.entries())
    }

    /// Looks at what was added to `sorted` since it was as `before`, and takes out what the target
    /// holds.
    pub(super) fn narrow(
        &mut self,
        round: RoundIndex,
        memory: &GuestMemory,
        sorted: &mut Sorted,
        before: Before,
    ) -> Result<(), RegionError> {
        let Sharing::Shared { held, .. } = &*self.sharing else { return Ok(()) };
        let Before { data, zero, hole } = before;
        let zeros = sorted.zero[zero..].iter().chain(&sorted.hole[hole..]);
        if !self.active {
            for extent in sorted.data[data..].iter().chain(zeros) {
                held.forget(*extent);
            }
            return Ok(());
        }
        for extent in zeros {
            held.zero(round, *extent);
        }
        let start = Instant::now();
        self.copy.resize(PAYLOAD_BYTES_MAX, 0);
        let spare = self.room(sorted);
        let (extents, buffer) = ((&mut sorted.data, data), (&mut self.copy[..], self.used));
        let narrowed = held.narrow(round, memory, extents, buffer, spare)?;
        self.used = narrowed.used;
        self.looked_bytes += narrowed.hashed_bytes;
        self.was_empty = sorted.entries() == 0;
        self.count(&narrowed, start.elapsed());
        Ok(())
    }

    fn count(&mut self, narrowed: &Narrowed, took: Duration) {
        self.stats.hashed_bytes += narrowed.hashed_bytes;
        self.stats.spared_bytes += narrowed.spared_bytes;
        self.stats.ns += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(mut gauge) = self.sharing.gauge() {
            gauge.narrowed(narrowed, took);
        }
    }

    /// Gives the batch's bytes to the parcel, as they are.
    pub(super) fn load(&mut self, parcel: &mut Parcel) {
        assert!(self.used.is_multiple_of(PAGE_BYTES_MIN as usize));
        parcel.exchange(&mut self.copy);
        parcel.pack(self.used);
    }

    /// A batch of so many bytes of guest memory took so long to be sent, once it was made.
    pub(super) fn sent(&self, bytes: u64, took: Duration) {
        if let Some(mut gauge) = self.sharing.gauge() {
            gauge.sent(bytes, took);
        }
    }

    /// The target has acknowledged all of the round.
    pub(super) fn acknowledged(&self) {
        if let Sharing::Shared { held, .. } = &*self.sharing {
            held.acknowledged();
        }
    }

    /// What came of it, when the lane ends.
    pub(super) fn finish(self) -> lane::Narrowing {
        let (reason, table_bytes) = match &*self.sharing {
            Sharing::Not(reason) => (reason.clone(), 0),
            Sharing::Shared { held, always: true, .. } => ("asked for".into(), held.table_bytes()),
            Sharing::Shared { held, .. } => {
                (self.sharing.gauge().map_or(String::new(), |it| it.reason()), held.table_bytes())
            }
        };
        lane::Narrowing { reason, table_bytes, ..self.stats }
    }
}
