//! The rules at the end of a run: where the guest is, what was left, what the records say, and
//! that all of it was told as it is.

use pageferry_datapath::source::{FailureKind, Outcome as SourceOutcome};
use pageferry_datapath::target::Outcome as TargetOutcome;

use crate::check::Rule;
use crate::disk::Decision;
use crate::scenario::{Peer, Side};
use crate::world::World;

impl World {
    pub(crate) fn check_end(&mut self) {
        if self.source.desk.is_open() {
            let phase = self.source.machine.as_ref().map(|machine| machine.phase());
            self.break_rule(Rule::Ends, format!("the source waits for ever in {phase:?}"));
        }
        if self.target.desk.is_open() {
            let phase = self.target.machine.as_ref().map(|machine| machine.phase());
            self.break_rule(Rule::Ends, format!("the target waits for ever in {phase:?}"));
        }
        if self.scenario.peer != Peer::Hostile(Side::Target) {
            self.check_source_end();
        }
        if self.scenario.peer != Peer::Hostile(Side::Source) {
            self.check_target_end();
        }
        if !self.is_hostile() {
            self.check_whereabouts();
        }
    }

    fn check_source_end(&mut self) {
        let Some(outcome) = self.source.outcome().cloned() else { return };
        if !self.source.desk.alive || !self.guest.alive {
            return;
        }
        let (running, ran_there) = (self.guest.running, self.waiting.ran && !self.is_hostile());
        let kind = match &outcome {
            SourceOutcome::Migrated => None,
            SourceOutcome::Failed { kind, .. } => Some(*kind),
        };
        let as_told = match kind {
            None => !running && (self.waiting.ran || self.is_hostile()),
            Some(FailureKind::Refused) => running && !ran_there && !self.check.touched,
            Some(FailureKind::RunsAtSource) => running && !ran_there,
            Some(FailureKind::PausedAtSource) => {
                !running && !ran_there && self.source.resumed == Some(false)
            }
            Some(FailureKind::Gone) => false,
            Some(FailureKind::Uncertain) => !running,
        };
        if !as_told {
            self.break_rule(Rule::Told, format!("the source says {outcome:?}"));
        }
        let failed_here = matches!(kind, Some(kind) if kind != FailureKind::Uncertain);
        let record = self.disks[0].seen.filter(|_| running);
        if failed_here && !(self.guest.is_untouched() && !self.lanes.open && record.is_none()) {
            self.break_rule(Rule::LeftAsItWas, format!("left behind: record {record:?}"));
        }
    }

    fn check_target_end(&mut self) {
        let Some(outcome) = self.target.outcome().cloned() else { return };
        if !self.target.desk.alive || !self.waiting.alive {
            return;
        }
        let as_told = match &outcome {
            TargetOutcome::Runs => self.waiting.running,
            TargetOutcome::Failed(_) => !self.waiting.ran && !self.waiting.loaded,
            TargetOutcome::Uncertain(_) => !self.waiting.ran && self.waiting.loaded,
        };
        if !as_told {
            self.break_rule(Rule::Told, format!("the target says {outcome:?}"));
        }
        if !self.lanes.fenced {
            self.break_rule(Rule::Fenced, "the target's lanes are open after its end");
        }
    }

    /// Whose the guest is, by the records: the rule at the top of `source`.
    fn owner(&self) -> Side {
        let (source, target) = (self.disks[0].seen, self.disks[1].seen);
        let given = source == Some(Decision::HandedOver) && target != Some(Decision::Aborted);
        if given || target == Some(Decision::Running) { Side::Target } else { Side::Source }
    }

    /// The guest is where the records say, whole; and where it stands still, that was told, or the
    /// agent that could have told it is dead.
    fn check_whereabouts(&mut self) {
        let owner = self.owner();
        let records = (self.disks[0].seen, self.disks[1].seen);
        let say = |text: &str| format!("{text}; records {records:?}");
        // Both sides know how it ended, and keep nothing.
        let closed = records == (None, None);
        if self.waiting.ran && owner == Side::Source && !closed && !self.disks[1].failed {
            self.break_rule(Rule::OneOwner, say("it ran at the target, and is the source's"));
        }
        if self.guest.running && owner == Side::Target {
            self.break_rule(Rule::OneOwner, say("it runs at the source, and is the target's"));
        }
        if self.guest.running || self.waiting.ran {
            return;
        }
        let gone = match owner {
            Side::Source => !self.guest.alive,
            Side::Target => !self.waiting.alive,
        };
        if gone {
            return; // With its host.
        }
        if owner == Side::Target && !self.waiting.loaded {
            self.break_rule(Rule::OneOwner, say("it is the target's, and was dropped there"));
        }
        let told = match self.source.outcome() {
            _ if !self.source.desk.alive => true,
            Some(SourceOutcome::Failed { kind, .. }) => {
                matches!(kind, FailureKind::Uncertain | FailureKind::PausedAtSource)
            }
            _ => false,
        };
        if !told {
            self.break_rule(Rule::Told, say("it runs nowhere, and nobody said so"));
        }
    }
}
