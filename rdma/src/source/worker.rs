//! One source lane's worker: WRITEs out, a barrier per round, its acknowledgement in.
//!
//! Owns its connection and the list of what is not acknowledged yet. Runs on its own thread, pinned
//! if the plan says so; ends after a close, a stop or the first error.
//!
//! Zero pages are named in a message instead of being written: neither end's device touches them.
//! Scattered pages go as one chain of WRITEs for each batch, long runs as WRITEs of a whole batch;
//! one signal at the end of each chain. As much is in flight as keeps a fast link busy, and no
//! more, so that at the end of a round no lane sits on work that others could take.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::FramingError;
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneEvent, LaneStats};
use pageferry_datapath::limits::BATCH_EXTENTS_MAX;
use pageferry_datapath::pace::{Pacer, clock};
use pageferry_datapath::work::RoundWork;
use pageferry_datapath::zero::Sorted;

use super::{Command, PoolCounters};
use crate::connection::Dialled;
use crate::error::RdmaError;
use crate::guest::RdmaMemory;
use crate::limits::{CLOSE_WAIT_MAX, IN_FLIGHT_BYTES_MAX, PACE_TICK, TICK, ZERO_BYTES_MAX};
use crate::line::Line;
use crate::message::{Message, RUNS_MAX, SliceKey};
use crate::qp_sys::{RemoteAddr, Write};
use crate::registration::RegisteredMemory;
use crate::stats::{Tally, pin_to, record};

/// What a worker works on.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) lane: LaneId,
    pub(super) cpu: Option<usize>,
    pub(super) progress_wait: Duration,
    pub(super) events: Sender<LaneEvent>,
    pub(super) counters: Arc<PoolCounters>,
    pub(super) pacer: Arc<Pacer>,
    pub(super) memory: Arc<RdmaMemory>,
}

/// Serves commands until the lane ends; the body of a worker's thread.
pub(super) fn run(setup: Setup, dialled: Dialled, commands: &Receiver<Command>) -> LaneStats {
    let cpu = pin_to(setup.cpu);
    let memory = Arc::clone(&setup.memory);
    let Dialled { line, registered, device } = dialled;
    let (tally, sleeps) = {
        let keys = vec![None; registered.slices().count() as usize];
        let mut worker = Worker {
            setup,
            line,
            registered,
            keys,
            barriers: 0,
            batch: Vec::with_capacity(BATCH_EXTENTS_MAX),
            sorted: Sorted::new(),
            zeros: Vec::new(),
            zeros_asked: false,
            writes: Vec::with_capacity(BATCH_EXTENTS_MAX),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            unacked: Vec::new(),
            tally: Tally::new(),
        };
        worker.serve(commands);
        worker.line.hang_up();
        (worker.tally, worker.line.sleeps())
    };
    // Nothing of this lane is left: who removes the device need not wait for the other lanes' driver.
    memory.let_go_of_removed();
    tally.finish(format!("device {device}"), cpu, sleeps)
}

/// One chain of WRITEs under way.
#[derive(Debug)]
struct Chain {
    entry: u64,
    bytes: u64,
    since: Instant,
}

struct Worker {
    setup: Setup,
    line: Line,
    registered: Arc<RegisteredMemory>,
    /// The target's key of each slice, once it was asked for.
    keys: Vec<Option<RemoteAddr>>,
    barriers: u32,
    batch: Vec<Extent>,
    /// The same, by what has to travel.
    sorted: Sorted,
    /// Zero pages that the target was not told of yet, neighbours joined.
    zeros: Vec<Extent>,
    /// It was told of some, and has not answered.
    zeros_asked: bool,
    writes: Vec<Write>,
    in_flight: VecDeque<Chain>,
    in_flight_bytes: u64,
    /// What was sent since the last acknowledged barrier, neighbours joined.
    unacked: Vec<Extent>,
    tally: Tally,
}

impl Worker {
    fn serve(&mut self, commands: &Receiver<Command>) {
        loop {
            let ended = match commands.recv_timeout(TICK) {
                Ok(Command::Round(work)) => match self.round(&work) {
                    Ok(()) => continue,
                    Err(error) => Some(error),
                },
                Ok(Command::Close) => self.close().err(),
                Err(RecvTimeoutError::Timeout) => match self.line.check_device() {
                    Ok(()) => continue,
                    Err(error) => Some(error),
                },
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // Counted out and hung up first: whoever hears of the failure may rely on both.
            self.setup.counters.alive.fetch_sub(1, Ordering::AcqRel);
            self.line.qp.hang_up();
            let lane = self.setup.lane;
            if let Some(error) = ended.and_then(|error| error.into_lane_error(lane)) {
                let unacked = std::mem::take(&mut self.unacked);
                self.say(LaneEvent::Failed { lane, error, unacked });
            }
            return;
        }
    }

    /// Moves batches until the round has no more, then waits until all of them are placed.
    fn round(&mut self, work: &RoundWork) -> Result<(), RdmaError> {
        loop {
            let bytes = self.setup.pacer.piece_bytes();
            work.next_batch_within(&mut self.batch, BATCH_EXTENTS_MAX, bytes);
            if self.batch.is_empty() {
                break;
            }
            // Noted before it is sent: a batch that fails half-way may be half placed.
            note(&mut self.unacked, &self.batch);
            let sorted = self.sorted.sort(self.registered.memory(), &self.batch);
            sorted.map_err(RdmaError::OutsideMemory)?;
            self.name_zeros()?;
            self.pace()?;
            self.write_batch()?;
        }
        self.tell_zeros()?;
        let start = Instant::now();
        self.barrier(work.round())?;
        record(&mut self.tally.barrier_ns, start);
        self.unacked.clear();
        self.say(LaneEvent::Placed { lane: self.setup.lane, round: work.round() });
        Ok(())
    }

    /// Waits until the batch may go, where lanes are held to a rate.
    fn pace(&mut self) -> Result<(), RdmaError> {
        let bytes = self.sorted.data.iter().map(|extent| extent.len).sum();
        let piece = self.setup.pacer.reserve(clock(), bytes);
        loop {
            self.line.stop().check()?;
            let wait = self.setup.pacer.wait(clock(), piece);
            if wait.is_zero() {
                return Ok(());
            }
            std::thread::sleep(wait.min(PACE_TICK));
        }
    }

    /// Adds the batch's zero pages to those that the target will be told of; when it is time, tells.
    fn name_zeros(&mut self) -> Result<(), RdmaError> {
        for index in 0..self.sorted.zero.len() {
            let zero = self.sorted.zero[index];
            let named: u64 = self.zeros.iter().map(|extent| extent.len).sum();
            if self.zeros.len() == RUNS_MAX || named + zero.len > ZERO_BYTES_MAX {
                self.tell_zeros()?;
            }
            note(&mut self.zeros, &[zero]);
        }
        let bytes = self.sorted.zero_bytes();
        self.tally.zero_bytes += bytes;
        self.setup.counters.zero_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Tells the target of the zero pages, without waiting for its answer: the next question does.
    fn tell_zeros(&mut self) -> Result<(), RdmaError> {
        if self.zeros.is_empty() {
            return Ok(());
        }
        let zeros = Message::Zeros(std::mem::take(&mut self.zeros));
        self.ask(&zeros)?;
        self.zeros_asked = true;
        Ok(())
    }

    fn write_batch(&mut self) -> Result<(), RdmaError> {
        let chain_max = (self.line.qp.depth() / 2).max(1) as usize;
        for index in 0..self.sorted.data.len() {
            let mut rest = self.sorted.data[index];
            while rest.len > 0 {
                let place = self.registered.slices().locate(&rest);
                let to = self.key(place.slice)?;
                let from = self.registered.slice(place.slice, self.line.stop())?;
                let to = RemoteAddr { addr: to.addr.wrapping_add(place.offset), ..to };
                let len = place.len as u32;
                self.writes.push(Write { from, offset: place.offset, len, to });
                if self.writes.len() == chain_max {
                    self.post()?;
                }
                rest.offset += place.len;
                rest.len -= place.len;
            }
        }
        if self.writes.is_empty() { Ok(()) } else { self.post() }
    }

    /// Posts what was gathered, once there is room for it.
    fn post(&mut self) -> Result<(), RdmaError> {
        let bytes: u64 = self.writes.iter().map(|write| u64::from(write.len)).sum();
        loop {
            self.retire();
            let fits =
                self.in_flight_bytes + bytes <= IN_FLIGHT_BYTES_MAX || self.in_flight.is_empty();
            if fits && self.line.qp.free() as usize >= self.writes.len() {
                break;
            }
            self.progress()?;
        }
        let since = Instant::now();
        let entry = self.line.qp.post_writes(&self.writes)?;
        self.writes.clear();
        self.in_flight.push_back(Chain { entry, bytes, since });
        self.in_flight_bytes += bytes;
        self.tally.moved_bytes += bytes;
        self.tally.wire_bytes += bytes;
        self.setup.counters.moved_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Counts the chains that are done.
    fn retire(&mut self) {
        while let Some(entry) = self.line.next_done() {
            while let Some(chain) = self.in_flight.front()
                && chain.entry <= entry
            {
                self.in_flight_bytes -= chain.bytes;
                record(&mut self.tally.batch_ns, chain.since);
                self.in_flight.pop_front();
            }
        }
    }

    fn progress(&mut self) -> Result<(), RdmaError> {
        self.line.progress(self.setup.progress_wait)
    }

    /// A SEND after the WRITEs on the same queue pair: what it finds is placed. A completion here
    /// says only that the bytes were handed over.
    fn barrier(&mut self, round: RoundIndex) -> Result<(), RdmaError> {
        let seq = self.barriers;
        self.barriers = seq.wrapping_add(1);
        self.ask(&Message::Barrier { round, seq })?;
        let answer = self.answer()?;
        if answer != (Message::Placed { round, seq }) {
            return Err(RdmaError::WrongAnswer);
        }
        while !self.in_flight.is_empty() {
            self.retire();
            if !self.in_flight.is_empty() {
                self.progress()?;
            }
        }
        Ok(())
    }

    /// Sends a question, once the one before it is answered: the target has a receive for each.
    fn ask(&mut self, question: &Message) -> Result<(), RdmaError> {
        if std::mem::take(&mut self.zeros_asked) && self.answer()? != Message::Zeroed {
            return Err(RdmaError::WrongAnswer);
        }
        self.line.send(question, self.setup.progress_wait)
    }

    /// The answer to the question before; a target that is at it says so from time to time.
    fn answer(&mut self) -> Result<Message, RdmaError> {
        loop {
            let mut answer = None;
            self.line.until(self.setup.progress_wait, |line| {
                answer = line.message();
                answer.is_some()
            })?;
            match answer.expect("waited for") {
                Message::Patience => {}
                answer => return Ok(answer),
            }
        }
    }

    /// The target's key of a slice, asked for when it is first needed.
    fn key(&mut self, slice: u32) -> Result<RemoteAddr, RdmaError> {
        if let Some(key) = self.keys[slice as usize] {
            return Ok(key);
        }
        // What was gathered can move meanwhile.
        if !self.writes.is_empty() {
            self.post()?;
        }
        self.ask(&Message::Want { slice })?;
        let keys = match self.answer()? {
            Message::Keys(keys) => keys,
            Message::NoKey { slice, errno } => {
                let source = std::io::Error::from_raw_os_error(errno);
                return Err(RdmaError::KeyRefused { slice, source });
            }
            _ => return Err(RdmaError::WrongAnswer),
        };
        for SliceKey { slice, at } in &keys {
            let place = self.keys.get_mut(*slice as usize);
            *place.ok_or(RdmaError::Misbehaved(FramingError::Count { count: 0 }))? = Some(*at);
        }
        self.keys[slice as usize].ok_or(RdmaError::WrongAnswer)
    }

    /// Says that nothing follows, and waits a little for the target to hang up.
    fn close(&mut self) -> Result<(), RdmaError> {
        self.line.send(&Message::Close, self.setup.progress_wait)?;
        let deadline = Instant::now() + CLOSE_WAIT_MAX;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.line.wait(left) {
                Ok(true) if !left.is_zero() => {}
                _hung_up_or_late => return Ok(()),
            }
        }
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
