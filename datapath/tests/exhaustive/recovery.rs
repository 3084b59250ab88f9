//! `pageferry recover`, guards that take over, and targets that are asked: the decisions that ship
//! (`datapath/src/recover.rs`), carried out in this world as `ctl/src/agent/recovery.rs` does.
//!
//! ```text
//!   source: look ── record ── ask ──────────────> answer: look ── steps ──┐ target: at its record,
//!                              │ <───────────── word of the record <──────┘ or its live session
//!                              └ or nobody answers, whether or not it was heard ── steps
//!   target: look ── steps                     (its operator asks; nothing is known of the source)
//! ```
//!
//! One process holds a side's record at a time. A question may be acted upon long after who asked it
//! has given up; its answer is then heard by nobody.

use std::collections::VecDeque;

use pageferry_datapath::control::{Abort, AbortReason, Message, Word};
use pageferry_datapath::recover::{self, End, Guest, Peer, Plan, Step};
use pageferry_datapath::target::Outcome;

use crate::flaws::Flaw;
use crate::rules::Rule;
use crate::world::{Decision, Side, World};

/// What a process at a side's record does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// The steps that are to be done.
    Steps,
    /// The source's question leaves.
    Asks,
    /// It waits for the answer.
    Waits,
}

/// Why it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    /// The operator's `recover`, which may have said that the other side is dead.
    Recovers { peer_is_dead: bool },
    /// The guard of a source agent: it only tells.
    Tells,
    /// The target's answer to a question.
    Answers,
}

/// A process at one side's record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Job {
    purpose: Purpose,
    stage: Stage,
    /// The guest as it was when this began.
    guest: Guest,
    steps: VecDeque<Step>,
    half: bool,
    /// The plan is made: what is asked now only tells.
    planned: bool,
    /// What it will say.
    end: Option<End>,
}

/// What is on its way between the two sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    /// The target has this question to answer.
    question: Option<Word>,
    /// Its session is on its way, and answers when it has ended.
    live: bool,
    /// The source has this answer to hear.
    answer: Option<Word>,
}

/// A step of one of these processes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Recovers {
    /// The operator starts `recover`.
    Starts(Side, bool),
    /// It makes its next step.
    Works(Side),
    /// The question arrives; or nobody hears it.
    Arrives,
    Lost,
    /// The target begins to act on the question, at its record; or its live session hears it, with
    /// what had come before or without it.
    Answers,
    AnswersLive(bool),
    /// The source hears the answer, or gives up waiting.
    Hears,
    GivesUp,
}

impl Asked {
    /// A question was heard, and its answer is not on its way yet.
    pub(crate) fn is_there(&self) -> bool {
        self.question.is_some()
    }

    /// A session that is on its way has heard it.
    pub(crate) fn live(&self) -> bool {
        self.live
    }
}

impl Job {
    fn new(purpose: Purpose, stage: Stage, guest: Guest, steps: impl Into<VecDeque<Step>>) -> Self {
        Self { purpose, stage, guest, steps: steps.into(), half: false, planned: false, end: None }
    }
}

fn decision(word: Word) -> Option<Decision> {
    match word {
        Word::None => None,
        Word::Attempting => Some(Decision::Attempting),
        Word::HandedOver => Some(Decision::HandedOver),
        Word::Ready => Some(Decision::Ready),
        Word::Running => Some(Decision::Running),
        Word::Aborted => Some(Decision::Aborted),
    }
}

impl World {
    /// What the record of a side says.
    pub(crate) fn word(&self, side: Side) -> Word {
        match self.disks[side as usize].seen {
            None => Word::None,
            Some(Decision::Attempting) => Word::Attempting,
            Some(Decision::HandedOver) => Word::HandedOver,
            Some(Decision::Ready) => Word::Ready,
            Some(Decision::Running) => Word::Running,
            Some(Decision::Aborted) => Word::Aborted,
        }
    }

    pub(crate) fn guest_of(&self, side: Side) -> Guest {
        let (alive, running, whole) = match side {
            Side::Source => (self.guest.alive, self.guest.running, true),
            Side::Target => (self.waiting.alive, self.waiting.running, self.waiting.loaded),
        };
        match (alive, running, whole) {
            (true, true, _) => Guest::Runs,
            (true, false, true) => Guest::Whole,
            _ => Guest::Absent,
        }
    }

    /// What an operator can know of a side: its host is lost; or there is no guest, and `recover` there
    /// knows nothing of the session or, at the target, says that it may have run it.
    fn surely_dead(&self, side: Side) -> bool {
        let knows = matches!(self.word(side), Word::Ready | Word::None);
        let gone = knows && self.guest_of(side) == Guest::Absent && !self.works(side);
        let asked = match side {
            Side::Target => self.word(Side::Source) != Word::None,
            Side::Source => self.word(Side::Source) == Word::None,
        };
        self.lost[side as usize] || (asked && gone)
    }

    /// Nobody else holds this side's record, and there is one.
    fn may_open(&self, side: Side) -> bool {
        let guarded = side == Side::Source && self.guard;
        let free = !self.works(side) && !guarded && self.jobs[side as usize].is_none();
        free && !self.lost[side as usize] && self.word(side) != Word::None
    }

    pub(crate) fn recoveries(&self, steps: &mut Vec<crate::world::Step>) {
        if self.setting.recovers == 0 {
            return;
        }
        let mut can = |step| steps.push(crate::world::Step::Recovers(step));
        for side in Side::BOTH {
            if self.recovers[side as usize] > 0 && self.may_open(side) {
                can(Recovers::Starts(side, false));
                if self.surely_dead(side.other()) || self.setting.false_word {
                    can(Recovers::Starts(side, true));
                }
            }
            match &self.jobs[side as usize] {
                Some(job) if job.stage == Stage::Steps => can(Recovers::Works(side)),
                Some(job) if job.stage == Stage::Asks => {
                    can(Recovers::Lost);
                    // Without a session there may be nobody who listens.
                    let there = self.works(Side::Target) || self.word(Side::Target) != Word::None;
                    if !self.lost[1] && there && self.asked == Asked::default() {
                        can(Recovers::Arrives);
                    }
                }
                Some(_) => {
                    can(Recovers::GivesUp);
                    if self.asked.answer.is_some() {
                        can(Recovers::Hears);
                    }
                }
                None => {}
            }
        }
        if self.asked.question.is_some() && !self.asked.live {
            match self.works(Side::Target) {
                true => {
                    can(Recovers::AnswersLive(true));
                    if !self.ways[1].queue.is_empty() {
                        can(Recovers::AnswersLive(false));
                    }
                }
                false if self.word(Side::Target) == Word::None || self.may_open(Side::Target) => {
                    can(Recovers::Answers);
                }
                false => {}
            }
        }
    }

    pub(crate) fn take_recovery(&mut self, step: Recovers) {
        match step {
            Recovers::Starts(side, peer_is_dead) => {
                self.recovers[side as usize] -= 1;
                self.start_recovery(side, peer_is_dead);
            }
            Recovers::Works(side) => self.recovery_works(side),
            Recovers::Arrives => {
                let word = self.told_word();
                if word == Word::HandedOver {
                    self.memory.commit_left = true;
                    if self.disks[0].durable != Some(Decision::HandedOver) {
                        self.break_rule(Rule::RecordFirst, "told before it is on record");
                    }
                }
                self.asked.question = Some(word);
                self.job(Side::Source).stage = Stage::Waits;
            }
            Recovers::Lost => self.answered(Peer::Unreachable),
            Recovers::GivesUp => {
                self.asked.answer = None;
                self.answered(Peer::Silent);
            }
            Recovers::Hears => {
                let word = self.asked.answer.take().expect("it was asked for");
                self.answered(Peer::Says(word));
            }
            Recovers::Answers => {
                let word = self.asked.question.expect("it was asked for");
                if self.word(Side::Target) == Word::None {
                    return self.reply(Word::None);
                }
                let guest = self.guest_of(Side::Target);
                let plan = self.plan_of_target(guest, Peer::Says(word));
                let job = Job::new(Purpose::Answers, Stage::Steps, guest, plan.steps);
                self.jobs[1] = Some(job);
                self.recovery_settles(Side::Target);
            }
            Recovers::AnswersLive(all) => self.answer_live(all),
        }
    }

    fn job(&mut self, side: Side) -> &mut Job {
        self.jobs[side as usize].as_mut().expect("it was asked for")
    }

    /// What the source's question says: a teller knows only one thing.
    fn told_word(&self) -> Word {
        match self.jobs[0].as_ref().expect("it asks").purpose {
            Purpose::Tells => Word::Aborted,
            _ => self.word(Side::Source),
        }
    }

    pub(crate) fn start_recovery(&mut self, side: Side, peer_is_dead: bool) {
        // Who opens a record makes it durable first.
        let disk = &mut self.disks[side as usize];
        disk.durable = disk.seen;
        self.memory.word |= peer_is_dead && side == Side::Source;
        let guest = self.guest_of(side);
        let purpose = Purpose::Recovers { peer_is_dead };
        let job = match side {
            Side::Source => {
                let (_, first) = recover::source_word(self.word(side), guest);
                let first = first.filter(|_| !self.has(Flaw::TellsUnrecorded));
                let steps: Vec<_> = first.into_iter().collect();
                Job::new(purpose, Stage::Steps, guest, steps)
            }
            Side::Target => {
                let peer = if peer_is_dead { Peer::Dead } else { Peer::Unreachable };
                let plan = self.plan_of_target(guest, peer);
                let mut job = Job::new(purpose, Stage::Steps, guest, plan.steps);
                (job.planned, job.end) = (true, Some(plan.end));
                job
            }
        };
        self.jobs[side as usize] = Some(job);
        self.recovery_settles(side);
    }

    /// The guard of an agent that died: `take_over` of `ctl/src/qemu/guard.rs`.
    pub(crate) fn guard_recovers(&mut self) {
        let disk = &mut self.disks[0];
        disk.durable = disk.seen;
        if !matches!(self.word(Side::Source), Word::Attempting | Word::Aborted) {
            return;
        }
        let guest = self.guest_of(Side::Source);
        let mut steps = vec![Step::Record(Word::Aborted)];
        if self.guarded {
            steps.push(Step::Run);
        }
        self.jobs[0] = Some(Job::new(Purpose::Tells, Stage::Steps, guest, steps));
    }

    fn plan_of_target(&self, guest: Guest, peer: Peer) -> Plan {
        let mut plan = recover::target(self.word(Side::Target), guest, peer);
        let undecided = plan.end == End::Unknown && guest == Guest::Whole;
        if self.has(Flaw::TakesLostForUnrun) && plan.end == End::Unknown && !undecided {
            plan.steps = vec![Step::Record(Word::Aborted)];
        }
        if self.has(Flaw::TargetRunsUntold) && undecided {
            plan.steps = vec![Step::Run, Step::Record(Word::Running)];
        }
        plan
    }

    fn plan_of_source(&self, guest: Guest, peer: Peer) -> Plan {
        let mut plan = recover::source(self.word(Side::Source), guest, peer);
        if self.has(Flaw::SourceRunsUntold) && plan.end == End::Unknown && guest == Guest::Whole {
            plan.steps = vec![Step::Record(Word::Aborted), Step::Run];
        }
        if self.has(Flaw::RunsBeforeRecording)
            && plan.steps.starts_with(&[Step::Record(Word::Aborted), Step::Run])
        {
            plan.steps.swap(0, 1);
        }
        if self.has(Flaw::ForgetsUntold) && plan.steps == [Step::Run] {
            plan.steps.push(Step::Forget);
        }
        plan
    }

    /// The source has an answer, or none.
    fn answered(&mut self, found: Peer) {
        let job = self.job(Side::Source);
        let (purpose, guest, planned) = (job.purpose, job.guest, job.planned);
        job.stage = Stage::Steps;
        match purpose {
            Purpose::Tells if matches!(found, Peer::Says(word) if recover::has_acted(word)) => {
                self.job(Side::Source).steps.push_back(Step::Forget);
            }
            Purpose::Recovers { peer_is_dead } if !planned => {
                let peer = if peer_is_dead { recover::believed_dead(found) } else { found };
                let plan = self.plan_of_source(guest, peer);
                let job = self.job(Side::Source);
                (job.steps, job.planned, job.end) = (plan.steps.into(), true, Some(plan.end));
            }
            _ => {}
        }
        self.recovery_settles(Side::Source);
    }

    fn recovery_works(&mut self, side: Side) {
        let at = side as usize;
        let step = *self.job(side).steps.front().expect("it was asked for");
        let alive = [self.guest.alive, self.waiting.alive][at];
        match step {
            Step::Record(word) if !self.job(side).half => {
                self.disks[at].seen = decision(word);
                self.job(side).half = true;
                return;
            }
            Step::Record(word) => self.disks[at].write(decision(word)),
            // Its monitor is gone meanwhile: nothing after it is done.
            Step::Run if !alive => self.job(side).steps.clear(),
            Step::Run if side == Side::Source && !self.guest.running => self.runs_at_source(),
            Step::Run if side == Side::Target && !self.waiting.running => {
                self.check_target_may_run();
                (self.waiting.running, self.waiting.ran) = (true, true);
            }
            Step::Run | Step::Release => {}
            Step::Tell => self.job(side).stage = Stage::Asks,
            // The folder is not made durable: what is removed may be back after a crash.
            Step::Forget => self.disks[at].seen = None,
        }
        let job = self.job(side);
        job.half = false;
        job.steps.pop_front();
        self.recovery_settles(side);
    }

    /// What follows when all steps are done.
    fn recovery_settles(&mut self, side: Side) {
        let recorded = self.disks[side as usize].seen.is_some();
        let job = self.job(side);
        if job.stage != Stage::Steps || !job.steps.is_empty() {
            return;
        }
        match (job.purpose, job.planned) {
            (Purpose::Recovers { .. }, false) => job.stage = Stage::Asks,
            // Only once: it is nobody's who would wait.
            (Purpose::Tells, false) if recorded => {
                (job.stage, job.planned) = (Stage::Asks, true);
            }
            (Purpose::Answers, _) => {
                self.jobs[side as usize] = None;
                self.reply(self.word(side));
            }
            _ => {
                self.ends[side as usize] = job.end;
                self.jobs[side as usize] = None;
            }
        }
    }

    /// To whoever waits for it.
    fn reply(&mut self, word: Word) {
        let waits = self.jobs[0].as_ref().is_some_and(|job| job.stage == Stage::Waits);
        self.asked = Asked { answer: Some(word).filter(|_| waits), ..Asked::default() };
    }

    /// A session that is on its way hears the source's word by the question, and then nothing more.
    fn answer_live(&mut self, all: bool) {
        self.asked.live = true;
        if self.target.told {
            return;
        }
        let word = self.asked.question.expect("it was asked for");
        let message = match word {
            Word::HandedOver => Message::Commit,
            _ => Message::Abort(Abort {
                reason: AbortReason::HostFailed,
                text: String::new(),
                hint: None,
            }),
        };
        let way = &mut self.ways[1];
        if !all {
            way.queue.clear();
        }
        way.queue.push_back(message);
        way.down = true;
        self.ways[0].down = true;
        self.target.told = true;
    }

    /// The target's session is over: whoever asked for it hears how.
    pub(crate) fn session_over(&mut self, outcome: Option<&Outcome>) {
        if !std::mem::take(&mut self.asked.live) {
            return;
        }
        self.reply(match outcome {
            Some(Outcome::Runs) => Word::Running,
            Some(Outcome::Failed(_)) => Word::Aborted,
            Some(Outcome::Uncertain(_)) | None => Word::Attempting,
        });
    }

    /// A process at this side's record is killed; with the host, the questions there are, too.
    pub(crate) fn recovery_dies(&mut self, side: Side) {
        let job = self.jobs[side as usize].take();
        let answering = job.is_some_and(|job| job.purpose == Purpose::Answers);
        if side == Side::Target && (answering || self.asked.live) {
            self.asked = Asked::default();
        }
        if side == Side::Source {
            // On its way to nobody.
            self.asked.answer = None;
        }
    }

    /// The documented way out of every state in which nothing happens any more: `recover` on both
    /// sides, with `--peer-is-dead` where that is so. It must lead to the one guest that is whole.
    pub(crate) fn check_way_out(&mut self) {
        let owner = self.owner();
        let whole = [self.guest_of(Side::Source), self.guest_of(Side::Target)];
        let gone = [self.surely_dead(Side::Source), self.surely_dead(Side::Target)];
        let mut after = self.clone();
        after.setting.recovers = 1;
        after.violation = None;
        let mut ends = [None; 2];
        for turn in 0..4 {
            let side = Side::BOTH[turn % 2];
            if after.may_open(side) {
                after.start_recovery(side, after.surely_dead(side.other()));
                after.finish_recoveries();
                ends[side as usize] = after.ends[side as usize];
            }
            after.check();
        }
        if let Some(violation) = after.violation.take() {
            self.break_rule(Rule::WayOut, format!("recovering: {violation:?}"));
        }
        let records = (self.disks[0].seen, self.disks[1].seen);
        // What has no guest and nobody to ask is forgotten by the operator's word: nothing runs by it.
        let forgets = after.guest_of(Side::Target) == Guest::Absent
            && after.word(Side::Source) == Word::None
            && ends[1] == Some(End::Unknown);
        if forgets {
            ends[1] = None;
        }
        if ends.contains(&Some(End::Unknown)) || ends.contains(&Some(End::RunsTwice)) {
            self.break_rule(Rule::WayOut, format!("no way out: {records:?}, {ends:?}"));
        }
        let runs = [after.guest_of(Side::Source), after.guest_of(Side::Target)];
        let survivor = match gone {
            [true, _] => Side::Target,
            [_, true] => Side::Source,
            _ => owner,
        };
        let at = survivor as usize;
        // The copy that is left is older than what ran on the side that is gone.
        let stale = match survivor {
            Side::Source => self.waiting.ran && !(gone[1] && self.word(Side::Source) != Word::None),
            // Or may be, for all that is known there: it was given back.
            Side::Target => {
                let given_back = self.word(Side::Target) == Word::Aborted;
                given_back || self.memory.went_on && !self.waiting.ran
            }
        };
        let there = whole[at] != Guest::Absent && !self.lost[at];
        if there && runs[at] != Guest::Runs && !stale {
            let text = format!("{whole:?} with {records:?} ends as {runs:?}, {ends:?}");
            self.break_rule(Rule::WayOut, text);
        }
        let agree = match ends {
            [Some(End::RunsHere), Some(there)] => there != End::RunsHere,
            [Some(End::TheOthers), Some(there)] => there != End::TheOthers,
            _ => true,
        };
        if !agree {
            self.break_rule(Rule::WayOut, format!("two answers: {ends:?}, {records:?}"));
        }
    }

    /// Until nothing is left to do, with every question answered.
    fn finish_recoveries(&mut self) {
        loop {
            let mut steps = Vec::new();
            self.recovers = [0, 0];
            self.recoveries(&mut steps);
            // Whoever has no record need not listen.
            let silent = !self.works(Side::Target) && self.word(Side::Target) == Word::None;
            let wanted = |step: &crate::world::Step| match step {
                crate::world::Step::Recovers(Recovers::GivesUp | Recovers::Lost) => 1,
                crate::world::Step::Recovers(Recovers::Answers) if silent => 0,
                crate::world::Step::Recovers(_) => 2,
                _ => unreachable!("only recoveries were asked for"),
            };
            let Some(step) = steps.into_iter().max_by_key(wanted) else { return };
            let crate::world::Step::Recovers(step) = step else { return };
            self.take_recovery(step);
        }
    }
}
