//! The target agent: waits for migrations and takes them in, one at a time.
//!
//! One listening port for everything: a connection's first bytes say whether it is a control
//! connection or a lane (`pageferry_uring::greet`). [`Session`] carries out the commands of
//! `pageferry_datapath::target`; [`Intake`](intake::Intake) has its lanes.

mod intake;
mod session;

use std::path::PathBuf;
use std::time::Duration;

use crossbeam_channel::{Receiver, select};
use pageferry_datapath::control::Offer;
use pageferry_datapath::framing::hello::Refusal;
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::Outcome;

use self::session::Session;
use super::acceptor::{Acceptor, Arrival};
use super::failure;
use super::lanes::LaneChoice;
use super::link::{Link, LinkError};
use super::monitor::TargetMonitor;

/// What a target agent is told.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Lanes and how they run; `count` is the most that are taken.
    pub lanes: LaneChoice,
    /// QMP socket here, for the record.
    pub qmp: Option<PathBuf>,
    /// Where records are kept.
    pub state_dir: PathBuf,
}

/// How one session ended here.
#[derive(Debug)]
pub struct TargetResult {
    /// The session, if the source got as far as saying it.
    pub session: Option<SessionId>,
    /// How it ended.
    pub outcome: Outcome,
    /// From the control connection until the end.
    pub total: Duration,
}

/// Opens the monitor for an offer: the one the agent was started with, or the one the offer names.
pub type OpenMonitor<'a> = dyn Fn(&Offer) -> Result<Box<dyn TargetMonitor>, Failure> + 'a;

/// Waits for one migration and takes it in; `None` when cancelled before one came.
pub fn serve_one(
    options: &TargetOptions,
    acceptor: &Acceptor,
    open_monitor: &OpenMonitor<'_>,
    cancel: &Receiver<()>,
    tell: &mut dyn FnMut(&str),
) -> Option<TargetResult> {
    let link = loop {
        select! {
            recv(acceptor.arrivals()) -> arrival => match arrival.ok()? {
                Arrival::Control(channel) => match Link::over(channel) {
                    Ok(link) => break link,
                    Err(error) => tell(&failure::chain("a control connection", &error)),
                },
                Arrival::Lane(lane) => lane.refuse(Refusal::Ticket),
                Arrival::Stranger { from, reason } => tell(&format!("{from}: {reason}")),
            },
            recv(cancel) -> _ => return None,
        }
    };
    Some(Session::new(options, link).run(acceptor, open_monitor, cancel, tell))
}

fn lost(error: &LinkError) -> Failure {
    failure::host("source", error, Some("look at the source agent's output".into()))
}
