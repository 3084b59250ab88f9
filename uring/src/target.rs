//! The target's end of a lane: bytes straight into guest memory, barriers acknowledged.
//!
//! A [`TargetLane`] is owned by the target's driver; its worker owns the wire. The acceptor has
//! read the hello and judged the ticket before ([`greet`](crate::greet)); from here on the peer may
//! name memory, and every name is checked.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::Sender;
use pageferry_datapath::codec::{UnpackError, Unpacker};
use pageferry_datapath::framing::{Ack, Frame, FramingError, LaneReader};
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneError, LaneEvent, LaneStats};
use pageferry_datapath::placed::Placed;
use pageferry_datapath::priority::GivesWay;
use pageferry_datapath::region::{GuestMemory, RegionError};
use pageferry_datapath::zero::{self, Sorted};
use rustls::Connection;

use crate::plan::{TargetLaneConfig, ZeroCopyWish};
use crate::socket;
use crate::stats::{Tally, record};
use crate::sys::{self, Order, Parcel};
use crate::wire::{Line, Wire, WireError};
use crate::worker::{Start, Worker};

/// A connection whose hello was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// Its TLS, if it is encrypted; nothing that was received is left in it.
    pub tls: Option<Box<Connection>>,
}

impl From<TcpStream> for Accepted {
    fn from(stream: TcpStream) -> Self {
        Self { stream, tls: None }
    }
}

/// One admitted lane and its worker. Dropping it fences it.
#[derive(Debug)]
pub struct TargetLane {
    lane: LaneId,
    line: Arc<Line>,
    placed: Arc<Mutex<Placed>>,
    worker: Option<Worker>,
}

impl TargetLane {
    /// Starts receiving into `memory` on a connection whose hello was accepted. The first frame
    /// may have arrived already.
    pub fn start(
        accepted: impl Into<Accepted>,
        lane: LaneId,
        memory: GuestMemory,
        config: &TargetLaneConfig,
        events: Sender<LaneEvent>,
    ) -> Result<Self, LaneError> {
        let Accepted { stream, tls } = accepted.into();
        let line = socket::tune(&stream, config.tuning)
            .and_then(|()| match tls {
                None => Line::new(stream, config.progress_wait),
                Some(tls) => Line::encrypted(stream, tls, config.progress_wait),
            })
            .map_err(|source| LaneError::Host { lane, call: "setsockopt", source })?;
        let line = Arc::new(line);
        let zero_copy = ZeroCopyWish::Not("a target sends nothing");
        let start = Start { end: "target", lane, cpu: config.cpu, path: config.path, zero_copy };
        let theirs = Arc::clone(&line);
        let placed = Arc::new(Mutex::new(Placed::new(&memory)));
        let noted = Arc::clone(&placed);
        let codecs = config.codecs.clone();
        let hole_pages: Vec<u64> = match config.holes {
            true => memory.regions().iter().map(|region| region.page_bytes()).collect(),
            false => Vec::new(),
        };
        let worker = Worker::start(start, &line, move |wire, cpu| {
            let mut receiver = Receiver::new(lane, theirs, memory, noted, events, wire);
            receiver.reader = receiver.reader.unpacking(codecs).punching(hole_pages);
            receiver.serve();
            receiver.finish(cpu)
        })?;
        Ok(Self { lane, line, placed, worker: Some(worker) })
    }

    /// Where its packets come from: the kernel's number for the receive queue, and the core that
    /// takes them from there; each `None` where the kernel does not tell.
    pub fn incoming(&self) -> (Option<u32>, Option<usize>) {
        sys::incoming(self.line.socket().as_fd())
    }

    /// Its number in the session.
    pub fn lane(&self) -> LaneId {
        self.lane
    }

    /// Closes the connection; when it returns, no byte of this lane will ever be placed again.
    /// What was placed before is told beside the counters.
    pub fn fence(mut self) -> (LaneStats, Placed) {
        self.line.stop();
        let stats = self.join().expect("a lane is fenced once");
        let placed = self.placed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        (stats, placed)
    }

    /// Waits for a lane that has said it is [`Closed`](LaneEvent::Closed) or
    /// [`Failed`](LaneEvent::Failed); on any other it waits until then.
    pub fn finish(mut self) -> LaneStats {
        self.join().expect("a lane is finished once")
    }

    fn join(&mut self) -> Option<LaneStats> {
        self.worker.take().map(Worker::join)
    }
}

impl Drop for TargetLane {
    fn drop(&mut self) {
        self.line.stop();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join_quietly();
        }
    }
}

/// How a lane ended.
enum Ended {
    Closed,
    Stopped,
    Failed(LaneError),
}

/// What the worker works with.
struct Receiver {
    lane: LaneId,
    line: Arc<Line>,
    memory: GuestMemory,
    /// Locked by nobody else before the lane is fenced.
    placed: Arc<Mutex<Placed>>,
    events: Sender<LaneEvent>,
    wire: Wire,
    reader: LaneReader,
    extents: Sorted,
    unpacker: Unpacker,
    /// Until the first pass is placed.
    gives_way: GivesWay,
    tally: Tally,
}

impl Receiver {
    fn new(
        lane: LaneId,
        line: Arc<Line>,
        memory: GuestMemory,
        placed: Arc<Mutex<Placed>>,
        events: Sender<LaneEvent>,
        wire: Wire,
    ) -> Self {
        let region_bytes: Vec<u64> = memory.regions().iter().map(|r| r.len()).collect();
        Self {
            lane,
            line,
            memory,
            placed,
            events,
            wire,
            reader: LaneReader::new(region_bytes),
            extents: Sorted::new(),
            unpacker: Unpacker::new(),
            gives_way: GivesWay::default(),
            tally: Tally::new(),
        }
    }

    /// Receives until the lane ends, and says how it did.
    fn serve(&mut self) {
        let lane = self.lane;
        let event = match self.receive() {
            Ended::Closed => LaneEvent::Closed { lane },
            Ended::Failed(error) => LaneEvent::Failed { lane, error, unacked: Vec::new() },
            Ended::Stopped => return,
        };
        // The connection goes first: the source notices, and nothing is placed after the event.
        self.line.hang_up();
        let _ = self.events.send(event);
    }

    fn receive(&mut self) -> Ended {
        self.gives_way.begin();
        let mut parcel = match self.wire.blank(&self.line) {
            Ok(parcel) => parcel,
            Err(error) => return self.ended(error),
        };
        parcel.clear(Order::HeaderLast);
        let mut idle = true;
        loop {
            let start = Instant::now();
            parcel = match self.wire.receive(&self.line, parcel, idle) {
                Ok(parcel) => parcel,
                Err(error) => return self.ended(error),
            };
            self.count(&parcel, start);
            if let Err(error) = self.unpack(&parcel) {
                return Ended::Failed(error);
            }
            // From here on every byte of the batch before this header is in guest memory.
            match self.note_placed() {
                Ok(bytes) => self.gives_way.moved(bytes),
                Err(source) => {
                    return Ended::Failed(LaneError::OutsideMemory { lane: self.lane, source });
                }
            }
            let frame = self.reader.frame(parcel.header(), &mut self.extents);
            parcel.clear(Order::HeaderLast);
            idle = match frame {
                Ok(Frame::Batch { .. }) => match self.place(&mut parcel) {
                    Ok(()) => false,
                    Err(error) => return Ended::Failed(error),
                },
                Ok(Frame::Barrier { round, seq }) => match self.acknowledge(round, seq) {
                    Ok(()) => true,
                    Err(error) => return self.ended(error),
                },
                Ok(Frame::Close) => return Ended::Closed,
                Err(source) => {
                    return Ended::Failed(LaneError::PeerMisbehaved { lane: self.lane, source });
                }
            };
        }
    }

    /// Clears what is zero, frees what is a hole, and leases what the payload goes into.
    fn place(&mut self, parcel: &mut Parcel) -> Result<(), LaneError> {
        // The reader has checked all of it against the same regions.
        let outside = |source| LaneError::OutsideMemory { lane: self.lane, source };
        for &extent in &self.extents.zero {
            zero::clear(&self.memory, extent).map_err(outside)?;
        }
        for &extent in &self.extents.hole {
            zero::punch(&self.memory, extent).map_err(outside)?;
        }
        for &extent in &self.extents.data {
            parcel.push(self.memory.lease(extent).map_err(outside)?);
        }
        // Bounded by the limits of a batch, as each chunk was checked to be.
        let packed_bytes = self.extents.chunks.iter().map(|chunk| chunk.packed_bytes).sum::<u64>();
        if packed_bytes > 0 {
            parcel.pack(packed_bytes as usize);
        }
        self.tally.zero_bytes += self.extents.zero_bytes();
        self.tally.hole_bytes += self.extents.hole_bytes();
        Ok(())
    }

    /// How many bytes that are.
    fn note_placed(&mut self) -> Result<u64, RegionError> {
        let mut placed = self.placed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Sorted { data, zero, hole, packed, .. } = &mut self.extents;
        let zeros = zero.drain(..).chain(hole.drain(..));
        let mut bytes = 0;
        for extent in data.drain(..).chain(zeros).chain(packed.drain(..)) {
            placed.extent(extent)?;
            bytes += extent.len;
        }
        Ok(bytes)
    }

    /// Unpacks what came in chunks, if anything did.
    fn unpack(&mut self, parcel: &Parcel) -> Result<(), LaneError> {
        let Sorted { packed, chunks, .. } = &self.extents;
        if chunks.is_empty() {
            return Ok(());
        }
        let lane = self.lane;
        let start = Instant::now();
        self.unpacker.unpack(parcel.packed(), chunks, &self.memory, packed).map_err(|error| {
            match error {
                UnpackError::Corrupt { .. } => {
                    LaneError::PeerMisbehaved { lane, source: FramingError::CorruptChunk }
                }
                UnpackError::Memory { source } => LaneError::OutsideMemory { lane, source },
            }
        })?;
        let raw_bytes = packed.iter().map(|extent| extent.len).sum::<u64>();
        let packing = &mut self.tally.packing;
        packing.ns += u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        packing.raw_bytes += raw_bytes;
        packing.packed_bytes += parcel.packed().len() as u64;
        self.tally.moved_bytes += raw_bytes;
        Ok(())
    }

    fn acknowledge(&mut self, round: RoundIndex, seq: u32) -> Result<(), WireError> {
        let lane = self.lane;
        let start = Instant::now();
        self.placed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).barrier(round);
        self.line.send_ack(&Ack { lane, round, seq }.encode())?;
        record(&mut self.tally.barrier_ns, start);
        self.gives_way.end();
        let _ = self.events.send(LaneEvent::Placed { lane, round });
        Ok(())
    }

    fn count(&mut self, parcel: &Parcel, start: Instant) {
        self.tally.wire_bytes += parcel.total_bytes();
        if parcel.leased_bytes() > 0 || !parcel.packed().is_empty() {
            self.tally.moved_bytes += parcel.leased_bytes();
            record(&mut self.tally.batch_ns, start);
        }
    }

    fn ended(&self, error: WireError) -> Ended {
        error.into_lane_error(self.lane, &self.line).map_or(Ended::Stopped, Ended::Failed)
    }

    fn finish(self, cpu: Option<usize>) -> LaneStats {
        self.line.hang_up();
        self.wire.finish(&self.line, self.tally, cpu)
    }
}
