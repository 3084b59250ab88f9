//! One host's disk, with the record of one session: what a reader sees now, and what is still
//! there after the host crashed.

use crate::random::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Attempting,
    HandedOver,
    Ready,
    Running,
    Aborted,
}

#[derive(Default)]
pub(crate) struct Disk {
    /// What a reader finds while the host lives.
    pub(crate) seen: Option<Decision>,
    /// What it finds after the host crashed.
    pub(crate) durable: Option<Decision>,
    /// Writes and removals that will fail from here on.
    pub(crate) failing: u32,
    /// A write or removal failed at some time.
    pub(crate) failed: bool,
}

impl Disk {
    /// Writes and makes durable. A failure may leave either, in either place.
    pub(crate) fn write(&mut self, decision: Option<Decision>, random: &mut Random) -> bool {
        if self.failing == 0 {
            (self.seen, self.durable) = (decision, decision);
            return true;
        }
        self.failing -= 1;
        self.failed = true;
        if random.chance(50) {
            self.seen = decision;
            if random.chance(30) {
                self.durable = decision;
            }
        }
        false
    }

    /// Written, not yet durable.
    pub(crate) fn half_written(&mut self, decision: Option<Decision>, random: &mut Random) {
        if self.failing == 0 {
            self.seen = decision;
            if random.chance(50) {
                self.durable = decision;
            }
        }
    }

    /// Removed without waiting: it may come back after a crash.
    pub(crate) fn forget(&mut self, random: &mut Random) {
        self.seen = None;
        if random.chance(50) {
            self.durable = None;
        }
    }

    pub(crate) fn crash(&mut self) {
        self.seen = self.durable;
    }
}
