//! The target's end: a listener, and lanes that answer.
//!
//! A [`TargetLane`] is owned by the target's driver; its worker owns the connection. The caller has
//! judged the ticket before. The source's device writes to guest memory by itself; the worker gives
//! out keys, clears what the source names as zero and acknowledges barriers, and may sleep otherwise.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::FramingError;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LaneEvent, LaneStats};
use pageferry_datapath::zero;

pub use crate::connection::ArrivingLane;
use crate::connection::{Dialled, ListeningId};
use crate::error::RdmaError;
use crate::guest::RdmaMemory;
use crate::limits::{CLOSE_WAIT_MAX, PATIENCE, PROGRESS_WAIT_MAX, REGISTER_WAIT_MAX, TICK};
use crate::line::Line;
use crate::message::Message;
use crate::plan::TargetLaneConfig;
use crate::registration::RegisteredMemory;
use crate::stats::{Tally, pin_to, record};
use crate::stop::Stop;

/// Listens for lanes. Dropping it ends that.
#[derive(Debug)]
pub struct Listener {
    port: u16,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens at an address of an RDMA device, or of all of them (`0.0.0.0`); port 0 lets the
    /// kernel choose one. On iWARP the port is one of TCP's. Lanes that ask are given to `arrived`,
    /// on the listener's thread; and what was wrong with one that is not ours.
    pub fn start(
        address: SocketAddr,
        mut arrived: impl FnMut(Result<ArrivingLane, RdmaError>) + Send + 'static,
    ) -> Result<Self, RdmaError> {
        let listening = ListeningId::at(address)?;
        let (port, stop) = (listening.port(), Arc::new(Stop::new()?));
        let told = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("pf-rdma-accept".into())
            .spawn(move || {
                loop {
                    match listening.next(&told) {
                        Ok(arriving) => arrived(arriving),
                        Err(RdmaError::Stopped) => return,
                        Err(error) => return arrived(Err(error)),
                    }
                }
            })
            .map_err(|source| RdmaError::Call { call: "clone", source })?;
        Ok(Self { port, stop, thread: Some(thread) })
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.tell();
        if let Some(thread) = self.thread.take() {
            // Its panic was printed there.
            let _ended = thread.join();
        }
    }
}

/// One admitted lane and its worker. Dropping it fences it.
#[derive(Debug)]
pub struct TargetLane {
    lane: LaneId,
    stop: Arc<Stop>,
    worker: Option<JoinHandle<LaneStats>>,
}

impl TargetLane {
    /// Takes a lane whose ticket is right, and starts answering it. What goes wrong from here on
    /// comes as an event.
    pub fn start(
        arriving: ArrivingLane,
        memory: Arc<RdmaMemory>,
        config: &TargetLaneConfig,
        events: Sender<LaneEvent>,
    ) -> Result<Self, LaneError> {
        let lane = arriving.hello().lane;
        let host = |error: RdmaError| {
            error.into_lane_error(lane).unwrap_or(LaneError::PeerClosed { lane })
        };
        let stop = Arc::new(Stop::new().map_err(host)?);
        let (told, config) = (Arc::clone(&stop), config.clone());
        let worker = thread::Builder::new()
            .name(format!("target-lane-{lane}"))
            .spawn(move || {
                let cpu = pin_to(config.cpu);
                let taken = arriving.take(&memory, config.connect_wait, &told);
                serve(lane, taken, memory, &events, cpu)
            })
            .map_err(|source| LaneError::Host { lane, call: "clone", source })?;
        Ok(Self { lane, stop, worker: Some(worker) })
    }

    /// Its number in the session.
    pub fn lane(&self) -> LaneId {
        self.lane
    }

    /// Closes the connection and destroys its queue pair; when it returns, no byte of this lane
    /// will ever be placed again. What had arrived before may or may not have been.
    pub fn fence(mut self) -> LaneStats {
        self.stop.tell();
        let worker = self.worker.take().expect("a lane is fenced once");
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for TargetLane {
    fn drop(&mut self) {
        self.stop.tell();
        if let Some(worker) = self.worker.take() {
            // Its panic was printed there.
            let _ended = worker.join();
        }
    }
}

/// Answers until the lane ends, and says how it did; the body of a worker's thread.
fn serve(
    lane: LaneId,
    taken: Result<Dialled, RdmaError>,
    memory: Arc<RdmaMemory>,
    events: &Sender<LaneEvent>,
    cpu: Option<usize>,
) -> LaneStats {
    let mut tally = Tally::new();
    let (mut reason, mut sleeps) = (String::new(), 0);
    let ended = match taken {
        Err(error) => Err(error),
        Ok(Dialled { line, registered, device }) => {
            reason = format!("device {device}");
            let mut server = Server { lane, line, registered, events, tally: &mut tally };
            let ended = server.answer_all();
            sleeps = server.line.sleeps();
            // The connection goes first: the source notices, and nothing is placed after the event.
            server.line.hang_up();
            ended
        }
    };
    let event = match ended {
        Ok(()) => Some(LaneEvent::Closed { lane }),
        Err(error) => error.into_lane_error(lane).map(|error| LaneEvent::Failed {
            lane,
            error,
            unacked: Vec::new(),
        }),
    };
    // A driver that has gone away no longer asks.
    let _ = event.map(|event| events.send(event));
    memory.let_go_of_removed();
    drop(memory);
    tally.finish(reason, cpu, sleeps)
}

struct Server<'a> {
    lane: LaneId,
    line: Line,
    registered: Arc<RegisteredMemory>,
    events: &'a Sender<LaneEvent>,
    tally: &'a mut Tally,
}

impl Server<'_> {
    fn answer_all(&mut self) -> Result<(), RdmaError> {
        loop {
            // Between rounds a lane may be silent for as long as it likes.
            while let Some(message) = self.line.message() {
                match message {
                    Message::Want { slice } => self.give_keys(slice)?,
                    Message::Zeros(zeros) => self.clear(&zeros)?,
                    Message::Barrier { round, seq } => {
                        let start = Instant::now();
                        self.say(&Message::Placed { round, seq })?;
                        record(&mut self.tally.barrier_ns, start);
                        let _ = self.events.send(LaneEvent::Placed { lane: self.lane, round });
                    }
                    Message::Close => return Ok(()),
                    Message::Keys(_)
                    | Message::Placed { .. }
                    | Message::Zeroed
                    | Message::NoKey { .. }
                    | Message::Patience => {
                        return Err(RdmaError::WrongAnswer);
                    }
                }
            }
            self.line.wait(TICK)?;
        }
    }

    fn give_keys(&mut self, slice: u32) -> Result<(), RdmaError> {
        if slice >= self.registered.slices().count() {
            let count = slice.min(u16::MAX.into()) as u16;
            return Err(RdmaError::Misbehaved(FramingError::Count { count }));
        }
        let since = Instant::now();
        loop {
            match self.registered.slice_within(slice, self.line.stop(), PATIENCE) {
                Ok(Some(_)) => break,
                Ok(None) if since.elapsed() < REGISTER_WAIT_MAX => self.say(&Message::Patience)?,
                Ok(None) => {
                    let waited_ms = since.elapsed().as_millis() as u64;
                    return Err(RdmaError::Stalled { waited_ms });
                }
                Err(error) => return Err(self.refuse_key(slice, error)),
            }
        }
        let keys = self.registered.keys_from(slice);
        self.say(&Message::Keys(keys))
    }

    /// Says that there is no key, and lets the source hang up, so that it hears of it.
    fn refuse_key(&mut self, slice: u32, error: RdmaError) -> RdmaError {
        let RdmaError::Register { source, .. } = &error else { return error };
        let errno = source.raw_os_error().unwrap_or(libc::EIO);
        let deadline = Instant::now() + CLOSE_WAIT_MAX;
        if self.say(&Message::NoKey { slice, errno }).is_ok() {
            while let left @ 1.. = deadline.saturating_duration_since(Instant::now()).as_millis()
                && self.line.wait(Duration::from_millis(left as u64)).is_ok()
            {}
        }
        error
    }

    /// Has pages read as zeros. Through the mapping, never by punching holes: a page that was freed
    /// would still be what the device writes to.
    fn clear(&mut self, zeros: &[Extent]) -> Result<(), RdmaError> {
        for zero in zeros {
            zero::clear(self.registered.memory(), *zero).map_err(RdmaError::OutsideMemory)?;
            self.tally.zero_bytes += zero.len;
        }
        self.say(&Message::Zeroed)
    }

    fn say(&mut self, message: &Message) -> Result<(), RdmaError> {
        const WAIT: Duration = PROGRESS_WAIT_MAX;
        self.line.send(message, WAIT)
    }
}
