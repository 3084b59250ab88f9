//! The source's lanes, and the round that is on them.
//!
//! Owned by the agent's loop, on its thread; the lanes' workers only send events.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{AbortReason, Choice, CoreUse, LanesLost, LanesPlaced, NewLanes};
use pageferry_datapath::holes::HoleLook;
use pageferry_datapath::ids::{LaneId, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LanePath, LaneStats, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::{Failure, Input};
use pageferry_datapath::work::RoundWork;

use super::super::core_use::CoreTimes;
use super::super::failure;
use super::super::lanes::{self, LaneChoice, Transport};
use super::super::mixed::MixedLanes;
use super::super::queues::{self, Picked};
use super::super::rails::{Rail, Rails, nics};
use super::super::rdma;
use crate::limits;
use crate::report::events::{RailDetail, RssDetail};

/// For a lane that broke and says no more than its errno.
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
    /// For lanes that look before they read.
    pub(super) look: Option<&'a Arc<HoleLook>>,
}

/// Lanes that are gone.
struct Lost {
    since: Instant,
    failure: Failure,
    /// The target was asked for others, and has not answered.
    asked: bool,
    /// When to ask it once more.
    again_at: Instant,
}

/// What an event of a lane means.
pub(super) enum Said {
    /// For the state machine.
    Input(Input),
    /// A lane is gone, and with it all of them.
    Lost(Failure),
}

/// Other lanes would be better.
pub(super) struct RailsChanged {
    /// In words.
    pub(super) why: Failure,
    /// The address of the NIC that lost its carrier, if one did.
    pub(super) dead: Option<IpAddr>,
}

/// The lanes of one migration.
pub(super) struct Mover {
    wanted: LaneChoice,
    /// Both ends are on one machine.
    pub(super) same_host: bool,
    events: Receiver<LaneEvent>,
    to_events: Sender<LaneEvent>,
    path: Option<LanePath>,
    path_reason: Option<String>,
    lanes: Option<Box<dyn SourceLanes>>,
    rails: Rails,
    /// When RDMA was last lost, it was on one of several rails.
    has_other_rails: bool,
    /// What went over each rail that lanes ran on.
    over_rails: Vec<RailDetail>,
    /// Source ports that were picked for the lanes, if they are over TCP.
    picked: Option<Picked>,
    /// What the target said last of where they led.
    arrived: Option<LanesPlaced>,
    /// Since the first lanes were opened.
    core_times: Option<CoreTimes>,
    /// How busy the cores were until the last were closed.
    cores: Vec<CoreUse>,
    /// Lanes opened; each has its part in every round.
    count: usize,
    stats: Vec<LaneStats>,
    work: Option<Arc<RoundWork>>,
    placed: usize,
    /// The round on its way, should new lanes have to carry on with it.
    moving: Option<(RoundIndex, DirtySet)>,
    /// The lanes are gone, and new ones are asked for.
    lost: Option<Lost>,
    /// How often new ones were opened.
    renewed: u32,
    /// By lanes that are gone.
    moved_before: u64,
    /// Found by all rounds before.
    zero_bytes: u64,
}

impl Mover {
    pub(super) fn new(wanted: LaneChoice) -> Self {
        let (to_events, events) = unbounded();
        let rails = Rails::new(wanted.networks.clone());
        Self {
            wanted,
            rails,
            has_other_rails: false,
            over_rails: Vec::new(),
            picked: None,
            arrived: None,
            core_times: None,
            cores: Vec::new(),
            same_host: false,
            events,
            to_events,
            path: None,
            path_reason: None,
            lanes: None,
            count: 0,
            stats: Vec::new(),
            work: None,
            placed: 0,
            moving: None,
            lost: None,
            renewed: 0,
            moved_before: 0,
            zero_bytes: 0,
        }
    }

    /// Opens the lanes of a choice: over RDMA where both ends have it, else over TCP.
    pub(super) fn open(&mut self, choice: &Choice, way: Way<'_>) -> Result<(), Failure> {
        self.count = choice.lanes.len();
        (self.picked, self.arrived) = (None, None);
        self.core_times.get_or_insert_with(CoreTimes::now);
        let chosen = choice.lanes.first().map(|lane| lane.path);
        let no_rdma = match (chosen, &self.wanted.no_rdma) {
            (Some(LanePath::Rdma), _) => match self.open_rdma(choice, way) {
                Ok(()) => return Ok(()),
                // The tickets of lanes that came about are used up: with new ones, over the others.
                Err(why) if self.rails.used().len() > 1 => return Err(over_others(why)),
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
        let Way { address, session, memory, .. } = way;
        let events = self.to_events.clone();
        let mix = self.choose_for_rdma(choice, address)?;
        let over = (address, self.rails.used());
        let is_rdma = |lane: usize| mix.as_ref().is_none_or(|mix| mix[lane]);
        let lanes = lanes::open_rdma(
            over,
            session,
            (choice, &is_rdma),
            &self.wanted,
            memory,
            events.clone(),
        );
        let lanes = lanes.map_err(|(lane, why)| {
            match lane {
                Some(lane) => self.blame(lane),
                // No rail would do, and none was tried.
                None => {
                    self.rails.leave();
                    self.wanted.no_rdma = Some(why.clone()).filter(|_| !self.only_rdma());
                }
            }
            why
        })?;
        let mut reason = "on each lane a page was written to the target and read back".to_owned();
        self.lanes = Some(match mix {
            None => lanes,
            Some(mix) => {
                let part = (choice, Some(&mix[..]));
                let over = (address, self.rails.used());
                let wanted = &self.wanted;
                // Memory that the target has registered is not punched: nobody need look for holes.
                let memory = (memory, None);
                let tcp = lanes::open(over, session, part, wanted, self.same_host, memory, events);
                let (tcp, _) = tcp.map_err(|error| {
                    self.blame(error.lane());
                    failure::chain("lanes over TCP beside those over RDMA", &error)
                })?;
                let plain = self.rails.used().iter().filter(|rail| !rail.rdma);
                let plain: Vec<_> = plain.map(|rail| rail.device.as_str()).collect();
                reason = format!("{reason}; beside them TCP over {}", plain.join(", "));
                Box::new(MixedLanes::new(lanes, tcp, mix))
            }
        });
        self.path = Some(LanePath::Rdma);
        self.path_reason = Some(reason);
        Ok(())
    }

    /// The rails for lanes of which some at least are over RDMA: which of them, if not all are.
    fn choose_for_rdma(
        &mut self,
        choice: &Choice,
        address: SocketAddr,
    ) -> Result<Option<Vec<bool>>, String> {
        let (own, interfaces) = (nics(), rdma::interfaces());
        // Told to take RDMA only, or by a target that knows of nothing else.
        let mixes = self.wanted.transport == Transport::Auto
            && choice.lanes.iter().all(|lane| lane.beside_rdma.is_some());
        if mixes {
            self.rails.choose(&own, &choice.addresses, address, &interfaces);
            let have_rdma = self.rails.have_rdma(choice.lanes.len());
            if have_rdma.contains(&true) {
                return Ok(Some(have_rdma).filter(|it| it.contains(&false)));
            }
            if self.rails.is_rdma_away() {
                self.rails.leave();
                return Err("no pair of NICs with RDMA devices answers".into());
            }
        }
        let own: Vec<_> = own.into_iter().filter(|nic| interfaces.contains(&nic.name)).collect();
        let theirs: Vec<_> = choice.addresses.iter().filter(|it| it.rdma).cloned().collect();
        self.rails.choose(&own, &theirs, address, &interfaces);
        Ok(None)
    }

    fn open_tcp(&mut self, choice: &Choice, way: Way<'_>, reason: String) -> Result<(), Failure> {
        let chosen = choice.lanes.first().map(|lane| lane.path);
        self.path = match chosen {
            Some(LanePath::Rdma) => self.wanted.paths().into_iter().nth(1),
            chosen => chosen,
        };
        self.path_reason = Some(reason).filter(|_| self.wanted.transport == Transport::Auto);
        let Way { address, session, memory, look } = way;
        self.rails.choose(&nics(), &choice.addresses, address, &[]);
        let opened = lanes::open(
            (address, self.rails.used()),
            session,
            (choice, None),
            &self.wanted,
            self.same_host,
            (memory, look),
            self.to_events.clone(),
        );
        let (lanes, picked) = opened.map_err(|error| {
            self.rails.blame(usize::from(error.lane().0));
            failure::lane("lanes", &error, None)
        })?;
        self.lanes = Some(lanes);
        self.picked = Some(picked);
        Ok(())
    }

    /// The first lanes could not be opened. Where they were to run over several rails, the target is
    /// asked for others soon.
    pub(super) fn open_again(&mut self, failure: Failure, rejoins: bool) -> Result<(), Failure> {
        if !rejoins || self.rails.used().len() < 2 {
            return Err(failure);
        }
        let now = Instant::now();
        self.lost = Some(Lost { since: now, failure, asked: false, again_at: now });
        Ok(())
    }

    /// Something about the rails that other lanes would be better for: one lost its carrier, or is
    /// back.
    pub(super) fn rails_changed(&mut self) -> Option<RailsChanged> {
        self.lanes.as_ref()?;
        let over_rdma = self.path == Some(LanePath::Rdma);
        let (text, dead) = match self.rails.without_carrier() {
            Some(rail) => {
                let Rail { device, from, .. } = self.rails.used()[rail].clone();
                self.rails.blame(rail);
                (format!("{device} has no carrier"), Some(from))
            }
            None if self.rails.is_one_back() => {
                ("a pair of NICs that was away is back".into(), None)
            }
            None => return None,
        };
        // RDMA itself is as good as it was, or may be what is back.
        self.has_other_rails = over_rdma || dead.is_none() && self.rails.knew_rdma();
        let why = Failure { reason: AbortReason::HostFailed, by_peer: false, text, hint: None };
        Some(RailsChanged { why, dead })
    }

    /// What lanes run over.
    pub(super) fn rails(&self) -> &[Rail] {
        self.rails.used()
    }

    /// What the target says of where the lanes arrived.
    pub(super) fn note_placed(&mut self, placed: LanesPlaced) {
        self.arrived = Some(placed);
    }

    /// Whether they got receive queues for themselves; `None` for those that are not over TCP.
    pub(super) fn rss(&self) -> Option<RssDetail> {
        self.picked.as_ref().map(|picked| queues::report(picked, self.arrived.as_ref()))
    }

    /// How busy the cores were while lanes were open, here and at the target.
    pub(super) fn cores(&mut self) -> (Vec<CoreUse>, Vec<CoreUse>) {
        let theirs = self.arrived.as_ref().map(|arrived| arrived.cores.clone());
        (std::mem::take(&mut self.cores), theirs.unwrap_or_default())
    }

    /// What went over each rail.
    pub(super) fn take_over_rails(&mut self) -> Vec<RailDetail> {
        std::mem::take(&mut self.over_rails)
    }

    /// Puts a round on the lanes.
    pub(super) fn move_round(&mut self, round: RoundIndex, pages: &DirtySet) {
        self.placed = 0;
        self.moving = Some((round, pages.clone()));
        if self.lost.is_some() {
            return; // New lanes will take it.
        }
        let work = Arc::new(RoundWork::new(round, pages.extents()));
        self.work = Some(Arc::clone(&work));
        self.lanes.as_mut().expect("lanes open before rounds").move_round(work);
    }

    /// What the lanes say, for [`Mover::heard`].
    pub(super) fn events(&self) -> &Receiver<LaneEvent> {
        &self.events
    }

    /// What an event means. A round is placed when every lane has placed its part.
    pub(super) fn heard(&mut self, event: LaneEvent) -> Said {
        Said::Input(match event {
            LaneEvent::Placed { round, .. } => {
                self.placed += 1;
                match self.placed == self.count {
                    true => self.round_placed(round),
                    false => Input::Tick,
                }
            }
            LaneEvent::Failed { lane, error, .. } => {
                self.blame(lane);
                return Said::Lost(failure::lane("moving memory", &error, Some(LANE_HINT)));
            }
            LaneEvent::Closed { .. } => Input::Tick,
        })
    }

    /// A lane's rail is left alone for a while, if there are others.
    fn blame(&mut self, lane: LaneId) {
        self.has_other_rails = self.rails.used().len() > 1;
        self.rails.blame(usize::from(lane.0));
    }

    fn round_placed(&mut self, round: RoundIndex) -> Input {
        self.moving = None;
        let zero_bytes = self.lanes.as_ref().map_or(0, |lanes| lanes.zero_bytes());
        let before = std::mem::replace(&mut self.zero_bytes, zero_bytes);
        Input::Placed { round, zero_bytes: zero_bytes - before }
    }

    /// The lanes are gone, or of no use: ends what is left of them. What to ask the target, unless
    /// it was asked before.
    pub(super) fn lost(&mut self, failure: Failure) -> Option<LanesLost> {
        if self.lanes.is_none() && self.lost.is_none() {
            return None; // None were opened yet.
        }
        self.moved_before = self.moved_bytes();
        self.close(true);
        // What the old lanes still had to say is about the past.
        (self.to_events, self.events) = unbounded();
        self.zero_bytes = 0;
        let now = Instant::now();
        let first = Lost { since: now, failure, asked: false, again_at: now };
        let lost = self.lost.get_or_insert(first);
        (!lost.asked).then(|| self.ask())
    }

    /// What to ask the target, if it is time to ask again; an error if it was tried for too long.
    pub(super) fn ask_again(&mut self, within: Duration) -> Result<Option<LanesLost>, Failure> {
        match &self.lost {
            Some(lost) if lost.since.elapsed() > within => Err(lost.failure.clone()),
            Some(lost) if !lost.asked && Instant::now() >= lost.again_at => Ok(Some(self.ask())),
            _ => Ok(None),
        }
    }

    fn ask(&mut self) -> LanesLost {
        if let Some(lost) = &mut self.lost {
            lost.asked = true;
        }
        // RDMA that was lost may be back at once; the second time it is left alone, unless there are
        // other devices for it.
        let once_more = self.renewed == 0 || self.has_other_rails;
        let paths = self.wanted.paths().into_iter();
        let paths = paths.filter(|path| *path != LanePath::Rdma || once_more || self.only_rdma());
        let round = self.moving.as_ref().map(|(round, _)| *round);
        LanesLost { round, paths: paths.collect() }
    }

    fn only_rdma(&self) -> bool {
        self.wanted.transport == Transport::Rdma
    }

    /// The target's answer: opens the new lanes, and puts on them what it has not got of the round.
    /// If they can't be opened, it is asked again later.
    pub(super) fn renew(&mut self, new: NewLanes, way: Way<'_>) -> Result<Option<Input>, Failure> {
        let Some(mut lost) = self.lost.take_if(|lost| lost.asked) else {
            return Err(misbehaved("it gave out tickets that nobody asked for"));
        };
        let was = self.path;
        if let Err(error) = self.open(&new.choice, way) {
            tracing::warn!(reason = %error.text, "new lanes could not be opened");
            lost.asked = false;
            lost.again_at = Instant::now() + limits::LANES_AGAIN_PAUSE;
            self.lost = Some(lost);
            self.renewed += 1;
            return Ok(None);
        }
        self.renewed += 1;
        tracing::warn!(reason = %lost.failure.text, "carrying on with new lanes");
        if was == Some(LanePath::Rdma) && self.path != was {
            self.path_reason = Some(failure::carried_on(&lost.failure));
        }
        let Some((round, mut pages)) = self.moving.take() else { return Ok(None) };
        if new.round_placed {
            return Ok(Some(self.round_placed(round)));
        }
        if !new.placed.is_empty() {
            let placed = DirtySet::decode(&new.placed, pages.shape().collect::<Vec<_>>())
                .map_err(|_| misbehaved("the bitmap of what it has does not decode"))?;
            pages.subtract(&placed);
        }
        self.move_round(round, &pages);
        Ok(None)
    }

    /// Closes every lane; after an abort they are reset rather than drained.
    pub(super) fn close(&mut self, abort: bool) {
        let Some(lanes) = self.lanes.take() else { return };
        if let Some(before) = &self.core_times {
            self.cores = CoreTimes::now().since(before);
        }
        let stats = lanes.close(abort);
        let rails = self.rails.used();
        for (lane, stats) in stats.iter().enumerate().filter(|_| !rails.is_empty()) {
            let rail = &rails[lane % rails.len()];
            let known = self.over_rails.iter().position(|known| rail.is(known));
            let known = known.unwrap_or_else(|| {
                self.over_rails.push(rail.detail());
                self.over_rails.len() - 1
            });
            self.over_rails[known].lanes += 1;
            self.over_rails[known].moved_bytes += stats.moved_bytes;
        }
        self.stats.extend(stats);
    }

    /// The guest stands still, or runs again: nothing is held back meanwhile.
    pub(super) fn hurry(&self, hurry: bool) {
        self.wanted.pacer.hurry(hurry);
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

    /// How often the lanes were lost and others opened.
    pub(super) fn renewed(&self) -> u32 {
        self.renewed
    }

    /// What each lane counted; those that carried on for others come after them.
    pub(super) fn take_stats(&mut self) -> Vec<LaneStats> {
        std::mem::take(&mut self.stats)
    }
}

fn over_others(why: String) -> Failure {
    let text = format!("no lanes over RDMA: {why}");
    Failure { reason: AbortReason::HostFailed, by_peer: false, text, hint: None }
}

fn misbehaved(what: &str) -> Failure {
    Failure {
        reason: AbortReason::PeerMisbehaved,
        by_peer: false,
        text: format!("the target broke the protocol: {what}"),
        hint: None,
    }
}
