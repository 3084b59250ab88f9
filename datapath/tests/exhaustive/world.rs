//! The world: who is where, what is on its way, and what can happen next.
//!
//! ```text
//!   source agent ── messages, in order ──> target agent        disk, disk
//!   guard  │     <─────────────────────         │
//!        guest  ══ lane: pages, barriers ══> waiting monitor
//! ```
//!
//! A step is as large as can be without anything of it being seen by others halfway: a command's
//! effect, an input and what the machine makes of it. Crashes fall between steps.

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use pageferry_datapath::control::{Message, Recover};
use pageferry_datapath::planner::{Goals, Stalled};
use pageferry_datapath::recover::End;
use pageferry_datapath::{source, target};

use crate::agent::Agent;
use crate::faults::Fault;
use crate::flaws::Flaw;
use crate::messages::{self, Pages, hash_message};
use crate::recovery::{Asked, Job, Recovers};
use crate::rules::{Rule, Violation};

pub(crate) const PAGES: usize = 2;
/// What the target's memory holds before: belongs to no guest.
pub(crate) const GARBAGE: u8 = 0xff;

pub(crate) type SourceAgent = Agent<source::Source, source::Command, source::Input>;
pub(crate) type TargetAgent = Agent<target::Target, target::Command, target::Input>;

/// What is searched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// Faults in one migration.
    pub(crate) faults: u8,
    /// Writes of the guest.
    pub(crate) writes: u8,
    /// The first scan does not lead to the switchover.
    pub(crate) rounds: bool,
    pub(crate) drain: bool,
    pub(crate) verify: bool,
    /// How often each side's operator may call `recover`; 0: what is said here of guards, too, is as
    /// simple as it was without.
    pub(crate) recovers: u8,
    /// Operators say that the other side is dead when it is not.
    pub(crate) false_word: bool,
    pub(crate) flaw: Option<Flaw>,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            faults: 0,
            writes: 2,
            rounds: false,
            drain: false,
            verify: false,
            recovers: 0,
            false_word: false,
            flaw: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Source,
    Target,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Source, Self::Target];

    pub(crate) fn other(self) -> Self {
        if self == Self::Source { Self::Target } else { Self::Source }
    }
}

/// Something that can happen.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// This agent makes a step of its next command, or comes to its end.
    Works(Side),
    /// The same, and what it sends on a connection that is gone seems to have been sent.
    WorksUnaware(Side),
    /// This agent takes the next message, or notices that there will be none.
    Hears(Side),
    /// This agent takes what its lane or a thread of its own has for it.
    Notices(Side),
    /// This agent has waited long enough.
    GivesUp(Side),
    LaneReads,
    LanePlaces,
    GuestWrites(usize),
    Guards,
    Recovers(Recovers),
    Fault(Fault),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Decision {
    Attempting,
    HandedOver,
    Ready,
    Running,
    Aborted,
}

/// The record of the session on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct Disk {
    /// What a reader finds while the host lives.
    pub(crate) seen: Option<Decision>,
    /// What it finds after the host crashed, or `seen`.
    pub(crate) durable: Option<Decision>,
    /// A write or removal has failed.
    pub(crate) failed: bool,
}

impl Disk {
    pub(crate) fn write(&mut self, decision: Option<Decision>) {
        (self.seen, self.durable) = (decision, decision);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Guest {
    pub(crate) alive: bool,
    pub(crate) running: bool,
    /// Content; 0 where it is a hole.
    pub(crate) pages: [u8; PAGES],
    pub(crate) armed: bool,
    /// Written since it was last protected.
    pub(crate) written: Pages,
    /// Written in all.
    pub(crate) writes: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Waiting {
    pub(crate) alive: bool,
    pub(crate) pages: [u8; PAGES],
    /// Device state given to it: of which moment, and how often.
    pub(crate) fed: Option<u8>,
    pub(crate) spoiled: bool,
    pub(crate) loaded: bool,
    pub(crate) running: bool,
    pub(crate) ran: bool,
}

/// One direction of the control connection.
#[derive(Clone, Default)]
pub(crate) struct Way {
    pub(crate) queue: VecDeque<Message>,
    /// Nothing more comes than what is in the queue.
    pub(crate) down: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Item {
    Page(usize, u8),
    Barrier(u32),
}

#[derive(Clone, Hash)]
pub(crate) struct Lane {
    pub(crate) open: bool,
    pub(crate) fenced: bool,
    pub(crate) round: u32,
    pub(crate) unread: Pages,
    pub(crate) barrier_due: bool,
    pub(crate) queue: VecDeque<Item>,
}

/// What has to be remembered to judge.
#[derive(Clone, Hash)]
pub(crate) struct Memory {
    pub(crate) touched: bool,
    pub(crate) commit_left: bool,
    /// What the last round announced had, when it was announced.
    pub(crate) announced: Option<(u32, Pages, [u8; PAGES])>,
    /// By the scan on its way.
    pub(crate) found: Pages,
    /// The guest ran at the source after it was loaded at the target: that copy is old.
    pub(crate) went_on: bool,
    /// The target's agent has loaded it, whatever became of its monitor since.
    pub(crate) loaded_once: bool,
    /// The source's operator has said that the target is dead, whatever ran there.
    pub(crate) word: bool,
    /// Of the source, of the target: the other side has said that it acted on the end.
    pub(crate) settled: [bool; 2],
}

#[derive(Clone)]
pub(crate) struct World {
    pub(crate) setting: Setting,
    pub(crate) faults: u8,
    pub(crate) source: SourceAgent,
    pub(crate) target: TargetAgent,
    /// The source agent died and its guard has not looked yet.
    pub(crate) guard: bool,
    /// The guest may be paused, as far as the guard was told.
    pub(crate) guarded: bool,
    pub(crate) guest: Guest,
    pub(crate) waiting: Waiting,
    /// Of the source, of the target.
    pub(crate) disks: [Disk; 2],
    /// To the source, to the target.
    pub(crate) ways: [Way; 2],
    pub(crate) lane: Lane,
    pub(crate) memory: Memory,
    /// Who is at the records, of agents that are gone.
    pub(crate) jobs: [Option<Job>; 2],
    pub(crate) asked: Asked,
    /// How often `recover` may be called yet.
    pub(crate) recovers: [u8; 2],
    /// Hosts that never come back.
    pub(crate) lost: [bool; 2],
    /// What the last `recover` has said.
    pub(crate) ends: [Option<End>; 2],
    pub(crate) violation: Option<Violation>,
}

impl World {
    pub(crate) fn new(setting: Setting) -> Self {
        let mut goals = Goals::default();
        if setting.rounds {
            goals.downtime = Duration::ZERO;
            goals.stalled = Stalled::SwitchOver;
        }
        let config = source::SourceConfig {
            hello: messages::hello(),
            offer: messages::offer(setting.verify),
            goals,
            drain: setting.drain,
        };
        let mut todo = Vec::new();
        let machine = source::Source::start(config, Duration::ZERO, &mut todo);
        let waiter = target::TargetConfig { welcome: messages::welcome() };
        let mut disks = [Disk::default(); 2];
        disks[0].write(Some(Decision::Attempting));
        Self {
            setting,
            faults: setting.faults,
            source: Agent::new(machine, todo),
            target: Agent::new(target::Target::start(waiter, Duration::ZERO), Vec::new()),
            guard: false,
            guarded: false,
            guest: Guest {
                alive: true,
                running: true,
                pages: [1, 0],
                armed: false,
                written: 0,
                writes: 0,
            },
            waiting: Waiting {
                alive: true,
                pages: [0, GARBAGE],
                fed: None,
                spoiled: false,
                loaded: false,
                running: false,
                ran: false,
            },
            disks,
            ways: Default::default(),
            lane: Lane {
                open: false,
                fenced: false,
                round: 0,
                unread: 0,
                barrier_due: false,
                queue: VecDeque::new(),
            },
            memory: Memory {
                touched: false,
                commit_left: false,
                announced: None,
                found: 0,
                went_on: false,
                loaded_once: false,
                word: false,
                settled: [false; 2],
            },
            jobs: [None, None],
            asked: Asked::default(),
            recovers: [setting.recovers; 2],
            lost: [false; 2],
            ends: [None; 2],
            violation: None,
        }
    }

    pub(crate) fn has(&self, flaw: Flaw) -> bool {
        self.setting.flaw == Some(flaw)
    }

    pub(crate) fn break_rule(&mut self, rule: Rule, text: impl Into<String>) {
        self.violation.get_or_insert(Violation { rule, text: text.into() });
    }

    pub(crate) fn works(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source.works(),
            Side::Target => self.target.works(),
        }
    }

    /// Everything that can happen now. When nothing can, time passes: those who wait for something
    /// until a time give up.
    pub(crate) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.agents(&mut steps);
        if self.lane.open && (self.lane.unread != 0 || self.lane.barrier_due) {
            steps.push(Step::LaneReads);
        }
        let takes = !self.lane.fenced || self.has(Flaw::FencesNothing);
        if takes && !self.lane.queue.is_empty() {
            steps.push(Step::LanePlaces);
        }
        if self.guard {
            steps.push(Step::Guards);
        }
        if self.guest.running && self.guest.writes < self.setting.writes && self.may_matter() {
            steps.extend((0..PAGES).map(Step::GuestWrites));
        }
        let waiting = steps.is_empty() || steps.iter().all(|it| matches!(it, Step::GuestWrites(_)));
        if waiting {
            steps.extend(self.who_gives_up().map(Step::GivesUp));
        }
        self.recoveries(&mut steps);
        if self.faults > 0 {
            self.faults_now(!waiting, &mut steps);
        }
        steps
    }

    /// The guest's writes are looked at only while an attempt is on: before tracking is armed and
    /// after it ended one more would only repeat everything with other numbers.
    fn may_matter(&self) -> bool {
        self.source.works() && self.source.machine.outcome().is_none() && self.guest.armed
    }

    fn agents(&self, steps: &mut Vec<Step>) {
        let done =
            [self.source.machine.outcome().is_some(), self.target.machine.outcome().is_some()];
        let has_todo = [!self.source.todo.is_empty(), !self.target.todo.is_empty()];
        let has_inbox = [!self.source.inbox.is_empty(), !self.target.inbox.is_empty()];
        let sends = [
            matches!(self.source.todo.front(), Some(source::Command::Send(_))),
            matches!(self.target.todo.front(), Some(target::Command::Send(_))),
        ];
        let told = [self.source.told, self.target.told];
        for side in Side::BOTH {
            let at = side as usize;
            if !self.works(side) {
                continue;
            }
            if has_todo[at] || done[at] {
                steps.push(Step::Works(side));
                if sends[at] && self.ways[side.other() as usize].down {
                    steps.push(Step::WorksUnaware(side));
                }
                continue;
            }
            let way = &self.ways[at];
            if !way.queue.is_empty() || (way.down && !told[at]) {
                steps.push(Step::Hears(side));
            }
            if has_inbox[at] {
                steps.push(Step::Notices(side));
            }
        }
    }

    /// Agents whose wait ends at some time.
    pub(crate) fn who_gives_up(&self) -> impl Iterator<Item = Side> {
        let waits = [
            self.source.waits() && self.source.machine.deadline().is_some(),
            self.target.waits() && self.target.machine.deadline().is_some(),
        ];
        Side::BOTH.into_iter().filter(move |side| waits[*side as usize])
    }

    pub(crate) fn take(&mut self, step: Step) {
        match step {
            Step::Works(Side::Source) => self.source_works(false),
            Step::Works(Side::Target) => self.target_works(false),
            Step::WorksUnaware(Side::Source) => self.source_works(true),
            Step::WorksUnaware(Side::Target) => self.target_works(true),
            Step::Hears(side) => self.hears(side),
            Step::Notices(Side::Source) => {
                let input = self.source.inbox.pop_front().expect("it was asked for");
                self.source_takes(input);
            }
            Step::Notices(Side::Target) => {
                let input = self.target.inbox.pop_front().expect("it was asked for");
                self.target_takes(input);
            }
            Step::GivesUp(Side::Source) => self.source_takes(source::Input::Tick),
            Step::GivesUp(Side::Target) => self.target_takes(target::Input::Tick),
            Step::LaneReads => self.lane_reads(),
            Step::LanePlaces => self.lane_places(),
            Step::GuestWrites(page) => self.guest_writes(page),
            Step::Guards => self.guard_acts(),
            Step::Recovers(step) => self.take_recovery(step),
            Step::Fault(fault) => self.strike(fault),
        }
        self.check();
    }

    fn hears(&mut self, side: Side) {
        let message = self.ways[side as usize].queue.pop_front();
        if let Some(Message::Recover(_)) = message {
            self.memory.settled[side as usize] = true; // The connection's own.
            return;
        }
        match (side, message) {
            (Side::Source, Some(message)) => self.source_takes(source::Input::Message(message)),
            (Side::Target, Some(message)) => self.target_takes(target::Input::Message(message)),
            (Side::Source, None) => {
                self.source.told = true;
                self.source_takes(source::Input::PeerLost(messages::failure()));
            }
            (Side::Target, None) => {
                self.target.told = true;
                self.target_takes(target::Input::PeerLost(messages::failure()));
            }
        }
    }

    /// Whether it could be sent, as far as the sender can tell.
    pub(crate) fn send(&mut self, from: Side, message: Message, unaware: bool) -> bool {
        let to = from.other();
        if self.ways[to as usize].down {
            return unaware;
        }
        if self.works(to) {
            self.ways[to as usize].queue.push_back(message);
        }
        true
    }

    /// This side will send nothing more, and hears nothing more.
    pub(crate) fn close(&mut self, side: Side) {
        self.ways[side.other() as usize].down = true;
        self.ways[side as usize].queue.clear();
        self.ways[side as usize].down = true;
    }

    /// This side has acted on the end, and says what its record says now.
    pub(crate) fn settle(&mut self, side: Side) {
        if self.setting.recovers > 0 {
            let (session, word) = (messages::hello().session, self.word(side));
            self.send(side, Message::Recover(Recover { session, word }), true);
        }
    }

    /// Whether this side was told so, as far as it has heard by now.
    pub(crate) fn was_settled(&self, side: Side) -> bool {
        let settles = |message: &Message| matches!(message, Message::Recover(_));
        self.memory.settled[side as usize] || self.ways[side as usize].queue.iter().any(settles)
    }

    fn guest_writes(&mut self, page: usize) {
        self.guest.writes += 1;
        self.guest.pages[page] = 1 + self.guest.writes;
        if self.guest.armed {
            self.guest.written |= 1 << page;
        }
    }

    /// What the guest's devices would say of this moment.
    pub(crate) fn device_state(&self) -> u8 {
        self.guest.writes
    }

    fn lane_reads(&mut self) {
        if self.lane.unread == 0 {
            self.lane.barrier_due = false;
            self.lane.queue.push_back(Item::Barrier(self.lane.round));
            if self.has(Flaw::AcksEarly) {
                self.acknowledge(self.lane.round);
            }
            return;
        }
        let page = self.lane.unread.trailing_zeros() as usize;
        self.lane.unread &= !(1 << page);
        self.lane.queue.push_back(Item::Page(page, self.guest.pages[page]));
    }

    fn lane_places(&mut self) {
        match self.lane.queue.pop_front().expect("it was asked for") {
            Item::Page(page, content) => {
                self.check_placement(page, content);
                self.waiting.pages[page] = content;
            }
            Item::Barrier(_) if self.has(Flaw::AcksEarly) => {}
            Item::Barrier(round) => self.acknowledge(round),
        }
    }

    fn acknowledge(&mut self, round: u32) {
        self.check_placed(round);
        let round = pageferry_datapath::ids::RoundIndex(round);
        self.target.tell(target::Input::Placed(round));
        if self.lane.open {
            self.source.tell(source::Input::Placed { round, zero_bytes: 0 });
        }
    }

    /// The source ends it, not in order.
    pub(crate) fn lane_is_reset(&mut self) {
        if self.lane.open {
            self.target.tell(target::Input::Failed(messages::failure()));
        }
        self.lane_closes();
    }

    /// The source's end is gone; what is on its way may still arrive.
    pub(crate) fn lane_closes(&mut self) {
        (self.lane.open, self.lane.unread, self.lane.barrier_due) = (false, 0, false);
    }

    /// The source's guard after the agent's death: `take_over` of `ctl/src/qemu/guard.rs`.
    fn guard_acts(&mut self) {
        self.guard = false;
        if self.setting.recovers > 0 {
            return self.guard_recovers();
        }
        let given = !matches!(self.disks[0].seen, Some(Decision::Attempting | Decision::Aborted));
        if given && !self.has(Flaw::GuardsBlindly) {
            return;
        }
        if !self.has(Flaw::GuardTrustsCache) {
            self.disks[0].durable = self.disks[0].seen;
        }
        if self.guarded && self.guest.alive && !self.guest.running {
            self.runs_at_source();
        }
        self.disks[0].seen = None;
    }

    pub(crate) fn runs_at_source(&mut self) {
        self.check_source_may_run();
        self.guest.running = true;
        self.memory.went_on |= self.waiting.loaded;
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        self.source.machine.hash_future(&mut hasher);
        self.target.machine.hash_future(&mut hasher);
        for command in &self.source.todo {
            std::mem::discriminant(command).hash(&mut hasher);
            match command {
                source::Command::Send(message) => hash_message(message, &mut hasher),
                source::Command::MoveRound { round, pages } => (round, pages).hash(&mut hasher),
                _ => {}
            }
        }
        for command in &self.target.todo {
            std::mem::discriminant(command).hash(&mut hasher);
            match command {
                target::Command::Send(message) => hash_message(message, &mut hasher),
                target::Command::BeginRound { round, pages } => (round, pages).hash(&mut hasher),
                target::Command::FeedDeviceState(bytes) => bytes.hash(&mut hasher),
                _ => {}
            }
        }
        for input in self.source.ready.iter().chain(&self.source.inbox) {
            input.kind().hash(&mut hasher);
            match input {
                source::Input::Placed { round, .. } => round.hash(&mut hasher),
                source::Input::Scanned(pages) => pages.hash(&mut hasher),
                source::Input::Digested(digest) => digest.hash(&mut hasher),
                _ => {}
            }
        }
        for input in self.target.ready.iter().chain(&self.target.inbox) {
            input.kind().hash(&mut hasher);
            match input {
                target::Input::Placed(round) => round.hash(&mut hasher),
                target::Input::Digested { digest, .. } => digest.hash(&mut hasher),
                _ => {}
            }
        }
        let desk = (self.source.process, self.source.half, self.source.told, self.source.fails);
        let other = (self.target.process, self.target.half, self.target.told, self.target.fails);
        let lens = (self.source.todo.len(), self.target.todo.len(), self.source.ready.len());
        let more = (self.target.ready.len(), self.source.inbox.len(), self.target.inbox.len());
        (desk, other, lens, more).hash(&mut hasher);
        for way in &self.ways {
            (way.down, way.queue.len()).hash(&mut hasher);
            way.queue.iter().for_each(|message| hash_message(message, &mut hasher));
        }
        (self.faults, self.guard, self.guarded, self.guest, self.waiting).hash(&mut hasher);
        (&self.disks, &self.lane, &self.memory).hash(&mut hasher);
        (&self.jobs, &self.asked, &self.recovers, &self.lost).hash(&mut hasher);
        hasher.finish()
    }
}
