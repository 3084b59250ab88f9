//! Lanes over RDMA, as the agents use them. `no_rdma.rs` has the same for a program without them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::{LaneId, SessionId};
use pageferry_datapath::lane::{LaneError, LaneEvent, SourceLanes};
use pageferry_datapath::pace::Pacer;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_rdma::error::RdmaError;
use pageferry_rdma::guest::RdmaMemory;
use pageferry_rdma::plan::{self, ConnectPlan, TargetLaneConfig};
use pageferry_rdma::source::RdmaPool;
use pageferry_rdma::target::{Listener, TargetLane};

pub use pageferry_rdma::plan::{LanePlan, LaneRoute, StillThere};
pub use pageferry_rdma::probe::interfaces;
pub use pageferry_rdma::target::ArrivingLane;

use super::failure;
use super::lanes::Pin;

/// A lane that was taken. Dropping it fences it.
pub type TakenLane = TargetLane;

/// Why this host has no lanes over RDMA; `None` when it may have.
pub fn why_not() -> Option<String> {
    pageferry_rdma::probe_host().why_none.map(|why| why.to_string())
}

/// What all lanes of a source have.
#[derive(Debug)]
pub struct Terms<'a> {
    /// Which memory is pinned here.
    pub pin: Pin,
    /// What they are held to.
    pub pacer: &'a Arc<Pacer>,
    /// How long one may be without progress, if not for as long as ever.
    pub progress_wait: Option<Duration>,
    /// Whom to ask after that.
    pub still_there: Option<StillThere>,
}

/// Source: opens every lane, after a page was written to the target and read back on each. What
/// went wrong is a text for people; with which, unless it is this host that allows none.
pub fn connect(
    address: SocketAddr,
    session: SessionId,
    lanes: Vec<LanePlan>,
    terms: Terms<'_>,
    memory: &GuestMemory,
    events: Sender<LaneEvent>,
) -> Result<Box<dyn SourceLanes>, (Option<LaneId>, String)> {
    let defaults = ConnectPlan::new(address, session, lanes);
    let plan = ConnectPlan {
        pin: terms.pin.into(),
        pacer: Arc::clone(terms.pacer),
        progress_wait: terms.progress_wait.unwrap_or(defaults.progress_wait),
        still_there: terms.still_there,
        ..defaults
    };
    match RdmaPool::connect(&plan, memory.clone(), events) {
        Ok(pool) => Ok(Box::new(pool)),
        Err((_, error @ RdmaError::Memlock { .. })) => Err((None, text(&error))),
        Err((lane, error)) => Err((Some(lane), text(&error))),
    }
}

/// Target: memory that lanes may be opened to.
#[derive(Debug)]
pub struct RdmaTarget {
    memory: Arc<RdmaMemory>,
    listener: Listener,
}

impl RdmaTarget {
    /// Listens at an address of this host, or at all of them, so that lanes may come over so many
    /// devices; lanes that ask arrive on the channel.
    pub fn listen(
        memory: GuestMemory,
        pin: Pin,
        at: IpAddr,
        devices: u64,
        threads: usize,
    ) -> Result<(Self, Receiver<ArrivingLane>), String> {
        let memory =
            RdmaMemory::target(memory, pin.into(), threads).map_err(|error| text(&error))?;
        memory.may_be_pinned_by(devices).map_err(|error| text(&error))?;
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
