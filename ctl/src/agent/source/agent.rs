//! The source agent's loop, and what each command of the state machine does.

mod ending;
mod heard;

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use caps::Capability;
use crossbeam_channel::{Receiver, Sender, after, select, unbounded};
use pageferry_datapath::control::{AbortReason, Choice, Hello, Message, NewLanes};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::source::{Command, Failure, Input, Phase, Source, SourceConfig};
use pageferry_uring::plan::LaneTls;

use self::heard::{Said, is_out, listener};
use super::super::backlog::Room;
use super::super::control::Control;
use super::super::digest_job::DigestJob;
use super::super::failure;
use super::super::hold::Hold;
use super::super::link::{Link, LinkError};
use super::super::monitor::{SourceMonitor, StateStream};
use super::super::record::{Decision, Record, RecordedSecurity, Records, Role};
use super::super::tls::{Security, TlsError};
use super::mover::{self, Mover, Way};
use super::state_relay::StateRelay;
use super::tracking::Tracking;
use super::ways::Ways;
use super::{SourceOptions, SourceResult, Watch, lost};
use crate::{host, privileges};

/// How often a watcher is told how far things are.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// How long the target may take to accept the control connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Everything one migration holds at the source.
pub(super) struct Agent<'a> {
    session: SessionId,
    started: Instant,
    monitor: &'a mut dyn SourceMonitor,
    control: Control,
    /// What is said of connections and lanes, which is not for the state machine.
    said: Receiver<Said>,
    reconnect: Duration,
    blackout: Duration,
    /// The guest was paused to be handed over.
    switching: bool,
    /// How often the control connection was cut and came back, and for how long it was away.
    cuts: Vec<Duration>,
    records: Option<Records>,
    hold: Hold<Input>,
    /// What the control connection brought; a message's room is given back when it is taken.
    heard: Receiver<(Input, Option<Room>)>,
    inputs: Receiver<Input>,
    to_inputs: Sender<Input>,
    mover: Mover,
    /// To the target's control port.
    ways: Ways,
    tracking: Tracking,
    digest: Option<DigestJob>,
    /// The monitor's device state, once it is on its way.
    state: Arc<OnceLock<Arc<dyn StateStream>>>,
    relay: Option<StateRelay>,
    state_bytes: u64,
    /// Rights that are needed to the end.
    keeps: &'static [Capability],
}

impl<'a> Agent<'a> {
    pub(super) fn new(
        options: &SourceOptions,
        monitor: &'a mut dyn SourceMonitor,
        session: SessionId,
        started: Instant,
    ) -> Result<Self, Failure> {
        let link = Link::connect(&options.to, &options.caller, CONNECT_WITHIN)
            .map_err(|error| not_connected(&error))?;
        let mut lanes = options.lanes.clone();
        if lanes.encrypt {
            lanes.tls = Some(lane_tls(options, &link, monitor)?);
        }
        let (peer, qmp, pid) = (options.to.clone(), options.qmp.clone(), monitor.facts().pid);
        let mut record = Record::attempting(session, Role::Source, peer, qmp, pid);
        record.security = RecordedSecurity {
            tls_dir: options.caller.tls_dir.clone(),
            hostname: options.caller.hostname.clone(),
            insecure: options.caller.insecure,
        };
        record.settings = monitor.settings();
        let records = Records::begin(&options.state_dir, record).map_err(|error| {
            let hint = "name a writable folder with --state-dir";
            failure::host("record", &error, Some(hint.into()))
        })?;
        if let Err(failure) = monitor.guard(records.path()) {
            records.forget();
            return Err(failure);
        }
        let (to_inputs, inputs) = unbounded();
        let (to_heard, heard) = unbounded();
        let (to_said, said) = unbounded();
        let state: Arc<OnceLock<Arc<dyn StateStream>>> = Arc::default();
        let on_event = listener(to_heard, to_said, Arc::clone(&state));
        let ways = Ways::new(options.to.clone(), options.caller.clone());
        let connect = {
            let ways = ways.clone();
            move |within| ways.connect(within)
        };
        let control = Control::source(link, session, options.reconnect, connect, on_event);
        Ok(Self {
            session,
            started,
            monitor,
            control,
            said,
            reconnect: options.reconnect,
            blackout: options.blackout,
            switching: false,
            cuts: Vec::new(),
            records: Some(records),
            hold: Hold::from_environment(),
            heard,
            inputs,
            to_inputs,
            mover: Mover::new(lanes),
            ways,
            tracking: Tracking::default(),
            digest: None,
            state,
            relay: None,
            state_bytes: 0,
            keeps: match options.writes_a_file {
                true => &[Capability::CAP_DAC_OVERRIDE],
                false => privileges::to_write_in(&options.state_dir),
            },
        })
    }

    pub(super) fn run(
        mut self,
        options: &SourceOptions,
        cancel: &Receiver<()>,
        watch: &mut dyn FnMut(&Watch<'_>),
    ) -> SourceResult {
        let (mut commands, mut ready) = (Vec::new(), VecDeque::new());
        let mut machine = Source::start(self.config(options), self.now(), &mut commands);
        loop {
            for command in commands.drain(..) {
                ready.extend(self.carry_out(command).unwrap_or_else(|f| Some(Input::Failed(f))));
            }
            let patience = self.patience(machine.phase());
            self.control.set_patience(patience);
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
                rejoins: true,
            },
            offer: super::offer(options, facts),
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
            self.mover.same_host = !here.is_empty() && welcome.boot_id == here;
        }
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
            match ready.pop_front().unwrap_or_else(|| self.wait(machine, cancel)) {
                // Time passing ends this phase, so it does not pass.
                Input::Tick if phase == Phase::Spacing => {}
                // From here on it counts what came before: what the target said, what QEMU saved.
                input @ Input::Failed(_) if phase >= Phase::Saving => {
                    self.hold.keep(input);
                    self.hold.end();
                }
                input @ (Input::Tick | Input::Cancelled | Input::Failed(_)) => return input,
                input @ (Input::PeerLost(_) | Input::Message(Message::Abort(_)))
                    if phase < Phase::Deciding =>
                {
                    return input;
                }
                input @ Input::PeerLost(_) => {
                    self.hold.keep(input);
                    self.hold.end();
                }
                input => self.hold.keep(input),
            }
        }
        let kept = self.hold.pop().or_else(|| ready.pop_front());
        kept.unwrap_or_else(|| self.wait(machine, cancel))
    }

    /// The next thing that happens; a tick at the deadline, or when it is time to tell the watcher.
    fn wait(&mut self, machine: &Source, cancel: &Receiver<()>) -> Input {
        let until = machine.deadline().map_or(WATCH_EVERY, |at| at.saturating_sub(self.now()));
        select! {
            recv(self.heard) -> heard => heard.expect("the control's callback holds a sender").0,
            recv(self.inputs) -> input => input.expect("this agent holds a sender"),
            recv(self.mover.events()) -> event => {
                let said = self.mover.heard(event.expect("the mover holds a sender"));
                match said {
                    mover::Said::Input(input) => input,
                    mover::Said::Lost(failure) => self.lanes_lost(machine.phase(), failure),
                }
            }
            recv(self.said) -> said => match said.expect("the control's callback holds a sender") {
                Said::NewLanes(new, room) => {
                    drop(room);
                    self.new_lanes(new)
                }
                Said::LanesPlaced(placed, _room) => {
                    self.mover.note_placed(placed);
                    Input::Tick
                }
                Said::Restored(away) => self.restored(machine.phase(), away),
            },
            recv(cancel) -> _ => Input::Cancelled,
            recv(after(until.min(WATCH_EVERY))) -> _ => self.look(machine.phase()),
        }
    }

    /// Time has passed: is the monitor still there, and are lanes still to be had?
    fn look(&mut self, phase: Phase) -> Input {
        if !self.monitor.is_alive() {
            return Input::Failed(failure::monitor_gone("source"));
        }
        // Inside the pause only what failed is mended.
        if !self.switching
            && let Some(changed) = self.mover.rails_changed()
        {
            let ours = self.control.local().map(|address| address.ip());
            if ours.is_some() && changed.dead == ours {
                self.control.lost_carrier();
            }
            return self.lanes_lost(phase, changed.why);
        }
        match self.mover.ask_again(self.reconnect) {
            Ok(Some(lost)) => self.send(&Message::LanesLost(lost)).unwrap_or(Input::Tick),
            Ok(None) => Input::Tick,
            Err(failure) => Input::Failed(failure),
        }
    }

    /// The connection is back. Lanes were cut with it, whether or not they know it yet.
    fn restored(&mut self, phase: Phase, away: Duration) -> Input {
        tracing::warn!(?away, "the target is back");
        self.cuts.push(away);
        let why = Failure {
            reason: AbortReason::HostFailed,
            by_peer: false,
            text: format!("the connections were cut for {} ms", away.as_millis()),
            hint: None,
        };
        self.lanes_lost(phase, why)
    }

    /// How long the target may be away: while the guest is paused, no longer than that may last.
    fn patience(&mut self, phase: Phase) -> Duration {
        self.switching |= phase == Phase::Pausing;
        let switching = self.switching && phase <= Phase::Deciding;
        let drained = (Phase::DrainPausing..=Phase::DrainResuming).contains(&phase);
        if switching || drained { self.blackout } else { self.reconnect }
    }

    /// Lanes are gone. After the last round nothing more is asked of them; before it, new ones go on
    /// with what the target has not got.
    fn lanes_lost(&mut self, phase: Phase, failure: Failure) -> Input {
        if phase >= Phase::Verifying {
            return Input::Tick;
        }
        if !self.control.rejoins() {
            return Input::Failed(failure);
        }
        tracing::warn!(reason = %failure.text, "the lanes are gone; asking for new ones");
        let asked = self.mover.lost(failure);
        asked.and_then(|lost| self.send(&Message::LanesLost(lost))).unwrap_or(Input::Tick)
    }

    fn new_lanes(&mut self, new: NewLanes) -> Input {
        let Some(address) = self.control.peer() else { return Input::Tick };
        let (session, memory, look) = (self.session, self.tracking.memory(), self.tracking.look());
        match self.mover.renew(new, Way { address, session, memory, look }) {
            Ok(input) => {
                self.ways.add(self.mover.rails());
                input.unwrap_or(Input::Tick)
            }
            Err(failure) => Input::Failed(failure),
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<Option<Input>, Failure> {
        Ok(match command {
            Command::Send(message) => self.send(&message),
            Command::OpenLanes(choice) => Some(self.open_lanes(&choice)?),
            Command::Attach => Some(self.attach()?),
            Command::MoveRound { round, pages } => {
                self.mover.move_round(round, &pages);
                None
            }
            Command::Scan => Some(Input::Scanned(self.tracking.scan()?)),
            Command::PrepareSwitchover => {
                self.monitor.prepare_switchover()?;
                Some(Input::SwitchoverPrepared)
            }
            Command::Pause => {
                self.monitor.pause()?;
                self.mover.hurry(true);
                Some(Input::Paused)
            }
            Command::Resume => {
                self.mover.hurry(false);
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
            Command::Unwind => Some(Input::Unwound { guest: self.unwind() }),
        })
    }

    fn send(&self, message: &Message) -> Option<Input> {
        match self.control.send(message) {
            Ok(()) => None,
            Err(error) => Some(Input::PeerLost(lost(&error))),
        }
    }

    fn open_lanes(&mut self, choice: &Choice) -> Result<Input, Failure> {
        self.tracking.map(self.monitor)?;
        let address = self.control.peer().ok_or_else(|| lost(&LinkError::Closed))?;
        let (session, memory, look) = (self.session, self.tracking.memory(), self.tracking.look());
        if let Err(failure) = self.mover.open(choice, Way { address, session, memory, look }) {
            // Over another rail, with other tickets: some of these are used up.
            let rejoins = self.control.rejoins();
            self.mover.open_again(failure, rejoins)?;
        }
        self.ways.add(self.mover.rails());
        Ok(Input::LanesOpen)
    }

    fn attach(&mut self) -> Result<Input, Failure> {
        let populated = self.tracking.arm(self.monitor)?;
        // What comes now is scanning by descriptors that are open, and talking.
        privileges::drop_on_this_thread(self.keeps);
        let recording = self.records.as_ref().map_or(Duration::ZERO, Records::write_cost);
        Ok(Input::Attached { populated, fixed: self.monitor.fixed_cost() + recording })
    }

    /// Digests on threads of its own, so that a cancel is heard meanwhile.
    fn digest(&mut self) {
        let (memory, cpus) = (self.tracking.memory().clone(), self.mover.cpus());
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
        let relay = StateRelay::start(stream, self.control.clone(), self.to_inputs.clone());
        self.relay = Some(relay);
        let Err(failure) = self.monitor.state_saved() else {
            return Ok(Some(Input::DeviceStateSent));
        };
        // That the target is gone, or has given up, explains more than what the monitor makes of it.
        self.heard.try_iter().map(|(input, _room)| input).find(is_out).map(Some).ok_or(failure)
    }

    fn watched<'m>(&'m self, machine: &'m Source) -> Watch<'m> {
        Watch {
            session: self.session,
            path: self.mover.path(),
            path_reason: self.mover.path_reason(),
            at: self.now(),
            phase: machine.phase(),
            report: machine.report(),
            round_bytes: self.mover.round_bytes(),
            moved_bytes: self.mover.moved_bytes(),
            lanes: self.mover.alive(),
        }
    }
}

/// What lanes are encrypted with: the same certificates that the target was believed by.
fn lane_tls(
    options: &SourceOptions,
    link: &Link,
    monitor: &dyn SourceMonitor,
) -> Result<LaneTls, Failure> {
    let bytes = monitor.facts().regions.iter().map(|region| region.bytes).sum();
    let tls = match link.security() {
        Security::Tls { .. } => options.caller.lane_tls(&options.to, bytes),
        Security::Loopback | Security::Insecure => Err(TlsError::NotEncrypted),
    };
    tls.map_err(|error| failure::host("encrypted lanes", &error, error.hint()))
}

fn not_connected(error: &LinkError) -> Failure {
    let hint = match error {
        LinkError::Tls(error) => error.hint(),
        _ => Some("is `pageferry target --listen` running there, and the port open?".into()),
    };
    failure::host("target", error, hint)
}
