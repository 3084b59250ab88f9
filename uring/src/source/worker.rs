//! One source lane's worker: batches out, a barrier per round, its acknowledgement in.
//!
//! Owns its wire and the list of what is not acknowledged yet. Runs on its own thread, pinned if
//! the plan says so; ends after a close, a stop or the first error.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use pageferry_datapath::codec::Codec;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::{Ack, LaneWriter};
use pageferry_datapath::governor::Sent;
use pageferry_datapath::holes::HolesError;
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneError, LaneEvent, LaneStats};
use pageferry_datapath::limits::{BATCH_EXTENTS_MAX, CHUNKS_MAX};
use pageferry_datapath::priority::GivesWay;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::work::RoundWork;
use pageferry_datapath::zero::Sorted;

use super::narrowing::{Before, LaneNarrowing};
use super::pacing::LanePacing;
use super::packing::LanePacking;
use super::{Command, PoolCounters};
use crate::limits;
use crate::plan::HolePlan;
use crate::stats::{Tally, record};
use crate::sys::{self, Order, Parcel};
use crate::wire::{Line, Wire, WireError};

/// What a worker works on.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) lane: LaneId,
    pub(super) line: Arc<Line>,
    pub(super) memory: GuestMemory,
    pub(super) events: Sender<LaneEvent>,
    pub(super) counters: Arc<PoolCounters>,
    pub(super) packing: LanePacking,
    pub(super) narrowing: LaneNarrowing,
    pub(super) pacing: LanePacing,
    pub(super) holes: Option<HolePlan>,
}

/// Serves commands until the lane ends; the body of a worker's thread.
pub(super) fn run(
    setup: Setup,
    commands: &Receiver<Command>,
    wire: Wire,
    cpu: Option<usize>,
) -> LaneStats {
    let mut worker = Worker {
        setup,
        wire,
        writer: LaneWriter::new(),
        batch: Vec::with_capacity(BATCH_EXTENTS_MAX),
        sorted: Sorted::new(),
        unacked: Vec::new(),
        holes: Vec::new(),
        gives_way: GivesWay::default(),
        tally: Tally::new(),
    };
    worker.serve(commands);
    let Worker { setup, wire, mut tally, .. } = worker;
    setup.line.hang_up();
    tally.packing = setup.packing.finish();
    tally.narrowing = setup.narrowing.finish();
    wire.finish(&setup.line, tally, cpu)
}

/// Why a lane's work ended before it was told to close.
#[derive(Debug)]
enum Ended {
    Stopped,
    Failed(LaneError),
}

struct Worker {
    setup: Setup,
    wire: Wire,
    writer: LaneWriter,
    batch: Vec<Extent>,
    /// The same, by what has to travel.
    sorted: Sorted,
    /// What was sent since the last acknowledged barrier, neighbours joined.
    unacked: Vec<Extent>,
    /// Those of it that were sent as holes.
    holes: Vec<Extent>,
    gives_way: GivesWay,
    tally: Tally,
}

impl Worker {
    fn serve(&mut self, commands: &Receiver<Command>) {
        for command in commands {
            let ended = match command {
                Command::Round(work) => match self.round(&work) {
                    Ok(()) => continue,
                    Err(ended) => ended,
                },
                Command::Close => match self.say_close() {
                    Ok(()) => Ended::Stopped,
                    Err(ended) => ended,
                },
            };
            // Counted out and hung up first: whoever hears of the failure may rely on both.
            self.setup.counters.alive.fetch_sub(1, Ordering::AcqRel);
            self.setup.line.hang_up();
            if let Ended::Failed(error) = ended {
                let (lane, unacked) = (self.setup.lane, std::mem::take(&mut self.unacked));
                self.say(LaneEvent::Failed { lane, error, unacked });
            }
            return;
        }
    }

    /// Moves batches until the round has no more, then waits until all of them are placed.
    fn round(&mut self, work: &RoundWork) -> Result<(), Ended> {
        self.setup.packing.round_begins();
        let extents = match self.setup.packing.may_pack() {
            true => BATCH_EXTENTS_MAX - CHUNKS_MAX,
            false => BATCH_EXTENTS_MAX,
        };
        loop {
            let codec = self.setup.packing.codec();
            self.yield_to_guest(work.round(), codec);
            let bytes = self.setup.pacing.piece_bytes();
            self.sorted.clear();
            self.take(work, extents, bytes)?;
            if self.batch.is_empty() && self.sorted.entries() == 0 {
                break;
            }
            let start = Instant::now();
            self.make_batch(work, bytes)?;
            let bytes = self.send_batch(codec)?;
            record(&mut self.tally.batch_ns, start);
            let (zero_bytes, hole_bytes) = (self.sorted.zero_bytes(), self.sorted.hole_bytes());
            self.tally.moved_bytes += bytes;
            self.tally.zero_bytes += zero_bytes;
            self.tally.hole_bytes += hole_bytes;
            self.gives_way.moved(bytes + zero_bytes + hole_bytes);
            self.setup.counters.moved_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.setup.counters.zero_bytes.fetch_add(zero_bytes, Ordering::Relaxed);
        }
        let start = Instant::now();
        self.barrier(work.round())?;
        record(&mut self.tally.barrier_ns, start);
        self.unacked.clear();
        if let Some(plan) = &self.setup.holes {
            plan.look.tell(&mut self.holes);
        }
        self.setup.narrowing.acknowledged();
        self.say(LaneEvent::Placed { lane: self.setup.lane, round: work.round() });
        Ok(())
    }

    /// Takes the next extents: into the batch what is there, into what is sorted what is a hole.
    fn take(&mut self, work: &RoundWork, extents: usize, bytes: u64) -> Result<(), Ended> {
        let lane = self.setup.lane;
        let Some(plan) = &self.setup.holes else {
            work.next_batch_within(&mut self.batch, extents, bytes);
            return Ok(());
        };
        let failed = |error: HolesError| {
            let source = io::Error::other(error);
            Ended::Failed(LaneError::Host { lane, call: "looking for holes", source })
        };
        if !plan.look.is_worth_it().map_err(failed)? {
            work.next_batch_within(&mut self.batch, extents, bytes);
            return Ok(());
        }
        let before = (self.sorted.zero.len(), self.sorted.hole.len());
        let look = (&*plan.look, plan.punches);
        work.next_batch_around(&mut self.batch, &mut self.sorted, (extents, bytes), look)
            .map_err(failed)?;
        note(&mut self.unacked, &self.sorted.zero[before.0..]);
        note(&mut self.unacked, &self.sorted.hole[before.1..]);
        note(&mut self.holes, &self.sorted.hole[before.1..]);
        Ok(())
    }

    /// Packing takes time that the guest may want; only while it stands still nothing else counts.
    fn yield_to_guest(&mut self, round: RoundIndex, codec: Option<Codec>) {
        let packs = codec.is_some() && !self.setup.pacing.is_hurried();
        match round {
            RoundIndex(0) => self.gives_way.begin(),
            _ if packs => self.gives_way.begin(),
            _ => self.gives_way.end(),
        }
    }

    /// Sorts what was taken, without what the target holds; where that leaves little, takes more.
    fn make_batch(&mut self, work: &RoundWork, piece_bytes: u64) -> Result<(), Ended> {
        let lane = self.setup.lane;
        let outside = |source| Ended::Failed(LaneError::OutsideMemory { lane, source });
        let round = work.round();
        let mut taken = self.batch.iter().chain(&self.sorted.zero).chain(&self.sorted.hole);
        let first = *taken.next().expect("something was taken");
        self.setup.narrowing.begin(round, first);
        let mut before = Before::default();
        loop {
            self.setup.line.check_stop().map_err(|_| Ended::Stopped)?;
            // Noted before it is sent: a batch that fails half-way may be half placed.
            note(&mut self.unacked, &self.batch);
            let Setup { narrowing, memory, .. } = &mut self.setup;
            let sorted = &mut self.sorted;
            sorted.sort_more(memory, &self.batch).map_err(outside)?;
            narrowing.narrow(round, memory, sorted, before).map_err(outside)?;
            if !narrowing.takes_more(sorted) {
                return Ok(());
            }
            let (extents, bytes) = narrowing.limits(sorted);
            before = Before::of(sorted);
            self.take(work, extents, bytes.min(piece_bytes))?;
            if self.batch.is_empty() && Before::of(&self.sorted) == before {
                return Ok(());
            }
        }
    }

    /// Sends what was sorted; the bytes of guest memory that travelled.
    fn send_batch(&mut self, codec: Option<Codec>) -> Result<u64, Ended> {
        let lane = self.setup.lane;
        let outside = |source| Ended::Failed(LaneError::OutsideMemory { lane, source });
        if self.sorted.entries() == 0 {
            return Ok(0); // The target holds all of it.
        }
        let begun = Instant::now();
        let raw_bytes = self.sorted.data.iter().map(|extent| extent.len).sum();
        let mut parcel = self.blank()?;
        let Setup { packing, narrowing, memory, .. } = &mut self.setup;
        let sorted = &mut self.sorted;
        packing.pack(codec, memory, narrowing.bytes(), sorted, &mut parcel).map_err(outside)?;
        if narrowing.bytes().is_none() {
            for &extent in &sorted.data {
                parcel.push(memory.lease(extent).map_err(outside)?);
            }
        } else if !sorted.data.is_empty() {
            // What was hashed is what is sent, whatever the guest has written since.
            narrowing.load(&mut parcel);
        }
        self.writer.sorted(&self.sorted, parcel.header_mut());
        let wire_bytes = parcel.total_bytes();
        let lanes = self.setup.counters.alive.load(Ordering::Relaxed);
        let paced = self.setup.pacing.wait(&self.setup.line, lanes, wire_bytes);
        paced.map_err(|error| self.ended(error))?;
        let start = Instant::now();
        self.send(parcel)?;
        self.setup.narrowing.sent(raw_bytes, begun.elapsed());
        if self.setup.packing.is_governed() {
            let acked_bytes = sys::acked_bytes(self.setup.line.socket().as_fd());
            let sending = start.elapsed();
            let sent = Sent { raw_bytes, wire_bytes, sending, acked_bytes, ..Sent::default() };
            self.setup.packing.sent(sent);
        }
        Ok(raw_bytes)
    }

    fn barrier(&mut self, round: RoundIndex) -> Result<(), Ended> {
        let mut parcel = self.blank()?;
        let seq = self.writer.barrier(round, parcel.header_mut());
        self.send(parcel)?;
        let bytes = self.setup.line.receive_ack().map_err(|error| self.ended(error))?;
        let lane = self.setup.lane;
        let ack = Ack::decode(&bytes)
            .map_err(|source| Ended::Failed(LaneError::PeerMisbehaved { lane, source }))?;
        if ack == (Ack { lane, round, seq }) {
            Ok(())
        } else {
            Err(Ended::Failed(LaneError::WrongAck { lane }))
        }
    }

    /// Says that nothing follows, and waits a little for the target to hang up.
    fn say_close(&mut self) -> Result<(), Ended> {
        let mut parcel = self.blank()?;
        self.writer.close(parcel.header_mut());
        self.send(parcel)?;
        self.setup.line.await_hang_up(limits::CLOSE_WAIT_MAX);
        Ok(())
    }

    fn blank(&mut self) -> Result<Box<Parcel>, Ended> {
        let blank = self.wire.blank(&self.setup.line);
        let mut parcel = blank.map_err(|error| self.ended(error))?;
        parcel.clear(Order::HeaderFirst);
        Ok(parcel)
    }

    fn send(&mut self, parcel: Box<Parcel>) -> Result<(), Ended> {
        self.tally.wire_bytes += parcel.total_bytes();
        self.wire.send(&self.setup.line, parcel).map_err(|error| self.ended(error))
    }

    fn ended(&self, error: WireError) -> Ended {
        error
            .into_lane_error(self.setup.lane, &self.setup.line)
            .map_or(Ended::Stopped, Ended::Failed)
    }

    fn say(&self, event: LaneEvent) {
        // A driver that has gone away no longer asks.
        let _ = self.setup.events.send(event);
    }
}

/// Adds a batch to the list, joined to its end where it continues there: a lane that takes one
/// long run needs one entry, not one per MiB.
fn note(unacked: &mut Vec<Extent>, batch: &[Extent]) {
    for extent in batch {
        match unacked.last_mut() {
            Some(last) if last.region == extent.region && last.end() == extent.offset => {
                last.len += extent.len;
            }
            _ => unacked.push(*extent),
        }
    }
}
