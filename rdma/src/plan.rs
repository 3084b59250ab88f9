//! What the caller decides about lanes before they start.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pageferry_datapath::framing::hello::Ticket;
use pageferry_datapath::ids::{LaneId, SessionId};
use pageferry_datapath::pace::Pacer;

use crate::limits;

/// Which memory the devices keep in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pin {
    /// All guest memory, holes too, before and while the first pages move.
    All,
    /// Slices that hold something, when they are first needed.
    #[default]
    Touched,
}

/// One lane to open.
#[derive(Clone, Debug)]
pub struct LanePlan {
    /// Its number in the session.
    pub lane: LaneId,
    /// What the target gave out for it.
    pub ticket: Ticket,
    /// The core to pin its worker to.
    pub cpu: Option<usize>,
    /// From which address to which, where that is not the plan's: over a rail of its own.
    pub route: Option<LaneRoute>,
}

/// The way of one lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneRoute {
    /// An address of a device here.
    pub from: IpAddr,
    /// Where the target listens for RDMA on it.
    pub to: SocketAddr,
}

/// Says whether the other end of a lane's way still answers by other means than the lane.
///
/// A lane that is silent for a while is not dead: on a slow link, or on a busy machine, it waits for
/// its turn. How long that takes is not known, but whoever is there answers meanwhile.
#[derive(Clone)]
pub struct StillThere(Arc<dyn Fn(LaneId) -> bool + Send + Sync>);

impl StillThere {
    /// Asked by a lane's worker, which does nothing else until it is told.
    pub fn new(ask: impl Fn(LaneId) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    pub(crate) fn ask(&self, lane: LaneId) -> bool {
        (self.0)(lane)
    }
}

impl fmt::Debug for StillThere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StillThere")
    }
}

/// How a source opens its lanes.
#[derive(Clone, Debug)]
pub struct ConnectPlan {
    /// Where the target listens for RDMA.
    pub addr: SocketAddr,
    /// Local address to connect from; else the route decides.
    pub from: Option<IpAddr>,
    /// The session the lanes belong to.
    pub session: SessionId,
    /// The lanes; at least one.
    pub lanes: Vec<LanePlan>,
    /// Which memory is pinned here.
    pub pin: Pin,
    /// What all lanes of the migration are held to.
    pub pacer: Arc<Pacer>,
    /// Requests a lane may have posted; the device may have fewer.
    pub depth: u32,
    /// Resolving, connecting and probing one lane.
    pub connect_wait: Duration,
    /// A lane without progress for this long has failed, unless there is somebody to ask.
    pub progress_wait: Duration,
    /// Asked each time when that is over; a lane whose other end answers has failed only after
    /// [`limits::PROGRESS_WAIT_MAX`].
    pub still_there: Option<StillThere>,
}

impl ConnectPlan {
    /// A plan with the defaults.
    pub fn new(addr: SocketAddr, session: SessionId, lanes: Vec<LanePlan>) -> Self {
        Self {
            addr,
            from: None,
            session,
            lanes,
            pin: Pin::default(),
            pacer: Arc::default(),
            depth: limits::SEND_DEPTH,
            connect_wait: limits::CONNECT_WAIT_MAX,
            progress_wait: limits::PROGRESS_WAIT_MAX,
            still_there: None,
        }
    }

    /// From where to where a lane goes.
    pub(crate) fn way(&self, lane: &LanePlan) -> (Option<IpAddr>, SocketAddr) {
        lane.route.map_or((self.from, self.addr), |route| (Some(route.from), route.to))
    }

    /// Devices that the lanes use: one for each address they go out from.
    pub(crate) fn devices(&self) -> u64 {
        let from: HashSet<_> = self.lanes.iter().map(|lane| self.way(lane).0).collect();
        from.len().max(1) as u64
    }
}

/// How a target runs one lane.
#[derive(Clone, Debug)]
pub struct TargetLaneConfig {
    /// The core to pin its worker to.
    pub cpu: Option<usize>,
    /// From the acceptance until the source has connected.
    pub connect_wait: Duration,
}

impl Default for TargetLaneConfig {
    fn default() -> Self {
        Self { cpu: None, connect_wait: limits::CONNECT_WAIT_MAX }
    }
}
