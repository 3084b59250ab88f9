//! A migration's own lanes, streaming as they do in a round, without a guest.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::control::Ticket;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, SourceLanes};
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::work::RoundWork;
use pageferry_rdma::error::RdmaError;
use pageferry_rdma::guest::RdmaMemory;
use pageferry_rdma::plan::{ConnectPlan, LanePlan, Pin, TargetLaneConfig};
use pageferry_rdma::source::{RdmaPool, lane_error};
use pageferry_rdma::target::{ArrivingLane, Listener, TargetLane};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::BenchError;
use crate::recorder::Recorded;
use crate::serve::{Peer, Request};

/// Connecting and moving, under emulation.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Both ends are ours: there is nothing to keep out.
const TICKET: Ticket = Ticket([0x42; 32]);
const SESSION: SessionId = SessionId(0x7067);

/// One way to use them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) lanes: u16,
    /// Size of the guest.
    pub(crate) memory_bytes: u64,
    /// Of one extent: a message, up to 1 MiB.
    pub(crate) extent_bytes: u64,
    /// Memory of 2 MiB pages.
    pub(crate) huge: bool,
}

impl Way {
    fn memory(&self) -> Result<GuestMemory, BenchError> {
        let huge = self.huge.then_some(2 << 20);
        let bytes = self.memory_bytes.next_multiple_of(huge.unwrap_or(4096));
        let region = Region::open(RegionIndex(0), Backing::memfd("lanes", bytes, huge)?)?;
        // A page that was never touched would be one more difference.
        let lease = region.lease(0, bytes)?;
        for at in (0..bytes).step_by(4096) {
            lease.copy_in(at, &at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())?;
        }
        Ok(GuestMemory::new(vec![region]))
    }

    /// Extents of `bytes` in all, over the memory again and again.
    fn extents(&self, bytes: u64) -> Vec<Extent> {
        let places = (self.memory_bytes / self.extent_bytes).max(1);
        let extent = |index: u64| Extent {
            region: RegionIndex(0),
            offset: index % places * self.extent_bytes,
            len: self.extent_bytes,
        };
        (0..bytes / self.extent_bytes).map(extent).collect()
    }
}

/// Streams rounds of `bytes`, the first of them dropped, each from the first post until all of it
/// is placed at the other end.
pub(crate) fn stream(
    peer: &mut Peer,
    from: IpAddr,
    way: &Way,
    warm_up_bytes: u64,
    bytes: u64,
) -> Result<Recorded, BenchError> {
    let memory = way.memory()?;
    let to = peer.ask(&Request::RdmaLanes(*way))?;
    // As a migration does it.
    let cores = pageferry_ctl::host::cpus_allowed();
    let cpu = |lane: u16| cores.get(usize::from(lane) % cores.len().max(1)).copied();
    let lane = |lane| LanePlan { lane: LaneId(lane), ticket: TICKET, cpu: cpu(lane) };
    let plan = ConnectPlan::new(to, SESSION, (0..way.lanes).map(lane).collect());
    let plan = ConnectPlan { from: Some(from), connect_wait: WAIT_MAX, ..plan };
    let (to_events, events) = unbounded();
    let pool = RdmaPool::connect(&plan, memory, to_events).map_err(lane_error)?;
    let mut pool: Box<dyn SourceLanes> = Box::new(pool);
    // Registers all of the memory on both sides, and has every lane know the keys it needs.
    for round in 0..u32::from(way.lanes) {
        move_round(&mut *pool, &events, round, way.extents(way.memory_bytes))?;
    }
    move_round(&mut *pool, &events, 100, way.extents(warm_up_bytes))?;
    let extents = way.extents(bytes);
    let began = Instant::now();
    move_round(&mut *pool, &events, 101, extents)?;
    let seconds = began.elapsed().as_secs_f64();
    pool.close(false);
    peer.done()?;
    let bytes = bytes / way.extent_bytes * way.extent_bytes;
    Ok(Recorded { bytes, seconds, ..Recorded::default() })
}

fn move_round(
    pool: &mut dyn SourceLanes,
    events: &Receiver<LaneEvent>,
    round: u32,
    extents: Vec<Extent>,
) -> Result<(), BenchError> {
    let lanes = pool.alive();
    pool.move_round(Arc::new(RoundWork::new(RoundIndex(round), extents)));
    for _ in 0..lanes {
        match events.recv_timeout(WAIT_MAX) {
            Ok(LaneEvent::Placed { .. }) => {}
            Ok(LaneEvent::Failed { error, .. }) => return Err(error.into()),
            Ok(LaneEvent::Closed { .. }) | Err(_) => {
                let (what, waited_s) = ("a lane".into(), WAIT_MAX.as_secs());
                return Err(BenchError::Timeout { what, waited_s });
            }
        }
    }
    Ok(())
}

/// The other end of [`stream`].
pub(crate) fn serve(
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
    let config = TargetLaneConfig { connect_wait: WAIT_MAX, ..TargetLaneConfig::default() };
    for _ in 0..way.lanes {
        let (what, waited_s) = ("a lane".into(), WAIT_MAX.as_secs());
        let late = |_| BenchError::Timeout { what, waited_s };
        let arriving = arrivals.recv_timeout(WAIT_MAX).map_err(late)??;
        let memory = Arc::clone(&registered);
        lanes.push(TargetLane::start(arriving, memory, &config, to_events.clone())?);
    }
    let mut open = lanes.len();
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
