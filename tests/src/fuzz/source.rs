//! Any events for the source's state machine, from an agent that keeps its word and a target that
//! may not.
//!
//! A byte of zero is what a good migration would bring next, so that a few changed bytes lead
//! anywhere. In the end everything is answered and the peer is lost: the machine has to end too.

use std::collections::VecDeque;
use std::time::Duration;

use arbitrary::Unstructured;
use pageferry_datapath::control::{Message, MessageKind};
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::planner::{Goals, Stalled};
use pageferry_datapath::recover::Guest;
use pageferry_datapath::source::{Command, Input, Outcome, Phase, Source, SourceConfig};

use super::events::{self, one_of};

/// More than any machine needs to end once everything is answered.
const STEPS_TO_THE_END: usize = 60;

struct Walk {
    machine: Option<Source>,
    now: Duration,
    /// Commands without their answer yet, in order.
    open: VecDeque<Command>,
    /// Rounds begun.
    rounds: u32,
    /// There are lanes that could say something.
    lanes: bool,
    /// The decision is in the record, as far as the machine was told.
    recorded: bool,
    committed: bool,
    /// The guest stands still, by the machine's own commands.
    paused: bool,
    unwinding: bool,
}

pub(super) fn run(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let mut walk = Walk::start(&mut bytes);
    while !bytes.is_empty() {
        let Some(input) = walk.choose(&mut bytes) else { continue };
        walk.feed(input);
    }
    walk.end();
}

impl Walk {
    fn start(bytes: &mut Unstructured<'_>) -> Self {
        let flags = one_of(bytes, 32);
        let patient = Goals { downtime: Duration::ZERO, ..Goals::default() };
        let goals = match flags >> 2 {
            0 => Goals::default(),
            1 => Goals { stalled: Stalled::SwitchOver, ..patient },
            2 => Goals { rounds_max: 1, ..patient },
            _ => Goals { stalled: Stalled::SwitchOver, slowdown_percent_max: 0, ..patient },
        };
        let config = SourceConfig {
            hello: events::hello(),
            offer: events::offer(flags & 1 == 1),
            goals,
            drain: flags & 2 == 2,
        };
        let mut out = Vec::new();
        let machine = Source::start(config, Duration::ZERO, &mut out);
        let mut walk = Self {
            machine: Some(machine),
            now: Duration::ZERO,
            open: VecDeque::new(),
            rounds: 0,
            lanes: false,
            recorded: false,
            committed: false,
            paused: false,
            unwinding: false,
        };
        walk.take(out);
        walk
    }

    fn machine(&self) -> &Source {
        self.machine.as_ref().expect("no input made it panic")
    }

    fn choose(&mut self, bytes: &mut Unstructured<'_>) -> Option<Input> {
        Some(match one_of(bytes, 20) {
            0..=9 => self.good(bytes)?,
            10 => self.fail()?,
            11 | 12 => Input::Message(events::message(bytes)),
            13 if !self.lanes => return None,
            13 => {
                Input::Placed { round: events::round(bytes), zero_bytes: one_of(bytes, 3).into() }
            }
            14 => {
                self.now += Duration::from_millis(10 << one_of(bytes, 16));
                Input::Tick
            }
            15 => Input::Cancelled,
            16 => Input::PeerLost(events::failure()),
            17 => Input::Failed(events::failure()),
            _ => {
                self.now += Duration::from_millis(one_of(bytes, 200).into());
                self.good(bytes)?
            }
        })
    }

    /// What a good migration would bring next.
    fn good(&mut self, bytes: &mut Unstructured<'_>) -> Option<Input> {
        if let Some(command) = self.open.pop_front() {
            return Some(self.answer(command, bytes));
        }
        let round = RoundIndex(self.rounds.saturating_sub(1));
        Some(Input::Message(match self.machine().phase() {
            Phase::Greeting => Message::Welcome(events::welcome()),
            Phase::Offering => Message::Choice(events::choice()),
            Phase::Closing => Message::RoundClosed(round),
            Phase::Preparing => Message::Prepared,
            Phase::Verifying => Message::DigestReport(events::report(one_of(bytes, 2))),
            Phase::Saving => Message::Ready,
            Phase::Committed => Message::Running(events::running()),
            _ => {
                self.now = self.now.max(self.machine().deadline()?);
                return Some(Input::Tick);
            }
        }))
    }

    fn answer(&mut self, command: Command, bytes: &mut Unstructured<'_>) -> Input {
        match command {
            Command::OpenLanes(_) => {
                self.lanes = true;
                Input::LanesOpen
            }
            Command::Attach => {
                let fixed = Duration::from_millis(one_of(bytes, 100).into());
                Input::Attached { populated: events::pages(bytes), fixed }
            }
            Command::MoveRound { round, .. } => {
                self.now += Duration::from_millis(one_of(bytes, 200).into());
                Input::Placed { round, zero_bytes: 0 }
            }
            Command::Scan => Input::Scanned(events::pages(bytes)),
            Command::PrepareSwitchover => Input::SwitchoverPrepared,
            Command::Pause => Input::Paused,
            Command::Resume => Input::Resumed,
            Command::Digest => Input::Digested(events::digest(one_of(bytes, 2))),
            Command::SaveDeviceState => Input::DeviceStateSent,
            Command::Record => {
                self.recorded = true;
                Input::Recorded
            }
            Command::Release => Input::Released,
            Command::Retract => {
                let durable = one_of(bytes, 2) == 0;
                self.recorded &= !durable;
                Input::Retracted { durable }
            }
            Command::Unwind => {
                let guest_running = one_of(bytes, 2) == 0;
                self.paused &= !guest_running;
                let guest = match guest_running {
                    true => Guest::Runs,
                    false if one_of(bytes, 2) == 0 => Guest::Whole,
                    false => Guest::Absent,
                };
                Input::Unwound { guest }
            }
            Command::Send(_) => unreachable!("not waited for"),
        }
    }

    /// A failure in place of the next answer. What never fails is answered.
    fn fail(&mut self) -> Option<Input> {
        if let Command::Release | Command::Retract | Command::Unwind = self.open.front()? {
            return None;
        }
        let command = self.open.pop_front()?;
        // What could not be written may stand there all the same.
        self.recorded |= matches!(command, Command::Record);
        Some(Input::Failed(events::failure()))
    }

    fn feed(&mut self, input: Input) {
        let done = self.machine().outcome().is_some();
        let mut out = Vec::new();
        let machine = self.machine.take().expect("no input made it panic");
        self.machine = Some(machine.handle(input, self.now, &mut out));
        assert!(!done || out.is_empty(), "it is done, and asks for {out:?}");
        self.take(out);
    }

    /// The rules about what it asks for.
    fn take(&mut self, out: Vec<Command>) {
        for command in out {
            match &command {
                Command::Send(Message::Commit) => {
                    assert!(self.recorded && self.paused, "a commit without a record");
                    assert!(!std::mem::replace(&mut self.committed, true), "a second commit");
                }
                Command::Send(message) => {
                    let after_the_commit = self.committed && !self.unwinding;
                    let gives_up = message.kind() == MessageKind::Abort;
                    assert!(!after_the_commit || gives_up, "{message:?} after the commit");
                }
                Command::Pause => self.paused = true,
                Command::Resume => {
                    assert!(!self.recorded && !self.committed, "it runs the guest it gave away");
                    self.paused = false;
                }
                Command::MoveRound { .. } => self.rounds += 1,
                Command::Release => assert!(self.committed && self.recorded, "nothing was given"),
                Command::Unwind => {
                    assert!(!self.recorded, "it runs the guest that its record gave away");
                    assert!(!std::mem::replace(&mut self.unwinding, true), "unwound twice");
                }
                _ => {}
            }
            if !matches!(command, Command::Send(_)) {
                self.open.push_back(command);
            }
        }
    }

    /// Everything is answered, the peer is lost, time passes: it ends, and says what is so.
    fn end(mut self) {
        for step in 0..STEPS_TO_THE_END {
            if self.machine().outcome().is_some() && self.open.is_empty() {
                return self.judge();
            }
            let input = match self.open.pop_front() {
                Some(command) => self.answer(command, &mut Unstructured::new(&[])),
                None if step % 2 == 0 => Input::PeerLost(events::failure()),
                None => {
                    self.now = self.now.max(self.machine().deadline().unwrap_or(self.now));
                    Input::Tick
                }
            };
            self.feed(input);
        }
        panic!("it is stuck in {:?}", self.machine().phase());
    }

    fn judge(&self) {
        match self.machine().outcome() {
            Some(Outcome::Migrated) => assert!(self.committed, "moved without a commit"),
            Some(Outcome::Failed { .. }) => {}
            None => unreachable!("asked before"),
        }
    }
}
