//! One migration at the target: the loop, and what each command of the state machine does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, never, select, unbounded};
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::clear;
use pageferry_datapath::control::{
    AbortReason, Choice, Hello, LanesLost, Message, Offer, Welcome, Word,
};
use pageferry_datapath::ids::{RoundIndex, SessionId};
use pageferry_datapath::limits;
use pageferry_datapath::populate::Populate;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_datapath::target::{Command, Input, Outcome, Phase, Target, TargetConfig};

use super::super::acceptor::ArrivingLane;
use super::super::admin::Admin;
use super::super::backlog::Room;
use super::super::control::{Control, Event};
use super::super::digest_job::DigestJob;
use super::super::failure;
use super::super::hold::Hold;
use super::super::link::Link;
use super::super::monitor::{StateStream, TargetMonitor};
use super::super::record::{Decision, Record, Records, Role};
use super::super::tickets::Tickets;
use super::intake::Intake;
use super::{OpenMonitor, TargetOptions, TargetResult, lost, told};
use crate::{host, privileges};

/// How long the source may take to close the control connection after it was told the end.
const GOODBYE_WAIT: Duration = Duration::from_secs(5);

/// How often it is looked whether the monitor is still there.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// One migration at the target.
pub(super) struct Session<'a> {
    options: &'a TargetOptions,
    control: Control,
    arrivals: Receiver<ArrivingLane>,
    lanes_lost: Receiver<(LanesLost, Room)>,
    /// Told to the server: from here on the source may decide to hand over.
    loaded: Arc<AtomicBool>,
    started: Instant,
    hold: Hold<Input>,
    /// What the control connection brought; a message's room is given back when it is taken.
    heard: Receiver<(Input, Option<Room>)>,
    inputs: Receiver<Input>,
    to_inputs: Sender<Input>,
    session: SessionId,
    intake: Intake,
    memory: GuestMemory,
    monitor: Option<Box<dyn TargetMonitor>>,
    populate: Option<Populate>,
    digest: Option<DigestJob>,
    state: Option<Arc<dyn StateStream>>,
    /// By which it can be told to end, and what tells it.
    admin: Option<Admin>,
    to_cancel: Sender<()>,
    records: Option<Records>,
}

/// What the server keeps of a session that it started.
pub(super) struct Handle {
    /// Its control connection.
    pub(super) control: Control,
    /// Where its lanes go.
    pub(super) lanes: Sender<ArrivingLane>,
    /// Ends it.
    pub(super) cancel: Sender<()>,
    /// The source may have decided to hand over.
    pub(super) loaded: Arc<AtomicBool>,
}

impl<'a> Session<'a> {
    /// Begins with what the source said first.
    pub(super) fn new(
        options: &'a TargetOptions,
        link: Link,
        hello: Hello,
    ) -> (Self, Handle, Receiver<()>) {
        let (to_inputs, inputs) = unbounded();
        let (to_heard, heard) = unbounded();
        let (to_lanes_lost, lanes_lost) = unbounded();
        let (lanes, arrivals) = unbounded();
        let (cancel, cancelled) = unbounded();
        let loaded = Arc::new(AtomicBool::new(false));
        let session = hello.session;
        // Not bounded themselves: the control connection bounds what it hands on.
        let on_event = move |event| {
            let heard = match event {
                Event::Message(Message::LanesLost(lost), room) => {
                    let _nobody_waits_after_the_end = to_lanes_lost.send((lost, room));
                    return;
                }
                Event::Message(message, room) => (Input::Message(message), Some(room)),
                Event::Lost(error) => (Input::PeerLost(lost(&error)), None),
                Event::Cut(error) => return tracing::warn!(%error, "the source is cut off"),
                Event::Restored { away } => return tracing::warn!(?away, "the source is back"),
            };
            let _nobody_waits_after_the_end = to_heard.send(heard);
        };
        let control = Control::target(link, hello, options.reconnect, on_event);
        let to_cancel = cancel.clone();
        let handle =
            Handle { control: control.clone(), lanes, cancel, loaded: Arc::clone(&loaded) };
        let session = Self {
            options,
            control,
            arrivals,
            lanes_lost,
            loaded,
            started: Instant::now(),
            hold: Hold::from_environment(),
            heard,
            inputs,
            to_inputs,
            session,
            intake: Intake::new(options.lanes.clone()),
            memory: GuestMemory::default(),
            monitor: None,
            populate: None,
            digest: None,
            state: None,
            admin: None,
            to_cancel,
            records: None,
        };
        (session, handle, cancelled)
    }

    /// Takes the guest in, however that ends.
    pub(super) fn run(
        mut self,
        open_monitor: &OpenMonitor<'_>,
        cancel: &Receiver<()>,
    ) -> TargetResult {
        let welcome = Welcome {
            software: host::software(),
            host: host::name(),
            boot_id: host::boot_id(),
            rejoin_key: self.control.key(),
        };
        let mut machine = Target::start(TargetConfig { welcome }, self.now());
        let (mut commands, mut ready) = (Vec::new(), VecDeque::new());
        while machine.outcome().is_none() {
            let mut wait = |session: &mut Self| match ready.pop_front() {
                Some(input) => input,
                None => session.wait(machine.deadline(), cancel),
            };
            let input = self.next(machine.phase(), &mut wait);
            self.note(&input);
            machine = machine.handle(input, self.now(), &mut commands);
            for command in commands.drain(..) {
                let answer = self.carry_out(command, open_monitor);
                ready.extend(answer.unwrap_or_else(|failure| Some(Input::Failed(failure))));
            }
        }
        self.finish(machine)
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

    fn wait(&mut self, deadline: Option<Duration>, cancel: &Receiver<()>) -> Input {
        let until = deadline.map_or(LOOK_EVERY, |at| at.saturating_sub(self.now()));
        select! {
            recv(self.heard) -> heard => {
                heard.expect("the control connection's callback holds a sender").0
            }
            recv(self.inputs) -> input => input.expect("this session holds a sender"),
            recv(self.intake.events()) -> event => {
                self.intake.heard(event.expect("the intake holds a sender"))
            }
            recv(self.arrivals) -> lane => match lane {
                Ok(lane) => {
                    let admitted = self.intake.admit(lane);
                    admitted.map_or_else(Input::Failed, |()| Input::Tick)
                }
                Err(_) => {
                    self.arrivals = never();
                    Input::Tick
                }
            },
            recv(self.intake.rdma_arrivals()) -> lane => {
                match lane {
                    Ok(lane) => self.intake.admit_rdma(lane),
                    Err(_) => self.intake.no_more_rdma_arrivals(),
                }
                Input::Tick
            }
            recv(self.lanes_lost) -> lost => {
                let (lost, _) = lost.expect("the control connection's callback holds a sender");
                self.renew_lanes(&lost)
            }
            recv(cancel) -> _ => Input::Cancelled,
            recv(after(until.min(LOOK_EVERY))) -> _ => self.look(),
        }
    }

    /// The source lost its lanes: ends what is left of them and lets it open others.
    fn renew_lanes(&mut self, lost: &LanesLost) -> Input {
        let Some(renewed) = self.intake.renew(lost) else {
            return Input::Tick; // It has none yet, and can't have lost any.
        };
        tracing::warn!(round = ?lost.round, "the source lost its lanes; it gets new ones");
        self.send(&Message::NewLanes(renewed)).unwrap_or(Input::Tick)
    }

    /// Sends a message; what the machine hears if that is of no use any more.
    fn send(&self, message: &Message) -> Option<Input> {
        self.control.send(message).err().map(|error| Input::PeerLost(lost(&error)))
    }

    /// After a round that is not inside the pause: a source that asked is told where lanes arrived.
    fn tell_placed(&self, sent: &Message) {
        if matches!(sent, Message::RoundClosed(_))
            && self.state.is_none()
            && let Some(placed) = self.intake.placed()
        {
            let _the_next_message_finds_out = self.send(&Message::LanesPlaced(placed));
        }
    }

    /// Time has passed; is the monitor still there?
    fn look(&mut self) -> Input {
        // Once it is loaded, nothing is missing that a lane could bring.
        if !self.loaded.load(Ordering::Relaxed)
            && let Some(failure) = self.intake.given_up(self.options.reconnect)
        {
            return Input::Failed(failure);
        }
        if self.now() > self.options.session_max && !self.loaded.load(Ordering::Relaxed) {
            return Input::Failed(too_long(self.options.session_max));
        }
        match self.monitor.as_ref().is_none_or(|monitor| monitor.is_alive()) {
            true => Input::Tick,
            false => Input::Failed(failure::monitor_gone("target")),
        }
    }

    /// What the hello says is needed here too: whether both ends share a machine.
    fn note(&mut self, input: &Input) {
        if let Input::Message(Message::Hello(hello)) = input {
            self.intake.same_host = !hello.boot_id.is_empty() && hello.boot_id == host::boot_id();
        }
    }

    fn carry_out(
        &mut self,
        command: Command,
        open_monitor: &OpenMonitor<'_>,
    ) -> Result<Option<Input>, Failure> {
        Ok(match command {
            Command::Send(message) => {
                let sent = self.send(&message);
                self.tell_placed(&message);
                sent
            }
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
            Command::Record => Some(self.record_ready()?),
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
        self.intake.beside_guest(monitor.pid(), &monitor.vcpus());
        let to_cancel = self.to_cancel.clone();
        self.admin = told::listen(&self.options.runtime_dir, self.session, to_cancel);
        self.records = Some(self.begin_record(offer, &*monitor)?);
        self.monitor = Some(monitor);
        // What it took to look into QEMU is not needed to take its guest in.
        privileges::drop_on_this_thread(privileges::to_write_in(&self.options.state_dir));
        let at = self.control.local().map(|address| address.ip());
        let secret = self
            .control
            .lane_secret()
            .map_err(|error| failure::host("lane tickets", &error, None))?;
        let tickets = Tickets::new(self.session, &secret);
        self.intake.agree(offer, self.memory.clone(), at, tickets)
    }

    fn begin_record(&self, offer: &Offer, monitor: &dyn TargetMonitor) -> Result<Records, Failure> {
        let peer = self.control.peer().map(|peer| peer.to_string()).unwrap_or_default();
        let named = || offer.target_qmp.clone().map(Into::into);
        let qmp = self.options.qmp.clone().or_else(named).unwrap_or_default();
        let mut record = Record::attempting(self.session, Role::Target, peer, qmp, monitor.pid());
        record.peer_identity = self.control.security().identity();
        record.settings = monitor.settings();
        record.socket = self.admin.as_ref().map(|admin| admin.path().to_owned());
        record.listen = Some(self.options.listen.clone());
        record.security = self.options.security.clone();
        Records::begin(&self.options.state_dir, record).map_err(|error| {
            let hint = "name a writable folder with --state-dir";
            failure::host("record", &error, Some(hint.into()))
        })
    }

    /// What lies where the guest has holes would stay there: clear it. Then populate ahead of the
    /// data, so that first-touch faults don't sit in its path.
    fn make_room(&mut self, pages: &DirtySet) -> Result<(), Failure> {
        clear::outside(&self.memory, pages)
            .map_err(|error| failure::host("clearing the target's memory", &error, None))?;
        let threads = self.options.lanes.cpus.len().max(1);
        self.populate = Some(
            Populate::start(&self.memory, &pages.to_extents(), threads)
                .map_err(|error| failure::host("populating the target's memory", &error, None))?,
        );
        // Not before: what is cleared after it was pinned would stay the device's.
        self.intake.begin(pages.to_extents())
    }

    fn prepare_incoming(&mut self) -> Result<(), Failure> {
        let monitor = self.monitor.as_mut().expect("inspected before");
        let stream = monitor.prepare_incoming()?;
        self.state = Some(Arc::clone(&stream));
        let control = self.control.clone();
        // What this monitor answers to the source's. It ends when the monitor closes its end.
        let relay = move || {
            let mut chunk = vec![0; limits::STATE_CHUNK_BYTES_MAX];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                if control.send(&Message::ReturnPath(chunk[..count].to_vec())).is_err() {
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
        self.loaded.store(true, Ordering::Relaxed);
        Ok(Input::Loaded { took: started.elapsed() })
    }

    fn record_ready(&mut self) -> Result<Input, Failure> {
        let written = self.records.as_mut().map_or(Ok(()), |it| it.write(Decision::Ready));
        let hint = "the disk of --state-dir must take a few hundred bytes";
        written.map_err(|error| failure::host("record", &error, Some(hint.into())))?;
        Ok(Input::Recorded)
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
        let loaded = self.loaded.load(Ordering::Relaxed);
        self.digest = None;
        self.intake.fence();
        self.stop_populating();
        // Before what was loaded is dropped: should the source have decided to hand over, and not
        // hear of this, it is the record here that gives the guest back to it.
        if let Some(Err(error)) = self.records.as_mut().map(|it| it.write(Decision::Aborted)) {
            tracing::warn!(%error, "the end of this session is not on record");
            if loaded {
                return false;
            }
        }
        if let Some(monitor) = &mut self.monitor {
            monitor.unwind();
        }
        self.state = None;
        // Before it was loaded the source can't have decided.
        if let Some(records) = self.records.take_if(|_| !loaded) {
            records.forget();
        }
        true
    }

    fn stop_populating(&mut self) {
        if let Some(populate) = self.populate.take() {
            populate.cancel();
            if let Err(error) = populate.join() {
                tracing::warn!(%error, "populating ahead failed; pages were faulted in as they came");
            }
        }
    }

    /// Whether the source has no record of this session any more, so that nobody will ask for the one
    /// here. That the guest runs here it has to hear, however long that takes; that it does not, and
    /// that this side has acted on that, it is told now.
    fn settle(&self, outcome: &Outcome) -> bool {
        let within = match outcome {
            Outcome::Runs => self.options.reconnect,
            Outcome::Failed(_) => {
                let word = self.records.as_ref().map_or(Word::None, |it| it.record().word());
                let told = self.control.settle(word);
                if self.records.is_none() || !told {
                    return false;
                }
                Duration::ZERO
            }
            Outcome::Uncertain(_) => return false,
        };
        self.control.settled(within) == Some(Word::None)
    }

    fn finish(mut self, machine: Target) -> TargetResult {
        let total = self.now();
        let outcome = machine.outcome().expect("the loop ends with it").clone();
        // Whatever still comes is dropped, or what it was told would never be heard behind that.
        (self.heard, self.lanes_lost) = (never(), never());
        self.intake.fence();
        // Sets QEMU back. As long as that is to be done, and as long as the source may ask how this
        // ended, the record stays, for `pageferry recover` to finish it.
        self.monitor = None;
        let settled = self.settle(&outcome);
        if let Some(records) = self.records.take_if(|_| settled) {
            records.forget();
        }
        self.control.finish(GOODBYE_WAIT, false);
        self.control.close();
        self.stop_populating();
        TargetResult { session: self.session, outcome, total, settled }
    }
}

fn too_long(max: Duration) -> Failure {
    Failure {
        reason: AbortReason::Timeout,
        by_peer: false,
        text: format!("the session took longer than {} s", max.as_secs()),
        hint: Some("the target's --session-max-s says how long one may take".into()),
    }
}
