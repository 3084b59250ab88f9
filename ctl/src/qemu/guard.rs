//! A process of its own that looks after the guest if the source agent dies while it holds it.
//!
//! An agent that is killed takes its tracking with it, but a guest it had paused stays paused,
//! QEMU's migration settings stay changed, and what it was just about to take out of QEMU stays in
//! there. So it starts a guard before it touches anything, tells it through a pipe when it has
//! attached, when it pauses the guest and lets it go on, and in the end that all is done. When the
//! pipe ends without that word, the guard ends QEMU's migration, sets the settings back, closes what
//! was left open in QEMU and lets the guest go on: unless the session's record says that it was handed over. Then nobody here
//! can know whose it is, and it stays paused.

use std::io::{BufRead, Write, stdin};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use caps::Capability;
use pageferry_datapath::attach::{self, Process};
use pageferry_datapath::control::Word;
use pageferry_datapath::recover::{self, Peer};
use pageferry_datapath::source::Failure;
use serde::{Deserialize, Serialize};

use super::capabilities::Settings;
use super::{device_state, runstate};
use crate::agent::failure;
use crate::agent::record::{Decision, Records};
use crate::agent::recovery;
use crate::limits::{RECOVER_TELL_MAX, STATE_TIMEOUT};
use crate::privileges;
use crate::qmp::Qmp;
use crate::report::exit::Exit;

const ATTACHED: &str = "attached";
const PAUSED: &str = "paused";
const RUNNING: &str = "running";
const DONE: &str = "done";

/// What a guard has to know, in its first line.
#[derive(Debug, Serialize, Deserialize)]
struct Charge {
    qmp: PathBuf,
    pid: i32,
    record: PathBuf,
    /// As they were before anything was touched.
    settings: Settings,
}

/// The agent's end; dropped, it tells the guard that all is done, but not in a panic.
#[derive(Debug)]
pub(super) struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts a guard for the QEMU behind `qmp`, of the session with this record.
    pub(super) fn start(qmp: &Qmp, pid: i32, record: &Path) -> Result<Self, Failure> {
        let settings = Settings::current(qmp)
            .map_err(|error| failure::host("QEMU's migration settings", &error, None))?;
        let (qmp, record) = (qmp.path().to_owned(), record.to_owned());
        let charge = Charge { qmp, pid, record, settings };
        let failed = |error: std::io::Error| failure::host("guard process", &error, None);
        let program = std::env::current_exe().map_err(failed)?;
        let mut command = Command::new(program);
        // A group of its own: what is typed at the agent's terminal is not for it.
        command.arg("guard").stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        let mut process = command.spawn().map_err(failed)?;
        let mut guard = Self { pipe: process.stdin.take(), process };
        let charge = serde_json::to_string(&charge).expect("a charge is plain data");
        guard.tell(&charge).map_err(failed)?;
        Ok(guard)
    }

    /// When nothing is left to take out of QEMU.
    pub(super) fn attached(&mut self) {
        if let Err(error) = self.tell(ATTACHED) {
            tracing::warn!(%error, "the guard is gone");
        }
    }

    /// Before the guest is paused.
    pub(super) fn paused(&mut self) -> Result<(), Failure> {
        self.tell(PAUSED).map_err(|error| failure::host("guard process", &error, None))
    }

    /// After it was let go on.
    pub(super) fn running(&mut self) {
        if let Err(error) = self.tell(RUNNING) {
            tracing::warn!(%error, "the guard is gone");
        }
    }

    fn tell(&mut self, line: &str) -> std::io::Result<()> {
        match &mut self.pipe {
            Some(pipe) => pipe.write_all(format!("{line}\n").as_bytes()),
            None => Ok(()),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _it_may_be_gone = self.tell(DONE);
        }
        self.pipe = None;
        let _it_was_ours = self.process.wait();
    }
}

/// The guard's process.
pub fn run() -> Exit {
    privileges::drop_on_this_thread(&[Capability::CAP_DAC_OVERRIDE, Capability::CAP_SYS_PTRACE]);
    let mut lines = stdin().lock().lines().map_while(Result::ok);
    let charge = lines.next().and_then(|line| serde_json::from_str::<Charge>(&line).ok());
    let Some(charge) = charge else {
        return Exit::Refused;
    };
    // Held from here on, so that the number can't come to mean another one.
    let mut attaching = Process::open(charge.pid).ok();
    let mut paused = false;
    for line in lines {
        match line.as_str() {
            ATTACHED => {
                attaching = None;
                privileges::drop_on_this_thread(&[Capability::CAP_DAC_OVERRIDE]);
            }
            PAUSED => paused = true,
            RUNNING => paused = false,
            DONE => return Exit::Done,
            _ => {}
        }
    }
    take_over(&charge, attaching.as_ref(), paused)
}

/// Lets the guest go on if it is this side's. What can't be done is said.
fn take_over(charge: &Charge, attaching: Option<&Process>, paused: bool) -> Exit {
    let Charge { qmp, pid: _, record, settings } = charge;
    let by_hand = format!("connect to {} and look with `query-status`", qmp.display());
    let mut records = match Records::inherit(record) {
        Ok(records) => records,
        Err(error) => {
            eprintln!(
                "error: the source agent ended unexpectedly: {}: the guest stays as it is here\n\
                 hint: {by_hand}",
                failure::chain("", &error)
            );
            return Exit::HandoverUncertain;
        }
    };
    let session = records.record().session;
    let dir = record.parent().unwrap_or(record).display();
    let recover = format!("pageferry recover {session} --state-dir {dir}");
    if !matches!(records.record().decision, Decision::Attempting | Decision::Aborted) {
        eprintln!(
            "error: the source agent ended unexpectedly: its record says {:?}: the guest stays as \
             it is here\nhint: {recover}",
            records.record().decision,
        );
        return Exit::HandoverUncertain;
    }
    // Before the guest goes on: should this host lose its power then, nobody may find a record here
    // that gives away what runs.
    if let Err(error) = records.write(Decision::Aborted) {
        eprintln!(
            "error: the source agent ended unexpectedly: {}: the guest stays as it is here\n\
             hint: when {dir} can be written to: {recover}",
            failure::chain("", &error)
        );
        return Exit::HandoverUncertain;
    }
    let settled = Qmp::connect(qmp).map_err(|error| error.to_string()).and_then(|qmp| {
        // QEMU's main thread has answered: what it was made to do before is done.
        let closed = attaching.map_or(Ok(0), attach::close_leftovers);
        let cancelled = device_state::cancel(&qmp, Instant::now() + STATE_TIMEOUT);
        let restored = settings.restore_differing(&qmp);
        if paused {
            runstate::settle_and_cont(&qmp).map_err(|error| error.to_string())?;
        }
        cancelled.map_err(|error| error.to_string())?;
        if let Err(error) = closed {
            tracing::warn!(%error, "what the agent left open in QEMU stays there, unused");
        }
        restored.map_err(|error| error.to_string())
    });
    match settled {
        Ok(()) => {
            eprintln!("error: the source agent ended unexpectedly: the guest runs on here");
            let until = Instant::now() + RECOVER_TELL_MAX;
            match recovery::ask(records.record(), Word::Aborted, until) {
                (Peer::Says(word), link) if recover::has_acted(word) => {
                    let forgot = records.remove().is_ok();
                    if let Some(link) = link.filter(|_| forgot) {
                        recovery::settle(&link, session);
                    }
                }
                // Should the target ask one day, or its operator.
                _ => {
                    eprintln!("hint: the target was not told; {recover} does it");
                }
            }
            Exit::RunningAtSource
        }
        Err(error) => {
            eprintln!(
                "error: the source agent ended unexpectedly: {error}\n\
                 hint: when nobody else is connected to {}: {recover}",
                qmp.display()
            );
            Exit::PausedAtSource
        }
    }
}
