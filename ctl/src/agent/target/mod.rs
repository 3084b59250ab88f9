//! The target agent: waits for migrations and takes them in.
//!
//! One listening port for everything: a connection's first bytes say whether it is a control
//! connection or a lane (`pageferry_uring::greet`), and the [`server`] whose it is.
//! [`Session`](session::Session) carries out the commands of `pageferry_datapath::target`, a thread
//! for each migration; [`Intake`](intake::Intake) has its lanes.

mod intake;
mod server;
mod session;
mod told;

use std::path::PathBuf;
use std::time::Duration;

use pageferry_datapath::control::Offer;
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::Outcome;

pub use self::server::serve;
use super::allow::Allowed;
use super::failure;
use super::lanes::LaneChoice;
use super::link::LinkError;
use super::monitor::TargetMonitor;
use super::record::RecordedSecurity;

/// What a target agent is told.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Lanes and how they run; `count` is the most that are taken.
    pub lanes: LaneChoice,
    /// QMP socket here, for the record.
    pub qmp: Option<PathBuf>,
    /// Where records are kept.
    pub state_dir: PathBuf,
    /// Where each session has a socket, to be told to end.
    pub runtime_dir: PathBuf,
    /// Where it listens, for the record.
    pub listen: String,
    /// How sources are believed, for the record.
    pub security: RecordedSecurity,
    /// For how long a source may be cut off.
    pub reconnect: Duration,
    /// Migrations at the same time.
    pub sessions_max: usize,
    /// Of one source, by its certificate; those without one count as one.
    pub sessions_per_peer: usize,
    /// What it may be used for, and by whom.
    pub allowed: Allowed,
    /// The longest that one session may take until its guest is loaded.
    pub session_max: Duration,
}

/// How one session ended here.
#[derive(Debug)]
pub struct TargetResult {
    /// The session.
    pub session: SessionId,
    /// How it ended.
    pub outcome: Outcome,
    /// From the control connection until the end.
    pub total: Duration,
    /// The source has said that it knows, and keeps no record any more.
    pub settled: bool,
}

/// Opens the monitor for an offer: the one the agent was started with, or the one the offer names.
pub type OpenMonitor<'a> = dyn Fn(&Offer) -> Result<Box<dyn TargetMonitor>, Failure> + Sync + 'a;

fn lost(error: &LinkError) -> Failure {
    failure::host("source", error, Some("look at the source agent's output".into()))
}
