//! Whether the guest runs, and the two commands that change it.
//!
//! `stop` answers when the virtual CPUs stand still and every block request has finished and was
//! flushed; before that a disk may still write into guest memory, although the event `STOP` has
//! been sent. So the answer counts, never the event.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Execute;
use crate::limits::{QEMU_POLL, QEMU_SETTLE_TIMEOUT};
use crate::qmp::QmpError;

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

/// Pauses the guest and returns how long QEMU took. When it returns nothing writes into guest
/// memory any more. In a QEMU that waits for a migration it only withholds the start that would
/// otherwise follow the load.
pub fn stop(qemu: &dyn Execute) -> Result<Duration, QmpError> {
    let began = Instant::now();
    qemu.execute("stop", json!({}))?;
    Ok(began.elapsed())
}

/// Lets the guest run and returns how long QEMU took. QEMU refuses while a migration is being
/// wound up: see [`settle_and_cont`].
pub fn cont(qemu: &dyn Execute) -> Result<Duration, QmpError> {
    let began = Instant::now();
    qemu.execute("cont", json!({}))?;
    Ok(began.elapsed())
}

/// Lets the guest run again after a failed or cancelled migration, waiting for QEMU to wind that
/// up first. Does nothing if QEMU has started the guest by itself, as it does when it was QEMU
/// that had paused it.
pub fn settle_and_cont(qemu: &dyn Execute) -> Result<Duration, QmpError> {
    let began = Instant::now();
    loop {
        let state = RunState::query(qemu)?;
        if state.running {
            return Ok(began.elapsed());
        }
        match cont(qemu) {
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
