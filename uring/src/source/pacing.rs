//! One lane's part in holding the migration to its rate.
//!
//! The budget is shared ([`Pacer`]); a lane takes its batch's bytes from it and sleeps until they are
//! granted. The kernel spreads each batch over its time, with some room to spare, so that a batch
//! is no burst on the wire.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use pageferry_datapath::pace::{Pacer, clock};

use crate::limits;
use crate::sys;
use crate::wire::{Line, WireError};

/// See the [module](self).
#[derive(Debug)]
pub(super) struct LanePacing {
    pacer: Arc<Pacer>,
    /// The pacer's version that the kernel was told last, and for how many lanes.
    told: (u64, usize),
}

impl LanePacing {
    pub(super) fn new(pacer: Arc<Pacer>) -> Self {
        Self { pacer, told: (0, 0) }
    }

    /// The most bytes of a batch.
    pub(super) fn piece_bytes(&self) -> u64 {
        self.pacer.piece_bytes()
    }

    /// Whether the guest stands still.
    pub(super) fn is_hurried(&self) -> bool {
        self.pacer.is_hurried()
    }

    /// Waits until `bytes` may be sent; `lanes` share the rate.
    pub(super) fn wait(&mut self, line: &Line, lanes: usize, bytes: u64) -> Result<(), WireError> {
        self.tell_kernel(line, lanes);
        let piece = self.pacer.reserve(clock(), bytes);
        loop {
            line.check_stop()?;
            let wait = self.pacer.wait(clock(), piece);
            if wait.is_zero() {
                return Ok(());
            }
            thread::sleep(wait.min(limits::PACE_TICK));
        }
    }

    fn tell_kernel(&mut self, line: &Line, lanes: usize) {
        let (version, rate) = self.pacer.version();
        let never = version == 0;
        if never || self.told == (version, lanes) {
            return;
        }
        self.told = (version, lanes);
        let share = |rate: u64| {
            rate.saturating_mul(limits::KERNEL_PACING_PERCENT) / 100 / lanes.max(1) as u64
        };
        // Without it batches leave at once; the rate over time is the same.
        if let Err(error) = sys::set_pacing(line.socket().as_fd(), rate.map(share)) {
            tracing::debug!(%error, "the kernel does not pace this lane");
        }
    }
}
