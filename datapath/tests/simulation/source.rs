//! The source's agent: carries out the commands of the real state machine on the imagined guest,
//! in order, each taking its time, as `ctl/src/agent/source/agent.rs` does on a real one.

use std::time::Duration;

use pageferry_datapath::control::Message;
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::recover::Guest;
use pageferry_datapath::source::{Command, Input, Outcome, Source, SourceConfig};

use crate::desk::{Busy, Desk, Mail};
use crate::disk::Decision;
use crate::flaws::Flaw;
use crate::messages;
use crate::pages::{PAGES, digest_of, pages_of, set_of};
use crate::scenario::{Side, Trigger};
use crate::world::{Event, World, failure};

/// Pieces that the device state travels in.
const STATE_PIECES: u32 = 2;

#[derive(Default)]
pub(crate) struct SourceAgent {
    pub(crate) machine: Option<Source>,
    pub(crate) desk: Desk<Command, Input>,
    /// What the scan on its way has found.
    pub(crate) found: Vec<usize>,
    /// Of which some content was sent.
    pub(crate) sent: Vec<bool>,
    /// Lanes that have placed their part of the round.
    placed: usize,
    pub(crate) last_placed: Option<RoundIndex>,
    digesting: bool,
    /// How much longer the device state takes than usual.
    relay_drags: Duration,
    /// It is putting its things away.
    ending: bool,
    /// What the last unwinding said about the guest.
    pub(crate) resumed: Option<bool>,
}

impl SourceAgent {
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.machine.as_ref().and_then(Source::outcome)
    }
}

impl World {
    pub(crate) fn start_source(&mut self) {
        let config = SourceConfig {
            hello: messages::hello(),
            offer: messages::offer(self.scenario.verify),
            goals: self.scenario.goals,
            drain: self.scenario.direct_io && !self.has(Flaw::NeverDrains),
        };
        let mut commands = Vec::new();
        self.source.machine = Some(Source::start(config, self.now, &mut commands));
        self.source.desk.todo.extend(commands);
        self.watch_source_deadline();
        self.pump_source();
    }

    pub(crate) fn pump_source(&mut self) {
        while self.source.desk.is_open() && self.violation.is_none() {
            if self.source.desk.busy.is_some() && !self.scenario.beside {
                return;
            }
            if self.source.desk.busy.is_none()
                && let Some(command) = self.source.desk.todo.pop_front()
            {
                self.begin_at_source(command);
                continue;
            }
            if self.source.outcome().is_some() && self.source.desk.is_idle() {
                return self.source_ends();
            }
            let Some(mail) = self.source.desk.next_mail() else { return };
            let input = match mail {
                Mail::Input(input) => input,
                Mail::Lane(round) => {
                    self.source.placed += 1;
                    let lanes = match self.has(Flaw::CountsLanesAlive) {
                        true => self.lanes.up(),
                        false => self.scenario.lanes,
                    };
                    match self.source.placed == lanes {
                        true => {
                            self.source.last_placed = Some(round);
                            Input::Placed { round, zero_bytes: 0 }
                        }
                        false => Input::Tick,
                    }
                }
            };
            self.source_takes(input);
        }
    }

    fn source_takes(&mut self, input: Input) {
        self.check_source_input(&input);
        let machine = self.source.machine.take().expect("no input made it panic");
        let (from, kind) = (machine.phase(), input.kind());
        let mut commands = Vec::new();
        let machine = machine.handle(input, self.now, &mut commands);
        let to = machine.phase();
        self.note(|| format!("source: {from:?} -{kind:?}-> {to:?} {}", short(&commands)));
        self.coverage.source(from, kind, to);
        self.source.machine = Some(machine);
        self.source.desk.todo.extend(commands);
        if from != to {
            self.reached(|trigger| match trigger {
                Trigger::Source(phase, skipped) if phase == to => Some(skipped),
                _ => None,
            });
        }
        self.watch_source_deadline();
    }

    fn watch_source_deadline(&mut self) {
        let deadline = self.source.machine.as_ref().and_then(Source::deadline);
        if let Some(at) = deadline
            && self.source.desk.tick_at != Some(at)
        {
            self.source.desk.tick_at = Some(at);
            let at = self.a_little_late(at);
            self.schedule(at, Event::Tick(Side::Source));
        }
    }

    fn begin_at_source(&mut self, command: Command) {
        match command {
            Command::Send(message) => {
                self.check_source_sends(&message);
                if !self.send(Side::Source, message) {
                    let lost = failure("the control connection is gone");
                    self.source.desk.ready.push_back(Input::PeerLost(lost));
                }
                return;
            }
            Command::MoveRound { round, ref pages } => {
                self.source.placed = 0;
                self.check_round_begins(round, pages);
                return self.move_round(round, pages);
            }
            Command::Digest => {
                self.source.digesting = true;
                let time = self.about(self.scenario.command_time * 4);
                let time = time + std::mem::take(&mut self.source.desk.drag_next);
                return self.after(time, Event::Digested(Side::Source));
            }
            _ => {}
        }
        let fallible = !matches!(command, Command::Release | Command::Retract | Command::Unwind);
        let time = self.about(self.scenario.command_time);
        let desk = &mut self.source.desk;
        let fails = fallible && std::mem::take(&mut desk.fail_next);
        let drag = std::mem::take(&mut desk.drag_next);
        self.source.relay_drags = drag;
        let desk = &mut self.source.desk;
        let time = time + drag;
        desk.begun += 1;
        let number = desk.begun;
        let middle = self.random.up_to(time);
        self.after(middle, Event::Middle(Side::Source, number));
        self.after(time, Event::Finish(Side::Source, number));
        let busy = Busy { command, number, fails, effective: false };
        self.begins_at_source(&busy);
        self.source.desk.busy = Some(busy);
    }

    /// What a command does at once.
    fn begins_at_source(&mut self, busy: &Busy<Command>) {
        match busy.command {
            Command::Attach => {
                self.check.touched = true;
                self.guest.arm(0..PAGES / 2);
                if self.has(Flaw::LooksBeforeArming) {
                    self.look_for_data();
                }
            }
            Command::Scan => {
                self.source.found.clear();
                if self.has(Flaw::ReadsFirst) {
                    for page in (0..PAGES).filter(|page| self.guest.written[*page]) {
                        self.check.cached[page] = Some(self.guest.pages[page]);
                    }
                }
                self.scan(0..PAGES / 2);
            }
            Command::Pause => self.check.touched = true,
            Command::SaveDeviceState => {
                let wait = self.about(self.scenario.command_time / 2);
                self.after(wait, Event::Relay(0));
            }
            Command::Unwind => self.source.digesting = false,
            _ => {}
        }
    }

    /// What a command does somewhere in the middle of its time.
    pub(crate) fn middle_of_source(&mut self, number: u64) {
        let Some(busy) = self.source.desk.at(number) else { return };
        if std::mem::replace(&mut busy.effective, true) {
            return;
        }
        // Half of what fails has its effect all the same.
        let fails = busy.fails;
        if fails && self.random.chance(50) {
            return;
        }
        let busy = self.source.desk.busy.take().expect("it is on its way");
        match busy.command {
            Command::Attach => self.guest.arm(PAGES / 2..PAGES),
            Command::Scan => self.scan(PAGES / 2..PAGES),
            Command::PrepareSwitchover => self.guest.settings = true,
            Command::Pause if !self.has(Flaw::PausesLate) => self.guest.stop(),
            Command::Resume => self.guest_runs_at_source(),
            Command::Record => {
                self.disks[0].half_written(Some(Decision::HandedOver), &mut self.random)
            }
            Command::Retract => {
                self.disks[0].half_written(Some(Decision::Aborted), &mut self.random)
            }
            Command::Unwind => self.unwind_the_guest(),
            _ => {}
        }
        self.source.desk.busy = Some(busy);
    }

    pub(crate) fn finish_of_source(&mut self, number: u64) {
        self.middle_of_source(number);
        let Some(busy) = self.source.desk.done(number) else { return };
        let input = match busy.fails {
            true => {
                self.note(|| format!("source: {} failed", short([&busy.command])));
                Input::Failed(failure("a command failed"))
            }
            false => self.answer_of_source(busy.command),
        };
        self.source.desk.ready.push_back(input);
        self.pump_source();
    }

    fn answer_of_source(&mut self, command: Command) -> Input {
        match command {
            Command::OpenLanes(_) => {
                let admitted = !self.lanes.fenced && !self.partitioned();
                if !admitted || !self.target.desk.is_open() {
                    return Input::Failed(failure("no lane"));
                }
                self.lanes.open_all();
                Input::LanesOpen
            }
            Command::Attach => {
                if !self.has(Flaw::LooksBeforeArming) {
                    self.look_for_data();
                }
                self.check.watching = true;
                let populated = (0..PAGES).filter(|page| self.source.sent[*page]);
                Input::Attached { populated: set_of(populated), fixed: self.scenario.fixed }
            }
            Command::Scan => Input::Scanned(self.scanned()),
            Command::PrepareSwitchover => Input::SwitchoverPrepared,
            Command::Pause => Input::Paused,
            Command::Resume => Input::Resumed,
            Command::SaveDeviceState => Input::DeviceStateSent,
            Command::Record => {
                let written = self.has(Flaw::AnswersBeforeRecording)
                    || self.disks[0].write(Some(Decision::HandedOver), &mut self.random);
                match written {
                    true => Input::Recorded,
                    false => Input::Failed(failure("the record")),
                }
            }
            Command::Release => {
                self.check.watching = false;
                self.guest.disarm();
                self.close_lanes(Side::Source, Duration::ZERO);
                self.disks[0].forget(&mut self.random);
                Input::Released
            }
            Command::Retract => Input::Retracted { durable: self.retract() },
            Command::Unwind => Input::Unwound { guest: self.unwound() },
            Command::Send(_) | Command::MoveRound { .. } | Command::Digest => {
                unreachable!("not waited for")
            }
        }
    }

    fn retract(&mut self) -> bool {
        self.has(Flaw::RetractsNothing)
            || self.disks[0].write(Some(Decision::Aborted), &mut self.random)
            || self.disks[0].write(None, &mut self.random)
    }

    fn guest_runs_at_source(&mut self) {
        self.check_source_may_run();
        self.guest.running = self.guest.alive;
    }

    fn unwind_the_guest(&mut self) {
        // Its monitor may refuse to run it.
        let refuses = !self.guest.running && std::mem::take(&mut self.source.desk.fail_next);
        if !self.guest.running && !refuses {
            self.guest_runs_at_source();
        }
    }

    fn unwound(&mut self) -> Guest {
        self.check.watching = false;
        self.guest.disarm();
        if !self.has(Flaw::LeavesSettings) {
            self.guest.settings = false;
        }
        self.finish_control(Side::Source, Duration::ZERO);
        self.close_lanes(Side::Source, Duration::ZERO);
        let running = self.guest.running;
        if running {
            self.disks[0].forget(&mut self.random);
        }
        self.source.resumed = Some(running);
        match (running, self.guest.alive) {
            (true, _) => Guest::Runs,
            (false, true) => Guest::Whole,
            (false, false) => Guest::Absent,
        }
    }

    pub(crate) fn digested_at_source(&mut self) {
        if self.source.digesting {
            self.tell_source(Input::Digested(digest_of(&self.guest.pages)));
        }
    }

    /// The device state goes on its way beside everything else.
    pub(crate) fn relay(&mut self, piece: u32) {
        if !self.source.desk.is_open() || self.source.resumed.is_some() {
            return;
        }
        let state = self.guest.device_state().to_le_bytes();
        let message = match piece {
            0 => Message::DeviceState(state[..3].to_vec()),
            1 => Message::DeviceState(state[3..].to_vec()),
            _ => Message::DeviceStateEnd,
        };
        if !self.send(Side::Source, message) {
            return self.post_failure(Side::Source, "the relay");
        }
        if piece < STATE_PIECES {
            let wait = self.about(self.scenario.command_time / 2);
            let wait = wait + std::mem::take(&mut self.source.relay_drags);
            self.after(wait, Event::Relay(piece + 1));
        }
    }

    fn source_ends(&mut self) {
        if !std::mem::replace(&mut self.source.ending, true) {
            let wait = self.about(self.scenario.command_time);
            self.after(wait, Event::Ended(Side::Source));
        }
    }

    pub(crate) fn source_ended(&mut self) {
        if !self.source.desk.is_open() {
            return;
        }
        self.note(|| format!("source: ends with {:?}", self.source.outcome()));
        self.source.desk.ended = true;
        self.check.watching = false;
        self.guest.disarm();
        if self.lanes.open {
            self.close_lanes(Side::Source, Duration::ZERO);
        }
        self.close_control(Side::Source, Duration::ZERO, false);
    }

    /// Whether it lived until now.
    pub(crate) fn source_dies(&mut self) -> bool {
        if !self.source.desk.is_open() {
            return false;
        }
        if let Some(number) = self.source.desk.busy.as_ref().map(|busy| busy.number)
            && self.random.chance(50)
        {
            self.middle_of_source(number);
        }
        self.source.desk.alive = false;
        self.source.desk.busy = None;
        self.check.watching = false;
        self.guest.disarm();
        true
    }
}

pub(crate) fn short<'a>(commands: impl IntoIterator<Item = &'a Command>) -> String {
    let name = |command: &Command| match command {
        Command::Send(message) => format!("Send({:?})", message.kind()),
        Command::OpenLanes(_) => "OpenLanes".into(),
        Command::MoveRound { round, pages } => format!("MoveRound({round}, {:?})", pages_of(pages)),
        command => format!("{command:?}"),
    };
    commands.into_iter().map(name).collect::<Vec<_>>().join(", ")
}
