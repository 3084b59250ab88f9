//! A process of its own that looks after the guest if the source agent dies while it holds it.
//!
//! An agent that is killed takes its tracking with it, but a guest it had paused stays paused, and
//! QEMU's migration settings stay changed. So it starts a guard before it touches anything, tells
//! it through a pipe when it pauses the guest and lets it go on, and in the end that all is done.
//! When the pipe ends without that word, the guard ends QEMU's migration, sets the settings back and
//! lets the guest go on: unless the session's record says that it was handed over. Then nobody here
//! can know whose it is, and it stays paused.

use std::fs::File;
use std::io::{BufRead, Write, stdin};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use pageferry_datapath::source::Failure;
use serde::{Deserialize, Serialize};

use super::capabilities::Settings;
use super::{device_state, runstate};
use crate::agent::failure;
use crate::agent::record::{self, Decision};
use crate::limits::STATE_TIMEOUT;
use crate::qmp::Qmp;
use crate::report::exit::Exit;

const PAUSED: &str = "paused";
const RUNNING: &str = "running";
const DONE: &str = "done";

/// What a guard has to know, in its first line.
#[derive(Debug, Serialize, Deserialize)]
struct Charge {
    qmp: PathBuf,
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
    pub(super) fn start(qmp: &Qmp, record: &Path) -> Result<Self, Failure> {
        let settings = Settings::current(qmp)
            .map_err(|error| failure::host("QEMU's migration settings", &error, None))?;
        let charge = Charge { qmp: qmp.path().to_owned(), record: record.to_owned(), settings };
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
    let mut lines = stdin().lock().lines().map_while(Result::ok);
    let Some(charge) = lines.next().and_then(|line| serde_json::from_str(&line).ok()) else {
        return Exit::Refused;
    };
    let mut paused = false;
    for line in lines {
        match line.as_str() {
            PAUSED => paused = true,
            RUNNING => paused = false,
            DONE => return Exit::Done,
            _ => {}
        }
    }
    take_over(&charge, paused)
}

/// Lets the guest go on if it is this side's. What can't be done is said.
fn take_over(charge: &Charge, paused: bool) -> Exit {
    let Charge { qmp, record, settings } = charge;
    let by_hand = format!("connect to {} and look with `query-status`", qmp.display());
    match record::read(record).map(|record| record.decision) {
        Ok(Decision::Attempting | Decision::Aborted) => {}
        Ok(decision) => {
            eprintln!(
                "error: the source agent ended unexpectedly: its record says {decision:?}: the \
                 guest stays as it is here\nhint: if it does not run at the target and never \
                 will, {by_hand}, then `cont`; the record is {}",
                record.display()
            );
            return Exit::HandoverUncertain;
        }
        Err(error) => {
            eprintln!(
                "error: the source agent ended unexpectedly: {}: {error}: the guest stays as it \
                 is here\nhint: {by_hand}",
                record.display()
            );
            return Exit::HandoverUncertain;
        }
    }
    // What was read may be on its way to the disk yet: should this host lose its power once the guest
    // runs, nobody may find a record there that gives it away.
    if let Err(error) = File::open(record).and_then(|file| file.sync_all()) {
        eprintln!(
            "error: the source agent ended unexpectedly: {}: {error}: the guest stays as it is \
             here\nhint: {by_hand}, then `cont`",
            record.display()
        );
        return Exit::HandoverUncertain;
    }
    let settled = Qmp::connect(qmp).map_err(|error| error.to_string()).and_then(|qmp| {
        let cancelled = device_state::cancel(&qmp, Instant::now() + STATE_TIMEOUT);
        let restored = settings.restore_differing(&qmp);
        if paused {
            runstate::settle_and_cont(&qmp).map_err(|error| error.to_string())?;
        }
        cancelled.map_err(|error| error.to_string())?;
        restored.map_err(|error| error.to_string())
    });
    match settled {
        Ok(()) => {
            eprintln!("error: the source agent ended unexpectedly: the guest runs on here");
            let _a_leftover_is_harmless = std::fs::remove_file(record);
            Exit::RunningAtSource
        }
        Err(error) => {
            eprintln!("error: the source agent ended unexpectedly: {error}\nhint: {by_hand}");
            Exit::PausedAtSource
        }
    }
}
