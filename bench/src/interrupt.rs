//! Ctrl-C and SIGTERM: the run in progress ends or fails, and then everything made is taken back.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::BenchError;

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on a signal is only noted. The children of a terminal get theirs themselves.
pub(crate) fn catch() -> Result<(), BenchError> {
    ctrlc::set_handler(|| ASKED.store(true, Ordering::Relaxed))
        .map_err(|source| BenchError::Signals { source })
}

/// Whether it is time to stop.
pub(crate) fn check() -> Result<(), BenchError> {
    match ASKED.load(Ordering::Relaxed) {
        true => Err(BenchError::Interrupted),
        false => Ok(()),
    }
}
