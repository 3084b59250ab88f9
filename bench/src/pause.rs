//! The pause of a guest, seen from outside and alike for everyone: QEMU's `STOP` event at the
//! source to QEMU's `RESUME` event at the target, by the one clock of this machine, through
//! monitors that nobody else uses; and the longest silence of the guest's own ticks around it.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageferry_ctl::lab::console::ticks_across;
use pageferry_ctl::lab::{Console, Qemu};
use pageferry_ctl::qmp::Qmp;

use crate::error::BenchError;

/// A QEMU as those see it who move its guest.
pub(crate) trait Monitored {
    /// The monitor to move it by.
    fn qmp(&self) -> &Path;
    /// A monitor that nobody else uses.
    fn spare_qmp(&self) -> &Path;
    /// Its process.
    fn pid(&self) -> u32;
}

impl Monitored for Qemu {
    fn qmp(&self) -> &Path {
        self.qmp()
    }

    fn spare_qmp(&self) -> &Path {
        self.spare_qmp()
    }

    fn pid(&self) -> u32 {
        self.pid()
    }
}

/// Watches both ends of one migration.
pub(crate) struct PauseWatch {
    source: Qmp,
    target: Qmp,
}

/// When the guest stood still, by the time since the Unix epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pause {
    /// The source's guest was paused.
    pub(crate) stop: Duration,
    /// The target's guest runs.
    pub(crate) resume: Duration,
}

impl Pause {
    /// Its length in milliseconds.
    pub(crate) fn ms(&self) -> f64 {
        (self.resume.as_secs_f64() - self.stop.as_secs_f64()) * 1e3
    }
}

impl PauseWatch {
    /// Begins to watch; before the migration is started.
    pub(crate) fn begin(
        source: &dyn Monitored,
        target: &dyn Monitored,
    ) -> Result<Self, BenchError> {
        Ok(Self {
            source: Qmp::connect(source.spare_qmp())?,
            target: Qmp::connect(target.spare_qmp())?,
        })
    }

    /// Waits for the guest to run at the target.
    pub(crate) fn finish(&self, deadline: Instant) -> Result<Pause, BenchError> {
        let resume = self.target.wait_event("RESUME", deadline)?.at;
        // A drain point pauses too; the hand-over's pause is the last.
        let mut stop = self.source.wait_event("STOP", deadline)?.at;
        for event in self.source.drain_events()? {
            if event.name == "STOP" {
                stop = event.at;
            }
        }
        Ok(Pause { stop, resume })
    }
}

/// The longest silence between two of the guest's ticks that touches the pause, in milliseconds:
/// the pause as the guest's console saw it, plus at most one tick's interval.
pub(crate) fn tick_gap_ms(source: &Console, target: &Console, pause: &Pause) -> Option<f64> {
    let (stop, resume) = (instant_of(pause.stop)?, instant_of(pause.resume)?);
    ticks_across(source, target)
        .windows(2)
        .filter(|pair| pair[0].seen <= resume && pair[1].seen >= stop)
        .map(|pair| pair[1].seen.saturating_duration_since(pair[0].seen).as_secs_f64() * 1e3)
        .max_by(f64::total_cmp)
}

/// Time since the epoch, now.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The moment of a time since the epoch on the clock that consoles use.
pub(crate) fn instant_of(time: Duration) -> Option<Instant> {
    Instant::now().checked_sub(now().checked_sub(time)?)
}
