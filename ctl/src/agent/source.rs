//! The source agent: moves one running guest to a waiting target.
//!
//! Owns the monitor, the lanes, the tracker and the session's record; runs the loop drawn in
//! [`agent`](super). Decides nothing: see `pageferry_datapath::source`.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, select, unbounded};
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{
    AbortReason, Choice, Hello, LaneOffer, Message, Offer, SourceLimits,
};
use pageferry_datapath::holes::{self, HolesError};
use pageferry_datapath::ids::{RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LanePath, LaneStats, SourceLanes};
use pageferry_datapath::limits;
use pageferry_datapath::planner::Goals;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::{
    Command, Failure, FailureKind, Input, Outcome, Phase, Source, SourceConfig, SourceReport,
};
use pageferry_datapath::tracker::DirtyTracker;
use pageferry_datapath::work::RoundWork;

use super::digest_job::DigestJob;
use super::failure;
use super::hold::Hold;
use super::lanes::{self, LaneChoice, Transport};
use super::link::{Link, LinkError};
use super::monitor::{SourceMonitor, StateStream};
use super::record::{Decision, Record, Records, Role};
use crate::host;

/// How often a watcher is told how far things are.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// How long the target may take to accept the control connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// A lane that broke says no more than its errno.
const LANE_HINT: &str = "look at the target agent's output, and at the link";

/// What a source agent is told.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// `HOST:PORT` of the target.
    pub to: String,
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
    /// What the machine learned.
    pub report: SourceReport,
    /// What each lane counted; those that carried on for others come after them.
    pub lanes: Vec<LaneStats>,
    /// Why lanes ran on what they did, where there was a choice.
    pub path_reason: Option<String>,
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
            report: SourceReport::default(),
            lanes: Vec::new(),
            path_reason: None,
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

struct Agent<'a> {
    session: SessionId,
    started: Instant,
    monitor: &'a mut dyn SourceMonitor,
    link: Link,
    records: Option<Records>,
    hold: Hold<Input>,
    inputs: Receiver<Input>,
    to_inputs: Sender<Input>,
    lane_events: Receiver<LaneEvent>,
    to_lane_events: Sender<LaneEvent>,
    lane_choice: LaneChoice,
    same_host: bool,
    path: Option<LanePath>,
    path_reason: Option<String>,
    /// What the lanes were opened by, and may be opened by once more over TCP.
    choice: Option<Choice>,
    lanes: Option<Box<dyn SourceLanes>>,
    /// Lanes opened; each has its part in every round.
    lane_count: usize,
    lane_stats: Vec<LaneStats>,
    work: Option<Arc<RoundWork>>,
    placed: usize,
    /// The round on its way over RDMA, should TCP have to carry on with it.
    moving: Option<(RoundIndex, DirtySet)>,
    /// By lanes that are gone.
    moved_before: u64,
    /// Found by all rounds before.
    zero_bytes: u64,
    memory: GuestMemory,
    tracker: Option<Box<dyn DirtyTracker>>,
    /// Every page of which some content is at the target, or on its way there.
    sent: Option<DirtySet>,
    scans: Vec<Duration>,
    attach_stopped: Option<Duration>,
    digest: Option<DigestJob>,
    state: Arc<std::sync::OnceLock<Arc<dyn StateStream>>>,
    relay: Option<thread::JoinHandle<Result<u64, Failure>>>,
    state_bytes: u64,
}

impl<'a> Agent<'a> {
    fn new(
        options: &SourceOptions,
        monitor: &'a mut dyn SourceMonitor,
        session: SessionId,
        started: Instant,
    ) -> Result<Self, Failure> {
        let link = Link::connect(&options.to, CONNECT_WITHIN).map_err(|error| {
            let hint = "is `pageferry target --listen` running there, and the port open?";
            failure::host("target", &error, Some(hint.into()))
        })?;
        let records = Records::begin(
            &options.state_dir,
            Record {
                session,
                role: Role::Source,
                decision: Decision::Attempting,
                peer: options.to.clone(),
                qmp: options.qmp.clone(),
                pid: monitor.facts().pid,
                sequence: 0,
                written_at: 0,
            },
        )
        .map_err(|error| {
            let hint = "name a writable folder with --state-dir";
            failure::host("record", &error, Some(hint.into()))
        })?;
        if let Err(failure) = monitor.guard(records.path()) {
            records.forget();
            return Err(failure);
        }
        let (to_inputs, inputs) = unbounded();
        let (to_lane_events, lane_events) = unbounded();
        Ok(Self {
            session,
            started,
            monitor,
            link,
            records: Some(records),
            hold: Hold::from_environment(),
            inputs,
            to_inputs,
            lane_events,
            to_lane_events,
            lane_choice: options.lanes.clone(),
            same_host: false,
            path: None,
            path_reason: None,
            choice: None,
            lanes: None,
            lane_count: 0,
            lane_stats: Vec::new(),
            work: None,
            placed: 0,
            moving: None,
            moved_before: 0,
            zero_bytes: 0,
            memory: GuestMemory::default(),
            tracker: None,
            sent: None,
            scans: Vec::new(),
            attach_stopped: None,
            digest: None,
            state: Arc::default(),
            relay: None,
            state_bytes: 0,
        })
    }

    fn run(
        mut self,
        options: &SourceOptions,
        cancel: &Receiver<()>,
        watch: &mut dyn FnMut(&Watch<'_>),
    ) -> SourceResult {
        self.read_control();
        let (mut commands, mut ready) = (Vec::new(), VecDeque::new());
        let mut machine = Source::start(self.config(options), self.now(), &mut commands);
        loop {
            for command in commands.drain(..) {
                ready.extend(self.carry_out(command).unwrap_or_else(|f| Some(Input::Failed(f))));
            }
            watch(&self.watched(&machine));
            if machine.outcome().is_some() {
                break;
            }
            let input = self.next(&machine, &mut ready, cancel);
            self.note(&input);
            machine = machine.handle(input, self.now(), &mut commands);
        }
        self.finish(machine)
    }

    fn config(&self, options: &SourceOptions) -> SourceConfig {
        let facts = self.monitor.facts();
        SourceConfig {
            hello: Hello {
                session: self.session,
                software: host::software(),
                host: host::name(),
                boot_id: host::boot_id(),
            },
            offer: Offer {
                regions: facts.regions.clone(),
                monitor: facts.monitor.clone(),
                machine: facts.machine.clone(),
                lanes: LaneOffer {
                    count: options.lanes.count,
                    paths: options.lanes.paths(),
                    cpus: options.lanes.cpus.len() as u16,
                },
                tracker: facts.tracker.0.clone(),
                target_qmp: options.target_qmp.clone(),
                verify: options.verify,
                limits: SourceLimits { downtime_ms: options.goals.downtime.as_millis() as u64 },
            },
            goals: options.goals,
            drain: facts.drain.is_some() && !options.skip_drain,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether both ends share a machine is needed here too.
    fn note(&mut self, input: &Input) {
        if let Input::Message(Message::Welcome(welcome)) = input {
            let here = host::boot_id();
            self.same_host = !here.is_empty() && welcome.boot_id == here;
        }
    }

    /// Starts the control reader. What the target's monitor answers to the source's goes straight
    /// to it; everything else is the machine's.
    fn read_control(&self) {
        let to_inputs = self.to_inputs.clone();
        let state = Arc::clone(&self.state);
        self.link.read_with(move |message| {
            let input = match message {
                Ok(Message::ReturnPath(bytes)) => {
                    // A monitor that no longer listens says so by itself.
                    let _its_own_failure = state.get().map(|stream| stream.write_all(&bytes));
                    return;
                }
                Ok(message) => Input::Message(message),
                Err(error) => Input::PeerLost(lost(&error)),
            };
            let _nobody_waits_after_the_end = to_inputs.send(input);
        });
    }

    /// What the machine hears next: answers to its commands, then what happens.
    fn next(
        &mut self,
        machine: &Source,
        ready: &mut VecDeque<Input>,
        cancel: &Receiver<()>,
    ) -> Input {
        let phase = machine.phase();
        while self.hold.holds(phase, self.now()) {
            match ready.pop_front().unwrap_or_else(|| self.wait(machine.deadline(), cancel)) {
                // Time passing ends this phase, so it does not pass.
                Input::Tick if phase == Phase::Spacing => {}
                input @ (Input::Tick | Input::Cancelled | Input::Failed(_)) => return input,
                input @ (Input::PeerLost(_) | Input::Message(Message::Abort(_)))
                    if phase < Phase::Deciding =>
                {
                    return input;
                }
                // From the decision on it counts what the target said before it was lost.
                input @ Input::PeerLost(_) => {
                    self.hold.keep(input);
                    self.hold.end();
                }
                input => self.hold.keep(input),
            }
        }
        let kept = self.hold.pop().or_else(|| ready.pop_front());
        kept.unwrap_or_else(|| self.wait(machine.deadline(), cancel))
    }

    /// The next thing that happens; a tick at the deadline, or when it is time to tell the watcher.
    fn wait(&mut self, deadline: Option<Duration>, cancel: &Receiver<()>) -> Input {
        let until = deadline.map_or(WATCH_EVERY, |at| at.saturating_sub(self.now()));
        select! {
            recv(self.inputs) -> input => input.expect("this agent holds a sender"),
            recv(self.lane_events) -> event => {
                self.lane_event(event.expect("this agent holds a sender"))
            }
            recv(cancel) -> _ => Input::Cancelled,
            recv(after(until.min(WATCH_EVERY))) -> _ => match self.monitor.is_alive() {
                true => Input::Tick,
                false => Input::Failed(failure::monitor_gone("source")),
            },
        }
    }

    /// A round is placed when every lane has placed its part. Those that have failed are waited for
    /// too: that they did may be heard after what the others placed.
    fn lane_event(&mut self, event: LaneEvent) -> Input {
        match event {
            LaneEvent::Placed { round, .. } => {
                self.placed += 1;
                match self.placed == self.lane_count {
                    true => self.round_placed(round),
                    false => Input::Tick,
                }
            }
            LaneEvent::Failed { error, .. } => {
                let failed = failure::host("moving memory", &error, Some(LANE_HINT.into()));
                self.carry_on(failed).map_or_else(Input::Failed, |()| Input::Tick)
            }
            LaneEvent::Closed { .. } => Input::Tick,
        }
    }

    /// A lane over RDMA is gone: TCP takes the round from its beginning, where it may. Accepting the
    /// first new lane, the target fences all old ones, so nothing older comes after what is sent
    /// now.
    fn carry_on(&mut self, failed: Failure) -> Result<(), Failure> {
        let may = self.path == Some(LanePath::Rdma)
            && self.lane_choice.transport == Transport::Auto
            && self.lanes.is_some();
        let Some(choice) = self.choice.clone().filter(|_| may) else { return Err(failed) };
        tracing::warn!(reason = %failed.text, "RDMA is lost; carrying on over TCP");
        self.moved_before = self.lanes.as_ref().map_or(0, |lanes| lanes.moved_bytes());
        self.close_lanes(true);
        // What the old lanes still had to say is about the past.
        (self.to_lane_events, self.lane_events) = unbounded();
        self.zero_bytes = 0;
        self.open_tcp(
            &choice,
            format!("carried on over TCP after RDMA was lost: {}", failed.text),
        )?;
        if let Some((round, pages)) = self.moving.take() {
            self.move_round(round, &pages);
        }
        Ok(())
    }

    fn round_placed(&mut self, round: RoundIndex) -> Input {
        self.moving = None;
        let zero_bytes = self.lanes.as_ref().map_or(0, |lanes| lanes.zero_bytes());
        let before = std::mem::replace(&mut self.zero_bytes, zero_bytes);
        Input::Placed { round, zero_bytes: zero_bytes - before }
    }

    fn carry_out(&mut self, command: Command) -> Result<Option<Input>, Failure> {
        Ok(match command {
            Command::Send(message) => self.send(&message),
            Command::OpenLanes(choice) => Some(self.open_lanes(&choice)?),
            Command::Attach => Some(self.attach()?),
            Command::MoveRound { round, pages } => self.move_round(round, &pages),
            Command::Scan => Some(self.scan()?),
            Command::PrepareSwitchover => {
                self.monitor.prepare_switchover()?;
                Some(Input::SwitchoverPrepared)
            }
            Command::Pause => {
                self.monitor.pause()?;
                Some(Input::Paused)
            }
            Command::Resume => {
                self.monitor.resume()?;
                Some(Input::Resumed)
            }
            Command::Digest => {
                self.digest();
                None
            }
            Command::SaveDeviceState => self.save_state()?,
            Command::Record => {
                self.decide(Decision::HandedOver)?;
                Some(Input::Recorded)
            }
            Command::Release => {
                self.release();
                Some(Input::Released)
            }
            Command::Retract => Some(Input::Retracted { durable: self.retract() }),
            Command::Unwind => Some(Input::Unwound { guest_running: self.unwind() }),
        })
    }

    fn send(&self, message: &Message) -> Option<Input> {
        match self.link.send(message) {
            Ok(()) => None,
            Err(error) => Some(Input::PeerLost(lost(&error))),
        }
    }

    fn open_lanes(&mut self, choice: &Choice) -> Result<Input, Failure> {
        // The lanes lease guest memory, so it is mapped before them and tracked after.
        self.memory = self.monitor.map_memory()?;
        self.lane_count = choice.lanes.len();
        self.choice = Some(choice.clone());
        let chosen = choice.lanes.first().map(|lane| lane.path);
        let no_rdma = match (chosen, &self.lane_choice.no_rdma) {
            (Some(LanePath::Rdma), _) => match self.open_rdma(choice) {
                Ok(()) => return Ok(Input::LanesOpen),
                Err(why) => why,
            },
            (_, Some(why)) => why.clone(),
            (_, None) => {
                let why = lanes::refused_rdma(choice).unwrap_or("the target knows none");
                format!("at the target: {why}")
            }
        };
        match self.lane_choice.transport {
            Transport::Rdma => Err(Failure {
                reason: AbortReason::HostFailed,
                by_peer: false,
                text: format!("no lanes over RDMA: {no_rdma}"),
                hint: Some("leave out --transport rdma: TCP is used where RDMA is not".into()),
            }),
            Transport::Auto => self.open_tcp(choice, format!("no RDMA: {no_rdma}")),
            Transport::Tcp => self.open_tcp(choice, no_rdma),
        }?;
        Ok(Input::LanesOpen)
    }

    fn open_rdma(&mut self, choice: &Choice) -> Result<(), String> {
        let address = self.link.peer().ok_or("the target is gone")?;
        let opened = lanes::open_rdma(
            address,
            self.session,
            choice,
            &self.lane_choice,
            &self.memory,
            self.to_lane_events.clone(),
        );
        self.lanes = Some(opened?);
        self.path = Some(LanePath::Rdma);
        let reason = "on each lane a page was written to the target and read back";
        self.path_reason = Some(reason.into());
        Ok(())
    }

    fn open_tcp(&mut self, choice: &Choice, reason: String) -> Result<(), Failure> {
        let address = self.link.peer().ok_or_else(|| lost(&LinkError::Closed))?;
        let chosen = choice.lanes.first().map(|lane| lane.path);
        self.path = match chosen {
            Some(LanePath::Rdma) => self.lane_choice.paths().into_iter().nth(1),
            chosen => chosen,
        };
        self.path_reason = Some(reason).filter(|_| self.lane_choice.transport == Transport::Auto);
        self.lanes = Some(lanes::open(
            address,
            self.session,
            choice,
            &self.lane_choice,
            self.same_host,
            &self.memory,
            self.to_lane_events.clone(),
        )?);
        Ok(())
    }

    fn attach(&mut self) -> Result<Input, Failure> {
        let attached = self.monitor.attach(&self.memory)?;
        self.tracker = Some(attached.tracker);
        self.attach_stopped = Some(attached.stopped);
        // Only now: what got populated before tracking was armed is seen here, what gets populated
        // after it is reported by the first scan.
        let extents = holes::guest_data_extents(&self.memory)
            .map_err(|error| failure::host("first pass", &error, None))?;
        let mut populated = DirtySet::for_memory(&self.memory);
        for extent in extents {
            populated
                .set_extent(extent)
                .map_err(|error| failure::host("first pass", &error, None))?;
        }
        self.sent = Some(populated.clone());
        let recording = self.records.as_ref().map_or(Duration::ZERO, Records::write_cost);
        Ok(Input::Attached { populated, fixed: self.monitor.fixed_cost() + recording })
    }

    fn move_round(&mut self, round: RoundIndex, pages: &DirtySet) -> Option<Input> {
        let work = Arc::new(RoundWork::new(round, pages.extents()));
        self.placed = 0;
        self.moving = (self.path == Some(LanePath::Rdma)).then(|| (round, pages.clone()));
        self.work = Some(Arc::clone(&work));
        self.lanes.as_mut().expect("lanes open before rounds").move_round(work);
        None
    }

    fn scan(&mut self) -> Result<Input, Failure> {
        let tracker = self.tracker.as_mut().expect("tracking is armed before scans");
        let mut found = self.sent.as_ref().expect("set with the tracker").empty_like();
        let stats = tracker
            .scan(&mut found)
            .map_err(|error| failure::host("dirty tracking", &error, None))?;
        self.scans.push(stats.elapsed);
        self.leave_holes(&mut found)
            .map_err(|error| failure::host("dirty tracking", &error, None))?;
        Ok(Input::Scanned(found))
    }

    /// A scan may report holes whose page table is new. What was never sent and is a hole is one at
    /// the target too: moving it would only populate it on both sides. (What was sent and became a
    /// hole since moves as zeros.)
    fn leave_holes(&mut self, found: &mut DirtySet) -> Result<(), HolesError> {
        let sent = self.sent.as_mut().expect("set with the tracker");
        let mut fresh = found.clone();
        fresh.subtract(sent);
        if !fresh.is_empty() {
            fresh.subtract(&holes::data_within(&self.memory, &fresh)?);
            found.subtract(&fresh);
        }
        sent.union_with(found);
        Ok(())
    }

    /// Digests on threads of its own, so that a cancel is heard meanwhile.
    fn digest(&mut self) {
        let (memory, cpus) = (self.memory.clone(), self.lane_choice.cpus.len());
        let to_inputs = self.to_inputs.clone();
        self.digest = Some(DigestJob::start(memory, cpus, move |digested| {
            let input = match digested {
                Ok((digest, _took)) => Input::Digested(digest),
                Err(failure) => Input::Failed(failure),
            };
            let _nobody_waits_after_the_end = to_inputs.send(input);
        }));
    }

    /// Starts the relay: device state goes from the monitor to the control connection as it comes.
    fn save_state(&mut self) -> Result<Option<Input>, Failure> {
        let stream = self.monitor.save_state()?;
        assert!(self.state.set(Arc::clone(&stream)).is_ok(), "device state is saved once");
        let (link, to_inputs) = (self.link.clone(), self.to_inputs.clone());
        let relay = thread::Builder::new()
            .name("pf-state".into())
            .spawn(move || {
                let relayed = relay_state(&*stream, &link);
                if let Err(failure) = &relayed {
                    let _nobody_waits_after_the_end =
                        to_inputs.send(Input::Failed(failure.clone()));
                }
                relayed
            })
            .expect("the process can start threads");
        self.relay = Some(relay);
        self.monitor.state_saved()?;
        Ok(Some(Input::DeviceStateSent))
    }

    fn decide(&mut self, decision: Decision) -> Result<(), Failure> {
        let hint = "the disk of --state-dir must take a few hundred bytes";
        self.records
            .as_mut()
            .map_or(Ok(()), |records| records.write(decision))
            .map_err(|error| failure::host("record", &error, Some(hint.into())))
    }

    fn release(&mut self) {
        self.tracker = None;
        self.close_lanes(false);
        self.join_relay();
        self.monitor.release();
        if let Some(records) = self.records.take() {
            records.forget();
        }
    }

    fn unwind(&mut self) -> bool {
        self.digest = None;
        let running = self.monitor.unwind();
        self.tracker = None;
        self.link.finish();
        self.close_lanes(true);
        self.join_relay();
        match self.records.take() {
            Some(records) if running => records.forget(),
            records => self.records = records,
        }
        running
    }

    /// Should this agent die from here on, nobody may think that the guest was handed over.
    fn retract(&mut self) -> bool {
        self.decide(Decision::Aborted).is_ok()
            || self.records.take().is_none_or(|records| records.remove().is_ok())
    }

    fn close_lanes(&mut self, abort: bool) {
        if let Some(lanes) = self.lanes.take() {
            self.lane_stats.extend(lanes.close(abort));
        }
    }

    fn join_relay(&mut self) {
        if let Some(relay) = self.relay.take() {
            self.state_bytes = relay.join().ok().and_then(Result::ok).unwrap_or(0);
        }
    }

    fn watched<'m>(&'m self, machine: &'m Source) -> Watch<'m> {
        Watch {
            session: self.session,
            path: self.path,
            path_reason: self.path_reason.as_deref(),
            at: self.now(),
            phase: machine.phase(),
            report: machine.report(),
            round_bytes: self
                .work
                .as_ref()
                .map_or((0, 0), |work| (work.total_bytes(), work.taken_bytes())),
            moved_bytes: self.moved_before
                + self.lanes.as_ref().map_or(0, |lanes| lanes.moved_bytes()),
            lanes: self.lanes.as_ref().map_or(0, |lanes| lanes.alive()),
        }
    }

    fn finish(mut self, machine: Source) -> SourceResult {
        // After an uncertain end nothing was let go of yet: the guest stays paused.
        self.close_lanes(true);
        self.tracker = None;
        self.link.close();
        SourceResult {
            session: self.session,
            outcome: machine.outcome().expect("the loop ends with it").clone(),
            report: machine.report().clone(),
            lanes: std::mem::take(&mut self.lane_stats),
            path_reason: self.path_reason.take(),
            scans: std::mem::take(&mut self.scans),
            state_bytes: self.state_bytes,
            attach_stopped: self.attach_stopped,
            total: self.started.elapsed(),
        }
    }
}

/// Device state to the control connection until the monitor closes its end.
fn relay_state(stream: &dyn StateStream, link: &Link) -> Result<u64, Failure> {
    let mut chunk = vec![0; limits::STATE_CHUNK_BYTES_MAX];
    let mut total = 0;
    loop {
        let count =
            stream.read(&mut chunk).map_err(|error| failure::host("device state", &error, None))?;
        let message = match count {
            0 => Message::DeviceStateEnd,
            count => Message::DeviceState(chunk[..count].to_vec()),
        };
        link.send(&message).map_err(|error| lost(&error))?;
        if count == 0 {
            return Ok(total);
        }
        total += count as u64;
    }
}

fn lost(error: &LinkError) -> Failure {
    failure::host("target", error, Some("look at the target agent's output".into()))
}
