//! The source in every situation, fed with every input.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{
    Abort, AbortReason, Choice, DigestReport, Hello, LaneOffer, LaneTicket, Message, MessageKind,
    Offer, RegionOffer, RoundStart, Running, SourceLimits, Ticket, Welcome,
};
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::{RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::LanePath;
use pageferry_datapath::planner::Goals;
use pageferry_datapath::recover::Guest;
use pageferry_datapath::source::{
    Command, Failure, Input, InputKind, Outcome, Phase, Source, SourceConfig, table,
};

use crate::snapshot;

const PAGES: u64 = 64;

/// A source on its way, with the time and the commands it gave last.
pub(crate) struct Walk {
    machine: Option<Source>,
    pub(crate) now: Duration,
    pub(crate) out: Vec<Command>,
}

impl Walk {
    pub(crate) fn start(config: SourceConfig) -> Self {
        let mut out = Vec::new();
        let machine = Some(Source::start(config, Duration::ZERO, &mut out));
        Self { machine, now: Duration::ZERO, out }
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

    pub(crate) fn machine(&self) -> &Source {
        self.machine.as_ref().expect("no input made it panic")
    }

    pub(crate) fn phase(&self) -> Phase {
        self.machine().phase()
    }

    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.machine().outcome()
    }

    /// One round from its start to its scan, which finds `found`.
    pub(crate) fn round(&mut self, round: u32, found: DirtySet) -> &mut Self {
        self.moved(round);
        if self.phase() == Phase::Spacing {
            self.feed_after(Duration::from_secs(3), Input::Tick);
        }
        self.feed(Input::Scanned(found))
    }

    pub(crate) fn moved(&mut self, round: u32) -> &mut Self {
        self.feed(placed(round)).feed(Input::Message(Message::RoundClosed(RoundIndex(round))))
    }

    /// The pages of the round that was begun last.
    pub(crate) fn moving(&self) -> Option<&DirtySet> {
        self.out.iter().find_map(|command| match command {
            Command::MoveRound { pages, .. } => Some(pages),
            _ => None,
        })
    }

    pub(crate) fn gave(&self) -> String {
        self.out.iter().map(command_text).collect::<Vec<_>>().join(", ")
    }
}

pub(crate) fn pages(which: impl IntoIterator<Item = u64>) -> DirtySet {
    let mut set = DirtySet::new([(PAGES, 4096)]);
    for page in which {
        set.set_extent(Extent { region: RegionIndex(0), offset: page * 4096, len: 4096 })
            .expect("a page of the region");
    }
    set
}

pub(crate) fn config(drain: bool, verify: bool) -> SourceConfig {
    SourceConfig { hello: hello(), offer: offer(verify), goals: Goals::default(), drain }
}

pub(crate) fn hello() -> Hello {
    Hello {
        session: SessionId(1),
        software: String::new(),
        host: String::new(),
        boot_id: String::new(),
        rejoins: false,
    }
}

pub(crate) fn offer(verify: bool) -> Offer {
    Offer {
        regions: vec![RegionOffer {
            name: "pc.ram".into(),
            bytes: PAGES * 4096,
            page_bytes: 4096,
            backing: "tmpfs".into(),
            populated_bytes: 0,
        }],
        monitor: String::new(),
        machine: String::new(),
        lanes: LaneOffer {
            count: None,
            paths: vec![LanePath::TcpPlain],
            cpus: 1,
            encrypt: false,
            codecs: vec![],
            nics: 0,
            rss: false,
            holes: false,
        },
        tracker: String::new(),
        target_qmp: None,
        verify,
        limits: SourceLimits { downtime_ms: 50 },
    }
}

pub(crate) fn choice() -> Choice {
    let lane = LaneTicket {
        path: LanePath::TcpPlain,
        ticket: Ticket([0; 32]),
        cpu: None,
        over_tcp: None,
        beside_rdma: None,
    };
    Choice {
        lanes: vec![lane],
        refused: Vec::new(),
        rdma_port: None,
        codecs: vec![],
        addresses: vec![],
        queues: vec![],
        holes: false,
    }
}

pub(crate) fn digest(number: u64) -> MemoryDigest {
    MemoryDigest::new(vec![vec![number]])
}

pub(crate) fn failure() -> Failure {
    Failure { reason: AbortReason::HostFailed, by_peer: false, text: "it broke".into(), hint: None }
}

/// One message of each kind, as an honest peer might send it.
pub(crate) fn message(kind: MessageKind) -> Message {
    let name = String::new;
    match kind {
        MessageKind::Hello => Message::Hello(hello()),
        MessageKind::Welcome => Message::Welcome(Welcome {
            software: name(),
            host: name(),
            boot_id: name(),
            rejoin_key: None,
        }),
        MessageKind::Offer => Message::Offer(offer(true)),
        MessageKind::Choice => Message::Choice(choice()),
        MessageKind::Prepare => Message::Prepare,
        MessageKind::Prepared => Message::Prepared,
        MessageKind::RoundStart => Message::RoundStart(RoundStart {
            round: RoundIndex(0),
            last: false,
            bitmap: pages([]).encode(),
        }),
        MessageKind::RoundEnd => Message::RoundEnd(RoundIndex(0)),
        MessageKind::RoundClosed => Message::RoundClosed(RoundIndex(0)),
        MessageKind::Verify => Message::Verify,
        MessageKind::DigestReport => {
            Message::DigestReport(DigestReport { took_us: 1, digest: digest(1).encode() })
        }
        MessageKind::DeviceState => Message::DeviceState(vec![1]),
        MessageKind::DeviceStateEnd => Message::DeviceStateEnd,
        MessageKind::ReturnPath => Message::ReturnPath(vec![1]),
        MessageKind::Ready => Message::Ready,
        MessageKind::Commit => Message::Commit,
        MessageKind::Running => {
            Message::Running(Running { load_us: 1, resume_us: 1, late_us: 0, cpu_us: 1 })
        }
        MessageKind::Abort => Message::Abort(Abort {
            reason: AbortReason::HostFailed,
            text: "there".into(),
            hint: None,
        }),
        kind => unreachable!("{kind:?} is the agents' own"),
    }
}

fn command_text(command: &Command) -> String {
    match command {
        Command::Send(message) => format!("Send({:?})", message.kind()),
        Command::OpenLanes(_) => "OpenLanes".into(),
        Command::MoveRound { .. } => "MoveRound".into(),
        other => format!("{other:?}"),
    }
}

type Situation = (&'static str, fn() -> Walk);

/// How to get into each situation: phases, and what sets apart visits of one phase.
#[rustfmt::skip]
pub(crate) const SITUATIONS: &[Situation] = &[
    ("Greeting", || Walk::start(config(true, true))),
    ("Offering", || after("Greeting", Input::Message(message(MessageKind::Welcome)))),
    ("Opening", || after("Offering", Input::Message(Message::Choice(choice())))),
    ("Attaching", || after("Opening", Input::LanesOpen)),
    ("DrainPausing (first)", || after("Attaching", attached())),
    ("DrainResuming (first)", || after("DrainPausing (first)", Input::Paused)),
    // So costly that only a switchover is worth another one.
    ("Moving", || {
        let mut walk = at("DrainResuming (first)");
        walk.feed_after(Duration::from_millis(30), Input::Resumed);
        walk
    }),
    ("Closing", || {
        let mut walk = at("Moving");
        walk.feed_after(Duration::from_millis(300), placed(0));
        walk
    }),
    ("Scanning", || after("Closing", Input::Message(Message::RoundClosed(RoundIndex(0))))),
    ("Moving (second)", || after("Scanning", Input::Scanned(pages(0..60)))),
    ("Moving (stalled)", || {
        let mut walk = at("Moving (second)");
        walk.feed_after(Duration::from_millis(280), placed(1));
        walk.feed(Input::Message(Message::RoundClosed(RoundIndex(1))));
        walk.feed(Input::Scanned(pages(0..60)));
        walk
    }),
    ("Spacing", || {
        let mut walk = at("Moving (stalled)");
        walk.feed_after(Duration::ZERO, placed(2));
        walk.feed_after(Duration::ZERO, Input::Message(Message::RoundClosed(RoundIndex(2))));
        walk
    }),
    ("DrainPausing", || {
        let mut walk = at("Spacing");
        walk.feed_after(Duration::from_secs(3), Input::Tick).feed(Input::Scanned(pages([1])));
        walk
    }),
    ("DrainScanning", || after("DrainPausing", Input::Paused)),
    ("DrainResuming", || after("DrainScanning", Input::Scanned(pages([2])))),
    ("Preparing", || {
        let mut walk = at("DrainResuming");
        walk.feed(Input::Resumed).round(3, pages([3]));
        walk
    }),
    ("Preparing (here)", || after("Preparing", Input::SwitchoverPrepared)),
    ("Preparing (there)", || after("Preparing", Input::Message(Message::Prepared))),
    ("Pausing", || after("Preparing (here)", Input::Message(Message::Prepared))),
    ("LastScanning", || after("Pausing", Input::Paused)),
    ("Moving (last)", || after("LastScanning", Input::Scanned(pages([4])))),
    ("Closing (last)", || after("Moving (last)", placed(4))),
    ("Verifying", || {
        after("Closing (last)", Input::Message(Message::RoundClosed(RoundIndex(4))))
    }),
    ("Verifying (here)", || after("Verifying", Input::Digested(digest(1)))),
    ("Saving", || after("Verifying (here)", Input::Message(message(MessageKind::DigestReport)))),
    ("Saving (sent)", || after("Saving", Input::DeviceStateSent)),
    ("Saving (ready)", || after("Saving", Input::Message(Message::Ready))),
    ("Deciding", || after("Saving (sent)", Input::Message(Message::Ready))),
    ("Committed", || after("Deciding", Input::Recorded)),
    ("Releasing", || after("Committed", Input::Message(message(MessageKind::Running)))),
    ("Retracting", || after("Deciding", Input::PeerLost(failure()))),
    ("Unwinding", || after("Moving", Input::Cancelled)),
    ("Unwinding (untouched)", || after("Opening", Input::Cancelled)),
    ("Done", || after("Releasing", Input::Released)),
];

fn attached() -> Input {
    Input::Attached { populated: pages(0..PAGES), fixed: Duration::from_millis(5) }
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
fn inputs(round: u32) -> Vec<(String, Duration, Input)> {
    let soon = Duration::from_millis(1);
    let mut inputs = Vec::new();
    for kind in InputKind::ALL {
        let input = match kind {
            InputKind::Message => {
                let named = |kind: &MessageKind| {
                    let message = match kind {
                        MessageKind::RoundClosed => Message::RoundClosed(RoundIndex(round)),
                        kind => message(*kind),
                    };
                    (format!("{kind:?}"), soon, Input::Message(message))
                };
                inputs.extend(MessageKind::OF_MACHINES.iter().map(named));
                continue;
            }
            InputKind::Tick => {
                inputs.push(("Tick".into(), soon, Input::Tick));
                ("Tick (an hour later)".into(), Duration::from_secs(3600), Input::Tick)
            }
            InputKind::Unwound => {
                inputs.push(input("Unwound (runs)", Input::Unwound { guest: Guest::Runs }));
                inputs.push(input("Unwound (gone)", Input::Unwound { guest: Guest::Absent }));
                input("Unwound (paused)", Input::Unwound { guest: Guest::Whole })
            }
            InputKind::Retracted => {
                inputs.push(input("Retracted", Input::Retracted { durable: true }));
                input("Retracted (not)", Input::Retracted { durable: false })
            }
            InputKind::LanesOpen => input("LanesOpen", Input::LanesOpen),
            InputKind::Attached => input("Attached", attached()),
            InputKind::Placed => input("Placed", placed(round)),
            InputKind::Scanned => input("Scanned", Input::Scanned(pages([5]))),
            InputKind::Paused => input("Paused", Input::Paused),
            InputKind::Resumed => input("Resumed", Input::Resumed),
            InputKind::SwitchoverPrepared => input("SwitchoverPrepared", Input::SwitchoverPrepared),
            InputKind::Digested => {
                inputs.push(input("Digested", Input::Digested(digest(1))));
                input("Digested (other)", Input::Digested(digest(2)))
            }
            InputKind::DeviceStateSent => input("DeviceStateSent", Input::DeviceStateSent),
            InputKind::Recorded => input("Recorded", Input::Recorded),
            InputKind::Released => input("Released", Input::Released),
            InputKind::Failed => input("Failed", Input::Failed(failure())),
            InputKind::PeerLost => input("PeerLost", Input::PeerLost(failure())),
            InputKind::Cancelled => input("Cancelled", Input::Cancelled),
        };
        inputs.push(input);
    }
    return inputs;

    fn input(name: &str, input: Input) -> (String, Duration, Input) {
        (name.into(), Duration::from_millis(1), input)
    }
}

fn round_of(situation: &str) -> u32 {
    match situation {
        "Moving (second)" => 1,
        "Moving (stalled)" => 2,
        "Moving (last)" | "Closing (last)" => 4,
        _ => 0,
    }
}

#[test]
fn every_situation_and_every_input() {
    let mut text = String::from(
        "# What the source makes of every input in every situation: the phase it comes to, and\n\
         # the commands it gives. `never`: the answer of a command that is not out.\n",
    );
    for (situation, _) in SITUATIONS {
        let mut results = Vec::new();
        for (name, wait, input) in inputs(round_of(situation)) {
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
    snapshot::assert_is("tests/transitions/source.snapshot", &text);
}

fn outcome_text(walk: &Walk) -> String {
    match walk.outcome() {
        None => String::new(),
        Some(Outcome::Migrated) => " (Migrated)".into(),
        Some(Outcome::Failed { kind, .. }) => format!(" ({kind:?})"),
    }
}

#[test]
fn the_peer_never_makes_the_source_panic_and_every_phase_was_looked_at() {
    for (situation, _) in SITUATIONS {
        for kind in MessageKind::OF_MACHINES {
            after(situation, Input::Message(message(*kind)));
        }
        for input in [Input::PeerLost(failure()), Input::Failed(failure()), Input::Cancelled] {
            after(situation, input);
        }
    }
    for phase in Phase::ALL {
        assert!(SITUATIONS.iter().any(|(_, build)| build().phase() == *phase), "{phase:?}");
    }
}

/// Every lane has placed its part of a round, none of it zero.
pub(crate) fn placed(round: u32) -> Input {
    Input::Placed { round: RoundIndex(round), zero_bytes: 0 }
}
