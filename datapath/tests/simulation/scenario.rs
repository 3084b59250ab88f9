//! What one seed chooses: the guest's and the links' habits, and what goes wrong when.

use std::time::Duration;

use pageferry_datapath::control::MessageKind;
use pageferry_datapath::planner::{Goals, Stalled};
use pageferry_datapath::{source, target};

use crate::random::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// When something goes wrong: at a time, or when a machine comes to a phase.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trigger {
    At(Duration),
    /// Left out the first so many times it comes there.
    Source(source::Phase, u32),
    Target(target::Phase, u32),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// The operator of this side wants no more of it.
    Cancel(Side),
    /// The control connection breaks.
    Cut,
    LaneFails(usize),
    /// Nothing passes between the hosts for so long.
    Partition(Duration),
    AgentDies(Side),
    /// Agent, monitor and page cache are gone; the disk is left.
    HostDies(Side),
    /// The agent is told of a failure out of any command.
    Trouble(Side),
    /// The next command that can fail does.
    CommandFails(Side),
    /// The next command takes so long.
    CommandDrags(Side, Duration),
    /// So many writes and removals fail.
    DiskFails(Side, u32),
    /// The last notice of a placed round comes again.
    PlacedAgain(Side),
}

/// What the control connection does to what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Honest,
    /// Of this side's messages some are dropped, doubled, replaced or garbled.
    Hostile(Side),
}

/// A fault: when, how long after that, and what.
pub(crate) type Mishap = (Trigger, Duration, Fault);

#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) lanes: usize,
    pub(crate) goals: Goals,
    pub(crate) direct_io: bool,
    pub(crate) verify: bool,
    /// Answers of commands may come between other inputs; today's agents wait for each command.
    pub(crate) beside: bool,
    /// Messages go through their wire form, cut at any point.
    pub(crate) bytes: bool,
    pub(crate) peer: Peer,
    pub(crate) hostile_percent: u64,
    /// What messages, lanes and commands take, about.
    pub(crate) message_time: Duration,
    pub(crate) lane_time: Duration,
    pub(crate) command_time: Duration,
    /// What the source expects its fixed part of the pause to be.
    pub(crate) fixed: Duration,
    pub(crate) mishaps: Vec<Mishap>,
}

impl Scenario {
    pub(crate) fn of(random: &mut Random, hostile: bool) -> Self {
        let micros = Duration::from_micros;
        let hostile_side = random.pick(&[Side::Source, Side::Target]);
        let mut goals = Goals {
            downtime: random.pick(&[0, 1, 5, 50, 1000].map(Duration::from_millis)),
            rounds_max: random.below(6) as u32,
            stalled_rounds_max: 1 + random.below(3) as u32,
            stalled: random.pick(&[Stalled::Stop, Stalled::SwitchOver, Stalled::SwitchOver]),
            slowdown_percent_max: random.pick(&[1, 10, 100]),
        };
        // Rounds that get nowhere, and are over before the next scan may be.
        let hasty = random.chance(30);
        if hasty {
            goals.downtime = Duration::ZERO;
            goals.slowdown_percent_max = 1;
            goals.stalled_rounds_max = 5;
        }
        let mut scenario = Self {
            lanes: 1 + random.below(3),
            goals,
            direct_io: random.chance(40),
            verify: random.chance(40),
            beside: random.chance(50),
            bytes: hostile || random.chance(10),
            peer: if hostile { Peer::Hostile(hostile_side) } else { Peer::Honest },
            hostile_percent: random.pick(&[2, 5, 20]),
            message_time: micros(random.pick(&[20, 200, 2000, 50_000])),
            lane_time: micros(random.pick(&[5, 50, 500, 5000])),
            command_time: micros(random.pick(&[20, 500, 5000])),
            fixed: random.pick(&[Duration::ZERO, micros(500), micros(10_000)]),
            mishaps: Vec::new(),
        };
        if hasty {
            scenario.message_time = micros(20);
            scenario.lane_time = micros(70);
            scenario.lanes = 1;
            scenario.command_time = micros(20);
        }
        for _ in 0..random.pick(&[0, 1, 1, 1, 2, 2, 3, 4]) {
            let mut next = mishap(random);
            // What goes wrong together goes wrong in the most interesting ways.
            if let Some((trigger, ..)) = scenario.mishaps.last().filter(|_| random.chance(50)) {
                next.0 = *trigger;
            }
            scenario.mishaps.push(next);
        }
        scenario
    }
}

fn mishap(random: &mut Random) -> Mishap {
    let trigger = match random.below(10) {
        0..2 => Trigger::At(Duration::from_micros(10 << random.below(17))),
        2..7 => Trigger::Source(random.pick(source::Phase::ALL), random.pick(&[0, 0, 0, 1, 2])),
        _ => Trigger::Target(random.pick(target::Phase::ALL), 0),
    };
    let after = match random.below(10) {
        0..3 => Duration::ZERO,
        // Just when a wait is over.
        3 => Duration::from_secs(45) + random.up_to(Duration::from_millis(10)),
        4..7 => random.up_to(Duration::from_micros(100)),
        _ => random.up_to(Duration::from_millis(10)),
    };
    let side = random.pick(&[Side::Source, Side::Target]);
    let long = Duration::from_millis(1 << random.below(21));
    let fault = match random.below(14) {
        0 | 1 => Fault::Cancel(side),
        2 => Fault::Cut,
        3 => Fault::LaneFails(random.below(3)),
        4 | 5 => Fault::Partition(long),
        6 => Fault::AgentDies(side),
        7 => Fault::HostDies(side),
        8 => Fault::Trouble(side),
        9 | 10 => Fault::CommandFails(side),
        11 => Fault::CommandDrags(side, long),
        12 => Fault::DiskFails(side, 1 + random.below(3) as u32),
        _ => Fault::PlacedAgain(side),
    };
    (trigger, after, fault)
}

/// A kind that a hostile peer sends in place of what it should.
pub(crate) fn any_kind(random: &mut Random) -> MessageKind {
    random.pick(MessageKind::ALL)
}
