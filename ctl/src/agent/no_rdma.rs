//! What stands for `rdma.rs` in a program that was built without lanes over RDMA.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};

use crossbeam_channel::{Receiver, Sender};
use pageferry_datapath::control::Ticket;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Hello, Refusal};
use pageferry_datapath::ids::{LaneId, SessionId};
use pageferry_datapath::lane::{LaneError, LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;

use super::lanes::Pin;

const WHY_NOT: &str = "this program was built without it";

/// One lane to open.
#[derive(Clone, Debug)]
pub struct LanePlan {
    /// Its number in the session.
    pub lane: LaneId,
    /// What the target gave out for it.
    pub ticket: Ticket,
    /// The core to pin its worker to.
    pub cpu: Option<usize>,
    /// From which address to which, where that is not the plan's.
    pub route: Option<LaneRoute>,
}

/// The way of one lane.
#[derive(Clone, Copy, Debug)]
pub struct LaneRoute {
    /// An address here.
    pub from: IpAddr,
    /// One of the target.
    pub to: SocketAddr,
}

/// Never arrives.
#[derive(Debug)]
pub struct ArrivingLane(Infallible);

impl ArrivingLane {
    /// What it said.
    pub fn hello(&self) -> &Hello {
        match self.0 {}
    }

    /// Refuses it.
    pub fn refuse(self, _refusal: Refusal) {
        match self.0 {}
    }
}

/// Never taken.
#[derive(Debug)]
pub struct TakenLane(Infallible);

impl TakenLane {
    /// Closes it.
    pub fn fence(self) -> LaneStats {
        match self.0 {}
    }
}

/// Why this host has no lanes over RDMA.
pub fn why_not() -> Option<String> {
    Some(WHY_NOT.into())
}

/// No NIC has what this program could use.
pub fn interfaces() -> Vec<String> {
    Vec::new()
}

/// Never asked.
#[derive(Debug)]
pub struct StillThere;

impl StillThere {
    /// Whatever would be asked.
    pub fn new(_ask: impl Fn(LaneId) -> bool + Send + Sync + 'static) -> Self {
        Self
    }
}

/// What all lanes have.
#[derive(Debug)]
pub struct Terms<'a> {
    /// Of this side.
    pub pin: Pin,
    /// What they are held to.
    pub pacer: &'a std::sync::Arc<pageferry_datapath::pace::Pacer>,
    /// How long one may be without progress.
    pub progress_wait: Option<std::time::Duration>,
    /// Whom to ask after that.
    pub still_there: Option<StillThere>,
}

/// Opens none.
pub fn connect(
    _address: SocketAddr,
    _session: SessionId,
    _lanes: Vec<LanePlan>,
    _terms: Terms<'_>,
    _memory: &GuestMemory,
    _events: Sender<LaneEvent>,
) -> Result<Box<dyn SourceLanes>, (Option<LaneId>, String)> {
    Err((None, WHY_NOT.into()))
}

/// Never listens.
#[derive(Debug)]
pub struct RdmaTarget(Infallible);

impl RdmaTarget {
    /// Says why not.
    pub fn listen(
        _memory: GuestMemory,
        _pin: Pin,
        _at: IpAddr,
        _devices: u64,
        _threads: usize,
    ) -> Result<(Self, Receiver<ArrivingLane>), String> {
        Err(WHY_NOT.into())
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        match self.0 {}
    }

    /// Registers memory.
    pub fn begin(&self, _extents: Vec<Extent>) -> Result<(), Failure> {
        match self.0 {}
    }

    /// Takes a lane.
    pub fn take(
        &self,
        lane: ArrivingLane,
        _cpu: Option<usize>,
        _events: Sender<LaneEvent>,
    ) -> Result<TakenLane, LaneError> {
        match lane.0 {}
    }
}
