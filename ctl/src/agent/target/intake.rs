//! The lanes of one session at the target: their tickets, who may come in, what they have placed.
//!
//! Owned by the session's loop, on its thread; the lanes' workers only send events.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, never, unbounded};
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::codec::CodecName;
use pageferry_datapath::control::{
    AbortReason, Choice, LaneAddress, LanePlaced, LaneTicket, LanesLost, LanesPlaced, NewLanes,
    NicQueues, Offer,
};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Hello, Refusal, Reply};
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneError, LaneEvent, LanePath};
use pageferry_datapath::placed::{Placed, placed_by};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::Input;
use pageferry_uring::plan::TargetLaneConfig;
use pageferry_uring::target::TargetLane;

use super::super::acceptor::ArrivingLane;
use super::super::compress::accepted_codecs;
use super::super::core_use::CoreTimes;
use super::super::failure;
use super::super::lanes::{self, LaneChoice, Transport};
use super::super::queues::{self, Landing};
use super::super::rails;
use super::super::rdma::{self, RdmaTarget};
use super::super::tickets::{Over, Tickets};
use crate::cores::Topology;
use crate::limits;

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
    codecs: Vec<CodecName>,
    /// Holes of the source's become holes here. Not where memory is registered for RDMA: the NIC
    /// would go on writing to pages that were freed.
    holes: bool,
    /// What the source was told of this host's NICs; `None` for one that did not ask.
    queues: Option<Vec<NicQueues>>,
    /// Of each lane that came over TCP, where it lands and the core of its worker.
    landed: Vec<Option<(Landing, Option<usize>)>>,
    topology: Topology,
    core_times: Option<CoreTimes>,
    lanes: Vec<Option<Taken>>,
    events: Receiver<LaneEvent>,
    to_events: Sender<LaneEvent>,
    placed: usize,
    /// The newest round that all lanes have placed.
    told: Option<RoundIndex>,
    /// Lanes over RDMA are taken, unless the source carries on over TCP.
    rdma: Option<RdmaTarget>,
    /// At every address.
    rdma_everywhere: bool,
    rdma_arrivals: Receiver<rdma::ArrivingLane>,
    fell_back: bool,
    /// A lane is gone, and the source has not said yet what becomes of it.
    failed: Option<(Instant, Failure)>,
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
            codecs: Vec::new(),
            holes: false,
            queues: None,
            landed: Vec::new(),
            topology: Topology::default(),
            core_times: None,
            lanes: Vec::new(),
            events,
            to_events,
            placed: 0,
            told: None,
            rdma: None,
            rdma_everywhere: false,
            rdma_arrivals: never(),
            fell_back: false,
            failed: None,
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

    /// What an event means. A lane that is gone ends nothing: the source knows or will, and opens
    /// new ones or ends the attempt. One whose other end broke the rules does.
    pub(super) fn heard(&mut self, event: LaneEvent) -> Input {
        match event {
            LaneEvent::Placed { round, .. } => {
                self.placed += 1;
                if self.placed < self.lanes.len() {
                    return Input::Tick;
                }
                self.placed = 0;
                self.told = Some(round);
                Input::Placed(round)
            }
            LaneEvent::Failed { error, .. } => {
                let misbehaved = matches!(error, LaneError::PeerMisbehaved { .. });
                let failure = failure::lane("taking memory in", &error, None);
                if misbehaved {
                    return Input::Failed(failure);
                }
                tracing::warn!(reason = %failure.text, hint = failure.hint, "a lane is gone");
                self.failed.get_or_insert((Instant::now(), failure));
                Input::Tick
            }
            // In order: the source closes its lanes when the guest runs here.
            LaneEvent::Closed { .. } => Input::Tick,
        }
    }

    /// Why this session must end: a lane is gone, and the source said nothing about it for so long.
    pub(super) fn given_up(&mut self, within: Duration) -> Option<Failure> {
        let over = |failed: &mut (Instant, Failure)| failed.0.elapsed() > within;
        self.failed.take_if(over).map(|(_, failure)| failure)
    }

    /// Ends what is left of the lanes and gives out tickets for as many new ones; `None` if none
    /// were given out before. When this returns, no old lane will ever place a byte again.
    pub(super) fn renew(&mut self, lost: &LanesLost) -> Option<NewLanes> {
        self.tickets.as_ref()?;
        let placed = self.fence();
        (self.to_events, self.events) = unbounded();
        (self.placed, self.failed) = (0, None);
        let stays = self.rdma.is_some() && lost.paths.contains(&LanePath::Rdma);
        self.fell_back = !stays;
        let path = match stays {
            true => LanePath::Rdma,
            false => lanes::tcp_path_for(&lost.paths),
        };
        let lanes = self.draw_tickets(path)?;
        let round_placed = lost.round.is_some() && self.told >= lost.round;
        let placed = match lost.round {
            Some(round) if !round_placed => {
                placed_by(&placed, round, &DirtySet::for_memory(&self.memory)).encode()
            }
            _ => Vec::new(),
        };
        let rdma_port = self.rdma.as_ref().filter(|_| stays).map(RdmaTarget::port);
        let (codecs, addresses) = (self.codecs.clone(), self.addresses());
        let (queues, holes) = (self.queues.clone().unwrap_or_default(), self.holes);
        let refused = Vec::new();
        let choice = Choice { lanes, refused, rdma_port, codecs, addresses, queues, holes };
        Some(NewLanes { choice, round_placed, placed })
    }

    /// A new ticket for each lane; those drawn before are good no longer.
    fn draw_tickets(&mut self, path: LanePath) -> Option<Vec<LaneTicket>> {
        let tickets = self.tickets.as_mut()?;
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
            let mixes = second.is_some() && self.rdma_everywhere;
            let beside_rdma = mixes.then(|| tickets.draw(lane, Over::BesideRdma));
            LaneTicket { path, ticket, cpu, over_tcp, beside_rdma }
        });
        Some(lanes.collect())
    }

    /// The guest's monitor is known: lanes keep off the cores of its vCPUs.
    pub(super) fn beside_guest(&mut self, pid: i32, vcpus: &[i32]) {
        self.wanted.leave_to_vcpus(pid, vcpus);
    }

    /// Chooses lanes for an offer and draws their tickets; `at` is the address the source came to.
    pub(super) fn agree(
        &mut self,
        offer: &Offer,
        memory: GuestMemory,
        at: Option<IpAddr>,
        tickets: Tickets,
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
        self.codecs = accepted_codecs(&offer.lanes);
        self.holes = offer.lanes.holes && self.rdma.is_none();
        let cpus = &self.wanted.cpus;
        let cpu_of = |lane| cpus.get(lane % cpus.len().max(1)).map(|cpu| *cpu as u16);
        self.cpus = (0..usize::from(count)).map(cpu_of).collect();
        self.lanes.resize_with(self.cpus.len(), || None);
        self.landed.resize_with(self.cpus.len(), || None);
        let addresses = self.addresses();
        self.queues = offer.lanes.rss.then(|| self.look_at_queues(&addresses, at));
        self.core_times = Some(CoreTimes::now());
        self.tickets = Some(tickets);
        let lanes = self.draw_tickets(path).expect("set just now");
        Ok(Choice {
            lanes,
            refused: lanes::refused(&offer.lanes, path, no_rdma.as_deref()),
            rdma_port: self.rdma.as_ref().map(RdmaTarget::port),
            codecs: self.codecs.clone(),
            addresses,
            queues: self.queues.clone().unwrap_or_default(),
            holes: self.holes,
        })
    }

    /// How the NICs that lanes may come to spread flows over queues; `at` is where the source is.
    fn look_at_queues(&mut self, addresses: &[LaneAddress], at: Option<IpAddr>) -> Vec<NicQueues> {
        self.topology = Topology::here();
        let addresses: Vec<_> = addresses.iter().map(|it| it.address).chain(at).collect();
        queues::told(&rails::nics(), &addresses, &self.wanted.cpus)
    }

    /// Where lanes are taken, beside where the control connection came to.
    fn addresses(&self) -> Vec<LaneAddress> {
        if !self.wanted.everywhere {
            return Vec::new();
        }
        let mut offered = rails::offered(&rails::nics(), &self.wanted.networks);
        if self.rdma_everywhere {
            let interfaces = rdma::interfaces();
            offered.iter_mut().for_each(|it| it.rdma = interfaces.contains(&it.device));
        }
        offered
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
        let (pin, threads) = (self.wanted.pin, self.wanted.cpus.len());
        let listen =
            |at, devices| RdmaTarget::listen(self.memory.clone(), pin, at, devices, threads);
        // Over all devices, or, where so much may not be pinned, over the one that was named.
        let devices = rdma::interfaces().len().min(limits::RAILS_MAX) as u64;
        let everywhere = match self.wanted.everywhere && devices > 0 {
            true => listen(unspecified(at), devices)
                .inspect_err(|why| tracing::warn!(%why, "RDMA over one device only"))
                .ok(),
            false => None,
        };
        self.rdma_everywhere = everywhere.is_some();
        let (rdma, arrivals) = everywhere.map_or_else(|| listen(at, 1), Ok)?;
        (self.rdma, self.rdma_arrivals) = (Some(rdma), arrivals);
        Ok(())
    }

    /// The memory is ready to be written by devices, first what these extents need.
    pub(super) fn begin(&self, extents: Vec<Extent>) -> Result<(), Failure> {
        self.rdma.as_ref().map_or(Ok(()), |rdma| rdma.begin(extents))
    }

    /// Starts a lane whose ticket is one of this session's and was not used before. A lane over TCP
    /// where those over RDMA were chosen means that the source could not open those.
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
        let landing = match (&self.queues, lane.ends()) {
            (Some(told), Some((from, to))) => queues::landing(told, from, to),
            _ => Landing::default(),
        };
        let cpu = self.core_for(index, &landing).or(cpu);
        let config = self.wanted.target_config(cpu, self.same_host, &self.codecs);
        let config = TargetLaneConfig { holes: self.holes, ..config };
        let Some(stream) = lane.reply(Reply::Accepted) else { return Ok(()) };
        let id = LaneId(index as u16);
        let events = self.to_events.clone();
        let lane = TargetLane::start(stream, id, self.memory.clone(), &config, events)
            .map_err(|error| failure::host(&format!("lane {id}"), &error, None))?;
        self.lanes[index] = Some(Taken::Tcp(lane));
        self.landed[index] = Some((landing, cpu));
        Ok(())
    }

    /// The core beside the one that a lane's queue interrupts, if that is known. On one machine both
    /// ends share the core that was agreed on, whatever their packets go through.
    fn core_for(&self, index: usize, landing: &Landing) -> Option<usize> {
        let interrupt = landing.cpu.filter(|_| !self.same_host)?;
        let others = self.landed.iter().enumerate().filter(|(lane, _)| *lane != index);
        let busy: Vec<usize> = others.filter_map(|(_, it)| it.as_ref()?.1).collect();
        // Those of the queues that as many lanes as these land on, on each NIC.
        let of_nic = |nic: &NicQueues| {
            let used = nic.queues.iter().take(self.lanes.len());
            used.filter_map(|core| core.cpu.map(usize::from)).collect::<Vec<_>>()
        };
        let interrupted: Vec<usize> = self.queues.iter().flatten().flat_map(of_nic).collect();
        self.topology.beside(interrupt, &self.wanted.cpus, &busy, &interrupted)
    }

    /// Where the lanes that are open arrived, for a source that asked.
    pub(super) fn placed(&self) -> Option<LanesPlaced> {
        self.queues.as_ref()?;
        let lanes = self.lanes.iter().zip(&self.landed).enumerate().filter_map(|(index, lane)| {
            let (Some(Taken::Tcp(lane)), Some((landing, cpu))) = lane else { return None };
            let (napi, incoming_cpu) = lane.incoming();
            Some(LanePlaced {
                lane: index as u16,
                device: landing.device.clone(),
                queue: landing.queue,
                napi,
                incoming_cpu: incoming_cpu.and_then(|cpu| u16::try_from(cpu).ok()),
                cpu: cpu.and_then(|cpu| u16::try_from(cpu).ok()),
            })
        });
        let cores = self.core_times.as_ref().map(|before| CoreTimes::now().since(before));
        Some(LanesPlaced { lanes: lanes.collect(), cores: cores.unwrap_or_default() })
    }

    /// The place of a lane over TCP; those over RDMA are fenced before the first is taken that is not
    /// meant to be beside them.
    fn may_enter(&mut self, hello: &Hello) -> Result<(usize, Option<usize>), Refusal> {
        let beside = self.judge(hello, Over::BesideRdma);
        let is_beside = beside.is_ok();
        let (index, cpu) = beside.or_else(|_| self.judge(hello, Over::Tcp))?;
        if is_beside && self.fell_back {
            return Err(Refusal::Duplicate);
        }
        if !is_beside && self.rdma.is_some() && !self.fell_back {
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

    /// The source has done with lanes over RDMA: those that were opened are ended, none are taken.
    fn fall_back(&mut self) {
        self.fell_back = true;
        self.fence();
        self.placed = 0;
        (self.to_events, self.events) = unbounded();
    }

    /// Ends every lane; when it returns, none of them will ever place a byte again. What they have
    /// placed, of those that can tell.
    pub(super) fn fence(&mut self) -> Vec<Placed> {
        let mut placed = Vec::new();
        self.landed.fill_with(|| None);
        for lane in self.lanes.iter_mut().filter_map(Option::take) {
            match lane {
                Taken::Tcp(lane) => placed.push(lane.fence().1),
                Taken::Rdma(lane) => drop(lane.fence()),
            }
        }
        placed
    }
}

/// Every address of the family.
fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
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
