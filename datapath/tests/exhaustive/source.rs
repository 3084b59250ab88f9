//! The source's agent: carries out the commands of the real state machine in this world, in order,
//! as `ctl/src/agent/source` does on a real guest.

use std::time::Duration;

use pageferry_datapath::control::Message;
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::recover::Guest;
use pageferry_datapath::source::{Command, Input, Phase};

use crate::agent::Process;
use crate::flaws::Flaw;
use crate::messages::{Pages, failure, pages_of, set_of};
use crate::world::{Decision, PAGES, Side, World};

impl World {
    /// The machine takes this, and all answers that are there, until it asks for something.
    pub(crate) fn source_takes(&mut self, input: Input) {
        let mut input = Some(input);
        while let Some(next) = input.take() {
            let lost = matches!(next, Input::PeerLost(_));
            let heard = matches!(next, Input::Message(Message::Abort(_)));
            self.memory.settled[0] |= heard && self.has(Flaw::ForgetsHeard);
            // A flawed one thinks that the guest is its own again.
            if lost && self.has(Flaw::TakesBack) && self.source.machine.phase() == Phase::Committed
            {
                self.source.todo.push_back(Command::Unwind);
            }
            let now = self.source.machine.deadline().filter(|_| matches!(next, Input::Tick));
            let mut out = Vec::new();
            let machine = self.source.machine.clone();
            self.source.machine = machine.handle(next, now.unwrap_or(Duration::ZERO), &mut out);
            self.source.todo.extend(out);
            if self.source.todo.is_empty() {
                input = self.source.ready.pop_front();
            }
        }
    }

    fn answer_source(&mut self, input: Input) {
        self.source.todo.pop_front();
        self.source.half = 0;
        self.source.ready.push_back(input);
        self.settle_source();
    }

    /// When all commands are carried out, their answers are heard.
    fn settle_source(&mut self) {
        if self.source.todo.is_empty()
            && let Some(input) = self.source.ready.pop_front()
        {
            self.source_takes(input);
        }
    }

    pub(crate) fn source_works(&mut self, unaware: bool) {
        let Some(command) = self.source.todo.front().cloned() else { return self.source_ends() };
        if std::mem::take(&mut self.source.fails) {
            return self.source_fails(&command);
        }
        let half = self.source.half;
        self.source.half += 1;
        match command {
            Command::Send(message) => {
                self.source.todo.pop_front();
                self.source.half = 0;
                self.check_source_sends(&message);
                if !self.send(Side::Source, message, unaware) {
                    self.source.ready.push_back(Input::PeerLost(failure()));
                }
                self.settle_source();
            }
            Command::OpenLanes(_) => {
                let admitted = self.target.works() && !self.lane.fenced;
                self.lane.open = admitted;
                let refused = || Input::Failed(failure());
                self.answer_source(if admitted { Input::LanesOpen } else { refused() });
            }
            Command::Attach => {
                if !self.guest.alive {
                    return self.answer_source(Input::Failed(failure()));
                }
                self.memory.touched = true;
                (self.guest.armed, self.guest.written) = (true, 0);
                let populated = self.populated();
                let fixed = Duration::from_millis(u64::from(self.setting.rounds));
                self.answer_source(Input::Attached { populated: set_of(populated), fixed });
            }
            Command::MoveRound { round, pages } => {
                self.source.todo.pop_front();
                self.source.half = 0;
                // Lanes that are gone have said so.
                if self.lane.open {
                    self.lane.round = round.0;
                    (self.lane.unread, self.lane.barrier_due) = (pages_of(&pages), true);
                }
                self.settle_source();
            }
            Command::Scan if !self.guest.alive => {
                self.answer_source(Input::Failed(failure()));
            }
            Command::Scan => {
                if half == 0 {
                    self.memory.found = self.guest.written;
                }
                // What is written between the two halves is protected, and not reported.
                if half == 0 && self.has(Flaw::ProtectsLate) {
                    return;
                }
                self.guest.written = 0;
                self.answer_source(Input::Scanned(set_of(self.memory.found)));
            }
            Command::PrepareSwitchover => self.answer_source(Input::SwitchoverPrepared),
            Command::Pause => {
                if !self.guest.alive {
                    return self.answer_source(Input::Failed(failure()));
                }
                (self.memory.touched, self.guarded) = (true, true);
                if !self.has(Flaw::PausesLate) {
                    self.guest.running = false;
                }
                self.answer_source(Input::Paused);
            }
            Command::Resume => {
                if !self.guest.alive {
                    return self.answer_source(Input::Failed(failure()));
                }
                self.runs_at_source();
                self.guarded = false;
                self.answer_source(Input::Resumed);
            }
            Command::Digest => {
                self.source.todo.pop_front();
                self.source.half = 0;
                let digest = digest_of(&self.guest.pages);
                self.source.tell(Input::Digested(digest));
                self.settle_source();
            }
            Command::SaveDeviceState => self.save_device_state(),
            Command::Record if half == 0 && self.has(Flaw::AnswersBeforeRecording) => {
                self.answer_source(Input::Recorded);
            }
            Command::Record if half == 0 => self.disks[0].seen = Some(Decision::HandedOver),
            Command::Record => {
                self.disks[0].write(Some(Decision::HandedOver));
                self.answer_source(Input::Recorded);
            }
            Command::Release => {
                self.guest.armed = false;
                self.lane_closes();
                if half == 0 {
                    self.disks[0].seen = None;
                    return;
                }
                self.forget_at_source();
                self.answer_source(Input::Released);
            }
            Command::Retract if self.has(Flaw::RetractsNothing) => {
                self.answer_source(Input::Retracted { durable: true });
            }
            Command::Retract if half == 0 => self.disks[0].seen = Some(Decision::Aborted),
            Command::Retract => {
                self.disks[0].write(Some(Decision::Aborted));
                self.answer_source(Input::Retracted { durable: true });
            }
            Command::Unwind if half == 0 => {
                if self.guest.alive && !self.guest.running {
                    self.runs_at_source();
                }
                self.guarded = false;
                self.guest.armed = false;
            }
            Command::Unwind => {
                self.unwound_at_source();
                self.answer_source(Input::Unwound { guest: self.guest_of(Side::Source) });
            }
        }
    }

    fn save_device_state(&mut self) {
        if !self.guest.alive {
            return self.answer_source(Input::Failed(failure()));
        }
        if self.has(Flaw::PausesLate) {
            self.guest.running = false;
        }
        let state = vec![self.device_state()];
        let sent = self.send(Side::Source, Message::DeviceState(state), false)
            && self.send(Side::Source, Message::DeviceStateEnd, false);
        self.answer_source(match sent {
            true => Input::DeviceStateSent,
            false => Input::Failed(failure()),
        });
    }

    /// The next command fails; a write that fails may stand there all the same.
    fn source_fails(&mut self, command: &Command) {
        match command {
            Command::Record => {
                self.disks[0].failed = true;
                self.disks[0].seen = Some(Decision::HandedOver);
                self.answer_source(Input::Failed(failure()));
            }
            Command::Retract => {
                self.disks[0].failed = true;
                self.answer_source(Input::Retracted { durable: false });
            }
            // The monitor does not let it go on.
            Command::Unwind => {
                self.guest.armed = false;
                self.unwound_at_source();
                self.answer_source(Input::Unwound { guest: self.guest_of(Side::Source) });
            }
            _ => self.answer_source(Input::Failed(failure())),
        }
    }

    fn unwound_at_source(&mut self) {
        let given = self.disks[0].seen == Some(Decision::HandedOver);
        let needless = match self.guest_of(Side::Source) {
            Guest::Runs => true,
            Guest::Whole => false,
            Guest::Absent => !given,
        };
        if needless && self.target_knows() {
            self.forget_at_source();
        }
        self.ways[Side::Target as usize].down = true;
        self.lane_is_reset();
    }

    /// Durably, before it is said: the target forgets its own record then.
    fn forget_at_source(&mut self) {
        self.disks[0].seen = None;
        if self.setting.recovers > 0 && !self.has(Flaw::SettlesInCache) {
            self.disks[0].durable = None;
        }
        self.settle(Side::Source);
    }

    /// What was never loaded nobody asks for; what may have been stays on record until the target
    /// has said that it acted on this end.
    fn target_knows(&self) -> bool {
        let retracted = self.disks[0].seen == Some(Decision::Aborted);
        let careless = self.setting.recovers == 0 || self.has(Flaw::ForgetsUnheard);
        careless || !retracted || self.was_settled(Side::Source)
    }

    fn populated(&self) -> Pages {
        let there = |page: &usize| self.guest.pages[*page] != 0;
        (0..PAGES).filter(there).fold(0, |mask, page| mask | 1 << page)
    }

    fn source_ends(&mut self) {
        self.check_source_end();
        self.guest.armed = false;
        self.lane_is_reset();
        self.close(Side::Source);
        self.source.leave(Process::Ended);
    }
}

pub(crate) fn digest_of(pages: &[u8; PAGES]) -> MemoryDigest {
    MemoryDigest::new(vec![pages.iter().map(|content| u64::from(*content)).collect()])
}
