//! What the caller decides about lanes before they start.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry_datapath::codec::{Codec, CodecName};
use pageferry_datapath::framing::hello::Ticket;
use pageferry_datapath::holes::HoleLook;
use pageferry_datapath::ids::{LaneId, SessionId};
use pageferry_datapath::pace::Pacer;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use crate::{limits, placement};

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

/// Whether lanes send from guest memory without copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroCopyWish {
    /// Where the kernel can, until it reports that it copied all the same.
    Try,
    /// No, for this reason, which the lanes' statistics repeat.
    Not(&'static str),
}

/// Whether lanes compress what they send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackingWish {
    /// While it makes the migration faster, with one of these, fastest first.
    Auto(Vec<Codec>),
    /// Always, with this one.
    Always(Codec),
    /// No, for this reason, which the lanes' statistics repeat.
    Not(String),
}

/// Whether huge pages are narrowed to the 4 KiB pages that the target does not hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NarrowingWish {
    /// While it makes the migration faster.
    #[default]
    Auto,
    /// Always.
    Always,
    /// No, for this reason, which the lanes' statistics repeat.
    Not(String),
}

/// How a lane's sockets differ from the system's defaults. The default is to leave all of it to the
/// kernel, which a long fat link needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketTuning {
    /// Send and receive buffer as `setsockopt` takes it.
    pub buffer_bytes: Option<usize>,
    /// Send as fast as the window allows, whatever congestion control the system prefers. One that
    /// paces (bbr) arms a timer for every few packets, for a link that can't be congested.
    pub unpaced: bool,
}

impl SocketTuning {
    /// For two ends on one machine, on one core: what is in flight stays in that core's cache, and
    /// nothing is paced.
    pub fn same_host() -> Self {
        // The kernel doubles the value for its own book-keeping: payload of half the second-level
        // cache's size fills that cache, and what waits longer would wait further away.
        let bytes = placement::second_level_cache_bytes().map_or(0, |bytes| bytes / 2);
        let bytes = bytes.clamp(
            limits::SAME_HOST_SOCKET_BUFFER_BYTES_MIN,
            limits::SAME_HOST_SOCKET_BUFFER_BYTES,
        );
        Self { buffer_bytes: Some(bytes), unpaced: true }
    }
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
    /// Local addresses to connect from, the best first: ports that lead to a queue of the target's.
    /// Those that are taken are passed over; if all are, or there are none, the kernel chooses.
    pub from: Vec<SocketAddr>,
    /// Where it leads and through which NIC, if not where the system's routes lead it.
    pub route: Option<LaneRoute>,
}

/// The way of one lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneRoute {
    /// The NIC it goes out of, whatever the system's routes say.
    pub device: String,
    /// Local address to connect from; port 0 lets the kernel choose one.
    pub from: SocketAddr,
    /// Where the target takes it in.
    pub to: SocketAddr,
}

/// How lanes are encrypted.
#[derive(Clone, Debug)]
pub struct LaneTls {
    /// What this side shows and believes. Where the kernel encrypts it keeps its keys for the whole
    /// lane, so the cipher has to bear what a lane may carry: the caller knows how much that is.
    pub config: Arc<ClientConfig>,
    /// Whom the target's certificate has to name.
    pub name: ServerName<'static>,
}

/// What becomes of memory that is a hole by the time it would be read.
#[derive(Clone, Debug)]
pub struct HolePlan {
    /// Tells.
    pub look: Arc<HoleLook>,
    /// The target takes holes; one that does not gets zeros.
    pub punches: bool,
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
    /// Whether to send from guest memory without copying.
    pub zero_copy: ZeroCopyWish,
    /// Which system calls to use.
    pub path: PathWish,
    /// Whether to compress; only with codecs that the target takes.
    pub packing: PackingWish,
    /// Where guests give memory back while they move: who looks for it.
    pub holes: Option<HolePlan>,
    /// Whether to narrow huge pages.
    pub narrowing: NarrowingWish,
    /// What all lanes of the migration are held to.
    pub pacer: Arc<Pacer>,
    /// How the sockets are tuned.
    pub tuning: SocketTuning,
    /// TLS on each lane.
    pub tls: Option<LaneTls>,
    /// Connecting, hello and reply of one lane.
    pub connect_wait: Duration,
    /// A lane without progress for this long has failed.
    pub progress_wait: Duration,
}

impl ConnectPlan {
    /// A plan with the defaults for two machines: zero-copy where it works, sockets tuned by the
    /// kernel.
    pub fn new(addr: SocketAddr, session: SessionId, lanes: Vec<LanePlan>) -> Self {
        Self {
            addr,
            session,
            lanes,
            zero_copy: ZeroCopyWish::Try,
            path: PathWish::Auto,
            packing: PackingWish::Not("not asked for".into()),
            holes: None,
            narrowing: NarrowingWish::default(),
            pacer: Arc::default(),
            tuning: SocketTuning::default(),
            tls: None,
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
    /// Codecs that were agreed on.
    pub codecs: Vec<CodecName>,
    /// Holes were agreed on: no memory is registered with a device.
    pub holes: bool,
    /// How the socket is tuned.
    pub tuning: SocketTuning,
    /// A batch without progress for this long has failed. Between rounds a lane may be silent.
    pub progress_wait: Duration,
}

impl Default for TargetLaneConfig {
    fn default() -> Self {
        Self {
            cpu: None,
            path: PathWish::Auto,
            codecs: Vec::new(),
            holes: false,
            tuning: SocketTuning::default(),
            progress_wait: limits::PROGRESS_WAIT_MAX,
        }
    }
}
