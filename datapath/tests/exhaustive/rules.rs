//! What no order of events may break: looked at after every step, and at every end.

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::Message;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::source::{FailureKind, Outcome as SourceOutcome};
use pageferry_datapath::target::Outcome as TargetOutcome;

use crate::messages::pages_of;
use crate::world::{Decision, GARBAGE, PAGES, Side, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// An older copy never overwrites a newer one.
    LaterWins,
    /// A round is called placed when its bytes are in the target's memory.
    Placed,
    /// What the target does not call stale is no garbage.
    Stale,
    /// What is loaded and what runs is what the guest had when it was paused, to the byte.
    Same,
    /// The decision is on disk before the commit leaves.
    RecordFirst,
    /// The guest never runs on both sides, and the records say whose it is.
    OneOwner,
    /// Nothing is written into the target's memory once it was given up or handed to the guest.
    Fenced,
    /// What an agent says at its end is what happened.
    Told,
    /// A failed attempt leaves the source as it was.
    LeftAsItWas,
    /// Every migration ends: with the guest running on one side, or paused and whole on the side
    /// that the records name.
    Ends,
    /// What is left after the worst is got out of by `recover`, with the same answer on both sides.
    WayOut,
}

#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) rule: Rule,
    /// For who reads the test's output.
    #[allow(dead_code)]
    pub(crate) text: String,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Migrated,
    AtSource,
    /// It runs nowhere; it is whole where the records say it belongs.
    Recoverable,
    /// It went with its host or its monitor.
    Gone,
}

impl World {
    /// After every step.
    pub(crate) fn check(&mut self) {
        if self.guest.running && self.waiting.running {
            self.break_rule(Rule::OneOwner, "the guest runs on both sides");
        }
        let fresh = self.target.machine.stale().and_then(|stale| self.garbage_called_fresh(stale));
        if let Some(page) = fresh.filter(|_| self.target.works()) {
            self.break_rule(Rule::Stale, format!("page {page} is garbage, and not called stale"));
        }
    }

    fn garbage_called_fresh(&self, stale: &DirtySet) -> Option<usize> {
        let bitmap = stale.get(RegionIndex(0))?;
        (0..PAGES)
            .find(|page| !bitmap.contains(*page as u64) && self.waiting.pages[*page] == GARBAGE)
    }

    pub(crate) fn check_placement(&mut self, page: usize, content: u8) {
        let there = self.waiting.pages[page];
        if there != GARBAGE && there > content {
            self.break_rule(Rule::LaterWins, format!("page {page}: {content} over {there}"));
        }
        if self.lane.fenced || self.waiting.ran || self.waiting.loaded {
            self.break_rule(Rule::Fenced, format!("page {page} was written after the end"));
        }
    }

    pub(crate) fn check_placed(&mut self, round: u32) {
        let Some((announced, pages, contents)) = self.memory.announced else { return };
        let missing = (0..PAGES).find(|page| {
            let there = self.waiting.pages[*page];
            pages >> page & 1 == 1 && (there == GARBAGE || there < contents[*page])
        });
        if let Some(page) = missing.filter(|_| announced == round) {
            self.break_rule(Rule::Placed, format!("page {page} of round {round} is not there"));
        }
    }

    /// Rules about what the source says.
    pub(crate) fn check_source_sends(&mut self, message: &Message) {
        match message {
            Message::RoundStart(start) => {
                let shape = [(PAGES as u64, 4096)];
                let pages = DirtySet::decode(&start.bitmap, shape).expect("what it encoded");
                let announced = (start.round.0, pages_of(&pages), self.guest.pages);
                self.memory.announced = Some(announced);
            }
            Message::Commit => {
                self.memory.commit_left = true;
                if self.disks[0].durable != Some(Decision::HandedOver) {
                    self.break_rule(Rule::RecordFirst, "the commit left before its record");
                }
            }
            _ => {}
        }
    }

    /// Loading is the moment when every byte must be there. Of an attempt that was given up
    /// meanwhile, what is loaded is worth nothing and never runs.
    pub(crate) fn check_loading(&mut self) {
        if self.guest.running || !self.guest.alive || !self.source.works() {
            return;
        }
        if self.waiting.pages != self.guest.pages {
            self.break_rule(Rule::Same, "loaded with other memory");
        }
        if self.waiting.fed != Some(self.device_state()) {
            self.break_rule(Rule::Same, "loaded the state of another moment");
        }
    }

    pub(crate) fn check_source_may_run(&mut self) {
        let disk = &self.disks[0];
        let given = Some(Decision::HandedOver);
        if disk.seen == given || (disk.durable == given && !disk.failed) {
            self.break_rule(Rule::OneOwner, "runs at the source with a record that gave it away");
        }
        if self.waiting.ran && !self.memory.word {
            self.break_rule(Rule::OneOwner, "runs at the source after it ran at the target");
        }
    }

    pub(crate) fn check_target_may_run(&mut self) {
        // Where the source is gone for good, its operator's word stands for the commit.
        let word = self.lost[0] || self.setting.false_word;
        if self.memory.went_on && !word {
            self.break_rule(Rule::OneOwner, "an old copy runs at the target");
        }
        if !self.memory.commit_left && !word {
            self.break_rule(Rule::OneOwner, "runs at the target without a commit");
        }
        if self.guest.running {
            self.break_rule(Rule::OneOwner, "runs at the target while it runs at the source");
        }
        let same = self.waiting.pages == self.guest.pages || word;
        if !self.waiting.loaded || !same {
            self.break_rule(Rule::Same, "runs at the target with other memory, or not loaded");
        }
    }

    pub(crate) fn check_source_end(&mut self) {
        if !self.guest.alive {
            return;
        }
        let Some(outcome) = self.source.machine.outcome().cloned() else { return };
        let (running, ran) = (self.guest.running, self.waiting.ran);
        let as_told = match &outcome {
            SourceOutcome::Migrated => !running && ran,
            SourceOutcome::Failed { kind, .. } => match kind {
                FailureKind::Refused => running && !ran && !self.memory.touched,
                FailureKind::RunsAtSource => running && !ran,
                FailureKind::PausedAtSource => !running && !ran,
                FailureKind::Gone => false,
                FailureKind::Uncertain => !running,
            },
        };
        if !as_told {
            self.break_rule(Rule::Told, format!("the source says {outcome:?}"));
        }
        let record = self.disks[0].seen.is_some() && self.setting.recovers == 0;
        let left = self.guest.armed || self.lane.open || record;
        if running && left {
            self.break_rule(Rule::LeftAsItWas, "something of the attempt is left");
        }
    }

    pub(crate) fn check_target_end(&mut self) {
        if !self.waiting.alive {
            return;
        }
        let Some(outcome) = self.target.machine.outcome().cloned() else { return };
        let as_told = match &outcome {
            TargetOutcome::Runs => self.waiting.running,
            TargetOutcome::Failed(_) => !self.waiting.ran && !self.waiting.loaded,
            TargetOutcome::Uncertain(_) => !self.waiting.ran && self.waiting.loaded,
        };
        if !as_told {
            self.break_rule(Rule::Told, format!("the target says {outcome:?}"));
        }
    }

    /// Nothing can happen any more.
    pub(crate) fn check_end(&mut self) -> End {
        if self.source.works() || self.target.works() {
            let phases = (self.source.machine.phase(), self.target.machine.phase());
            self.break_rule(Rule::Ends, format!("they wait for ever in {phases:?}"));
        }
        let owner = self.owner();
        let records = (self.disks[0].seen, self.disks[1].seen);
        if self.setting.recovers > 0 {
            self.check_way_out();
            return self.end_of(owner);
        }
        let closed = records == (None, None);
        if self.waiting.ran && owner == Side::Source && !closed && !self.disks[1].failed {
            self.break_rule(Rule::OneOwner, format!("it ran at the target; {records:?}"));
        }
        if self.guest.running && owner == Side::Target {
            self.break_rule(Rule::OneOwner, format!("it runs at the source; {records:?}"));
        }
        let end = self.end_of(owner);
        let there = end == End::Recoverable;
        if there && owner == Side::Target && !self.waiting.loaded {
            self.break_rule(Rule::OneOwner, format!("dropped where it belongs; {records:?}"));
        }
        if there && owner == Side::Target && self.waiting.pages != self.guest.pages {
            self.break_rule(Rule::Same, "what could be recovered is not the guest");
        }
        end
    }

    fn end_of(&self, owner: Side) -> End {
        if self.waiting.ran {
            return if self.waiting.alive { End::Migrated } else { End::Gone };
        }
        if self.guest.running {
            return End::AtSource;
        }
        let there = match owner {
            Side::Source => self.guest.alive,
            Side::Target => self.waiting.alive,
        };
        if there { End::Recoverable } else { End::Gone }
    }

    /// Whose the guest is, by the records: the rule at the top of `source`.
    pub(crate) fn owner(&self) -> Side {
        if self.setting.recovers > 0 {
            // Records are removed when both sides know: it is where it ran last.
            match (self.waiting.ran && !self.memory.word, self.memory.went_on) {
                (true, _) => return Side::Target,
                (_, true) => return Side::Source,
                _ => {}
            }
        }
        let (source, target) = (self.disks[0].seen, self.disks[1].seen);
        let given = source == Some(Decision::HandedOver) && target != Some(Decision::Aborted);
        if given || target == Some(Decision::Running) { Side::Target } else { Side::Source }
    }
}
