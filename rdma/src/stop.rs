//! Tells a worker to stop, wherever it waits.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::RdmaError;

/// Shared by a worker and by whoever may stop it. Once told, it stays told.
#[derive(Debug)]
pub(crate) struct Stop {
    told: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub(crate) fn new() -> Result<Self, RdmaError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| RdmaError::Call { call: "eventfd", source: errno.into() })?;
        Ok(Self { told: AtomicBool::new(false), event })
    }

    /// Makes the worker's wait return, and every later one fail.
    pub(crate) fn tell(&self) {
        self.told.store(true, Ordering::SeqCst);
        // Fails only when told 2^64 times.
        let _told = self.event.write(1);
    }

    pub(crate) fn check(&self) -> Result<(), RdmaError> {
        if self.told.load(Ordering::SeqCst) { Err(RdmaError::Stopped) } else { Ok(()) }
    }
}

impl AsFd for Stop {
    /// Readable once told.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
