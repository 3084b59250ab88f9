//! The imagined world: a virtual clock, the events to come, and what is done at each.
//!
//! ```text
//!   source agent ── messages, in order ──> target agent        disk, disk
//!        │       <─────────────────────         │
//!      guest  ══ lanes: pages, barriers ══>  waiting monitor
//! ```
//!
//! Everything happens in one thread; between any two events the guest lives a little. Nothing here
//! judges: the rules are in `check`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use pageferry_datapath::control::AbortReason;
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::source::{Failure, Input as SourceInput};
use pageferry_datapath::target::Input as TargetInput;

use crate::check::{Check, Rule, Violation};
use crate::coverage::Coverage;
use crate::desk::Mail;
use crate::disk::{Decision, Disk};
use crate::flaws::Flaw;
use crate::guest::{Guest, Waiting};
use crate::lanes::Lanes;
use crate::random::Random;
use crate::scenario::{Fault, Scenario, Side, Trigger};
use crate::source::SourceAgent;
use crate::target::TargetAgent;
use crate::wire::Way;

/// Longer than any honest run's deadlines added up.
const TIME_MAX: Duration = Duration::from_secs(6 * 3600);
/// More than any run has needed, by far.
const STEPS_MAX: u32 = 100_000;
/// A host that says nothing is given up after this long, as the agents' sockets are set.
pub(crate) const DEAD_AFTER: Duration = Duration::from_secs(45);

#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    Fault(usize),
    /// The next message for this side arrives.
    Deliver(Side),
    /// This side notices that the control connection has ended.
    EndOfControl(Side),
    /// A command takes effect.
    Middle(Side, u64),
    /// A command is done.
    Finish(Side, u64),
    Digested(Side),
    /// The relay of the device state sends its next piece.
    Relay(u32),
    Pull(usize),
    Arrive(usize),
    Place(usize),
    Ack(usize, RoundIndex),
    LaneGone(Side),
    Tick(Side),
    /// An agent whose machine is done goes.
    Ended(Side),
}

struct Entry {
    at: Duration,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

pub(crate) struct World {
    pub(crate) now: Duration,
    pub(crate) random: Random,
    pub(crate) scenario: Scenario,
    pub(crate) flaw: Option<Flaw>,
    pub(crate) guest: Guest,
    pub(crate) waiting: Waiting,
    /// Of the source, of the target.
    pub(crate) disks: [Disk; 2],
    /// To the source, to the target.
    pub(crate) ways: [Way; 2],
    pub(crate) lanes: Lanes,
    pub(crate) source: SourceAgent,
    pub(crate) target: TargetAgent,
    pub(crate) check: Check,
    pub(crate) coverage: Coverage,
    pub(crate) violation: Option<Violation>,
    pub(crate) partition_until: Duration,
    events: BinaryHeap<Reverse<Entry>>,
    scheduled: u64,
    visits: Vec<(Trigger, u32)>,
    trace: bool,
}

/// How a run went.
pub(crate) struct Ran {
    pub(crate) violation: Option<Violation>,
    pub(crate) coverage: Coverage,
}

impl World {
    pub(crate) fn new(seed: u64, hostile: bool, flaw: Option<Flaw>, trace: bool) -> Self {
        let mut random = Random::new(seed);
        let scenario = Scenario::of(&mut random, hostile);
        let guest = Guest::new(&mut random, scenario.direct_io);
        let waiting = Waiting::new(&mut random);
        let visits = scenario.mishaps.iter().map(|(trigger, ..)| (*trigger, 0)).collect();
        if trace {
            eprintln!("seed {seed}: {scenario:#?}");
        }
        let mut disks: [Disk; 2] = Default::default();
        disks[0].write(Some(Decision::Attempting), &mut random);
        Self {
            now: Duration::ZERO,
            lanes: Lanes::new(scenario.lanes),
            guest,
            waiting,
            disks,
            ways: Default::default(),
            source: SourceAgent::default(),
            target: TargetAgent::default(),
            check: Check::default(),
            coverage: Coverage::default(),
            violation: None,
            partition_until: Duration::ZERO,
            events: BinaryHeap::new(),
            scheduled: 0,
            visits,
            trace,
            random,
            scenario,
            flaw,
        }
    }

    /// To the end, or to the first rule that is broken.
    pub(crate) fn run(mut self) -> Ran {
        for index in 0..self.scenario.mishaps.len() {
            if let (Trigger::At(at), ..) = self.scenario.mishaps[index] {
                self.schedule(at, Event::Fault(index));
            }
        }
        self.start_target();
        self.start_source();
        let mut steps = 0;
        while self.violation.is_none() {
            let Some(Reverse(Entry { at, event, .. })) = self.events.pop() else { break };
            steps += 1;
            if at > TIME_MAX || steps > STEPS_MAX {
                self.break_rule(Rule::Ends, format!("still at work after {at:?}, {steps} steps"));
                break;
            }
            self.now = at;
            self.guest.live(&mut self.random);
            self.step(event);
            self.check_step();
        }
        if self.violation.is_none() {
            self.check_end();
        }
        Ran { violation: self.violation, coverage: self.coverage }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Fault(index) => self.strike(self.scenario.mishaps[index].2),
            Event::Deliver(side) => self.deliver(side),
            Event::EndOfControl(side) => self.end_of_control(side),
            Event::Middle(Side::Source, number) => self.middle_of_source(number),
            Event::Middle(Side::Target, number) => self.middle_of_target(number),
            Event::Finish(Side::Source, number) => self.finish_of_source(number),
            Event::Finish(Side::Target, number) => self.finish_of_target(number),
            Event::Digested(Side::Source) => self.digested_at_source(),
            Event::Digested(Side::Target) => self.digested_at_target(),
            Event::Relay(piece) => self.relay(piece),
            Event::Pull(lane) => self.pull(lane),
            Event::Arrive(lane) => self.arrive(lane),
            Event::Place(lane) => self.place(lane),
            Event::Ack(lane, round) => self.ack(lane, round),
            Event::LaneGone(side) => self.post_failure(side, "a lane is gone"),
            Event::Ended(Side::Source) => self.source_ended(),
            Event::Ended(Side::Target) => self.target_ended(),
            Event::Tick(Side::Source) => self.tell_source(SourceInput::Tick),
            Event::Tick(Side::Target) => self.tell_target(TargetInput::Tick),
        }
    }

    pub(crate) fn schedule(&mut self, at: Duration, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse(Entry { at, number: self.scheduled, event }));
    }

    pub(crate) fn after(&mut self, time: Duration, event: Event) {
        self.schedule(self.now + time, event);
    }

    /// About `usual`, now and then much longer.
    pub(crate) fn about(&mut self, usual: Duration) -> Duration {
        let time = self.random.up_to(usual * 2);
        if self.random.chance(1) { time * 50 } else { time }
    }

    /// Nobody is woken on the dot.
    pub(crate) fn a_little_late(&mut self, at: Duration) -> Duration {
        let late = if self.random.chance(20) { Duration::from_millis(20) } else { Duration::ZERO };
        at.max(self.now) + self.random.up_to(late)
    }

    pub(crate) fn partitioned(&self) -> bool {
        self.now < self.partition_until
    }

    pub(crate) fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>14?} {}", self.now, text());
        }
    }

    pub(crate) fn break_rule(&mut self, rule: Rule, text: impl Into<String>) {
        let text = text.into();
        self.note(|| format!("BROKEN {rule:?}: {text}"));
        self.violation.get_or_insert(Violation { rule, text });
    }

    pub(crate) fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    /// A machine came to a phase: what was to happen there is on its way.
    pub(crate) fn reached(&mut self, is_it: impl Fn(Trigger) -> Option<u32>) {
        for index in 0..self.visits.len() {
            let (trigger, seen) = self.visits[index];
            let Some(skipped) = is_it(trigger) else { continue };
            self.visits[index].1 += 1;
            if seen == skipped {
                self.after(self.scenario.mishaps[index].1, Event::Fault(index));
            }
        }
    }

    fn strike(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        match fault {
            Fault::Cancel(Side::Source) => self.tell_source(SourceInput::Cancelled),
            Fault::Cancel(Side::Target) => self.tell_target(TargetInput::Cancelled),
            Fault::Cut => self.cut(self.scenario.message_time * 4),
            Fault::LaneFails(lane) => self.lane_fails(lane),
            Fault::Partition(time) => {
                self.partition_until = self.partition_until.max(self.now + time);
                if time > DEAD_AFTER {
                    self.cut(DEAD_AFTER);
                    (0..self.scenario.lanes).for_each(|lane| self.lane_fails(lane));
                }
            }
            Fault::AgentDies(side) => self.agent_dies(side, Duration::ZERO),
            Fault::HostDies(side) => self.host_dies(side),
            Fault::Trouble(side) => self.post_failure(side, "trouble"),
            Fault::CommandFails(Side::Source) => self.source.desk.fail_next = true,
            Fault::CommandFails(Side::Target) => self.target.desk.fail_next = true,
            Fault::CommandDrags(Side::Source, time) => self.source.desk.drag_next = time,
            Fault::CommandDrags(Side::Target, time) => self.target.desk.drag_next = time,
            Fault::DiskFails(side, times) => self.disks[side as usize].failing += times,
            Fault::PlacedAgain(Side::Source) => {
                if let Some(round) = self.source.last_placed {
                    self.tell_source(SourceInput::Placed { round, zero_bytes: 0 });
                }
            }
            Fault::PlacedAgain(Side::Target) => {
                if let Some(round) = self.target.last_placed {
                    self.tell_target(TargetInput::Placed(round));
                }
            }
        }
    }

    pub(crate) fn post_failure(&mut self, side: Side, text: &str) {
        match side {
            Side::Source => self.tell_source(SourceInput::Failed(failure(text))),
            Side::Target => self.tell_target(TargetInput::Failed(failure(text))),
        }
    }

    pub(crate) fn tell_source(&mut self, input: SourceInput) {
        self.source.desk.post(Mail::Input(input));
        self.pump_source();
    }

    pub(crate) fn tell_target(&mut self, input: TargetInput) {
        self.target.desk.post(Mail::Input(input));
        self.pump_target();
    }

    /// The process is gone; the kernel closes what it had open.
    fn agent_dies(&mut self, side: Side, noticed_after: Duration) {
        let dies = match side {
            Side::Source => self.source_dies(),
            Side::Target => self.target_dies(),
        };
        if dies {
            self.close_control(side, noticed_after, true);
            self.close_lanes(side, noticed_after);
        }
    }

    fn host_dies(&mut self, side: Side) {
        self.agent_dies(side, DEAD_AFTER);
        match side {
            Side::Source => (self.guest.alive, self.guest.running) = (false, false),
            Side::Target => {
                (self.waiting.alive, self.waiting.running) = (false, false);
                self.waiting.loaded = false;
            }
        }
        self.disks[side as usize].crash();
    }
}

pub(crate) fn failure(text: &str) -> Failure {
    Failure { reason: AbortReason::HostFailed, by_peer: false, text: text.into(), hint: None }
}
