//! One migration with one fault.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pageferry_ctl::agent::record;
use pageferry_ctl::lab::{LabError, Qemu, with_environment};
use pageferry_ctl::qemu::capabilities::Settings;
use pageferry_ctl::qmp::Qmp;
use serde::Serialize;

use super::fault::Fault;
use super::inject::{Stage, mend};
use super::judge::{Ends, Judge, Outcome, Verdict};
use super::moment::Moment;
use super::rig::Rig;
use crate::agents::{Agent, Ended, Manner};

/// Until an agent is in its phase, on a machine that does other work.
const REACH_MAX: Duration = Duration::from_secs(60);
/// Until everybody has ended: the longest wait of an agent is the source's for an answer to its
/// commit, 45 s.
const END_MAX: Duration = Duration::from_secs(100);
/// A target that has no record of a session by then has none.
const NEVER_CAME: Duration = Duration::from_secs(4);
/// In the environment of the agents of one trial, and of what they start.
const MARK: &str = "PAGEFERRY_TORTURE";

/// When a fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// In this phase, and so long after it was entered; agents that were held in it may have been
    /// let go just before.
    In {
        /// The phase.
        moment: Moment,
        /// After that.
        delay: Duration,
        /// The agent is let go before the fault comes, not after.
        let_go: bool,
    },
    /// So long after the source agent was started.
    After(Duration),
}

impl When {
    /// As soon as it is in this phase.
    pub fn at(moment: Moment) -> Self {
        Self::In { moment, delay: Duration::ZERO, let_go: false }
    }
}

/// What came of a fault.
#[derive(Debug, Serialize)]
pub struct Trial {
    /// What was done.
    pub fault: Fault,
    /// When.
    pub when: When,
    /// Whether it was: a migration may have ended before.
    pub injected: bool,
    /// How it ended.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Exit code of the source agent.
    pub source_code: i32,
    /// Exit code of the target agent.
    pub target_code: i32,
    /// In all.
    pub took: Duration,
    /// From the start of the source agent until both had ended.
    pub migration: Duration,
    /// What the agents complained of: the source's, and the target's.
    pub complaints: [String; 2],
}

impl Rig {
    /// Begins to move the guest to the other host, does `fault` to it, and looks what became of it.
    /// The guest is where it is then; if the fault killed it, the next trial boots another.
    pub fn trial(&mut self, fault: Fault, when: When) -> Result<Trial, LabError> {
        self.ensure_guest()?;
        self.trials += 1;
        let began = Instant::now();
        let waiting = self.waiting()?;
        let before = [settings(&self.scene.guest)?, settings(&waiting)?];
        let release = self.scene.workplace.file(&format!("go-{}", self.trials));
        let mark = release.display().to_string();
        let (mut source, mut target) = self.start(&waiting, fault, when, &mark)?;
        let started = Instant::now();

        let on_its_way = self.reach(when, &mut source, &mut target, &waiting, &release);
        let stage = Stage {
            rig: self,
            waiting: &waiting,
            source: &source,
            target: &target,
            mark: (MARK, &mark),
            release: &release,
        };
        let injected = on_its_way && stage.inject(fault)?;
        if !injected {
            stage.let_go();
        }
        let ends = self.wait_for_all(source, target, &mark)?;
        let migration = started.elapsed();
        mend(self, fault)?;
        let (source_code, target_code) = (ends.source.code, ends.target.code);
        let complaints = [&ends.source, &ends.target].map(|ended| ended.stderr.clone());
        let verdict = Judge { rig: self, waiting, before, fault, ends }.verdict()?;
        let took = began.elapsed();
        let _it_is_not_needed = std::fs::remove_file(release);
        Ok(Trial {
            fault,
            when,
            injected,
            verdict,
            source_code,
            target_code,
            took,
            migration,
            complaints,
        })
    }

    fn start(
        &self,
        waiting: &Qemu,
        fault: Fault,
        when: When,
        mark: &str,
    ) -> Result<(Agent, Agent), LabError> {
        let records =
            [self.records_here(), self.records_there()].map(|d| d.path().display().to_string());
        let patience = ["--reconnect-timeout", fault.reconnect_timeout_s()];
        // A middle round always, and one pause at the end, however slow this machine is.
        let source = ["--lanes", "3", "--verify", "--downtime-ms", "1", "--rounds-max", "2"];
        let source = [&source[..], &patience, &["--not-converging", "switch-over"]].concat();
        let source = [&source[..], &["--state-dir", &records[0]]].concat();
        let target = [&patience[..], &["--state-dir", &records[1]]].concat();
        let (here, there) = match when {
            When::In { moment, .. } => (moment.source_hold(mark), moment.target_hold(mark)),
            When::After(_) => (String::new(), String::new()),
        };
        let without = ["setpriv", "--inh-caps=-ipc_lock", "--bounding-set=-ipc_lock"];
        let under: &[&str] = if fault == Fault::SmallMemlock { &without } else { &[] };
        let manner = |hold| Manner { hold, under, mark: Some((MARK, mark)) };
        self.scene.agents_in(waiting, (&source, manner(&here)), (&target, manner(&there)))
    }

    /// Waits until the fault is due; `false` if the migration is over by then.
    fn reach(
        &self,
        when: When,
        source: &mut Agent,
        target: &mut Agent,
        waiting: &Qemu,
        release: &Path,
    ) -> bool {
        match when {
            When::In { moment, delay, let_go } => {
                let records: PathBuf = self.records_here().path().into();
                if !moment.wait(source, target, waiting, &records, REACH_MAX) {
                    return false;
                }
                if let_go {
                    let _it_goes_on_by_itself_in_the_end = std::fs::write(release, []);
                }
                sleep(delay);
                true
            }
            When::After(delay) => {
                sleep(delay);
                !source.has_ended()
            }
        }
    }

    /// Waits for both agents and whatever they started.
    fn wait_for_all(&self, source: Agent, target: Agent, mark: &str) -> Result<Ends, LabError> {
        let until = Instant::now() + END_MAX;
        let mut stuck = Vec::new();
        let (mut source, mut target) = (source, target);
        let mut source_ended = None;
        while !(source.has_ended() && target.has_ended()) && Instant::now() < until {
            if source.has_ended() {
                let ended = source_ended.get_or_insert_with(Instant::now).elapsed();
                // A target whose source never came waits for ever, and so it should.
                if ended > NEVER_CAME && record::list(self.records_there().path()).is_empty() {
                    target.signal(Signal::SIGINT);
                }
            }
            sleep(Duration::from_millis(5));
        }
        let mut end = |agent: Agent, name: &str| -> Result<Ended, LabError> {
            let mut agent = agent;
            if !agent.has_ended() {
                stuck.push(format!("the {name} agent has not ended"));
                agent.signal(Signal::SIGKILL);
            }
            agent.wait(END_MAX)
        };
        let (source, target) = (end(source, "source")?, end(target, "target")?);
        while !with_environment(MARK, mark).is_empty() && Instant::now() < until {
            sleep(Duration::from_millis(5));
        }
        for pid in with_environment(MARK, mark) {
            stuck.push(format!("process {pid} of an agent is left"));
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            let _it_may_be_gone = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
        Ok(Ends { source, target, stuck })
    }
}

impl Trial {
    /// Whether anything was not as promised.
    pub fn is_sound(&self) -> bool {
        self.verdict.losses.is_empty() && self.verdict.broken.is_empty()
    }

    /// Whether the guest was lost to a fault that had to kill it.
    pub fn killed(&self) -> bool {
        self.verdict.outcome == Outcome::Killed
    }
}

pub(super) fn settings(qemu: &Qemu) -> Result<Option<Settings>, LabError> {
    Ok(Qmp::connect(qemu.spare_qmp()).ok().and_then(|qmp| Settings::current(&qmp).ok()))
}
