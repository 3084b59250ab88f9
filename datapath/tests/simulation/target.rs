//! The target's agent: carries out the commands of the real state machine on the imagined waiting
//! monitor, in order, as `ctl/src/agent/target/session.rs` does on a real one.

use std::time::Duration;

use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::target::{Command, Input, Outcome, Target, TargetConfig};

use crate::check::Rule;
use crate::desk::{Busy, Desk, Mail};
use crate::disk::Decision;
use crate::flaws::Flaw;
use crate::messages;
use crate::pages::{PAGES, digest_of, holds};
use crate::scenario::{Side, Trigger};
use crate::world::{Event, World, failure};

#[derive(Default)]
pub(crate) struct TargetAgent {
    pub(crate) machine: Option<Target>,
    pub(crate) desk: Desk<Command, Input>,
    /// Lanes that have placed their part of the round.
    placed: usize,
    pub(crate) last_placed: Option<RoundIndex>,
    digesting: bool,
    /// It has a record.
    recording: bool,
    /// Device state is loaded: from here on the source may decide to hand over.
    loaded: bool,
    /// It is putting its things away.
    ending: bool,
}

impl TargetAgent {
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.machine.as_ref().and_then(Target::outcome)
    }
}

impl World {
    pub(crate) fn start_target(&mut self) {
        let config = TargetConfig { welcome: messages::welcome() };
        self.target.machine = Some(Target::start(config, self.now));
        self.watch_target_deadline();
    }

    pub(crate) fn pump_target(&mut self) {
        while self.target.desk.is_open() && self.violation.is_none() {
            if self.target.desk.busy.is_some() && !self.scenario.beside {
                return;
            }
            if self.target.desk.busy.is_none()
                && let Some(command) = self.target.desk.todo.pop_front()
            {
                self.begin_at_target(command);
                continue;
            }
            if self.target.outcome().is_some() && self.target.desk.is_idle() {
                return self.target_ends();
            }
            let Some(mail) = self.target.desk.next_mail() else { return };
            let input = match mail {
                Mail::Input(input) => input,
                Mail::Lane(round) => self.lane_placed(round),
            };
            self.target_takes(input);
        }
    }

    fn lane_placed(&mut self, round: RoundIndex) -> Input {
        self.target.placed += 1;
        if self.target.placed < self.scenario.lanes {
            return Input::Tick;
        }
        self.target.placed = 0;
        self.target.last_placed = Some(round);
        Input::Placed(round)
    }

    fn target_takes(&mut self, input: Input) {
        self.check_target_input(&input);
        let machine = self.target.machine.take().expect("no input made it panic");
        let (from, kind) = (machine.phase(), input.kind());
        let mut commands = Vec::new();
        let machine = machine.handle(input, self.now, &mut commands);
        let to = machine.phase();
        self.note(|| format!("target: {from:?} -{kind:?}-> {to:?} {}", short(&commands)));
        self.coverage.target(from, kind, to);
        self.target.machine = Some(machine);
        self.target.desk.todo.extend(commands);
        if from != to {
            self.reached(|trigger| match trigger {
                Trigger::Target(phase, skipped) if phase == to => Some(skipped),
                _ => None,
            });
        }
        self.watch_target_deadline();
    }

    fn watch_target_deadline(&mut self) {
        let deadline = self.target.machine.as_ref().and_then(Target::deadline);
        if let Some(at) = deadline
            && self.target.desk.tick_at != Some(at)
        {
            self.target.desk.tick_at = Some(at);
            let at = self.a_little_late(at);
            self.schedule(at, Event::Tick(Side::Target));
        }
    }

    fn begin_at_target(&mut self, command: Command) {
        match command {
            Command::Send(message) => {
                if !self.send(Side::Target, message) {
                    let lost = failure("the control connection is gone");
                    self.target.desk.ready.push_back(Input::PeerLost(lost));
                }
                return;
            }
            Command::Digest => {
                self.target.digesting = true;
                let time = self.about(self.scenario.command_time * 4);
                let time = time + std::mem::take(&mut self.target.desk.drag_next);
                return self.after(time, Event::Digested(Side::Target));
            }
            _ => {}
        }
        let time = self.about(self.scenario.command_time);
        let desk = &mut self.target.desk;
        let fails = !matches!(command, Command::Unwind) && std::mem::take(&mut desk.fail_next);
        let time = time + std::mem::take(&mut desk.drag_next);
        desk.begun += 1;
        let number = desk.begun;
        let middle = self.random.up_to(time);
        self.after(middle, Event::Middle(Side::Target, number));
        self.after(time, Event::Finish(Side::Target, number));
        if matches!(command, Command::Unwind) {
            self.target.digesting = false;
            self.close_lanes(Side::Target, Duration::ZERO);
        }
        self.target.desk.busy = Some(Busy { command, number, fails, effective: false });
    }

    /// What a command does somewhere in the middle of its time.
    pub(crate) fn middle_of_target(&mut self, number: u64) {
        let Some(busy) = self.target.desk.at(number) else { return };
        if std::mem::replace(&mut busy.effective, true) {
            return;
        }
        let fails = busy.fails;
        let busy = self.target.desk.busy.take().expect("it is on its way");
        match &busy.command {
            // Clearing first half, so that data and clearing mix.
            Command::BeginRound { round: RoundIndex(0), pages } if !fails => {
                for page in (0..PAGES / 2).filter(|page| !holds(pages, *page)) {
                    self.clear(page);
                }
            }
            Command::EndDeviceState
                if self.waiting.alive
                    && self.state_is_whole()
                    && (!fails || self.random.chance(50)) =>
            {
                self.check_loading();
                self.waiting.loaded = true;
            }
            // A monitor that could not let it run is told to stop it, whatever it did.
            Command::Resume if !fails => self.guest_runs_at_target(),
            Command::Unwind if self.target.recording && !self.has(Flaw::DropsUnrecorded) => {
                self.disks[1].half_written(Some(Decision::Aborted), &mut self.random);
            }
            _ => {}
        }
        self.target.desk.busy = Some(busy);
    }

    fn state_is_whole(&self) -> bool {
        self.waiting.fed.len() == size_of::<u64>()
    }

    fn clear(&mut self, page: usize) {
        if !self.has(Flaw::ClearsNothing) {
            self.waiting.pages[page] = 0;
        }
    }

    fn guest_runs_at_target(&mut self) {
        self.check_target_may_run();
        self.waiting.running = self.waiting.alive;
        self.waiting.ran |= self.waiting.alive;
    }

    pub(crate) fn finish_of_target(&mut self, number: u64) {
        self.middle_of_target(number);
        let Some(busy) = self.target.desk.done(number) else { return };
        let input = match busy.fails {
            true => {
                self.note(|| format!("target: {} failed", short([&busy.command])));
                let failure = failure("a command failed");
                Some(match busy.command {
                    Command::Resume => Input::NotResumed(failure),
                    _ => Input::Failed(failure),
                })
            }
            false => self.answer_of_target(busy.command),
        };
        self.target.desk.ready.extend(input);
        self.pump_target();
    }

    fn answer_of_target(&mut self, command: Command) -> Option<Input> {
        Some(match command {
            Command::Inspect(_) => {
                if !self.disks[1].write(Some(Decision::Attempting), &mut self.random) {
                    return Some(Input::Failed(failure("the record")));
                }
                self.target.recording = true;
                Input::Inspected(messages::choice(self.scenario.lanes))
            }
            Command::BeginRound { round, pages } => {
                if round == RoundIndex(0) {
                    for page in (PAGES / 2..PAGES).filter(|page| !holds(&pages, *page)) {
                        self.clear(page);
                    }
                }
                Input::Cleared(round)
            }
            Command::PrepareIncoming => Input::IncomingPrepared,
            Command::FeedDeviceState(bytes) => {
                self.waiting.fed.extend(bytes);
                return None;
            }
            Command::EndDeviceState if !self.waiting.loaded => {
                Input::Failed(failure("the monitor did not take its state"))
            }
            Command::EndDeviceState => {
                self.target.loaded = true;
                Input::Loaded { took: Duration::ZERO }
            }
            Command::Record => match self.disks[1].write(Some(Decision::Ready), &mut self.random) {
                true => Input::Recorded,
                false => Input::Failed(failure("the record")),
            },
            Command::Resume => {
                let _tried = self.has(Flaw::RunsUnrecorded)
                    || self.disks[1].write(Some(Decision::Running), &mut self.random)
                    || self.disks[1].write(None, &mut self.random);
                Input::Resumed { took: Duration::ZERO, late: Duration::ZERO, cpu: Duration::ZERO }
            }
            Command::Unwind => Input::Unwound { dropped: self.unwound_at_target() },
            Command::Send(_) | Command::Digest => unreachable!("not waited for"),
        })
    }

    fn unwound_at_target(&mut self) -> bool {
        let written = !self.target.recording
            || self.has(Flaw::DropsUnrecorded)
            || self.disks[1].write(Some(Decision::Aborted), &mut self.random);
        if self.target.loaded && !written {
            return false;
        }
        self.waiting.loaded = false;
        if !self.target.loaded {
            self.disks[1].forget(&mut self.random);
        }
        true
    }

    pub(crate) fn digested_at_target(&mut self) {
        if self.target.digesting {
            let digest = digest_of(&self.waiting.pages);
            self.tell_target(Input::Digested { digest, took: Duration::ZERO });
        }
    }

    fn target_ends(&mut self) {
        if !std::mem::replace(&mut self.target.ending, true) {
            let wait = self.about(self.scenario.command_time);
            self.after(wait, Event::Ended(Side::Target));
        }
    }

    pub(crate) fn target_ended(&mut self) {
        if !self.target.desk.is_open() {
            return;
        }
        self.note(|| format!("target: ends with {:?}", self.target.outcome()));
        self.target.desk.ended = true;
        if self.target.outcome() == Some(&Outcome::Runs) {
            self.disks[1].forget(&mut self.random);
        }
        self.close_lanes(Side::Target, Duration::ZERO);
        self.close_control(Side::Target, Duration::ZERO, false);
    }

    /// Whether it lived until now.
    pub(crate) fn target_dies(&mut self) -> bool {
        if !self.target.desk.is_open() {
            return false;
        }
        if let Some(number) = self.target.desk.busy.as_ref().map(|busy| busy.number)
            && self.random.chance(50)
        {
            self.middle_of_target(number);
        }
        self.target.desk.alive = false;
        self.target.desk.busy = None;
        true
    }

    /// Loading is the moment when every byte must be there.
    fn check_loading(&mut self) {
        // Of an attempt that was given up meanwhile, it is worth nothing and never runs.
        if self.is_hostile() || self.guest.running || !self.guest.alive {
            return;
        }
        if let Some(page) =
            (0..PAGES).find(|page| self.waiting.pages[*page] != self.guest.pages[*page])
        {
            let (here, there) = (self.guest.pages[page], self.waiting.pages[page]);
            self.break_rule(Rule::Same, format!("loaded with page {page} {there:x}, not {here:x}"));
        }
        if self.waiting.fed != self.guest.device_state().to_le_bytes() {
            self.break_rule(Rule::Same, "loaded the state of another moment");
        }
    }
}

fn short<'a>(commands: impl IntoIterator<Item = &'a Command>) -> String {
    let name = |command: &Command| match command {
        Command::Send(message) => format!("Send({:?})", message.kind()),
        Command::Inspect(_) => "Inspect".into(),
        Command::BeginRound { round, .. } => format!("BeginRound({round})"),
        Command::FeedDeviceState(_) => "FeedDeviceState".into(),
        command => format!("{command:?}"),
    };
    commands.into_iter().map(name).collect::<Vec<_>>().join(", ")
}
