//! QEMU's own migration, used for the device state alone: how it is started, watched and ended.
//!
//! ```text
//!   paused by   source QEMU                                      target QEMU
//!               Settings::apply                                  Settings::apply
//!                                                                Incoming::begin
//!               Outgoing::prepare
//!   Agent       stop, begin
//!   Qemu        begin, wait_paused (set-up and QEMU's own RAM
//!               go while the guest runs), resume
//!                       ── Channel: both directions relayed ──
//!                                                                wait_loaded
//!               wait_completed                                   cont, when told to
//! ```
//!
//! **Who pauses.** `Agent`: the guest is stopped by `stop` before QEMU stores its state, so the
//! target's guest comes out paused, and the source's QEMU never starts its guest again by itself.
//! `Qemu` (with `pause-before-switchover`): QEMU stops the guest when set-up and its own RAM have
//! been sent, which keeps those out of the pause. But QEMU stores the state as "running", and starts
//! its guest again by itself when its migration fails. So the target is told to stay paused
//! ([`Incoming::begin`]), and no hand-over may be decided before [`Outgoing::wait_completed`] has
//! returned: from then on the source's QEMU does nothing by itself.
//!
//! **The trap.** Without a return path the source reports "completed" once its bytes are in the
//! socket, whatever becomes of the target. With one, the target's last word is waited for; still
//! only [`Incoming::wait_loaded`] says that the guest can run there.
//!
//! Nothing here relays bytes: whoever owns the [`Channel`] does, and must while waiting here, or
//! QEMU waits for it.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::channel::Channel;
use super::runstate::{self, RunState};
use crate::limits::{MIGRATION_LOOK, QEMU_POLL};
use crate::qmp::{Posted, Qmp, QmpError, Version};

/// Who stops the guest for the switchover; see the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PausedBy {
    /// The agent, with `stop`, before QEMU's migration is begun.
    Agent,
    /// QEMU, when everything but the device state has been sent.
    Qemu,
}

/// Why the device state did not get through.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// The monitor could not be asked, or refused.
    #[error("can't drive QEMU's migration")]
    Qmp(#[from] QmpError),
    /// The channel could not be made.
    #[error("can't make a channel for the device state")]
    Channel {
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// QEMU's migration ended without success.
    #[error("QEMU's migration of the device state {status}{}", said(.desc))]
    Failed {
        /// `failed`, `cancelled` or the like.
        status: String,
        /// QEMU's own words, if it has any.
        desc: Option<String>,
    },
    /// The target's QEMU exited while it loaded. Before 9.1 that is how it says no.
    #[error("the target's QEMU exited while it loaded the device state")]
    TargetExited {
        /// How the monitor saw it.
        #[source]
        source: QmpError,
    },
    /// The target's guest runs although it was told not to: somebody else started it.
    #[error("the target's guest is running already ({status})")]
    RunsAlready {
        /// QEMU's run state.
        status: String,
    },
    /// It took too long. The migration goes on and can be cancelled.
    #[error("QEMU's migration of the device state is still {status}")]
    Timeout {
        /// Its status.
        status: String,
    },
}

fn said(desc: &Option<String>) -> String {
    desc.as_ref().map(|desc| format!(": {desc}")).unwrap_or_default()
}

impl DeviceStateError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::TargetExited { .. } | Self::Failed { .. } => Some(
                "QEMU's own words are on the standard error of the QEMU that failed; mostly its \
                 devices differ from the other's: start both with the same options, ids included",
            ),
            _ => None,
        }
    }
}

/// What QEMU counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of the stream that QEMU counted as RAM of its own (firmware, video memory).
    pub own_ram_bytes: u64,
    /// From `migrate` to the end.
    pub total: Duration,
    /// Of that, until the stream's set-up had been sent.
    pub setup: Duration,
}

/// The source's side of a migration of the device state.
#[derive(Debug)]
pub struct Outgoing {
    paused_by: PausedBy,
    /// `migrate`, until its answer is heard.
    begun: Option<Posted>,
}

impl Outgoing {
    /// Gives QEMU its end of a channel, which nothing uses yet. Can be done while the guest runs.
    pub fn prepare(qmp: &Qmp, paused_by: PausedBy) -> Result<(Self, Channel), DeviceStateError> {
        let (channel, qemus) =
            Channel::pair().map_err(|source| DeviceStateError::Channel { source })?;
        qmp.execute_with_fd("getfd", json!({ "fdname": FD }), qemus.as_fd())?;
        Ok((Self { paused_by, begun: None }, channel))
    }

    /// Begins: QEMU writes into the channel from now on, as much as fits until somebody reads. Does
    /// not wait for QEMU's answer, which takes most of a millisecond. With [`PausedBy::Agent`] the
    /// guest must have been stopped, or QEMU stops it by itself and stores it as running.
    pub fn begin(&mut self, qmp: &Qmp) -> Result<(), DeviceStateError> {
        qmp.forget_events("MIGRATION")?;
        qmp.forget_events("STOP")?;
        self.begun = Some(qmp.post("migrate", json!({ "uri": format!("fd:{FD}") }))?);
        Ok(())
    }

    /// QEMU's answer to `migrate`, if it was not heard yet.
    fn hear(&mut self, qmp: &Qmp, deadline: Instant) -> Result<(), DeviceStateError> {
        if let Some(begun) = self.begun.take() {
            qmp.answer(begun, deadline)?;
        }
        Ok(())
    }

    /// Waits until QEMU has stopped the guest and everything but the device state is sent; returns
    /// when the virtual CPUs stopped, by QEMU's clock since the Unix epoch. From then on nothing
    /// writes into guest memory, and QEMU waits for [`Outgoing::resume`]. For [`PausedBy::Qemu`].
    pub fn wait_paused(
        &mut self,
        qmp: &Qmp,
        deadline: Instant,
    ) -> Result<Duration, DeviceStateError> {
        debug_assert_eq!(self.paused_by, PausedBy::Qemu);
        self.hear(qmp, deadline)?;
        wait_status(qmp, deadline, |status| status == PRE_SWITCHOVER)?;
        // Sent before the other.
        let stopped = qmp.wait_event("STOP", Instant::now())?;
        Ok(stopped.at)
    }

    /// Lets QEMU send the device state. For [`PausedBy::Qemu`].
    pub fn resume(&self, qmp: &Qmp) -> Result<(), DeviceStateError> {
        debug_assert_eq!(self.paused_by, PausedBy::Qemu);
        qmp.execute("migrate-continue", json!({ "state": PRE_SWITCHOVER }))?;
        Ok(())
    }

    /// Waits until QEMU has sent everything and heard the target's last word.
    pub fn wait_completed(
        &mut self,
        qmp: &Qmp,
        deadline: Instant,
    ) -> Result<Sent, DeviceStateError> {
        self.hear(qmp, deadline)?;
        wait_status(qmp, deadline, |status| status == "completed")?;
        let info = qmp.execute("query-migrate", json!({}))?;
        let ms = |name: &str| Duration::from_millis(info[name].as_u64().unwrap_or(0));
        Ok(Sent {
            own_ram_bytes: info["ram"]["transferred"].as_u64().unwrap_or(0),
            total: ms("total-time"),
            setup: ms("setup-time"),
        })
    }

    /// Ends the migration, whatever has become of it, and waits until it has ended. The channel
    /// must be closed first. Then the guest is where QEMU left it:
    /// [`runstate::settle_and_cont`] lets it run.
    pub fn cancel(mut self, qmp: &Qmp, deadline: Instant) -> Result<(), DeviceStateError> {
        if let Err(DeviceStateError::Qmp(QmpError::Refused { desc, .. })) = self.hear(qmp, deadline)
        {
            tracing::debug!(%desc, "QEMU's migration was refused");
        }
        cancel(qmp, deadline)
    }
}

/// Ends a migration that an agent began, whatever has become of it, and waits until it has ended.
/// The agent's end of the channel is closed.
pub(crate) fn cancel(qmp: &Qmp, deadline: Instant) -> Result<(), DeviceStateError> {
    // Ours still, unless a migration took it; then QEMU says that it knows none.
    let kept = qmp.execute("closefd", json!({ "fdname": FD }));
    tracing::trace!(?kept, "closefd");
    qmp.execute("migrate_cancel", json!({}))?;
    loop {
        let info = qmp.execute("query-migrate", json!({}))?;
        let status = info["status"].as_str().unwrap_or("none").to_owned();
        if has_ended(&status) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(DeviceStateError::Timeout { status });
        }
        std::thread::sleep(QEMU_POLL);
    }
}

/// The target's side.
#[derive(Debug)]
pub struct Incoming;

impl Incoming {
    /// Has a QEMU that was started with `-incoming defer` read its state from the channel, and stay
    /// paused afterwards, whether or not it was started with `-S`.
    ///
    /// This can be done once in the life of that QEMU. If the channel ends too early, QEMU exits
    /// (before 9.1) or is of no further use.
    pub fn begin(qmp: &Qmp) -> Result<(Self, Channel), DeviceStateError> {
        let (channel, qemus) =
            Channel::pair().map_err(|source| DeviceStateError::Channel { source })?;
        qmp.forget_events("MIGRATION")?;
        // While QEMU waits for a migration this only withdraws the start that would follow it.
        runstate::stop(qmp)?;
        qmp.execute_with_fd("getfd", json!({ "fdname": FD }), qemus.as_fd())?;
        drop(qemus);
        let mut args = json!({ "uri": format!("fd:{FD}") });
        if qmp.version() >= STAYS_AFTER_FAILURE {
            args["exit-on-error"] = false.into();
        }
        if let Err(error) = qmp.execute("migrate-incoming", args) {
            let _ = qmp.execute("closefd", json!({ "fdname": FD }));
            return Err(error.into());
        }
        Ok((Self, channel))
    }

    /// Waits until the state is loaded, and makes sure that the guest stands still: it can run from
    /// now on, by [`runstate::cont`].
    pub fn wait_loaded(&self, qmp: &Qmp, deadline: Instant) -> Result<(), DeviceStateError> {
        let loaded = wait_status(qmp, deadline, |status| status == "completed");
        loaded.map_err(|error| match error {
            DeviceStateError::Qmp(source @ (QmpError::Closed { .. } | QmpError::Host { .. })) => {
                DeviceStateError::TargetExited { source }
            }
            other => other,
        })?;
        let state = RunState::query(qmp)?;
        if state.running {
            return Err(DeviceStateError::RunsAlready { status: state.status });
        }
        Ok(())
    }
}

/// Waits for the status that `wanted` accepts, by events; and looks from time to time, in case one
/// was lost or its capability switched off by somebody else.
fn wait_status(
    qmp: &Qmp,
    deadline: Instant,
    wanted: impl Fn(&str) -> bool,
) -> Result<(), DeviceStateError> {
    let is_news = |status: &str| wanted(status) || has_failed(status);
    let status_of = |data: &Value| data["status"].as_str().unwrap_or("none").to_owned();
    loop {
        let look_at = deadline.min(Instant::now() + MIGRATION_LOOK);
        let event = qmp.wait_event_where("MIGRATION", look_at, |event| {
            is_news(event.data["status"].as_str().unwrap_or_default())
        });
        let status = match event {
            Ok(event) => status_of(&event.data),
            Err(QmpError::Timeout { .. }) => {
                let status = status_of(&qmp.execute("query-migrate", json!({}))?);
                if !is_news(&status) && Instant::now() >= deadline {
                    return Err(DeviceStateError::Timeout { status });
                }
                status
            }
            Err(error) => return Err(error.into()),
        };
        if wanted(&status) {
            return Ok(());
        }
        if has_failed(&status) {
            // QEMU fills in the words a moment later than the status; what is there is told.
            let info = qmp.execute("query-migrate", json!({})).unwrap_or_default();
            let desc = info["error-desc"].as_str().map(String::from);
            return Err(DeviceStateError::Failed { status, desc });
        }
    }
}

fn has_failed(status: &str) -> bool {
    matches!(status, "failed" | "cancelled" | "cancelling")
}

fn has_ended(status: &str) -> bool {
    matches!(status, "none" | "completed" | "failed" | "cancelled")
}

/// What our descriptor is called in QEMU, until its migration takes it over.
const FD: &str = "pageferry-device-state";

const PRE_SWITCHOVER: &str = "pre-switchover";

/// From here on QEMU can be asked not to exit when an incoming migration fails.
const STAYS_AFTER_FAILURE: Version = Version { major: 9, minor: 1, micro: 0 };
