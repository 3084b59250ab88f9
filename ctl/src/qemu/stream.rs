//! QEMU's device state channel as the agents read and write it.

use std::io;
use std::time::{Duration, Instant};

use super::channel::Channel;
use crate::agent::monitor::StateStream;
use crate::limits::STATE_TIMEOUT;

/// Longer than any migration waits between preparing and switching over.
const READ_MAX: Duration = Duration::from_secs(24 * 3600);

/// A [`Channel`] with its deadlines.
#[derive(Debug)]
pub(super) struct QemuStream(Channel);

impl QemuStream {
    pub(super) fn new(channel: Channel) -> Self {
        Self(channel)
    }

    /// Ends both directions; wakes whoever reads.
    pub(super) fn close(&self) {
        self.0.close();
    }
}

impl StateStream for QemuStream {
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes, Instant::now() + READ_MAX)
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes, Instant::now() + STATE_TIMEOUT)
    }

    fn finish(&self) -> io::Result<()> {
        self.0.finish()
    }
}
