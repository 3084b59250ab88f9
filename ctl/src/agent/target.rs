//! The target agent: waits for migrations and takes them in, one at a time.
//!
//! One listening port for everything: a connection's first bytes say whether it is a control
//! connection or a lane (`pageferry_uring::greet`). [`Session`] carries out the commands of
//! `pageferry_datapath::target`.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, never, select, unbounded};
use pageferry_datapath::clear;
use pageferry_datapath::control::{
    Abort, AbortReason, Choice, LaneTicket, Message, Offer, Ticket, Welcome,
};
use pageferry_datapath::framing::hello::{Hello, Refusal, Reply};
use pageferry_datapath::ids::{LaneId, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LanePath};
use pageferry_datapath::limits;
use pageferry_datapath::populate::Populate;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::{Command, Input, Outcome, Phase, Target, TargetConfig};
use pageferry_uring::target::TargetLane;

use super::acceptor::{Acceptor, Arrival, ArrivingLane};
use super::digest_job::DigestJob;
use super::failure;
use super::hold::Hold;
use super::lanes::{self, LaneChoice, Transport};
use super::link::{Link, LinkError};
use super::monitor::{StateStream, TargetMonitor};
use super::rdma::{self, RdmaTarget};
use super::record::{Decision, Record, Records, Role};
use crate::host;

/// How long the source may take to close the control connection after it was told the end.
const GOODBYE_WAIT: Duration = Duration::from_secs(5);

/// How often it is looked whether the monitor is still there.
const LOOK_EVERY: Duration = Duration::from_millis(250);

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
                Arrival::Control(stream) => match Link::over(stream) {
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

/// A lane that was taken.
enum Taken {
    Tcp(TargetLane),
    Rdma(rdma::TakenLane),
}

struct Session<'a> {
    options: &'a TargetOptions,
    link: Link,
    started: Instant,
    hold: Hold<Input>,
    inputs: Receiver<Input>,
    to_inputs: Sender<Input>,
    lane_events: Receiver<LaneEvent>,
    to_lane_events: Sender<LaneEvent>,
    session: Option<SessionId>,
    tickets: Vec<LaneTicket>,
    same_host: bool,
    lanes: Vec<Option<Taken>>,
    placed: usize,
    /// The newest round that all lanes have placed.
    told: Option<RoundIndex>,
    /// Lanes over RDMA are taken, until the source carries on over TCP.
    rdma: Option<RdmaTarget>,
    rdma_arrivals: Receiver<rdma::ArrivingLane>,
    fell_back: bool,
    memory: GuestMemory,
    monitor: Option<Box<dyn TargetMonitor>>,
    populate: Option<Populate>,
    digest: Option<DigestJob>,
    state: Option<Arc<dyn StateStream>>,
    records: Option<Records>,
    /// Device state is loaded: from here on the source may decide to hand over.
    loaded: bool,
}

impl<'a> Session<'a> {
    fn new(options: &'a TargetOptions, link: Link) -> Self {
        let (to_inputs, inputs) = unbounded();
        let (to_lane_events, lane_events) = unbounded();
        Self {
            options,
            link,
            started: Instant::now(),
            hold: Hold::from_environment(),
            inputs,
            to_inputs,
            lane_events,
            to_lane_events,
            session: None,
            tickets: Vec::new(),
            same_host: false,
            lanes: Vec::new(),
            placed: 0,
            told: None,
            rdma: None,
            rdma_arrivals: never(),
            fell_back: false,
            memory: GuestMemory::default(),
            monitor: None,
            populate: None,
            digest: None,
            state: None,
            records: None,
            loaded: false,
        }
    }

    fn run(
        mut self,
        acceptor: &Acceptor,
        open_monitor: &OpenMonitor<'_>,
        cancel: &Receiver<()>,
        tell: &mut dyn FnMut(&str),
    ) -> TargetResult {
        let to_inputs = self.to_inputs.clone();
        let reader = self.link.read_with(move |message| {
            let input = match message {
                Ok(message) => Input::Message(message),
                Err(error) => Input::PeerLost(lost(&error)),
            };
            let _nobody_waits_after_the_end = to_inputs.send(input);
        });
        let welcome =
            Welcome { software: host::software(), host: host::name(), boot_id: host::boot_id() };
        let mut machine = Target::start(TargetConfig { welcome }, self.now());
        let (mut commands, mut ready) = (Vec::new(), VecDeque::new());
        while machine.outcome().is_none() {
            let mut wait = |session: &mut Self| match ready.pop_front() {
                Some(input) => input,
                None => session.wait(machine.deadline(), acceptor, cancel, tell),
            };
            let input = self.next(machine.phase(), &mut wait);
            self.note(&input);
            machine = machine.handle(input, self.now(), &mut commands);
            for command in commands.drain(..) {
                let answer = self.carry_out(command, open_monitor);
                ready.extend(answer.unwrap_or_else(|failure| Some(Input::Failed(failure))));
            }
        }
        self.finish(machine, reader)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// What the machine hears next; `wait` gets the next thing that happens.
    fn next(&mut self, phase: Phase, wait: &mut dyn FnMut(&mut Self) -> Input) -> Input {
        while self.hold.holds(phase, self.now()) {
            match wait(self) {
                input @ (Input::Tick | Input::Cancelled | Input::Failed(_)) => return input,
                input @ (Input::PeerLost(_) | Input::Message(Message::Abort(_)))
                    if phase < Phase::Ready =>
                {
                    return input;
                }
                // From there on it counts what the source said before it was lost.
                input @ Input::PeerLost(_) => {
                    self.hold.keep(input);
                    self.hold.end();
                }
                input => self.hold.keep(input),
            }
        }
        self.hold.pop().unwrap_or_else(|| wait(self))
    }

    fn wait(
        &mut self,
        deadline: Option<Duration>,
        acceptor: &Acceptor,
        cancel: &Receiver<()>,
        tell: &mut dyn FnMut(&str),
    ) -> Input {
        let until = deadline.map_or(LOOK_EVERY, |at| at.saturating_sub(self.now()));
        select! {
            recv(self.inputs) -> input => input.expect("this session holds a sender"),
            recv(self.lane_events) -> event => {
                self.lane_event(event.expect("this session holds a sender"))
            }
            recv(acceptor.arrivals()) -> arrival => {
                if let Ok(arrival) = arrival {
                    self.arrived(arrival, tell);
                }
                Input::Tick
            }
            recv(self.rdma_arrivals) -> lane => {
                match lane {
                    Ok(lane) => self.admit_rdma(lane),
                    // Its listener is gone.
                    Err(_) => self.rdma_arrivals = never(),
                }
                Input::Tick
            }
            recv(cancel) -> _ => Input::Cancelled,
            recv(after(until.min(LOOK_EVERY))) -> _ => self.look(),
        }
    }

    /// Time has passed; is the monitor still there?
    fn look(&self) -> Input {
        match self.monitor.as_ref().is_none_or(|monitor| monitor.is_alive()) {
            true => Input::Tick,
            false => Input::Failed(failure::monitor_gone("target")),
        }
    }

    /// What the hello says is needed here too: which session, and whether both ends share a
    /// machine.
    fn note(&mut self, input: &Input) {
        if let Input::Message(Message::Hello(hello)) = input {
            self.session = Some(hello.session);
            self.same_host = !hello.boot_id.is_empty() && hello.boot_id == host::boot_id();
        }
    }

    fn lane_event(&mut self, event: LaneEvent) -> Input {
        match event {
            LaneEvent::Placed { round, .. } => {
                self.placed += 1;
                if self.placed < self.tickets.len() {
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

    fn arrived(&mut self, arrival: Arrival, tell: &mut dyn FnMut(&str)) {
        match arrival {
            Arrival::Lane(lane) => self.admit(lane),
            Arrival::Control(stream) => {
                let busy = Message::Abort(Abort {
                    reason: AbortReason::Refused,
                    text: "the target is taking in another guest".into(),
                    hint: Some("start a target of its own for each guest, or wait".into()),
                });
                // Whoever it was may be gone again.
                let _nothing_to_do_about_it =
                    Link::over(stream).and_then(|link| link.send(&busy).map(|()| link.finish()));
            }
            Arrival::Stranger { from, reason } => tell(&format!("{from}: {reason}")),
        }
    }

    /// Starts a lane whose ticket is one of this session's and was not used before. A lane over TCP
    /// where those over RDMA were chosen means that the source has done with them.
    fn admit(&mut self, lane: ArrivingLane) {
        let (index, cpu) = match self.judge(lane.hello()) {
            Ok(judged) => judged,
            Err(refusal) => return lane.refuse(refusal),
        };
        if self.rdma.is_some() && !self.fell_back {
            if self.options.lanes.transport == Transport::Rdma {
                return lane.refuse(Refusal::Duplicate);
            }
            self.fall_back();
        }
        if self.lanes[index].is_some() {
            return lane.refuse(Refusal::Duplicate);
        }
        let config = self.options.lanes.target_config(cpu, self.same_host);
        let Some(stream) = lane.reply(Reply::Accepted) else { return };
        let id = LaneId(index as u16);
        let events = self.to_lane_events.clone();
        match TargetLane::start(stream, id, self.memory.clone(), &config, events) {
            Ok(lane) => self.lanes[index] = Some(Taken::Tcp(lane)),
            Err(error) => {
                let failed = Input::Failed(failure::host(&format!("lane {id}"), &error, None));
                let _this_session_holds_a_receiver = self.to_inputs.send(failed);
            }
        }
    }

    /// The same for a lane over RDMA.
    fn admit_rdma(&mut self, lane: rdma::ArrivingLane) {
        let (index, cpu) = match self.judge(lane.hello()) {
            Ok(judged) => judged,
            Err(refusal) => return lane.refuse(refusal),
        };
        let taking = self.rdma.as_ref().filter(|_| !self.fell_back && self.lanes[index].is_none());
        let Some(rdma) = taking else { return lane.refuse(Refusal::Duplicate) };
        match rdma.take(lane, cpu, self.to_lane_events.clone()) {
            Ok(lane) => self.lanes[index] = Some(Taken::Rdma(lane)),
            // The source sees its lane fail, and decides.
            Err(error) => tracing::warn!(error = %failure::chain("", &error), "a lane over RDMA"),
        }
    }

    /// The place of a lane whose ticket is one of this session's, and its core.
    fn judge(&self, hello: &Hello) -> Result<(usize, Option<usize>), Refusal> {
        let index = usize::from(hello.lane.0);
        match self.tickets.get(index) {
            Some(ticket)
                if Some(hello.session) == self.session && ticket.ticket == hello.ticket =>
            {
                Ok((index, ticket.cpu.map(usize::from)))
            }
            _ => Err(Refusal::Ticket),
        }
    }

    /// Ends every lane over RDMA before the first over TCP is answered: nothing older can arrive
    /// after what the source sends from then on. What those lanes had told is forgotten; the round
    /// on its way comes again.
    fn fall_back(&mut self) {
        self.fell_back = true;
        self.fence_lanes();
        self.rdma_arrivals = never();
        self.placed = 0;
        (self.to_lane_events, self.lane_events) = unbounded();
    }

    fn carry_out(
        &mut self,
        command: Command,
        open_monitor: &OpenMonitor<'_>,
    ) -> Result<Option<Input>, Failure> {
        Ok(match command {
            Command::Send(message) => match self.link.send(&message) {
                Ok(()) => None,
                Err(error) => Some(Input::PeerLost(lost(&error))),
            },
            Command::Inspect(offer) => Some(Input::Inspected(self.inspect(&offer, open_monitor)?)),
            Command::BeginRound { round, pages } => {
                if round == RoundIndex(0) {
                    self.make_room(&pages)?;
                }
                Some(Input::Cleared(round))
            }
            Command::PrepareIncoming => {
                self.prepare_incoming()?;
                Some(Input::IncomingPrepared)
            }
            Command::Digest => {
                self.digest();
                None
            }
            Command::FeedDeviceState(bytes) => {
                self.state()
                    .write_all(&bytes)
                    .map_err(|error| failure::host("device state", &error, None))?;
                None
            }
            Command::EndDeviceState => Some(self.load_state()?),
            Command::Resume => Some(self.resume().unwrap_or_else(Input::NotResumed)),
            Command::Unwind => Some(Input::Unwound { dropped: self.unwind() }),
        })
    }

    fn inspect(
        &mut self,
        offer: &Offer,
        open_monitor: &OpenMonitor<'_>,
    ) -> Result<Choice, Failure> {
        let mut monitor = open_monitor(offer)?;
        self.memory = monitor.inspect(offer)?;
        self.records = Some(self.begin_record(monitor.pid())?);
        self.monitor = Some(monitor);
        let count = self.options.lanes.agree(&offer.lanes, self.same_host);
        let (path, no_rdma) = match self.offer_rdma(offer) {
            Ok(()) => (LanePath::Rdma, None),
            Err(why) if self.options.lanes.transport == Transport::Rdma => {
                let hint = "start the target without --transport rdma";
                return Err(failure::no_rdma(&why, hint));
            }
            Err(why) => (lanes::tcp_path_for(&offer.lanes.paths), Some(why)),
        };
        let cpus = &self.options.lanes.cpus;
        for lane in 0..count {
            let ticket = Ticket::random().expect("the kernel has random bytes");
            let cpu = cpus.get(usize::from(lane) % cpus.len().max(1)).map(|cpu| *cpu as u16);
            self.tickets.push(LaneTicket { path, ticket, cpu });
            self.lanes.push(None);
        }
        Ok(Choice {
            lanes: self.tickets.clone(),
            refused: lanes::refused(&offer.lanes, path, no_rdma.as_deref()),
            rdma_port: self.rdma.as_ref().map(RdmaTarget::port),
        })
    }

    /// Listens for lanes over RDMA, or says why not.
    fn offer_rdma(&mut self, offer: &Offer) -> Result<(), String> {
        if !offer.lanes.paths.contains(&LanePath::Rdma) {
            return Err("the source does not offer it".into());
        }
        if let Some(why) = &self.options.lanes.no_rdma {
            return Err(why.clone());
        }
        let at = self.link.local().ok_or("the source is gone")?.ip();
        let threads = self.options.lanes.cpus.len();
        let (rdma, arrivals) = RdmaTarget::listen(self.memory.clone(), at, threads)?;
        (self.rdma, self.rdma_arrivals) = (Some(rdma), arrivals);
        Ok(())
    }

    fn begin_record(&self, pid: i32) -> Result<Records, Failure> {
        let record = Record {
            session: self.session.expect("the hello came before the offer"),
            role: Role::Target,
            decision: Decision::Attempting,
            peer: self.link.peer().map(|peer| peer.to_string()).unwrap_or_default(),
            qmp: self.options.qmp.clone().unwrap_or_default(),
            pid,
            sequence: 0,
            written_at: 0,
        };
        Records::begin(&self.options.state_dir, record).map_err(|error| {
            let hint = "name a writable folder with --state-dir";
            failure::host("record", &error, Some(hint.into()))
        })
    }

    /// What lies where the guest has holes would stay there: clear it. Then populate ahead of the
    /// data, so that first-touch faults don't sit in its path.
    fn make_room(&mut self, pages: &pageferry_datapath::bitmap::DirtySet) -> Result<(), Failure> {
        clear::outside(&self.memory, pages)
            .map_err(|error| failure::host("clearing the target's memory", &error, None))?;
        let threads = self.options.lanes.cpus.len().max(1);
        self.populate = Some(
            Populate::start(&self.memory, &pages.to_extents(), threads)
                .map_err(|error| failure::host("populating the target's memory", &error, None))?,
        );
        // Not before: what is cleared after it was pinned would stay the device's.
        self.rdma.as_ref().map_or(Ok(()), |rdma| rdma.begin(pages.to_extents()))
    }

    fn prepare_incoming(&mut self) -> Result<(), Failure> {
        let monitor = self.monitor.as_mut().expect("inspected before");
        let stream = monitor.prepare_incoming()?;
        self.state = Some(Arc::clone(&stream));
        let link = self.link.clone();
        // What this monitor answers to the source's. It ends when the monitor closes its end.
        let relay = move || {
            let mut chunk = vec![0; limits::STATE_CHUNK_BYTES_MAX];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                if link.send(&Message::ReturnPath(chunk[..count].to_vec())).is_err() {
                    break;
                }
            }
        };
        thread::Builder::new()
            .name("pf-return-path".into())
            .spawn(relay)
            .expect("the process can start threads");
        Ok(())
    }

    fn state(&self) -> &Arc<dyn StateStream> {
        self.state.as_ref().expect("prepared before device state comes")
    }

    /// Digests on threads of its own, so that an abort is heard meanwhile.
    fn digest(&mut self) {
        let (memory, cpus) = (self.memory.clone(), self.options.lanes.cpus.len());
        let to_inputs = self.to_inputs.clone();
        self.digest = Some(DigestJob::start(memory, cpus, move |digested| {
            let input = match digested {
                Ok((digest, took)) => Input::Digested { digest, took },
                Err(failure) => Input::Failed(failure),
            };
            let _nobody_waits_after_the_end = to_inputs.send(input);
        }));
    }

    fn load_state(&mut self) -> Result<Input, Failure> {
        let started = Instant::now();
        self.state().finish().map_err(|error| failure::host("device state", &error, None))?;
        self.monitor.as_mut().expect("inspected before").state_loaded()?;
        self.loaded = true;
        Ok(Input::Loaded { took: started.elapsed() })
    }

    fn resume(&mut self) -> Result<Input, Failure> {
        let started = Instant::now();
        let took = self.monitor.as_mut().expect("inspected before").resume()?;
        self.record_running();
        let late = started.elapsed().saturating_sub(took);
        Ok(Input::Resumed { took, late, cpu: host::cpu_time() })
    }

    /// Before the source hears that the guest runs and forgets its own record: one here that said
    /// less than that would give the guest back to it.
    fn record_running(&mut self) {
        let Some(records) = &mut self.records else { return };
        if let Err(error) = records.write(Decision::Running) {
            tracing::warn!(%error, "that the guest runs here is not on record");
            if let Some(Err(error)) = self.records.take().map(Records::remove) {
                tracing::warn!(%error, "the record may say that the guest is the source's");
            }
        }
    }

    /// Whether what was loaded could be dropped.
    fn unwind(&mut self) -> bool {
        self.digest = None;
        self.fence_lanes();
        self.stop_populating();
        // Before what was loaded is dropped: should the source have decided to hand over, and not
        // hear of this, it is the record here that gives the guest back to it.
        if let Some(Err(error)) = self.records.as_mut().map(|it| it.write(Decision::Aborted)) {
            tracing::warn!(%error, "the end of this session is not on record");
            if self.loaded {
                return false;
            }
        }
        if let Some(monitor) = &mut self.monitor {
            monitor.unwind();
        }
        self.state = None;
        // Before it was loaded the source can't have decided.
        if let Some(records) = self.records.take_if(|_| !self.loaded) {
            records.forget();
        }
        true
    }

    fn fence_lanes(&mut self) {
        for lane in self.lanes.iter_mut().filter_map(Option::take) {
            match lane {
                Taken::Tcp(lane) => drop(lane.fence()),
                Taken::Rdma(lane) => drop(lane.fence()),
            }
        }
    }

    fn stop_populating(&mut self) {
        if let Some(populate) = self.populate.take() {
            populate.cancel();
            if let Err(error) = populate.join() {
                tracing::warn!(%error, "populating ahead failed; pages were faulted in as they came");
            }
        }
    }

    fn finish(mut self, machine: Target, reader: thread::JoinHandle<()>) -> TargetResult {
        let total = self.now();
        let outcome = machine.outcome().expect("the loop ends with it").clone();
        if let Some(records) = self.records.take_if(|_| outcome == Outcome::Runs) {
            records.forget();
        }
        self.link.finish();
        let deadline = Instant::now() + GOODBYE_WAIT;
        while !reader.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.link.close();
        self.fence_lanes();
        self.stop_populating();
        TargetResult { session: self.session, outcome, total }
    }
}

fn lost(error: &LinkError) -> Failure {
    failure::host("source", error, Some("look at the source agent's output".into()))
}
