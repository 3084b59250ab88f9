//! Lanes over RDMA, as the agents use them. `no_rdma.rs` has the same for a program without them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::lane::{LaneError, LaneEvent, SourceLanes};
use pageferry_datapath::pace::Pacer;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_rdma::error::RdmaError;
use pageferry_rdma::guest::RdmaMemory;
use pageferry_rdma::plan::{self, ConnectPlan, TargetLaneConfig};
use pageferry_rdma::source::RdmaPool;
use pageferry_rdma::target::{Listener, TargetLane};

pub use pageferry_rdma::plan::LanePlan;
pub use pageferry_rdma::target::ArrivingLane;

use super::failure;
use super::lanes::Pin;

/// A lane that was taken. Dropping it fences it.
pub type TakenLane = TargetLane;

/// Why this host has no lanes over RDMA; `None` when it may have.
pub fn why_not() -> Option<String> {
    pageferry_rdma::probe_host().why_none.map(|why| why.to_string())
}

/// Source: opens every lane, after a page was written to the target and read back on each. What
/// went wrong is a text for people.
pub fn connect(
    address: SocketAddr,
    session: SessionId,
    lanes: Vec<LanePlan>,
    (pin, pacer): (Pin, &Arc<Pacer>),
    memory: &GuestMemory,
    events: Sender<LaneEvent>,
) -> Result<Box<dyn SourceLanes>, String> {
    let pacer = Arc::clone(pacer);
    let plan = ConnectPlan { pin: pin.into(), pacer, ..ConnectPlan::new(address, session, lanes) };
    match RdmaPool::connect(&plan, memory.clone(), events) {
        Ok(pool) => Ok(Box::new(pool)),
        Err((_, error)) => Err(text(&error)),
    }
}

/// Target: memory that lanes may be opened to.
#[derive(Debug)]
pub struct RdmaTarget {
    memory: Arc<RdmaMemory>,
    listener: Listener,
}

impl RdmaTarget {
    /// Listens at an address of this host; lanes that ask arrive on the channel.
    pub fn listen(
        memory: GuestMemory,
        pin: Pin,
        at: IpAddr,
        threads: usize,
    ) -> Result<(Self, Receiver<ArrivingLane>), String> {
        let memory =
            RdmaMemory::target(memory, pin.into(), threads).map_err(|error| text(&error))?;
        let (to_arrivals, arrivals) = unbounded();
        let arrived = move |arrived: Result<ArrivingLane, RdmaError>| match arrived {
            Ok(lane) => {
                let _nobody_listens_after_the_end = to_arrivals.send(lane);
            }
            Err(error) => tracing::debug!(%error, "a connection that is no lane"),
        };
        let listener =
            Listener::start(SocketAddr::new(at, 0), arrived).map_err(|error| text(&error))?;
        Ok((Self { memory: Arc::new(memory), listener }, arrivals))
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.listener.port()
    }

    /// The memory is ready to be registered, first what these extents need.
    pub fn begin(&self, extents: Vec<Extent>) -> Result<(), Failure> {
        self.memory.begin(extents).map_err(|error| {
            let hint = error.hint();
            failure::host("registering guest memory", &error, hint)
        })
    }

    /// Takes a lane whose ticket is right.
    pub fn take(
        &self,
        lane: ArrivingLane,
        cpu: Option<usize>,
        events: Sender<LaneEvent>,
    ) -> Result<TakenLane, LaneError> {
        let config = TargetLaneConfig { cpu, ..TargetLaneConfig::default() };
        TargetLane::start(lane, Arc::clone(&self.memory), &config, events)
    }
}

impl From<Pin> for plan::Pin {
    fn from(pin: Pin) -> Self {
        match pin {
            Pin::All => Self::All,
            Pin::Touched => Self::Touched,
        }
    }
}

fn text(error: &RdmaError) -> String {
    let chain = failure::chain("", error);
    error.hint().map_or(chain.clone(), |hint| format!("{chain} ({hint})"))
}
