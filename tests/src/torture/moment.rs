//! When a fault comes: twelve phases, each of which an agent can be held in.

use std::path::Path;
use std::time::{Duration, Instant};

use pageferry_ctl::agent::record::{self, Decision};
use pageferry_ctl::lab::Qemu;
use pageferry_ctl::qemu::runstate::RunState;
use pageferry_ctl::qmp::Qmp;
use serde::Serialize;

use crate::agents::Agent;

/// A phase of a migration, as people name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // Said in words by `text`.
pub enum Moment {
    Negotiate,
    Lanes,
    FirstPass,
    MiddleRound,
    DrainPoint,
    Pause,
    LastExtents,
    DeviceState,
    Prepared,
    Decided,
    Committed,
    Resume,
}

/// The longest that an agent stays in a phase in which nothing ends it.
const HOLD_MS: u32 = 60_000;
/// How long to wait for what comes right after an agent said that it is held.
const SETTLED_MAX: Duration = Duration::from_secs(20);

impl Moment {
    /// Every phase, in order.
    pub const ALL: [Self; 12] = [
        Self::Negotiate,
        Self::Lanes,
        Self::FirstPass,
        Self::MiddleRound,
        Self::DrainPoint,
        Self::Pause,
        Self::LastExtents,
        Self::DeviceState,
        Self::Prepared,
        Self::Decided,
        Self::Committed,
        Self::Resume,
    ];

    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Negotiate => "negotiate",
            Self::Lanes => "lanes",
            Self::FirstPass => "first pass",
            Self::MiddleRound => "middle round",
            Self::DrainPoint => "drain point",
            Self::Pause => "pause",
            Self::LastExtents => "last extents",
            Self::DeviceState => "device state",
            Self::Prepared => "prepared",
            Self::Decided => "decided",
            Self::Committed => "committed",
            Self::Resume => "resume",
        }
    }

    /// What holds the source agent there, until there is a file `release`.
    pub(super) fn source_hold(self, release: &str) -> String {
        let phase = match self {
            Self::Negotiate => "offering",
            Self::Lanes => "opening",
            Self::FirstPass => "moving",
            Self::MiddleRound => "moving#2",
            Self::DrainPoint => "drainpausing",
            Self::Pause => "pausing",
            Self::LastExtents => "last-moving",
            // The target has loaded everything and said so, and the source has not heard it.
            Self::Prepared => "saving",
            // On record, and the commit has not left.
            Self::Decided => "deciding",
            Self::DeviceState | Self::Committed | Self::Resume => return String::new(),
        };
        format!("{phase}:{HOLD_MS}:{release}")
    }

    /// What holds the target agent there.
    pub(super) fn target_hold(self, release: &str) -> String {
        let phase = match self {
            Self::DeviceState => "loading",
            // The commit has come, and the guest does not run yet.
            Self::Committed => "ready",
            // It runs, and the source has not heard it.
            Self::Resume => "resuming",
            _ => return String::new(),
        };
        format!("{phase}:{HOLD_MS}:{release}")
    }

    /// Waits until the migration is there; `false` if it ended before.
    pub(super) fn wait(
        self,
        source: &mut Agent,
        target: &mut Agent,
        waiting: &Qemu,
        source_records: &Path,
        within: Duration,
    ) -> bool {
        let until = Instant::now() + within;
        loop {
            let holder = if self.source_hold("").is_empty() { &*target } else { &*source };
            if holder.complained().contains("held in ") {
                break;
            }
            if source.has_ended() || target.has_ended() || Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        match self {
            Self::Prepared => settled(|| {
                let status = status(waiting);
                status.is_some_and(|it| it.status != "inmigrate")
            }),
            // The commit is sent as soon as that is on record.
            Self::Committed => settled(|| {
                let records = record::list(source_records);
                records.iter().any(|(_, record)| record.decision == Decision::HandedOver)
            }),
            _ => {}
        }
        true
    }
}

/// What a QEMU is doing; `None` if it is gone.
pub(super) fn status(qemu: &Qemu) -> Option<RunState> {
    RunState::query(&Qmp::connect(qemu.spare_qmp()).ok()?).ok()
}

fn settled(mut there: impl FnMut() -> bool) {
    let until = Instant::now() + SETTLED_MAX;
    while !there() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
}
