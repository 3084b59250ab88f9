//! The lanes of one session at the target: their tickets, who may come in, what they have placed.
//!
//! Owned by the session's loop, on its thread; the lanes' workers only send events.

use std::net::IpAddr;

use crossbeam_channel::{Receiver, Sender, never, unbounded};
use pageferry_datapath::control::{AbortReason, Choice, LaneTicket, Offer};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Hello, Refusal, Reply};
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneEvent, LanePath};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::Input;
use pageferry_uring::target::TargetLane;

use super::super::acceptor::ArrivingLane;
use super::super::failure;
use super::super::lanes::{self, LaneChoice, Transport};
use super::super::rdma::{self, RdmaTarget};
use super::super::tickets::{Over, Tickets};

/// A lane that was taken.
enum Taken {
    Tcp(TargetLane),
    Rdma(rdma::TakenLane),
}

/// The lanes of one session.
pub(super) struct Intake {
    wanted: LaneChoice,
    /// Both ends are on one machine.
    pub(super) same_host: bool,
    memory: GuestMemory,
    tickets: Option<Tickets>,
    /// Lanes that are not encrypted are refused.
    encrypted: bool,
    /// Of each lane, the core of its worker.
    cpus: Vec<Option<u16>>,
    lanes: Vec<Option<Taken>>,
    events: Receiver<LaneEvent>,
    to_events: Sender<LaneEvent>,
    placed: usize,
    /// The newest round that all lanes have placed.
    told: Option<RoundIndex>,
    /// Lanes over RDMA are taken, until the source carries on over TCP.
    rdma: Option<RdmaTarget>,
    rdma_arrivals: Receiver<rdma::ArrivingLane>,
    fell_back: bool,
}

impl Intake {
    pub(super) fn new(wanted: LaneChoice) -> Self {
        let (to_events, events) = unbounded();
        Self {
            wanted,
            same_host: false,
            memory: GuestMemory::default(),
            tickets: None,
            encrypted: false,
            cpus: Vec::new(),
            lanes: Vec::new(),
            events,
            to_events,
            placed: 0,
            told: None,
            rdma: None,
            rdma_arrivals: never(),
            fell_back: false,
        }
    }

    /// What the lanes say, for [`Intake::heard`].
    pub(super) fn events(&self) -> &Receiver<LaneEvent> {
        &self.events
    }

    /// Lanes over RDMA that ask to come in, for [`Intake::admit_rdma`].
    pub(super) fn rdma_arrivals(&self) -> &Receiver<rdma::ArrivingLane> {
        &self.rdma_arrivals
    }

    /// Their listener is gone.
    pub(super) fn no_more_rdma_arrivals(&mut self) {
        self.rdma_arrivals = never();
    }

    /// What an event means.
    pub(super) fn heard(&mut self, event: LaneEvent) -> Input {
        match event {
            LaneEvent::Placed { round, .. } => {
                self.placed += 1;
                if self.placed < self.lanes.len() {
                    return Input::Tick;
                }
                self.placed = 0;
                // What lanes over RDMA had placed already TCP places once more.
                match self.fell_back && self.told.replace(round) == Some(round) {
                    true => Input::Tick,
                    false => {
                        self.told = Some(round);
                        Input::Placed(round)
                    }
                }
            }
            LaneEvent::Failed { error, .. } if self.rdma.is_some() && !self.fell_back => {
                // The source knows or will, and decides: it ends the attempt, or comes by TCP.
                tracing::warn!(error = %failure::chain("", &error), "a lane over RDMA is gone");
                Input::Tick
            }
            LaneEvent::Failed { error, .. } => {
                Input::Failed(failure::host("taking memory in", &error, None))
            }
            // In order: the source closes its lanes when the guest runs here.
            LaneEvent::Closed { .. } => Input::Tick,
        }
    }

    /// Chooses lanes for an offer and draws their tickets; `at` is the address the source came to.
    pub(super) fn agree(
        &mut self,
        offer: &Offer,
        memory: GuestMemory,
        at: Option<IpAddr>,
        mut tickets: Tickets,
    ) -> Result<Choice, Failure> {
        self.memory = memory;
        self.encrypted = offer.lanes.encrypt;
        if self.wanted.encrypt && !self.encrypted {
            return Err(not_encrypted());
        }
        let count = self.wanted.agree(&offer.lanes, self.same_host);
        let (path, no_rdma) = match self.offer_rdma(offer, at) {
            Ok(()) => (LanePath::Rdma, None),
            Err(why) if self.wanted.transport == Transport::Rdma => {
                let hint = "start the target without --transport rdma";
                return Err(failure::no_rdma(&why, hint));
            }
            Err(why) => (lanes::tcp_path_for(&offer.lanes.paths), Some(why)),
        };
        let cpus = &self.wanted.cpus;
        let cpu_of = |lane| cpus.get(lane % cpus.len().max(1)).map(|cpu| *cpu as u16);
        self.cpus = (0..usize::from(count)).map(cpu_of).collect();
        self.lanes.resize_with(self.cpus.len(), || None);
        tickets.begin_opening();
        let lanes = self.cpus.iter().enumerate().map(|(lane, &cpu)| {
            let lane = LaneId(lane as u16);
            let (over, second) = match (path, self.wanted.transport) {
                (LanePath::Rdma, Transport::Rdma) => (Over::Rdma, None),
                (LanePath::Rdma, _) => (Over::Rdma, Some(Over::Tcp)),
                _ => (Over::Tcp, None),
            };
            let ticket = tickets.draw(lane, over);
            let over_tcp = second.map(|over| tickets.draw(lane, over));
            LaneTicket { path, ticket, cpu, over_tcp }
        });
        let lanes = lanes.collect();
        self.tickets = Some(tickets);
        Ok(Choice {
            lanes,
            refused: lanes::refused(&offer.lanes, path, no_rdma.as_deref()),
            rdma_port: self.rdma.as_ref().map(RdmaTarget::port),
        })
    }

    /// Listens for lanes over RDMA, or says why not.
    fn offer_rdma(&mut self, offer: &Offer, at: Option<IpAddr>) -> Result<(), String> {
        if !offer.lanes.paths.contains(&LanePath::Rdma) {
            return Err("the source does not offer it".into());
        }
        if self.encrypted {
            return Err("the source encrypts its lanes, and RDMA has no encryption".into());
        }
        if let Some(why) = &self.wanted.no_rdma {
            return Err(why.clone());
        }
        let at = at.ok_or("the source is gone")?;
        let threads = self.wanted.cpus.len();
        let (rdma, arrivals) =
            RdmaTarget::listen(self.memory.clone(), self.wanted.pin, at, threads)?;
        (self.rdma, self.rdma_arrivals) = (Some(rdma), arrivals);
        Ok(())
    }

    /// The memory is ready to be written by devices, first what these extents need.
    pub(super) fn begin(&self, extents: Vec<Extent>) -> Result<(), Failure> {
        self.rdma.as_ref().map_or(Ok(()), |rdma| rdma.begin(extents))
    }

    /// Starts a lane whose ticket is one of this session's and was not used before. A lane over TCP
    /// where those over RDMA were chosen means that the source has done with them.
    pub(super) fn admit(&mut self, lane: ArrivingLane) -> Result<(), Failure> {
        if self.encrypted && !lane.is_encrypted() {
            lane.refuse(Refusal::Ticket);
            return Ok(());
        }
        let (index, cpu) = match self.may_enter(lane.hello()) {
            Ok(place) => place,
            Err(refusal) => {
                lane.refuse(refusal);
                return Ok(());
            }
        };
        let config = self.wanted.target_config(cpu, self.same_host);
        let Some(stream) = lane.reply(Reply::Accepted) else { return Ok(()) };
        let id = LaneId(index as u16);
        let events = self.to_events.clone();
        let lane = TargetLane::start(stream, id, self.memory.clone(), &config, events)
            .map_err(|error| failure::host(&format!("lane {id}"), &error, None))?;
        self.lanes[index] = Some(Taken::Tcp(lane));
        Ok(())
    }

    /// The place of a lane over TCP; those over RDMA are fenced before the first is taken.
    fn may_enter(&mut self, hello: &Hello) -> Result<(usize, Option<usize>), Refusal> {
        let (index, cpu) = self.judge(hello, Over::Tcp)?;
        if self.rdma.is_some() && !self.fell_back {
            if self.wanted.transport == Transport::Rdma {
                return Err(Refusal::Duplicate);
            }
            self.fall_back();
        }
        match self.lanes[index].is_some() {
            true => Err(Refusal::Duplicate),
            false => Ok((index, cpu)),
        }
    }

    /// The same for a lane over RDMA.
    pub(super) fn admit_rdma(&mut self, lane: rdma::ArrivingLane) {
        let (index, cpu) = match self.judge(lane.hello(), Over::Rdma) {
            Ok(judged) => judged,
            Err(refusal) => return lane.refuse(refusal),
        };
        let taking = self.rdma.as_ref().filter(|_| !self.fell_back && self.lanes[index].is_none());
        let Some(rdma) = taking else { return lane.refuse(Refusal::Duplicate) };
        match rdma.take(lane, cpu, self.to_events.clone()) {
            Ok(lane) => self.lanes[index] = Some(Taken::Rdma(lane)),
            // The source sees its lane fail, and decides.
            Err(error) => tracing::warn!(error = %failure::chain("", &error), "a lane over RDMA"),
        }
    }

    /// The place of a lane whose ticket is one of this session's, and its core. The ticket is used
    /// up: whatever becomes of the lane, the same one opens no other.
    fn judge(&mut self, hello: &Hello, over: Over) -> Result<(usize, Option<usize>), Refusal> {
        let tickets = self.tickets.as_mut().ok_or(Refusal::Ticket)?;
        let index = usize::from(tickets.redeem(hello, over)?.0);
        Ok((index, self.cpus[index].map(usize::from)))
    }

    /// Ends every lane over RDMA before the first over TCP is answered: nothing older can arrive
    /// after what the source sends from then on. What those lanes had told is forgotten; the round
    /// on its way comes again.
    fn fall_back(&mut self) {
        self.fell_back = true;
        self.fence();
        self.rdma_arrivals = never();
        self.placed = 0;
        (self.to_events, self.events) = unbounded();
    }

    /// Ends every lane; when it returns, none of them will ever place a byte again.
    pub(super) fn fence(&mut self) {
        for lane in self.lanes.iter_mut().filter_map(Option::take) {
            match lane {
                Taken::Tcp(lane) => drop(lane.fence()),
                Taken::Rdma(lane) => drop(lane.fence()),
            }
        }
    }
}

fn not_encrypted() -> Failure {
    Failure {
        reason: AbortReason::Refused,
        by_peer: false,
        text: "this target takes only encrypted lanes".into(),
        hint: Some("start the source with --encrypt too".into()),
    }
}
