//! One lane's packing: whether this batch is packed, and what that took.
//!
//! Owned by the lane's worker. The decision is the [`Governor`]'s, which all lanes of a pool share;
//! a lane adds what only it sees: a spell of memory that does not pack is sent as it is at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry_datapath::codec::{Codec, Packer};
use pageferry_datapath::governor::{Governor, Sent};
use pageferry_datapath::lane;
use pageferry_datapath::region::{GuestMemory, RegionError};
use pageferry_datapath::zero::Sorted;

use super::cpu_watch::CpuWatch;
use crate::plan::PackingWish;
use crate::sys::Parcel;

/// A batch that keeps more than this share, in percent, of its size was not worth it.
const USELESS_PERCENT: u64 = 94;
/// After so many useless batches in a row, the doubling of those sent as they are ends.
const SPELL_MAX: u32 = 5;

/// What all lanes of a pool share.
#[derive(Debug)]
pub(crate) enum Policy {
    /// Nothing is packed, for this reason.
    Not(String),
    /// Everything is.
    Always(Codec),
    /// While it pays.
    Auto { shared: Box<Mutex<Shared>>, began: Instant },
}

#[derive(Debug)]
pub(crate) struct Shared {
    governor: Governor,
    cpu: CpuWatch,
}

impl Policy {
    pub(crate) fn new(wish: &PackingWish, lanes: usize) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        match wish {
            PackingWish::Not(reason) => Self::Not(reason.clone()),
            PackingWish::Always(codec) => Self::Always(*codec),
            PackingWish::Auto(codecs) => {
                let governor = Governor::new(codecs, lanes, cpus);
                let shared = Box::new(Mutex::new(Shared { governor, cpu: CpuWatch::new() }));
                Self::Auto { shared, began: Instant::now() }
            }
        }
    }

    /// The shared part and the time since it was made.
    fn auto(&self) -> Option<(MutexGuard<'_, Shared>, Duration)> {
        match self {
            Self::Auto { shared, began } => {
                let shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                Some((shared, began.elapsed()))
            }
            _ => None,
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct LanePacking {
    policy: Arc<Policy>,
    /// This lane's place in the pool.
    place: usize,
    packer: Packer,
    /// Where samples are packed to.
    scratch: Vec<u8>,
    /// Useless batches in a row, and batches to send as they are before the next try.
    useless: u32,
    skip: u32,
    /// Of the batch being made.
    took: Duration,
    stats: lane::Packing,
}

impl LanePacking {
    pub(super) fn new(policy: Arc<Policy>, place: usize) -> Self {
        Self {
            policy,
            place,
            packer: Packer::new(),
            scratch: Vec::new(),
            useless: 0,
            skip: 0,
            took: Duration::ZERO,
            stats: lane::Packing::default(),
        }
    }

    /// Whether batches have to leave room for chunks in their header.
    pub(super) fn may_pack(&self) -> bool {
        !matches!(*self.policy, Policy::Not(_))
    }

    pub(super) fn round_begins(&self) {
        if let Some((mut shared, _)) = self.policy.auto() {
            shared.governor.round_begins();
        }
    }

    /// The codec for the next batch.
    pub(super) fn codec(&mut self) -> Option<Codec> {
        let codec = match &*self.policy {
            Policy::Not(_) => None,
            Policy::Always(codec) => Some(*codec),
            Policy::Auto { .. } => {
                let (mut shared, now) = self.policy.auto()?;
                if let Some(need) = shared.cpu.look(now) {
                    shared.governor.guests_need_cpu(now, need);
                }
                shared.governor.codec()
            }
        };
        if codec.is_some() && self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        codec
    }

    /// Packs a batch's data into the parcel, if it gets smaller by that: from `narrowed`, if that is
    /// what it is sent from.
    pub(super) fn pack(
        &mut self,
        codec: Option<Codec>,
        memory: &GuestMemory,
        narrowed: Option<&[u8]>,
        sorted: &mut Sorted,
        parcel: &mut Parcel,
    ) -> Result<(), RegionError> {
        self.took = Duration::ZERO;
        if sorted.data.is_empty() {
            return Ok(());
        }
        self.sample(memory, sorted)?;
        let Some(codec) = codec else { return Ok(()) };
        let start = Instant::now();
        let room = parcel.packing_room();
        let used = match narrowed {
            Some(bytes) => self.packer.pack_bytes(codec, bytes, room, &mut sorted.chunks),
            None => self.packer.pack(codec, memory, &sorted.data, room, &mut sorted.chunks)?,
        };
        self.took = start.elapsed();
        let raw_bytes = sorted.data.iter().map(|extent| extent.len).sum::<u64>();
        self.stats.ns += u64::try_from(self.took.as_nanos()).unwrap_or(u64::MAX);
        if used as u64 * 100 > raw_bytes * USELESS_PERCENT {
            // As it is it need not be copied; memory often has more of the same nearby.
            sorted.chunks.clear();
            self.skip = 1 << self.useless.min(SPELL_MAX);
            self.useless += 1;
            return Ok(());
        }
        self.useless = 0;
        std::mem::swap(&mut sorted.data, &mut sorted.packed);
        parcel.pack(used);
        self.stats.raw_bytes += raw_bytes;
        self.stats.packed_bytes += used as u64;
        Ok(())
    }

    /// Tells the governor what became of the batch.
    pub(super) fn sent(&self, sent: Sent) {
        if let Some((mut shared, now)) = self.policy.auto() {
            let sent = Sent { packing: self.took, ..sent };
            shared.governor.sent(now, self.place, sent);
        }
    }

    /// Whether the governor wants to know how fast bytes are acknowledged.
    pub(super) fn is_governed(&self) -> bool {
        matches!(*self.policy, Policy::Auto { .. })
    }

    /// Tries a codec on one chunk now and then.
    fn sample(&mut self, memory: &GuestMemory, sorted: &Sorted) -> Result<(), RegionError> {
        let due = self.policy.auto().and_then(|(mut shared, now)| shared.governor.sample_due(now));
        let Some(codec) = due else { return Ok(()) };
        self.scratch.resize(pageferry_datapath::codec::PAYLOAD_BYTES_MAX, 0);
        let start = Instant::now();
        let (raw, packed) = self.packer.try_out(codec, memory, &sorted.data, &mut self.scratch)?;
        let took = start.elapsed();
        if let Some((mut shared, now)) = self.policy.auto() {
            shared.governor.sampled(now, codec, raw, packed, took);
        }
        Ok(())
    }

    /// What came of it, when the lane ends.
    pub(super) fn finish(self) -> lane::Packing {
        let (codec, reason) = match &*self.policy {
            Policy::Not(reason) => (None, reason.clone()),
            Policy::Always(codec) => (Some(*codec), "asked for".to_owned()),
            Policy::Auto { .. } => {
                let (shared, _) = self.policy.auto().expect("just matched");
                let verdict = shared.governor.verdict();
                (verdict.codec, verdict.reason)
            }
        };
        lane::Packing { codec, reason, ..self.stats }
    }
}
