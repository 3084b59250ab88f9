//! Whether the guest runs, and the two commands that change it.
//!
//! `stop` answers when the virtual CPUs stand still and every block request has finished and was
//! flushed; before that a disk may still write into guest memory, although the event `STOP` has
//! been sent. So of `stop` the answer counts, never the event; of `cont` the event does.

use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::Execute;
use crate::limits::{FOREVER, QEMU_POLL, QEMU_SETTLE_TIMEOUT, QMP_COMMAND_TIMEOUT};
use crate::qmp::{Qmp, QmpError};

/// QEMU's run state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// QEMU's word for it, as `running`, `paused`, `inmigrate` or `postmigrate`.
    pub status: String,
    /// The virtual CPUs are running.
    pub running: bool,
}

impl RunState {
    /// Asks QEMU.
    pub fn query(qemu: &dyn Execute) -> Result<Self, QmpError> {
        let answer = qemu.execute("query-status", json!({}))?;
        Ok(Self {
            status: answer["status"].as_str().unwrap_or("unknown").into(),
            running: answer["running"].as_bool().unwrap_or(false),
        })
    }
}

/// A change of the run state that QEMU has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// When the virtual CPUs stopped or started, by this host's clock since the Unix epoch; `None`
    /// if they did not change.
    pub at: Option<Duration>,
    /// Time it took, as seen from here.
    pub took: Duration,
    began: Instant,
}

impl Changed {
    /// From the command until the virtual CPUs changed, by QEMU's clock; if that makes no sense
    /// (somebody set the clock), as seen from here.
    pub fn effective(&self) -> Duration {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let began = now.saturating_sub(self.began.elapsed());
        let effective = self.at.and_then(|at| at.checked_sub(began));
        effective.filter(|effective| *effective <= self.took).unwrap_or(self.took)
    }
}

/// Pauses the guest. When it returns nothing writes into guest memory any more. In a QEMU that
/// waits for a migration it only withholds the start that would otherwise follow the load.
pub fn stop(qmp: &Qmp) -> Result<Changed, QmpError> {
    qmp.forget_events("STOP")?;
    let began = Instant::now();
    qmp.execute("stop", json!({}))?;
    let took = began.elapsed();
    // Events are sent before the answer to the command that caused them.
    let at = match qmp.wait_event("STOP", began) {
        Ok(event) => Some(event.at),
        Err(QmpError::Timeout { .. }) => None,
        Err(error) => return Err(error),
    };
    Ok(Changed { at, took, began })
}

/// Lets the guest run, and returns as soon as it does: from then on its CPUs compete with QEMU's
/// answer, which was seen to come 20 ms later. QEMU refuses while a migration is being wound up:
/// see [`settle_and_cont`].
pub fn cont(qmp: &Qmp) -> Result<Changed, QmpError> {
    cont_by(qmp, Instant::now() + QMP_COMMAND_TIMEOUT)
}

/// As [`cont`], but waits as long as QEMU lives: when it fails the guest did not run, and won't.
/// QEMU writes the event to the socket before it starts the CPUs, so one that ends without it
/// never did. A `cont` that was given up could still be carried out later.
pub fn cont_for_certain(qmp: &Qmp) -> Result<Changed, QmpError> {
    cont_by(qmp, Instant::now() + FOREVER)
}

fn cont_by(qmp: &Qmp, deadline: Instant) -> Result<Changed, QmpError> {
    let began = Instant::now();
    // Sent when nothing is left that could keep the CPUs from starting.
    let event = qmp.execute_until_event("cont", json!({}), "RESUME", deadline)?;
    Ok(Changed { at: event.map(|event| event.at), took: began.elapsed(), began })
}

/// Lets the guest run again after a failed or cancelled migration, waiting for QEMU to wind that
/// up first. Does nothing if QEMU has started the guest by itself, as it does when it was QEMU
/// that had paused it.
pub fn settle_and_cont(qmp: &Qmp) -> Result<Duration, QmpError> {
    let began = Instant::now();
    loop {
        let state = RunState::query(qmp)?;
        if state.running {
            return Ok(began.elapsed());
        }
        match cont(qmp) {
            Ok(_) => return Ok(began.elapsed()),
            // "Migration is not finalized yet": its thread is still on its way out.
            Err(QmpError::Refused { .. })
                if state.status == "finish-migrate" && began.elapsed() < QEMU_SETTLE_TIMEOUT =>
            {
                std::thread::sleep(QEMU_POLL);
            }
            Err(error) => return Err(error),
        }
    }
}
