//! A migration's own lanes, over TCP or RDMA, moving rounds without a guest.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::control::Ticket;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::Reply;
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::work::RoundWork;
use pageferry_rdma::error::RdmaError;
use pageferry_rdma::guest::RdmaMemory;
use pageferry_rdma::plan::{self as rdma, Pin};
use pageferry_rdma::source::{RdmaPool, lane_error};
use pageferry_rdma::target::{ArrivingLane, Listener, TargetLane};
use pageferry_uring::plan::{
    ConnectPlan, LanePlan, PathWish, SocketTuning, TargetLaneConfig, ZeroCopyWish,
};
use pageferry_uring::source::LanePool;
use pageferry_uring::{self as uring, greet};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::BenchError;
use crate::places::Order;
use crate::recorder::{Pace, Recorded, Recorder};
use crate::serve::{Peer, Request};
use crate::stream_wire::Span;
use crate::turns::Taken;

/// Connecting and moving, under emulation.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);
/// Both ends are ours: there is nothing to keep out.
pub(crate) const TICKET: Ticket = Ticket([0x42; 32]);
pub(crate) const SESSION: SessionId = SessionId(0x7067);

/// What carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Over {
    Rdma,
    /// By io_uring, or by plain sockets.
    Tcp {
        uring: bool,
        zero_copy: bool,
    },
}

/// One way to use them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) over: Over,
    pub(crate) lanes: u16,
    /// Size of the guest.
    pub(crate) memory_bytes: u64,
    /// Of one extent: a message, up to 1 MiB.
    pub(crate) extent_bytes: u64,
    /// Extents in a random order, each of them once before any comes again.
    pub(crate) scattered: bool,
    /// Memory of 2 MiB pages.
    pub(crate) huge: bool,
    /// Both ends are on one machine: a lane's two workers share a core, as in a migration.
    pub(crate) same_host: bool,
}

impl Way {
    pub(crate) fn memory(&self) -> Result<GuestMemory, BenchError> {
        let huge = self.huge.then_some(2 << 20);
        let bytes = self.memory_bytes.next_multiple_of(huge.unwrap_or(4096));
        let region = Region::open(RegionIndex(0), Backing::memfd("lanes", bytes, huge)?)?;
        // A page that was never touched would be one more difference.
        let lease = region.lease(0, bytes)?;
        for at in (0..bytes).step_by(4096) {
            lease.copy_in(at, &(at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())?;
        }
        Ok(GuestMemory::new(vec![region]))
    }

    /// Extents of `bytes` in all, over the memory again and again.
    pub(crate) fn extents(&self, bytes: u64) -> Vec<Extent> {
        let places = (self.memory_bytes / self.extent_bytes).max(1);
        let order = Order::new(self.scattered.then_some(places));
        let extent = |index: u64| Extent {
            region: RegionIndex(0),
            offset: order.place(index % places) * self.extent_bytes,
            len: self.extent_bytes,
        };
        (0..bytes / self.extent_bytes).map(extent).collect()
    }

    fn tuning(&self) -> SocketTuning {
        if self.same_host { SocketTuning::same_host() } else { SocketTuning::default() }
    }

    pub(crate) fn cpu(&self, lane: u16) -> Option<usize> {
        let cores = pageferry_ctl::host::cpus_allowed();
        cores.get(usize::from(lane) % cores.len().max(1)).copied()
    }

    fn path(uring: bool) -> PathWish {
        if uring { PathWish::Uring } else { PathWish::Plain }
    }
}

/// A migration's lanes at the source, without a guest.
pub(crate) struct Lanes<'a> {
    pool: Box<dyn SourceLanes>,
    events: Receiver<LaneEvent>,
    peer: &'a mut Peer,
    way: Way,
    rounds: u32,
}

impl<'a> Lanes<'a> {
    /// Connects, and moves all memory once: all of it is there and registered on both sides, and
    /// every lane knows the keys it needs.
    pub(crate) fn connect(
        peer: &'a mut Peer,
        from: Option<IpAddr>,
        way: &Way,
    ) -> Result<Self, BenchError> {
        let memory = way.memory()?;
        let to = peer.ask(&Request::Lanes(*way))?;
        let (to_events, events) = unbounded();
        let pool: Box<dyn SourceLanes> = match way.over {
            Over::Rdma => {
                let lane = |lane| rdma::LanePlan {
                    lane: LaneId(lane),
                    ticket: TICKET,
                    cpu: way.cpu(lane),
                    route: None,
                };
                let plan = rdma::ConnectPlan::new(to, SESSION, (0..way.lanes).map(lane).collect());
                let plan = rdma::ConnectPlan { from, connect_wait: WAIT_MAX, ..plan };
                Box::new(RdmaPool::connect(&plan, memory, to_events).map_err(lane_error)?)
            }
            Over::Tcp { uring, zero_copy } => {
                let lane = |lane| LanePlan {
                    lane: LaneId(lane),
                    ticket: TICKET,
                    cpu: way.cpu(lane),
                    from: Vec::new(),
                    route: None,
                };
                let plan = ConnectPlan {
                    path: Way::path(uring),
                    zero_copy: match zero_copy {
                        true => ZeroCopyWish::Try,
                        false => ZeroCopyWish::Not("not asked for"),
                    },
                    tuning: way.tuning(),
                    ..ConnectPlan::new(to, SESSION, (0..way.lanes).map(lane).collect())
                };
                Box::new(LanePool::connect(&plan, memory, to_events)?)
            }
        };
        let mut this = Self { pool, events, peer, way: *way, rounds: 0 };
        for _ in 0..way.lanes {
            this.round(way.memory_bytes)?;
        }
        Ok(this)
    }

    /// Moves `bytes` in extents, from the first post until all of it is placed at the other end;
    /// how much it was.
    pub(crate) fn round(&mut self, bytes: u64) -> Result<u64, BenchError> {
        let extents = self.way.extents(bytes.max(self.way.extent_bytes));
        let bytes = extents.len() as u64 * self.way.extent_bytes;
        let lanes = self.pool.alive();
        self.pool.move_round(Arc::new(RoundWork::new(RoundIndex(self.rounds), extents)));
        self.rounds += 1;
        for _ in 0..lanes {
            match self.events.recv_timeout(WAIT_MAX) {
                Ok(LaneEvent::Placed { .. }) => {}
                Ok(LaneEvent::Failed { error, .. }) => return Err(error.into()),
                Ok(LaneEvent::Closed { .. }) | Err(_) => {
                    let (what, waited_s) = ("a lane".into(), WAIT_MAX.as_secs());
                    return Err(BenchError::Timeout { what, waited_s });
                }
            }
        }
        Ok(bytes)
    }

    /// Closes them; what they say of themselves.
    pub(crate) fn close(self) -> Result<Value, BenchError> {
        let of = |stats: &LaneStats| {
            json!({
                "path": stats.path, "path_reason": stats.path_reason,
                "zero_copy": stats.zero_copy, "zero_copy_reason": stats.zero_copy_reason,
                "cpu": stats.cpu, "system_calls": stats.syscalls, "thread_cpu_ns": stats.cpu_ns,
                "wire_bytes": stats.wire_bytes,
            })
        };
        let stats = self.pool.close(false);
        self.peer.done()?;
        Ok(json!({ "lanes": stats.iter().map(of).collect::<Vec<Value>>() }))
    }
}

/// One round of `bytes` after one of `warm_up_bytes` that is dropped.
pub(crate) fn stream(
    peer: &mut Peer,
    from: Option<IpAddr>,
    way: &Way,
    warm_up_bytes: u64,
    bytes: u64,
) -> Result<Taken, BenchError> {
    let mut lanes = Lanes::connect(peer, from, way)?;
    lanes.round(warm_up_bytes)?;
    let began = Instant::now();
    let bytes = lanes.round(bytes)?;
    let seconds = began.elapsed().as_secs_f64();
    let said = lanes.close()?;
    Ok(Taken { recorded: Recorded { bytes, seconds, ..Recorded::default() }, said })
}

/// Rounds of `bytes` for as long as `span` says, each with its barrier; their times are a
/// distribution.
pub(crate) fn rounds(
    peer: &mut Peer,
    from: Option<IpAddr>,
    way: &Way,
    bytes: u64,
    span: Span,
    interval_ms: u64,
) -> Result<Taken, BenchError> {
    let mut lanes = Lanes::connect(peer, from, way)?;
    let warm_until = Instant::now() + Duration::from_secs_f64(span.warm_up_s);
    while Instant::now() < warm_until {
        lanes.round(bytes)?;
    }
    let pace = Pace { warm_up: 0, operations: 0, rate: None, interval_ms, half: false };
    let mut recorder = Recorder::new(pace);
    let mut began = Instant::now();
    let until = began + Duration::from_secs_f64(span.seconds);
    while began < until {
        let moved = lanes.round(bytes)?;
        let ended = Instant::now();
        recorder.record(began, ended, moved);
        began = ended;
    }
    let said = lanes.close()?;
    Ok(Taken { recorded: recorder.finish(), said })
}

/// The other end of [`Lanes`].
pub(crate) fn serve(
    at: IpAddr,
    way: &Way,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    match way.over {
        Over::Rdma => serve_rdma(at, way, ready),
        Over::Tcp { uring, .. } => serve_tcp(at, way, uring, ready),
    }
}

fn serve_tcp(
    at: IpAddr,
    way: &Way,
    uring: bool,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    let memory = way.memory()?;
    let address = SocketAddr::new(at, 0);
    let io = || BenchError::io("listen on", address);
    let listener = TcpListener::bind(address).map_err(io())?;
    ready(listener.local_addr().map_err(io())?.port())?;
    let (to_events, events) = unbounded();
    let mut lanes = Vec::new();
    for _ in 0..way.lanes {
        let (stream, _) = listener.accept().map_err(io())?;
        let deadline = Instant::now() + WAIT_MAX;
        let greeted = || -> Result<LaneId, greet::GreetError> {
            let hello = greet::read_hello(&stream, deadline)?;
            greet::send_reply(&stream, Reply::Accepted, deadline)?;
            Ok(hello.lane)
        };
        let said = |error: greet::GreetError| BenchError::Unexpected {
            program: "the benchmark".into(),
            said: error.to_string(),
        };
        let lane = greeted().map_err(said)?;
        let config = TargetLaneConfig {
            cpu: way.cpu(lane.0),
            path: Way::path(uring),
            tuning: way.tuning(),
            ..TargetLaneConfig::default()
        };
        let (memory, events) = (memory.clone(), to_events.clone());
        lanes.push(uring::target::TargetLane::start(stream, lane, memory, &config, events)?);
    }
    await_closed(&events, lanes.len())
}

fn serve_rdma(
    at: IpAddr,
    way: &Way,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    let registered = Arc::new(RdmaMemory::target(way.memory()?, Pin::default(), 2)?);
    registered.begin(Vec::new())?;
    let (to_arrivals, arrivals) = unbounded::<Result<ArrivingLane, RdmaError>>();
    let arrived = move |lane| {
        let _nobody_listens_after_the_end = to_arrivals.send(lane);
    };
    let listener = Listener::start(SocketAddr::new(at, 0), arrived)?;
    ready(listener.port())?;
    let (to_events, events) = unbounded();
    let mut lanes: Vec<TargetLane> = Vec::new();
    let config =
        rdma::TargetLaneConfig { connect_wait: WAIT_MAX, ..rdma::TargetLaneConfig::default() };
    for _ in 0..way.lanes {
        let (what, waited_s) = ("a lane".into(), WAIT_MAX.as_secs());
        let late = |_| BenchError::Timeout { what, waited_s };
        let arriving = arrivals.recv_timeout(WAIT_MAX).map_err(late)??;
        let memory = Arc::clone(&registered);
        lanes.push(TargetLane::start(arriving, memory, &config, to_events.clone())?);
    }
    await_closed(&events, lanes.len())
}

/// Until every lane was closed in order.
fn await_closed(events: &Receiver<LaneEvent>, lanes: usize) -> Result<Value, BenchError> {
    let mut open = lanes;
    while open > 0 {
        match events.recv() {
            Ok(LaneEvent::Placed { .. }) => {}
            Ok(LaneEvent::Closed { .. }) => open -= 1,
            Ok(LaneEvent::Failed { error, .. }) => return Err(error.into()),
            Err(_) => break,
        }
    }
    Ok(Value::Null)
}
