//! What the caller decides about lanes before they start.

use std::net::SocketAddr;
use std::time::Duration;

use pageferry_datapath::framing::hello::Ticket;
use pageferry_datapath::ids::{LaneId, SessionId};

use crate::limits;

/// Which system calls a lane's worker uses. The two ends of a lane need not agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathWish {
    /// io_uring where it works and is no slower, else plain sockets.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Plain `sendmsg` and `recvmsg`.
    Plain,
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
    /// Local address to connect from; port 0 lets the kernel choose one.
    pub bind: Option<SocketAddr>,
}

/// How a source opens its lanes.
#[derive(Clone, Debug)]
pub struct ConnectPlan {
    /// Where the target listens.
    pub addr: SocketAddr,
    /// The session the lanes belong to.
    pub session: SessionId,
    /// The lanes; at least one.
    pub lanes: Vec<LanePlan>,
    /// Send from guest memory without copying, until the kernel reports that it copies.
    pub zero_copy: bool,
    /// Which system calls to use.
    pub path: PathWish,
    /// Send and receive buffer of each socket as `setsockopt` takes it; `None` leaves them to the
    /// kernel's tuning, which a long fat link needs.
    pub socket_buffer_bytes: Option<usize>,
    /// Connecting, hello and reply of one lane.
    pub connect_wait: Duration,
    /// A lane without progress for this long has failed.
    pub progress_wait: Duration,
}

impl ConnectPlan {
    /// A plan with the defaults for two machines: zero-copy where it works, buffers by the kernel.
    pub fn new(addr: SocketAddr, session: SessionId, lanes: Vec<LanePlan>) -> Self {
        Self {
            addr,
            session,
            lanes,
            zero_copy: true,
            path: PathWish::Auto,
            socket_buffer_bytes: None,
            connect_wait: limits::CONNECT_WAIT_MAX,
            progress_wait: limits::PROGRESS_WAIT_MAX,
        }
    }
}

/// How a target runs one lane.
#[derive(Clone, Debug)]
pub struct TargetLaneConfig {
    /// The core to pin its worker to.
    pub cpu: Option<usize>,
    /// Which system calls to use.
    pub path: PathWish,
    /// As in [`ConnectPlan::socket_buffer_bytes`].
    pub socket_buffer_bytes: Option<usize>,
    /// A batch without progress for this long has failed. Between rounds a lane may be silent.
    pub progress_wait: Duration,
}

impl Default for TargetLaneConfig {
    fn default() -> Self {
        Self {
            cpu: None,
            path: PathWish::Auto,
            socket_buffer_bytes: None,
            progress_wait: limits::PROGRESS_WAIT_MAX,
        }
    }
}
