//! The source agent: moves one running guest to a waiting target.
//!
//! [`run`] is the whole of it: the loop drawn in [`agent`](super) ([`Agent`]), the lanes and what is
//! on them ([`Mover`](mover::Mover)), the guest's memory and its tracking
//! ([`Tracking`](tracking::Tracking)), the relay of the device state. Decides nothing: see
//! `pageferry_datapath::source`.

mod agent;
mod mover;
pub mod overseen;
mod state_relay;
mod tracking;
mod ways;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use pageferry_datapath::control::{CoreUse, LaneOffer, Offer, SourceLimits};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::lane::{LanePath, LaneStats};
use pageferry_datapath::planner::Goals;
use pageferry_datapath::source::{Failure, FailureKind, Outcome, Phase, SourceReport};

use self::agent::Agent;
use super::failure;
use super::lanes::LaneChoice;
use super::link::LinkError;
use super::monitor::{GuestFacts, SourceMonitor};
use super::rails;
use super::tls::{Caller, Security};
use crate::report::events::{RailDetail, RssDetail};

/// What a source agent is told.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// `HOST:PORT` of the target.
    pub to: String,
    /// Whom to believe that it is the target.
    pub caller: Caller,
    /// QMP socket at the target, if it was not started with one.
    pub target_qmp: Option<String>,
    /// QMP socket here, for the record.
    pub qmp: PathBuf,
    /// Lanes and how they run.
    pub lanes: LaneChoice,
    /// What was asked for.
    pub goals: Goals,
    /// Compare digests inside the pause.
    pub verify: bool,
    /// Leave out the drain point although it is needed; for tests that show what happens then.
    pub skip_drain: bool,
    /// Where records are kept.
    pub state_dir: PathBuf,
    /// For how long the connections may be cut.
    pub reconnect: Duration,
    /// The same while the guest is paused.
    pub blackout: Duration,
    /// A file will be written at the end, perhaps in another user's folder.
    pub writes_a_file: bool,
}

/// How far a migration is; told to the watcher at every change and every 100 ms.
#[derive(Debug)]
pub struct Watch<'a> {
    /// The session.
    pub session: SessionId,
    /// The lanes' transport, once it was chosen.
    pub path: Option<LanePath>,
    /// Why that one, where there was a choice.
    pub path_reason: Option<&'a str>,
    /// Since the attempt began.
    pub at: Duration,
    /// Where the source is.
    pub phase: Phase,
    /// What it has learned.
    pub report: &'a SourceReport,
    /// Bytes of the current round, and of them handed to the lanes.
    pub round_bytes: (u64, u64),
    /// Guest memory moved so far.
    pub moved_bytes: u64,
    /// Lanes alive.
    pub lanes: usize,
}

/// Everything a source agent knows at the end.
pub struct SourceResult {
    /// The session.
    pub session: SessionId,
    /// How it ended.
    pub outcome: Outcome,
    /// Whom the two sides made sure of; `None` if nobody was reached.
    pub security: Option<Security>,
    /// What the machine learned.
    pub report: SourceReport,
    /// What each lane counted; those that carried on for others come after them.
    pub lanes: Vec<LaneStats>,
    /// What lanes ran on; where they were mixed, RDMA.
    pub path: Option<LanePath>,
    /// Why lanes ran on what they did, where there was a choice.
    pub path_reason: Option<String>,
    /// What lanes were spread over, and what went over it.
    pub rails: Vec<RailDetail>,
    /// Whether lanes got receive queues for themselves; `None` without lanes over TCP.
    pub rss: Option<RssDetail>,
    /// How busy each core was while lanes were open, here and at the target.
    pub cores: (Vec<CoreUse>, Vec<CoreUse>),
    /// For how long the target was away, each time that it was.
    pub cuts: Vec<Duration>,
    /// How often the lanes were lost and others asked for.
    pub lanes_renewed: u32,
    /// Time of each scan.
    pub scans: Vec<Duration>,
    /// Size of the device state.
    pub state_bytes: u64,
    /// For how long a thread of the monitor was stopped to attach.
    pub attach_stopped: Option<Duration>,
    /// The whole attempt.
    pub total: Duration,
}

impl SourceResult {
    /// Of an attempt that ended before anything was begun.
    pub fn untouched(outcome: Outcome) -> Self {
        Self {
            session: SessionId(0),
            outcome,
            security: None,
            report: SourceReport::default(),
            lanes: Vec::new(),
            path: None,
            path_reason: None,
            rails: Vec::new(),
            rss: None,
            cores: Default::default(),
            cuts: Vec::new(),
            lanes_renewed: 0,
            scans: Vec::new(),
            state_bytes: 0,
            attach_stopped: None,
            total: Duration::ZERO,
        }
    }
}

/// Moves the guest of `monitor`; returns when it is over, however it ended.
pub fn run(
    options: &SourceOptions,
    monitor: &mut dyn SourceMonitor,
    cancel: &Receiver<()>,
    watch: &mut dyn FnMut(&Watch<'_>),
) -> SourceResult {
    let started = Instant::now();
    let session = SessionId::random().expect("the kernel has random bytes");
    match Agent::new(options, monitor, session, started) {
        Ok(agent) => agent.run(options, cancel, watch),
        Err(failure) => SourceResult {
            session,
            total: started.elapsed(),
            ..SourceResult::untouched(Outcome::Failed { kind: FailureKind::Refused, failure })
        },
    }
}

/// What a guest is offered as.
pub fn offer(options: &SourceOptions, facts: &GuestFacts) -> Offer {
    Offer {
        regions: facts.regions.clone(),
        monitor: facts.monitor.clone(),
        machine: facts.machine.clone(),
        lanes: LaneOffer {
            count: options.lanes.count,
            paths: options.lanes.paths(),
            cpus: options.lanes.cpus.len() as u16,
            encrypt: options.lanes.encrypt,
            codecs: options.lanes.compress.offered(),
            nics: rails::usable_nics(&rails::nics(), &options.lanes.networks),
            rss: true,
            holes: true,
        },
        tracker: facts.tracker.0.clone(),
        target_qmp: options.target_qmp.clone(),
        verify: options.verify,
        limits: SourceLimits { downtime_ms: options.goals.downtime.as_millis() as u64 },
    }
}

fn lost(error: &LinkError) -> Failure {
    failure::host("target", error, Some("look at the target agent's output".into()))
}
