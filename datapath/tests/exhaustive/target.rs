//! The target's agent: carries out the commands of the real state machine in this world, in order,
//! as `ctl/src/agent/target` does on a real waiting monitor.

use std::time::Duration;

use pageferry_datapath::target::{Command, Input, Outcome, Phase};

use crate::agent::Process;
use crate::flaws::Flaw;
use crate::messages::{self, failure, pages_of};
use crate::source::digest_of;
use crate::world::{Decision, PAGES, Side, World};

impl World {
    pub(crate) fn target_takes(&mut self, input: Input) {
        let mut input = Some(input);
        while let Some(next) = input.take() {
            let lost = matches!(next, Input::PeerLost(_));
            // A flawed one thinks that it is meant to run the guest.
            if lost && self.has(Flaw::RunsUnasked) && self.target.machine.phase() == Phase::Ready {
                self.target.todo.push_back(Command::Resume);
            }
            let now = self.target.machine.deadline().filter(|_| matches!(next, Input::Tick));
            let mut out = Vec::new();
            let machine = self.target.machine.clone();
            self.target.machine = machine.handle(next, now.unwrap_or(Duration::ZERO), &mut out);
            self.target.todo.extend(out);
            if self.target.todo.is_empty() {
                input = self.target.ready.pop_front();
            }
        }
    }

    fn answer_target(&mut self, input: Option<Input>) {
        self.target.todo.pop_front();
        self.target.half = 0;
        self.target.ready.extend(input);
        if self.target.todo.is_empty()
            && let Some(input) = self.target.ready.pop_front()
        {
            self.target_takes(input);
        }
    }

    pub(crate) fn target_works(&mut self, unaware: bool) {
        let Some(command) = self.target.todo.front().cloned() else { return self.target_ends() };
        if std::mem::take(&mut self.target.fails) {
            return self.target_fails(&command);
        }
        let half = self.target.half;
        self.target.half += 1;
        let took = Duration::ZERO;
        match command {
            Command::Send(message) => {
                let sent = self.send(Side::Target, message, unaware);
                self.answer_target((!sent).then(|| Input::PeerLost(failure())));
            }
            Command::Inspect(_) => {
                if !self.waiting.alive {
                    return self.answer_target(Some(Input::Failed(failure())));
                }
                self.disks[1].write(Some(Decision::Attempting));
                self.answer_target(Some(Input::Inspected(messages::choice())));
            }
            Command::BeginRound { round, pages } => {
                let pages = pages_of(&pages);
                for page in 0..PAGES {
                    let outside = round.0 == 0 && pages >> page & 1 == 0;
                    if outside && !self.has(Flaw::ClearsNothing) {
                        self.waiting.pages[page] = 0;
                    }
                }
                self.answer_target(Some(Input::Cleared(round)));
            }
            Command::PrepareIncoming => self.answer_target(Some(Input::IncomingPrepared)),
            Command::Digest => {
                let digest = digest_of(&self.waiting.pages);
                self.target.tell(Input::Digested { digest, took });
                self.answer_target(None);
            }
            Command::FeedDeviceState(bytes) => {
                self.waiting.spoiled |= self.waiting.fed.is_some();
                self.waiting.fed = bytes.first().copied();
                self.answer_target(None);
            }
            Command::EndDeviceState => {
                if !self.waiting.alive || self.waiting.fed.is_none() || self.waiting.spoiled {
                    return self.answer_target(Some(Input::Failed(failure())));
                }
                self.check_loading();
                self.waiting.loaded = true;
                self.memory.loaded_once = self.setting.recovers > 0;
                self.answer_target(Some(Input::Loaded { took }));
            }
            Command::Record if self.has(Flaw::MayRunUnrecorded) => {
                self.answer_target(Some(Input::Recorded));
            }
            Command::Record if half == 0 => self.disks[1].seen = Some(Decision::Ready),
            Command::Record => {
                self.disks[1].write(Some(Decision::Ready));
                self.answer_target(Some(Input::Recorded));
            }
            Command::Resume if half == 0 => {
                if !self.waiting.alive {
                    return self.answer_target(Some(Input::NotResumed(failure())));
                }
                self.check_target_may_run();
                (self.waiting.running, self.waiting.ran) = (true, true);
            }
            Command::Resume if half == 1 && !self.has(Flaw::RunsUnrecorded) => {
                self.disks[1].seen = Some(Decision::Running);
            }
            Command::Resume => {
                if !self.has(Flaw::RunsUnrecorded) {
                    self.disks[1].write(Some(Decision::Running));
                }
                self.answer_target(Some(Input::Resumed { took, late: took, cpu: took }));
            }
            Command::Unwind => self.unwind_target(half),
        }
    }

    fn unwind_target(&mut self, half: u8) {
        let recording = self.disks[1].seen.is_some() && !self.has(Flaw::DropsUnrecorded);
        match half {
            0 => {
                self.lane.fenced = true;
                self.target.inbox.retain(|it| !matches!(it, Input::Digested { .. }));
            }
            1 if recording => self.disks[1].seen = Some(Decision::Aborted),
            _ => {
                if recording {
                    self.disks[1].write(Some(Decision::Aborted));
                }
                let loaded = self.waiting.loaded || self.memory.loaded_once;
                self.waiting.loaded = false;
                if !loaded {
                    self.disks[1].seen = None;
                }
                self.answer_target(Some(Input::Unwound { dropped: true }));
            }
        }
    }

    fn target_fails(&mut self, command: &Command) {
        match command {
            Command::Resume => self.answer_target(Some(Input::NotResumed(failure()))),
            Command::Unwind => {
                self.disks[1].failed = true;
                self.lane.fenced = true;
                let dropped = !self.waiting.loaded;
                self.answer_target(Some(Input::Unwound { dropped }));
            }
            _ => self.answer_target(Some(Input::Failed(failure()))),
        }
    }

    fn target_ends(&mut self) {
        let outcome = self.target.machine.outcome().cloned();
        let failed = matches!(outcome, Some(Outcome::Failed(_)));
        if failed && self.setting.recovers > 0 && self.target.half == 0 {
            self.settle(Side::Target);
            self.target.half = 1;
            return;
        }
        self.check_target_end();
        let careless = self.setting.recovers == 0 || self.has(Flaw::ForgetsHeard);
        let settled = self.was_settled(Side::Target);
        if (outcome == Some(Outcome::Runs) && careless)
            || (settled && !matches!(outcome, Some(Outcome::Uncertain(_))))
        {
            self.disks[1].seen = None;
        }
        self.lane.fenced = true;
        self.close(Side::Target);
        if self.lane.open {
            self.source.tell(pageferry_datapath::source::Input::Failed(failure()));
        }
        self.session_over(outcome.as_ref());
        self.target.leave(Process::Ended);
    }
}
