//! What became of the guest after a fault: who runs, is its memory right, was the truth told, is
//! anything left behind. Where nobody runs, it does what the documentation says: `pageferry recover`
//! on either side, and, where a host is known to have lost the guest, `--peer-is-dead` on the other.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use pageferry_ctl::agent::record::{self, Decision, Record};
use pageferry_ctl::lab::console::{missing_ticks, ticks_across};
use pageferry_ctl::lab::{LabError, Qemu, left_behind};
use pageferry_ctl::qemu::capabilities::Settings;
use serde::Serialize;

use super::fault::Fault;
use super::moment::status;
use super::rig::Rig;
use super::trial::settings;
use crate::agents::{Agent, Ended};
use crate::scene::SOON;

/// Where a guest is after a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It runs at the source, and nobody had to do anything.
    Stayed,
    /// It runs at the target, and nobody had to do anything.
    Moved,
    /// It stood still, and runs at the source after `pageferry recover`.
    RecoveredAtSource,
    /// It stood still, and runs at the target after `pageferry recover`.
    RecoveredAtTarget,
    /// The other side's QEMU was killed; it runs at the source after `--peer-is-dead`.
    WordAtSource,
    /// The other side's QEMU was killed; it runs at the target after `--peer-is-dead`.
    WordAtTarget,
    /// The fault killed the QEMU that it was in, and no other may run it.
    Killed,
    /// It is lost, though no fault killed it.
    Lost,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 8] = [
        Self::Stayed,
        Self::Moved,
        Self::RecoveredAtSource,
        Self::RecoveredAtTarget,
        Self::WordAtSource,
        Self::WordAtTarget,
        Self::Killed,
        Self::Lost,
    ];

    /// One or two letters, for tables.
    pub fn letters(self) -> &'static str {
        match self {
            Self::Stayed => "S",
            Self::Moved => "T",
            Self::RecoveredAtSource => "rS",
            Self::RecoveredAtTarget => "rT",
            Self::WordAtSource => "wS",
            Self::WordAtTarget => "wT",
            Self::Killed => "x",
            Self::Lost => "LOST",
        }
    }

    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Stayed => "runs on at the source",
            Self::Moved => "runs at the target",
            Self::RecoveredAtSource => "paused; `recover` lets it run at the source",
            Self::RecoveredAtTarget => "paused; `recover` lets it run at the target",
            Self::WordAtSource => "paused; runs at the source by `--peer-is-dead`",
            Self::WordAtTarget => "paused; runs at the target by `--peer-is-dead`",
            Self::Killed => "its QEMU was killed by the fault, and it runs nowhere",
            Self::Lost => "lost",
        }
    }
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// Where the guest is.
    pub outcome: Outcome,
    /// A guest lost, run twice, or with wrong memory.
    pub losses: Vec<String>,
    /// Promises broken that did not cost the guest: something left behind, an untrue exit code.
    pub broken: Vec<String>,
    /// What an operator would see besides.
    pub notes: Vec<String>,
}

/// How the agents ended.
pub(super) struct Ends {
    pub(super) source: Ended,
    pub(super) target: Ended,
    pub(super) stuck: Vec<String>,
}

/// Everything that there is to see after a trial.
pub(super) struct Judge<'a> {
    pub(super) rig: &'a mut Rig,
    pub(super) waiting: Qemu,
    /// Migration settings of both QEMUs before it.
    pub(super) before: [Option<Settings>; 2],
    pub(super) fault: Fault,
    pub(super) ends: Ends,
}

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runs {
    Source,
    Target,
    Both,
    Nobody,
}

const KILLED: i32 = 128 + 9;

impl Judge<'_> {
    /// Recovers the guest if need be, checks all of it, and leaves the rig ready for the next.
    pub(super) fn verdict(mut self) -> Result<Verdict, LabError> {
        let mut verdict = Verdict {
            outcome: Outcome::Lost,
            losses: Vec::new(),
            broken: std::mem::take(&mut self.ends.stuck),
            notes: Vec::new(),
        };
        let before = self.runs();
        self.truth_told(before, &mut verdict);
        if before == Runs::Nobody {
            self.equal_where_both_are_paused(&mut verdict)?;
        }
        let recovered = self.recover(&mut verdict)?;
        let mut now = self.runs();
        let mut by_word = false;
        if now == Runs::Nobody {
            by_word = self.give_the_word(&mut verdict)?;
            now = self.runs();
        }
        self.forget_what_is_settled(&mut verdict)?;
        verdict.outcome = match (before, now) {
            (Runs::Source, Runs::Source) => Outcome::Stayed,
            (Runs::Target, Runs::Target) => Outcome::Moved,
            (Runs::Nobody, Runs::Source) if by_word => Outcome::WordAtSource,
            (Runs::Nobody, Runs::Target) if by_word => Outcome::WordAtTarget,
            (Runs::Nobody, Runs::Source) => Outcome::RecoveredAtSource,
            (Runs::Nobody, Runs::Target) => Outcome::RecoveredAtTarget,
            (Runs::Nobody, Runs::Nobody) if self.a_qemu_was_killed() => Outcome::Killed,
            _ => Outcome::Lost,
        };
        if verdict.outcome == Outcome::Lost {
            let qemus = [self.rig.scene.guest.ended(), self.waiting.ended()];
            verdict.losses.push(format!(
                "{before:?} ran it, then {now:?}; the QEMUs ended with {qemus:?}; {recovered:?}"
            ));
        }
        self.memory_is_right(now, &mut verdict);
        self.nothing_left(now, &mut verdict)?;
        self.go_on_from(now);
        Ok(verdict)
    }

    fn runs(&self) -> Runs {
        let runs = |qemu: &Qemu| status(qemu).is_some_and(|state| state.running);
        match (runs(&self.rig.scene.guest), runs(&self.waiting)) {
            (true, false) => Runs::Source,
            (false, true) => Runs::Target,
            (true, true) => Runs::Both,
            (false, false) => Runs::Nobody,
        }
    }

    fn a_qemu_was_killed(&self) -> bool {
        matches!(self.fault, Fault::KillSourceQemu | Fault::KillTargetQemu)
    }

    /// An agent that lived to say something has to have said what is so.
    fn truth_told(&self, runs: Runs, verdict: &mut Verdict) {
        let source_died = self.fault == Fault::KillSourceQemu;
        let target_died = self.fault == Fault::KillTargetQemu;
        let told = match self.ends.source.code {
            0 => runs == Runs::Target || target_died,
            1 | 3 => runs == Runs::Source || source_died,
            4 | 5 => runs != Runs::Source && !(source_died && self.ends.source.code == 5),
            6 => runs == Runs::Nobody && source_died,
            KILLED => true,
            _ => false,
        };
        if !told {
            verdict.broken.push(format!(
                "the source agent ended with {}, and {runs:?} runs it: {}",
                self.ends.source.code, self.ends.source.stderr
            ));
        }
        // One that nobody came to has nothing to say.
        let told_of = self.ends.target.event("running").is_some();
        let told = match self.ends.target.code {
            0 => runs == Runs::Target || target_died || !told_of,
            1 | 3 | 4 => runs != Runs::Target,
            KILLED => true,
            _ => false,
        };
        if !told {
            verdict.broken.push(format!(
                "the target agent ended with {}, and {runs:?} runs it: {}",
                self.ends.target.code, self.ends.target.stderr
            ));
        }
    }

    /// Two paused copies of one guest are the same, byte for byte.
    fn equal_where_both_are_paused(&self, verdict: &mut Verdict) -> Result<(), LabError> {
        let whole = |qemu: &Qemu| status(qemu).is_some_and(|state| state.status != "inmigrate");
        let files = (self.rig.scene.guest.memory_file(), self.waiting.memory_file());
        let (Some(here), Some(there)) = files else { return Ok(()) };
        if !(whole(&self.rig.scene.guest) && whole(&self.waiting)) {
            return Ok(());
        }
        match first_difference(here, there)? {
            Some(at) => verdict.losses.push(format!("the paused copies differ at {at:#x}")),
            None => verdict.notes.push("both paused copies were equal".into()),
        }
        Ok(())
    }

    /// What an operator does who finds records left: `pageferry recover`, on both sides.
    fn recover(&self, verdict: &mut Verdict) -> Result<Vec<(i32, String)>, LabError> {
        let records = |disk: &Path| !record::list(disk).is_empty();
        let here = records(self.rig.records_here().path());
        let there = records(self.rig.records_there().path());
        // Each waits for the other, if there can be one.
        let wait = if here && there { "6" } else { "1" };
        let start = |at_source, asked: bool| {
            asked.then(|| self.command(at_source, &["--wait", wait])).transpose()
        };
        let at_target = start(false, there)?;
        let at_source = start(true, here)?;
        let mut said = Vec::new();
        for (agent, side) in [(at_source, "source"), (at_target, "target")] {
            let Some(agent) = agent else { continue };
            let ended = agent.wait(SOON)?;
            let end = ended.events.last().map_or("?".into(), |event| event["end"].to_string());
            verdict.notes.push(format!("recover at the {side}: {} {end}", ended.code));
            said.push((ended.code, ended.stderr));
        }
        Ok(said)
    }

    /// The operator knows which QEMU was killed, and says so on the other side.
    fn give_the_word(&self, verdict: &mut Verdict) -> Result<bool, LabError> {
        let at_source = match self.fault {
            Fault::KillSourceQemu => false,
            Fault::KillTargetQemu => true,
            _ => return Ok(false),
        };
        let disk = if at_source { self.rig.records_here() } else { self.rig.records_there() };
        let records = record::list(disk.path());
        let Some((_, Record { session, .. })) = records.first() else { return Ok(false) };
        let word = [&session.to_string(), "--peer-is-dead", "--wait", "1"];
        let ended = self.command(at_source, &word)?.wait(SOON)?;
        let end = ended.events.last().map_or("?".into(), |event| event["end"].to_string());
        verdict.notes.push(format!("--peer-is-dead: {} {end}", ended.code));
        Ok(true)
    }

    /// What an operator does who finds a record on one side alone, which says what is so.
    fn forget_what_is_settled(&self, verdict: &mut Verdict) -> Result<(), LabError> {
        let disks = [self.rig.records_here(), self.rig.records_there()];
        let [here, there] = disks.map(|disk| record::list(disk.path()));
        for (at_source, found, other) in [(true, &here, &there), (false, &there, &here)] {
            let settled =
                |record: &Record| matches!(record.decision, Decision::Running | Decision::Aborted);
            let Some((path, record)) = found.first().filter(|_| other.is_empty()) else { continue };
            if !settled(record) {
                continue;
            }
            let word = [&record.session.to_string(), "--forget"];
            let ended = self.command(at_source, &word)?.wait(SOON)?;
            let (decision, role) = (record.decision, record.role);
            verdict.notes.push(format!("{decision:?} at the {role:?}: --forget: {}", ended.code));
            if path.exists() {
                verdict.broken.push(format!("--forget left {decision:?}: {}", ended.stderr));
            }
        }
        Ok(())
    }

    fn command(&self, at_source: bool, more: &[&str]) -> Result<Agent, LabError> {
        let scene = &self.rig.scene;
        let (host, disk, side) = match at_source {
            true => (scene.here(), self.rig.records_here(), "source"),
            false => (scene.there(), self.rig.records_there(), "target"),
        };
        let dir = disk.path().display().to_string();
        let args = [&["recover", "--json", "--state-dir", &dir], more].concat();
        let name = format!("recover-{side}-{}", self.rig.trials);
        Agent::start(&scene.workplace, Some(host), &name, &args)
    }

    /// The guest goes on from where it was, not from before; it finds all its memory as it left it.
    fn memory_is_right(&self, runs: Runs, verdict: &mut Verdict) {
        let (source, target) = (&self.rig.scene.guest, &self.waiting);
        let runs_it = match runs {
            Runs::Source => source,
            Runs::Target => target,
            Runs::Both | Runs::Nobody => return,
        };
        let console = runs_it.console();
        let checked = console.wait_tick(SOON).and_then(|_| console.verify(SOON));
        match checked {
            Ok(found) if found.bad == 0 && found.disk_bad == 0 && found.pages > 0 => {}
            Ok(found) => verdict.losses.push(format!("the guest found bad memory: {found:?}")),
            Err(error) => verdict.losses.push(format!("the guest does not go on: {error}")),
        }
        let bad = console.last_tick().is_none_or(|tick| tick.bad + tick.disk_bad > 0);
        if bad {
            verdict.losses.push(format!("the guest found bad memory: {:?}", console.last_tick()));
        }
        let ticks = match runs {
            Runs::Target => ticks_across(source.console(), target.console()),
            _ => source.console().ticks(),
        };
        let in_order = ticks.windows(2).all(|pair| pair[0].n < pair[1].n);
        if !in_order || missing_ticks(&ticks) > 0 {
            verdict.losses.push("the guest did not go on from where it was".into());
        }
        // A target that was killed may have run for a moment, and the operator's word was that it
        // does not matter.
        let other_ran = runs == Runs::Source && !target.console().ticks().is_empty();
        if other_ran && self.fault != Fault::KillTargetQemu {
            verdict.losses.push("it ran at the target, and runs at the source".into());
        }
    }

    /// Both QEMUs are as if nobody had ever tried, and no record is left of what is over.
    fn nothing_left(&self, runs: Runs, verdict: &mut Verdict) -> Result<(), LabError> {
        let sides = [(&self.rig.scene.guest, "source"), (&self.waiting, "target")];
        for ((qemu, side), before) in sides.into_iter().zip(&self.before) {
            if status(qemu).is_none() {
                continue;
            }
            let left = left_behind(qemu.pid())?;
            if !left.is_empty() {
                verdict.broken.push(format!("left in the {side}'s QEMU: {left:?}"));
            }
            let runs_here =
                matches!((runs, side), (Runs::Source, "source") | (Runs::Target, "target"));
            let now = settings(qemu)?;
            if runs_here && now != *before {
                let changed = changed(before.as_ref(), now.as_ref());
                verdict.broken.push(format!("the {side}'s QEMU has other settings: {changed}"));
            }
        }
        let disks = [(self.rig.records_here(), "source"), (self.rig.records_there(), "target")];
        for (disk, side) in disks {
            for (path, record) in record::list(disk.path()) {
                let text = format!("a record at the {side} says {:?}", record.decision);
                // Who has given the guest up, or kept it, keeps that in mind until the other asks.
                let settled = record.decision == Decision::Aborted || self.a_qemu_was_killed();
                if settled { &mut verdict.notes } else { &mut verdict.broken }.push(text);
                let _it_is_seen = std::fs::remove_file(path);
            }
        }
        Ok(())
    }

    fn go_on_from(self, runs: Runs) {
        match runs {
            Runs::Source => {}
            Runs::Target => self.rig.scene.moved_to(self.waiting),
            Runs::Both | Runs::Nobody => self.rig.guest_is_gone = true,
        }
    }
}

/// The settings that are not as they were, with what they are now.
fn changed(before: Option<&Settings>, now: Option<&Settings>) -> String {
    let before = format!("{before:?}");
    let now = format!("{now:?}");
    let known: Vec<_> = before.split("), ").collect();
    now.split("), ").filter(|one| !known.contains(one)).collect::<Vec<_>>().join(", ")
}

/// Where two files differ first.
fn first_difference(one: &Path, other: &Path) -> Result<Option<u64>, LabError> {
    const CHUNK_BYTES: usize = 1 << 20;
    let open = |path: &Path| File::open(path).map_err(|source| unread(path, source));
    let (mut ours, mut theirs) = (open(one)?, open(other)?);
    let (mut left, mut right) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at = 0;
    loop {
        let count = ours.read(&mut left).map_err(|source| unread(one, source))?;
        if count == 0 {
            return Ok(None);
        }
        theirs.read_exact(&mut right[..count]).map_err(|source| unread(other, source))?;
        if let Some(differs) = (0..count).find(|&byte| left[byte] != right[byte]) {
            return Ok(Some(at + differs as u64));
        }
        at += count as u64;
    }
}

fn unread(path: &Path, source: std::io::Error) -> LabError {
    LabError::Io { action: "read", path: path.to_owned(), source }
}
