//! What the guest's threads count, and the words of a tick that show it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters shared by all threads of the guest program; each only goes up.
#[derive(Default)]
pub(super) struct Counters {
    /// Pages verified and rewritten.
    pub(super) writes: AtomicU64,
    /// Pages that were not what was last written there.
    pub(super) bad: AtomicU64,
    /// Whole walks through the pages that nobody rewrites.
    pub(super) cold_passes: AtomicU64,
    /// `O_DIRECT` reads finished.
    pub(super) disk_reads: AtomicU64,
    /// Buffers or disk blocks that were not what was last read or written there.
    pub(super) disk_bad: AtomicU64,
    /// Whole walks through the buffers that keep what was read.
    pub(super) disk_passes: AtomicU64,
    /// Blocks written to the scratch area and read back.
    pub(super) disk_writes: AtomicU64,
}

/// The counters at one moment; displays as the middle of a tick.
pub(super) struct Counted {
    pub(super) writes: u64,
    rest: [(&'static str, u64); 6],
}

impl Counters {
    pub(super) fn read(&self) -> Counted {
        Counted {
            writes: self.writes.load(Relaxed),
            rest: [
                ("bad", self.bad.load(Relaxed)),
                ("disk_reads", self.disk_reads.load(Relaxed)),
                ("disk_bad", self.disk_bad.load(Relaxed)),
                ("disk_writes", self.disk_writes.load(Relaxed)),
                ("cold_passes", self.cold_passes.load(Relaxed)),
                ("disk_passes", self.disk_passes.load(Relaxed)),
            ],
        }
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writes={}", self.writes)?;
        self.rest.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}
