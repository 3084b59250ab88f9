//! How many lanes, over what, on which cores: the choice both agents make together.
//!
//! Between two machines each lane gets a core of its own on either side, and the kernel tunes the
//! socket buffers. On one machine (a test, a demo, namespaces) both ends of a lane share a core and
//! small buffers, so that the bytes in flight stay in that core's cache.

use std::net::SocketAddr;
use std::sync::Arc;

use crossbeam_channel::Sender;
use ipnet::IpNet;
use pageferry_datapath::codec::CodecName;
use pageferry_datapath::control::{Choice, LaneOffer, Refused};
use pageferry_datapath::holes::HoleLook;
use pageferry_datapath::ids::{LaneId, SessionId};
use pageferry_datapath::lane::{LaneError, LaneEvent, LanePath, SourceLanes};
use pageferry_datapath::pace::Pacer;
use pageferry_datapath::region::GuestMemory;
use pageferry_uring::plan::{
    ConnectPlan, HolePlan, LanePlan, LaneTls, NarrowingWish, PathWish, SocketTuning,
    TargetLaneConfig, ZeroCopyWish,
};
use pageferry_uring::source::{LanePool, reaches};

use super::compress::Compress;
use super::queues::{self, Picked};
use super::rails::{self, Rail};
use super::rdma;
use crate::cores;
use crate::limits;

/// Eight connections fill 100 GbE; more only cost.
const LANES_DEFAULT_MAX: u16 = 8;

/// What lanes run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// RDMA where a page written to the other host and read back was the same, else TCP.
    #[default]
    Auto,
    /// RDMA, or an error.
    Rdma,
    /// TCP.
    Tcp,
}

/// Which guest memory RDMA devices keep in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Pin {
    /// All of it, holes too, before and while the first pages move.
    All,
    /// What holds something, and what is near it, when it is first needed.
    #[default]
    Touched,
}

/// Whether huge pages are narrowed to what changed in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Narrow {
    /// While it makes the migration faster.
    #[default]
    Auto,
    /// Never: a huge page of which a byte was written is sent whole.
    Off,
    /// Always.
    Always,
}

impl Narrow {
    fn wish(self) -> NarrowingWish {
        match self {
            Self::Auto => NarrowingWish::Auto,
            Self::Always => NarrowingWish::Always,
            Self::Off => NarrowingWish::Not("asked for".into()),
        }
    }
}

/// What one side was told, or found out, about its lanes.
#[derive(Clone, Debug)]
pub struct LaneChoice {
    /// What they may run on.
    pub transport: Transport,
    /// Why RDMA is not offered, or not taken, from this side; `None` if it may be.
    pub no_rdma: Option<String>,
    /// Which memory RDMA pins on this side.
    pub pin: Pin,
    /// Source: how many, if told. Target: how many at most.
    pub count: Option<u16>,
    /// Cores that lanes may use, in the order they are used.
    pub cpus: Vec<usize>,
    /// They were told, and are used whoever else has them.
    pub cpus_told: bool,
    /// Networks that lanes over TCP may take, the best first; all if none is named.
    pub networks: Vec<IpNet>,
    /// Target: lanes are taken at every address of this host.
    pub everywhere: bool,
    /// Which system calls to use.
    pub path: PathWish,
    /// Whether to send from guest memory without copying.
    pub zero_copy: ZeroCopyWish,
    /// They are encrypted, or there are none.
    pub encrypt: bool,
    /// Source: how, once it knows the target.
    pub tls: Option<LaneTls>,
    /// Source: whether to compress.
    pub compress: Compress,
    /// Source: whether to narrow huge pages.
    pub narrow: Narrow,
    /// Source: what all lanes together are held to; changed while they run.
    pub pacer: Arc<Pacer>,
}

impl LaneChoice {
    /// The paths this side can take, best first.
    pub fn paths(&self) -> Vec<LanePath> {
        let rdma = self.no_rdma.is_none().then_some(LanePath::Rdma);
        let tcp = match (self.transport, self.path) {
            (Transport::Rdma, _) => vec![],
            (_, PathWish::Auto) => vec![LanePath::TcpUring, LanePath::TcpPlain],
            (_, PathWish::Uring) => vec![LanePath::TcpUring],
            (_, PathWish::Plain) => vec![LanePath::TcpPlain],
        };
        rdma.into_iter().chain(tcp).collect()
    }

    /// Keeps off cores that vCPUs are pinned to, of the guest of process `pid` with these vCPU threads
    /// or of others, unless the cores were told.
    pub fn leave_to_vcpus(&mut self, pid: i32, threads: &[i32]) {
        if !self.cpus_told {
            let free = cores::free_of_vcpus(pid, threads);
            tracing::info!(cpus = ?free.cpus, reason = free.reason, "cores for lanes");
            self.cpus = free.cpus;
        }
    }

    /// Target: how many lanes a session gets.
    pub fn agree(&self, offer: &LaneOffer, same_host: bool) -> u16 {
        let most = self.count.unwrap_or(u16::MAX).max(1);
        let cores = (self.cpus.len() as u16).min(offer.cpus).max(1);
        let fitting = match same_host {
            // Two ends a core: a lane for each is all that can run.
            true => cores,
            // A lone core still gains from a second connection while the first waits.
            false => cores.clamp(2, LANES_DEFAULT_MAX),
        };
        // Each rail takes a lane at least.
        let fitting = fitting.max(offer.nics.min(LANES_DEFAULT_MAX));
        offer.count.unwrap_or(fitting).clamp(1, most)
    }

    /// Target: how one lane runs.
    pub fn target_config(
        &self,
        cpu: Option<usize>,
        same_host: bool,
        codecs: &[CodecName],
    ) -> TargetLaneConfig {
        TargetLaneConfig {
            cpu,
            codecs: codecs.to_vec(),
            path: self.path,
            tuning: tuning(same_host),
            ..TargetLaneConfig::default()
        }
    }
}

/// Why there is no RDMA, as far as this side knows before it asks the other.
pub fn no_rdma(transport: Transport, encrypt: bool) -> Option<String> {
    match transport {
        _ if encrypt => Some("encryption was asked for, and RDMA has none".into()),
        Transport::Tcp => Some("TCP was asked for".into()),
        Transport::Auto | Transport::Rdma => rdma::why_not(),
    }
}

/// Target: the best path over TCP that both sides can take. The two ends of a lane need not use
/// the same system calls, so this is what the source will do.
pub fn tcp_path_for(offered: &[LanePath]) -> LanePath {
    offered
        .iter()
        .copied()
        .find(|path| matches!(path, LanePath::TcpUring | LanePath::TcpPlain))
        .unwrap_or(LanePath::TcpPlain)
}

/// Target: what of the offered lanes is not used, and why.
pub fn refused(offer: &LaneOffer, path: LanePath, no_rdma: Option<&str>) -> Vec<Refused> {
    let unused = offer.paths.iter().filter(|offered| **offered != path);
    unused
        .map(|unused| Refused {
            what: format!("{unused:?}"),
            reason: match (unused, no_rdma) {
                (LanePath::Rdma, Some(why)) => why.to_owned(),
                _ => format!("{path:?} was offered before it"),
            },
        })
        .collect()
}

/// Source: why the target does not take RDMA, if it said so.
pub fn refused_rdma(choice: &Choice) -> Option<&str> {
    let refused = choice.refused.iter().find(|refused| refused.what == "Rdma")?;
    Some(&refused.reason)
}

/// Source: connects those lanes of the choice that `is_ours` tells, by `rails` if there are any, over
/// RDMA; what went wrong, and with which lane if with one, is a text.
pub fn open_rdma(
    (address, rails): (SocketAddr, &[Rail]),
    session: SessionId,
    (choice, is_ours): (&Choice, &dyn Fn(usize) -> bool),
    lanes: &LaneChoice,
    memory: &GuestMemory,
    events: Sender<LaneEvent>,
) -> Result<Box<dyn SourceLanes>, (Option<LaneId>, String)> {
    let nowhere = || (None, "the target did not say where it listens".to_owned());
    let port = choice.rdma_port.ok_or_else(nowhere)?;
    let address = SocketAddr::new(address.ip(), port);
    let route = |rail: &Rail| rdma::LaneRoute {
        from: rail.from,
        // That of the pair's control port is another.
        to: SocketAddr::new(rail.to.ip(), port),
    };
    let ours = choice.lanes.iter().enumerate().filter(|(lane, _)| is_ours(*lane));
    let plans = ours.map(|(lane, ticket)| rdma::LanePlan {
        lane: LaneId(lane as u16),
        ticket: ticket.ticket,
        cpu: lanes.cpus.get(lane % lanes.cpus.len().max(1)).copied(),
        route: rails.get(lane % rails.len().max(1)).map(route),
    });
    let progress_wait = rails::progress_wait(rails.len());
    let still_there = (!rails.is_empty()).then(|| still_there(rails.to_vec()));
    let terms = rdma::Terms { pin: lanes.pin, pacer: &lanes.pacer, progress_wait, still_there };
    rdma::connect(address, session, plans.collect(), terms, memory, events)
}

/// Asks a lane's rail whether the target still answers on it.
fn still_there(rails: Vec<Rail>) -> rdma::StillThere {
    rdma::StillThere::new(move |lane| {
        let rail = &rails[usize::from(lane.0) % rails.len()];
        let answers = reaches(&rail.route(), limits::RAIL_STILL_ANSWERS_WITHIN);
        tracing::debug!(%lane, answers, device = rail.device, "a lane is silent");
        answers
    })
}

/// Source: connects every lane of the choice over TCP, by `rails` if there are any, each to a receive
/// queue of its own where the target tells enough. Where there are some `over_rdma`, only the others,
/// beside them.
pub fn open(
    (address, rails): (SocketAddr, &[Rail]),
    session: SessionId,
    (choice, over_rdma): (&Choice, Option<&[bool]>),
    lanes: &LaneChoice,
    same_host: bool,
    (memory, look): (&GuestMemory, Option<&Arc<HoleLook>>),
    events: Sender<LaneEvent>,
) -> Result<(Box<dyn SourceLanes>, Picked), LaneError> {
    let picked = queues::pick(&choice.queues, choice.lanes.len(), (address, rails), session);
    let cpu_of = |lane: usize, theirs: Option<u16>| match same_host {
        true => theirs.map(usize::from).filter(|cpu| lanes.cpus.contains(cpu)),
        false => lanes.cpus.get(lane % lanes.cpus.len().max(1)).copied(),
    };
    let is_ours = |lane: usize| over_rdma.is_none_or(|over_rdma| !over_rdma[lane]);
    let ours = choice.lanes.iter().enumerate().filter(|(lane, _)| is_ours(*lane));
    let plans = ours.map(|(lane, ticket)| LanePlan {
        lane: LaneId(lane as u16),
        ticket: match over_rdma {
            Some(_) => ticket.beside_rdma,
            None => ticket.over_tcp,
        }
        .unwrap_or(ticket.ticket),
        cpu: cpu_of(lane, ticket.cpu),
        from: picked.from[lane].clone(),
        route: rails.get(lane % rails.len().max(1)).map(Rail::route),
    });
    let defaults = ConnectPlan::new(address, session, plans.collect());
    let plan = ConnectPlan {
        // The kernel would only say so later.
        zero_copy: match lanes.zero_copy {
            ZeroCopyWish::Try if same_host => {
                ZeroCopyWish::Not("on one machine every byte is copied")
            }
            wish => wish,
        },
        path: lanes.path,
        packing: lanes.compress.wish(&choice.codecs),
        holes: look.map(|look| HolePlan { look: Arc::clone(look), punches: choice.holes }),
        narrowing: match over_rdma {
            // Tags say what the target has; what lanes over RDMA write, they do not know.
            Some(_) => NarrowingWish::Not("other lanes are over RDMA".into()),
            None => lanes.narrow.wish(),
        },
        pacer: Arc::clone(&lanes.pacer),
        tuning: tuning(same_host),
        tls: lanes.tls.clone(),
        progress_wait: rails::progress_wait(rails.len()).unwrap_or(defaults.progress_wait),
        ..defaults
    };
    let lanes = LanePool::connect(&plan, memory.clone(), events)?;
    Ok((Box::new(lanes), picked))
}

fn tuning(same_host: bool) -> SocketTuning {
    if same_host { SocketTuning::same_host() } else { SocketTuning::default() }
}
