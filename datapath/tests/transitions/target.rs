//! The target in every situation, fed with every input.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use pageferry_datapath::control::{Message, MessageKind, RoundStart, Welcome};
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::target::{
    Command, Input, InputKind, Outcome, Phase, Target, TargetConfig, table,
};

use crate::snapshot;
use crate::source::{choice, digest, failure, message, offer, pages};

/// A target on its way, with the time and the commands it gave last.
pub(crate) struct Walk {
    machine: Option<Target>,
    pub(crate) now: Duration,
    pub(crate) out: Vec<Command>,
}

impl Walk {
    fn start() -> Self {
        let name = String::new;
        let welcome = Welcome { software: name(), host: name(), boot_id: name(), rejoin_key: None };
        let machine = Some(Target::start(TargetConfig { welcome }, Duration::ZERO));
        Self { machine, now: Duration::ZERO, out: Vec::new() }
    }

    pub(crate) fn feed(&mut self, input: Input) -> &mut Self {
        self.feed_after(Duration::from_millis(1), input)
    }

    pub(crate) fn feed_after(&mut self, wait: Duration, input: Input) -> &mut Self {
        self.now += wait;
        self.out.clear();
        let machine = self.machine.take().expect("no input made it panic");
        self.machine = Some(machine.handle(input, self.now, &mut self.out));
        self
    }

    pub(crate) fn machine(&self) -> &Target {
        self.machine.as_ref().expect("no input made it panic")
    }

    pub(crate) fn phase(&self) -> Phase {
        self.machine().phase()
    }

    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.machine().outcome()
    }

    pub(crate) fn gave(&self) -> String {
        self.out.iter().map(command_text).collect::<Vec<_>>().join(", ")
    }
}

fn command_text(command: &Command) -> String {
    match command {
        Command::Send(message) => format!("Send({:?})", message.kind()),
        Command::Inspect(_) => "Inspect".into(),
        Command::BeginRound { .. } => "BeginRound".into(),
        Command::FeedDeviceState(_) => "FeedDeviceState".into(),
        other => format!("{other:?}"),
    }
}

pub(crate) fn round_start(round: u32, last: bool) -> Input {
    let bitmap = pages([1]).encode();
    Input::Message(Message::RoundStart(RoundStart { round: RoundIndex(round), last, bitmap }))
}

type Situation = (&'static str, fn() -> Walk);

/// How to get into each situation: phases, and what sets apart moments of one phase.
#[rustfmt::skip]
pub(crate) const SITUATIONS: &[Situation] = &[
    ("Greeting", Walk::start),
    ("Offered", || after("Greeting", Input::Message(message(MessageKind::Hello)))),
    ("Inspecting", || after("Offered", Input::Message(Message::Offer(offer(true))))),
    ("Receiving", || after("Inspecting", Input::Inspected(choice()))),
    ("Receiving (lanes ahead)", || after("Receiving", Input::Placed(RoundIndex(0)))),
    ("Receiving (round)", || after("Receiving", round_start(0, false))),
    ("Receiving (cleared)", || after("Receiving (round)", Input::Cleared(RoundIndex(0)))),
    ("Receiving (placed)", || after("Receiving (cleared)", Input::Placed(RoundIndex(0)))),
    ("Receiving (closed)", || {
        after("Receiving (placed)", Input::Message(Message::RoundEnd(RoundIndex(0))))
    }),
    ("Receiving (complete)", || {
        let mut walk = after("Receiving (closed)", round_start(1, true));
        walk.feed(Input::Cleared(RoundIndex(1))).feed(Input::Placed(RoundIndex(1)));
        walk.feed(Input::Message(Message::RoundEnd(RoundIndex(1))));
        walk
    }),
    ("Receiving (preparing)", || after("Receiving (complete)", Input::Message(Message::Prepare))),
    ("Receiving (prepared)", || after("Receiving (preparing)", Input::IncomingPrepared)),
    ("Receiving (digesting)", || after("Receiving (prepared)", Input::Message(Message::Verify))),
    ("Receiving (digested)", || after("Receiving (digesting)", digested())),
    ("Loading", || {
        after("Receiving (digested)", Input::Message(message(MessageKind::DeviceState)))
    }),
    ("Loading (ended)", || after("Loading", Input::Message(Message::DeviceStateEnd))),
    ("Ready", || after("Loading (ended)", loaded())),
    ("Ready (committed)", || after("Ready", Input::Message(Message::Commit))),
    ("Ready (recorded)", || after("Ready", Input::Recorded)),
    ("Resuming", || after("Ready (recorded)", Input::Message(Message::Commit))),
    ("Unwinding", || after("Receiving", Input::Cancelled)),
    ("Done (runs)", || after("Resuming", resumed())),
    ("Done (uncertain)", || after("Ready", Input::PeerLost(failure()))),
];

fn digested() -> Input {
    Input::Digested { digest: digest(1), took: Duration::from_millis(1) }
}

fn loaded() -> Input {
    Input::Loaded { took: Duration::from_millis(1) }
}

fn resumed() -> Input {
    Input::Resumed {
        took: Duration::from_millis(1),
        late: Duration::ZERO,
        cpu: Duration::from_millis(1),
    }
}

pub(crate) fn at(situation: &str) -> Walk {
    let (_, build) = SITUATIONS.iter().find(|(name, _)| *name == situation).expect(situation);
    let walk = build();
    let phase = situation.split(' ').next().expect("a phase");
    assert_eq!(format!("{:?}", walk.phase()), phase, "on the way to {situation}");
    walk
}

pub(crate) fn after(situation: &str, input: Input) -> Walk {
    let mut walk = at(situation);
    walk.feed(input);
    walk
}

/// Every input, by a name: messages by kind, ticks before and after any deadline.
fn inputs() -> Vec<(String, Duration, Input)> {
    let soon = Duration::from_millis(1);
    let mut inputs = Vec::new();
    for kind in InputKind::ALL {
        let input = match kind {
            InputKind::Message => {
                for kind in MessageKind::OF_MACHINES {
                    inputs.push((format!("{kind:?}"), soon, Input::Message(message(*kind))));
                }
                inputs.push(("RoundStart (next)".into(), soon, round_start(1, false)));
                continue;
            }
            InputKind::Tick => {
                inputs.push(("Tick".into(), soon, Input::Tick));
                inputs.push(("Tick (an hour later)".into(), soon * 3_600_000, Input::Tick));
                continue;
            }
            InputKind::Placed => {
                inputs.push(("Placed (next)".into(), soon, Input::Placed(RoundIndex(1))));
                Input::Placed(RoundIndex(0))
            }
            InputKind::Inspected => Input::Inspected(choice()),
            InputKind::Cleared => Input::Cleared(RoundIndex(0)),
            InputKind::IncomingPrepared => Input::IncomingPrepared,
            InputKind::Digested => digested(),
            InputKind::Loaded => loaded(),
            InputKind::Recorded => Input::Recorded,
            InputKind::Resumed => resumed(),
            InputKind::NotResumed => Input::NotResumed(failure()),
            InputKind::Unwound => {
                let dropped = Input::Unwound { dropped: true };
                inputs.push(("Unwound".into(), soon, dropped));
                inputs.push(("Unwound (not)".into(), soon, Input::Unwound { dropped: false }));
                continue;
            }
            InputKind::Failed => Input::Failed(failure()),
            InputKind::PeerLost => Input::PeerLost(failure()),
            InputKind::Cancelled => Input::Cancelled,
        };
        inputs.push((format!("{kind:?}"), soon, input));
    }
    inputs
}

#[test]
fn every_situation_and_every_input() {
    let mut text = String::from(
        "# What the target makes of every input in every situation: the phase it comes to, and\n\
         # the commands it gives. `never`: the answer of a command that is not out.\n",
    );
    for (situation, _) in SITUATIONS {
        let mut results = Vec::new();
        for (name, wait, input) in inputs() {
            let mut walk = at(situation);
            let (from, kind) = (walk.phase(), input.kind());
            let fed = catch_unwind(AssertUnwindSafe(move || {
                walk.feed_after(wait, input);
                walk
            }));
            let result = match fed {
                Err(_) => "never".into(),
                Ok(walk) => {
                    assert!(table::allowed(from, kind, walk.phase()));
                    let gave = walk.gave();
                    let colon = if gave.is_empty() { "" } else { ": " };
                    format!("{:?}{}{colon}{gave}", walk.phase(), outcome_text(&walk))
                }
            };
            results.push((name, result));
        }
        text += &snapshot::situation(situation, &results);
    }
    snapshot::assert_is("tests/transitions/target.snapshot", &text);
}

fn outcome_text(walk: &Walk) -> &'static str {
    match walk.outcome() {
        None => "",
        Some(Outcome::Runs) => " (Runs)",
        Some(Outcome::Failed(_)) => " (Failed)",
        Some(Outcome::Uncertain(_)) => " (Uncertain)",
    }
}

#[test]
fn the_peer_never_makes_the_target_panic_and_every_phase_was_looked_at() {
    for (situation, _) in SITUATIONS {
        for kind in MessageKind::OF_MACHINES {
            after(situation, Input::Message(message(*kind)));
        }
        // Lanes are the peer's too.
        let placed = [0, 1, 2, u32::MAX].map(|round| Input::Placed(RoundIndex(round)));
        let lost = [Input::PeerLost(failure()), Input::Failed(failure()), Input::Cancelled];
        let lanes_open = !matches!(*situation, "Greeting" | "Offered" | "Inspecting");
        for input in placed.into_iter().filter(|_| lanes_open).chain(lost) {
            after(situation, input);
        }
    }
    for phase in Phase::ALL {
        assert!(SITUATIONS.iter().any(|(_, build)| build().phase() == *phase), "{phase:?}");
    }
}
