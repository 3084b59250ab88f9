//! Any events for the target's state machine, from an agent that keeps its word and a source that
//! may not. The twin of [`source`](super::source).

use std::collections::VecDeque;
use std::time::Duration;

use arbitrary::Unstructured;
use pageferry_datapath::control::{Message, RoundStart};
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::target::{Command, Input, Outcome, Phase, Target, TargetConfig};

use super::events::{self, one_of};

const STEPS_TO_THE_END: usize = 60;
/// Rounds of a good migration.
const ROUNDS: u32 = 3;

#[derive(Default)]
struct Walk {
    machine: Option<Target>,
    now: Duration,
    /// Commands without their answer yet, in order.
    open: VecDeque<Command>,
    /// Of a good migration, what the source says next.
    script: usize,
    /// Lanes have tickets, and may say something.
    lanes: bool,
    fed: bool,
    loaded: bool,
    recorded: bool,
    committed: bool,
    resumed: bool,
    unwinding: bool,
}

pub(super) fn run(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let config = TargetConfig { welcome: events::welcome() };
    let machine = Some(Target::start(config, Duration::ZERO));
    let mut walk = Walk { machine, ..Walk::default() };
    while !bytes.is_empty() {
        if let Some(input) = walk.choose(&mut bytes) {
            walk.feed(input);
        }
    }
    walk.end();
}

impl Walk {
    fn machine(&self) -> &Target {
        self.machine.as_ref().expect("no input made it panic")
    }

    fn choose(&mut self, bytes: &mut Unstructured<'_>) -> Option<Input> {
        Some(match one_of(bytes, 20) {
            0..=9 => self.good(bytes),
            10 => self.fail()?,
            11 | 12 => Input::Message(events::message(bytes)),
            13 | 14 if !self.lanes => return None,
            13 | 14 => Input::Placed(events::round(bytes)),
            15 => {
                self.now += Duration::from_millis(10 << one_of(bytes, 16));
                Input::Tick
            }
            16 => Input::Cancelled,
            17 => Input::PeerLost(events::failure()),
            18 => Input::Failed(events::failure()),
            // Ahead of everything that waits for its answer.
            _ => self.says(bytes),
        })
    }

    fn good(&mut self, bytes: &mut Unstructured<'_>) -> Input {
        match self.open.pop_front() {
            Some(command) => self.answer(command),
            None => self.says(bytes),
        }
    }

    /// What the source or its lanes say next in a good migration.
    fn says(&mut self, bytes: &mut Unstructured<'_>) -> Input {
        let step = self.script;
        self.script += 1;
        let (first, rounds) = (2, 3 * ROUNDS as usize);
        if (first..first + rounds).contains(&step) {
            let round = RoundIndex(((step - first) / 3) as u32);
            let last = round.0 + 1 == ROUNDS;
            return match (step - first) % 3 {
                0 => {
                    let bitmap = events::pages(bytes).encode();
                    Input::Message(Message::RoundStart(RoundStart { round, last, bitmap }))
                }
                1 if !self.lanes => Input::Tick,
                1 => Input::Placed(round),
                _ => Input::Message(Message::RoundEnd(round)),
            };
        }
        Input::Message(match step.checked_sub(first + rounds) {
            None if step == 0 => Message::Hello(events::hello()),
            None => Message::Offer(events::offer(true)),
            Some(0) => Message::Prepare,
            Some(1) => Message::Verify,
            Some(2) => Message::DeviceState(vec![1, 2]),
            Some(3) => Message::DeviceStateEnd,
            Some(4) => Message::Commit,
            Some(_) => return Input::Tick,
        })
    }

    fn answer(&mut self, command: Command) -> Input {
        let took = Duration::ZERO;
        match command {
            Command::Inspect(_) => {
                self.lanes = true;
                Input::Inspected(events::choice())
            }
            Command::BeginRound { round, .. } => Input::Cleared(round),
            Command::PrepareIncoming => Input::IncomingPrepared,
            Command::Digest => Input::Digested { digest: events::digest(0), took },
            Command::EndDeviceState => {
                self.loaded = true;
                Input::Loaded { took }
            }
            Command::Record => {
                self.recorded = true;
                Input::Recorded
            }
            Command::Resume => {
                self.resumed = true;
                Input::Resumed { took, late: took, cpu: took }
            }
            Command::Unwind => Input::Unwound { dropped: !self.loaded || self.now.is_zero() },
            Command::Send(_) | Command::FeedDeviceState(_) => unreachable!("not waited for"),
        }
    }

    fn fail(&mut self) -> Option<Input> {
        if let Command::Unwind = self.open.front()? {
            return None;
        }
        Some(match self.open.pop_front()? {
            Command::Resume => Input::NotResumed(events::failure()),
            _ => Input::Failed(events::failure()),
        })
    }

    fn feed(&mut self, input: Input) {
        let done = self.machine().outcome().is_some();
        let commit = matches!(input, Input::Message(Message::Commit));
        self.committed |= commit && self.machine().phase() == Phase::Ready;
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
                Command::Resume => {
                    assert!(self.committed && self.loaded, "it runs a guest it was not given");
                    assert!(self.recorded, "it runs one of which nothing is on record");
                    assert!(!self.unwinding, "it runs a guest it gave up");
                }
                Command::Send(Message::Ready) => assert!(self.loaded, "nothing is loaded"),
                Command::Send(Message::Running(_)) => assert!(self.resumed, "it does not run"),
                Command::FeedDeviceState(_) => self.fed = true,
                Command::BeginRound { .. } => assert!(!self.fed, "memory changes under the state"),
                Command::Unwind => {
                    assert!(!self.resumed, "it takes back a guest that runs");
                    assert!(!std::mem::replace(&mut self.unwinding, true), "unwound twice");
                }
                _ => {}
            }
            if !matches!(command, Command::Send(_) | Command::FeedDeviceState(_)) {
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
                Some(command) => self.answer(command),
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
            Some(Outcome::Runs) => assert!(self.resumed, "it says that the guest runs"),
            Some(_) => assert!(!self.resumed, "it says that the guest does not run"),
            None => unreachable!("asked before"),
        }
    }
}
