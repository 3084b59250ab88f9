//! The source's lanes, and the round that is on them.
//!
//! Owned by the agent's loop, on its thread; the lanes' workers only send events.

use std::net::SocketAddr;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{AbortReason, Choice};
use pageferry_datapath::ids::{RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LanePath, LaneStats, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::{Failure, Input};
use pageferry_datapath::work::RoundWork;

use super::super::failure;
use super::super::lanes::{self, LaneChoice, Transport};

/// A lane that broke says no more than its errno.
const LANE_HINT: &str = "look at the target agent's output, and at the link";

/// Where lanes lead to, and what they lease.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    /// Of the target.
    pub(super) address: SocketAddr,
    /// Of this migration.
    pub(super) session: SessionId,
    /// Of the guest.
    pub(super) memory: &'a GuestMemory,
}

/// The lanes of one migration.
pub(super) struct Mover {
    wanted: LaneChoice,
    /// Both ends are on one machine.
    pub(super) same_host: bool,
    events: Receiver<LaneEvent>,
    to_events: Sender<LaneEvent>,
    /// What the lanes were opened by, and may be opened by once more over TCP.
    choice: Option<Choice>,
    path: Option<LanePath>,
    path_reason: Option<String>,
    lanes: Option<Box<dyn SourceLanes>>,
    /// Lanes opened; each has its part in every round.
    count: usize,
    stats: Vec<LaneStats>,
    work: Option<Arc<RoundWork>>,
    placed: usize,
    /// The round on its way over RDMA, should TCP have to carry on with it.
    moving: Option<(RoundIndex, DirtySet)>,
    /// By lanes that are gone.
    moved_before: u64,
    /// Found by all rounds before.
    zero_bytes: u64,
}

impl Mover {
    pub(super) fn new(wanted: LaneChoice) -> Self {
        let (to_events, events) = unbounded();
        Self {
            wanted,
            same_host: false,
            events,
            to_events,
            choice: None,
            path: None,
            path_reason: None,
            lanes: None,
            count: 0,
            stats: Vec::new(),
            work: None,
            placed: 0,
            moving: None,
            moved_before: 0,
            zero_bytes: 0,
        }
    }

    /// Opens the lanes of a choice: over RDMA where both ends have it, else over TCP.
    pub(super) fn open(&mut self, choice: &Choice, way: Way<'_>) -> Result<(), Failure> {
        self.count = choice.lanes.len();
        self.choice = Some(choice.clone());
        let chosen = choice.lanes.first().map(|lane| lane.path);
        let no_rdma = match (chosen, &self.wanted.no_rdma) {
            (Some(LanePath::Rdma), _) => match self.open_rdma(choice, way) {
                Ok(()) => return Ok(()),
                Err(why) => why,
            },
            (_, Some(why)) => why.clone(),
            (_, None) => {
                let why = lanes::refused_rdma(choice).unwrap_or("the target knows none");
                format!("at the target: {why}")
            }
        };
        match self.wanted.transport {
            Transport::Rdma => Err(Failure {
                reason: AbortReason::HostFailed,
                by_peer: false,
                text: format!("no lanes over RDMA: {no_rdma}"),
                hint: Some("leave out --transport rdma: TCP is used where RDMA is not".into()),
            }),
            Transport::Auto => self.open_tcp(choice, way, format!("no RDMA: {no_rdma}")),
            Transport::Tcp => self.open_tcp(choice, way, no_rdma),
        }
    }

    fn open_rdma(&mut self, choice: &Choice, way: Way<'_>) -> Result<(), String> {
        let Way { address, session, memory } = way;
        let events = self.to_events.clone();
        let opened = lanes::open_rdma(address, session, choice, &self.wanted, memory, events);
        self.lanes = Some(opened?);
        self.path = Some(LanePath::Rdma);
        let reason = "on each lane a page was written to the target and read back";
        self.path_reason = Some(reason.into());
        Ok(())
    }

    fn open_tcp(&mut self, choice: &Choice, way: Way<'_>, reason: String) -> Result<(), Failure> {
        let chosen = choice.lanes.first().map(|lane| lane.path);
        self.path = match chosen {
            Some(LanePath::Rdma) => self.wanted.paths().into_iter().nth(1),
            chosen => chosen,
        };
        self.path_reason = Some(reason).filter(|_| self.wanted.transport == Transport::Auto);
        let Way { address, session, memory } = way;
        self.lanes = Some(lanes::open(
            address,
            session,
            choice,
            &self.wanted,
            self.same_host,
            memory,
            self.to_events.clone(),
        )?);
        Ok(())
    }

    /// Puts a round on the lanes.
    pub(super) fn move_round(&mut self, round: RoundIndex, pages: &DirtySet) {
        let work = Arc::new(RoundWork::new(round, pages.extents()));
        self.placed = 0;
        self.moving = (self.path == Some(LanePath::Rdma)).then(|| (round, pages.clone()));
        self.work = Some(Arc::clone(&work));
        self.lanes.as_mut().expect("lanes open before rounds").move_round(work);
    }

    /// What the lanes say, for [`Mover::heard`].
    pub(super) fn events(&self) -> &Receiver<LaneEvent> {
        &self.events
    }

    /// What an event means. A round is placed when every lane has placed its part. Those that have
    /// failed are waited for too: that they did may be heard after what the others placed.
    pub(super) fn heard(&mut self, event: LaneEvent, way: Option<Way<'_>>) -> Input {
        match event {
            LaneEvent::Placed { round, .. } => {
                self.placed += 1;
                match self.placed == self.count {
                    true => self.round_placed(round),
                    false => Input::Tick,
                }
            }
            LaneEvent::Failed { error, .. } => {
                let failed = failure::host("moving memory", &error, Some(LANE_HINT.into()));
                self.carry_on(failed, way).map_or_else(Input::Failed, |()| Input::Tick)
            }
            LaneEvent::Closed { .. } => Input::Tick,
        }
    }

    fn round_placed(&mut self, round: RoundIndex) -> Input {
        self.moving = None;
        let zero_bytes = self.lanes.as_ref().map_or(0, |lanes| lanes.zero_bytes());
        let before = std::mem::replace(&mut self.zero_bytes, zero_bytes);
        Input::Placed { round, zero_bytes: zero_bytes - before }
    }

    /// A lane over RDMA is gone: TCP takes the round from its beginning, where it may. Accepting the
    /// first new lane, the target fences all old ones, so nothing older comes after what is sent
    /// now.
    fn carry_on(&mut self, failed: Failure, way: Option<Way<'_>>) -> Result<(), Failure> {
        let may = self.path == Some(LanePath::Rdma)
            && self.wanted.transport == Transport::Auto
            && self.lanes.is_some();
        let (Some(choice), Some(way)) = (self.choice.clone().filter(|_| may), way) else {
            return Err(failed);
        };
        tracing::warn!(reason = %failed.text, "RDMA is lost; carrying on over TCP");
        self.moved_before = self.lanes.as_ref().map_or(0, |lanes| lanes.moved_bytes());
        self.close(true);
        // What the old lanes still had to say is about the past.
        (self.to_events, self.events) = unbounded();
        self.zero_bytes = 0;
        let reason = format!("carried on over TCP after RDMA was lost: {}", failed.text);
        self.open_tcp(&choice, way, reason)?;
        if let Some((round, pages)) = self.moving.take() {
            self.move_round(round, &pages);
        }
        Ok(())
    }

    /// Closes every lane; after an abort they are reset rather than drained.
    pub(super) fn close(&mut self, abort: bool) {
        if let Some(lanes) = self.lanes.take() {
            self.stats.extend(lanes.close(abort));
        }
    }

    /// Cores that the lanes may use.
    pub(super) fn cpus(&self) -> usize {
        self.wanted.cpus.len()
    }

    /// What the lanes run on, once they do.
    pub(super) fn path(&self) -> Option<LanePath> {
        self.path
    }

    /// Why on that, where there was a choice.
    pub(super) fn path_reason(&self) -> Option<&str> {
        self.path_reason.as_deref()
    }

    /// Bytes of the round on its way, and of them handed to the lanes.
    pub(super) fn round_bytes(&self) -> (u64, u64) {
        self.work.as_ref().map_or((0, 0), |work| (work.total_bytes(), work.taken_bytes()))
    }

    /// Guest memory moved so far.
    pub(super) fn moved_bytes(&self) -> u64 {
        self.moved_before + self.lanes.as_ref().map_or(0, |lanes| lanes.moved_bytes())
    }

    /// Lanes alive.
    pub(super) fn alive(&self) -> usize {
        self.lanes.as_ref().map_or(0, |lanes| lanes.alive())
    }

    /// What each lane counted; those that carried on for others come after them.
    pub(super) fn take_stats(&mut self) -> Vec<LaneStats> {
        std::mem::take(&mut self.stats)
    }
}
