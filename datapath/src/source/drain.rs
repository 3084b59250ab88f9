//! Drain points: short pauses in which the guest's devices finish what they write.
//!
//! A page that direct I/O writes to is reported when it is pinned, and may change after the scan
//! that reported it, unseen, until the request is finished. At a drain point every request is. So:
//!
//! ```text
//!   reported and protected   |   moved   |   written by the device   |   drain point
//!                                                                       moved once more
//! ```
//!
//! One drain point comes before the first pass (a page pinned before tracking was armed is never
//! reported at all), one before the switchover, others where they cost little; the last is the
//! final pause.

use std::time::Duration;

use super::input::{Command, Input};
use super::phases::{Step, stay};
use super::state::{Context, State};
use crate::bitmap::DirtySet;

/// What may have changed unseen.
#[derive(Clone, Debug, Hash)]
pub(super) struct Drain {
    /// Everything reported since the last drain point.
    pub(super) reported: DirtySet,
    /// The last one was taken to switch over after it.
    pub(super) to_switch_over: bool,
    /// When the last one began.
    pub(super) began: Duration,
    /// How long the guest stood still at it.
    pub(super) cost: Duration,
}

impl Drain {
    pub(super) fn new(shape: &DirtySet, now: Duration) -> Self {
        let reported = shape.empty_like();
        Self { reported, to_switch_over: false, began: now, cost: Duration::ZERO }
    }
}

impl Context {
    pub(super) fn drain_point(
        &mut self,
        dirty: DirtySet,
        first: bool,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> State {
        if let Some(drain) = &mut self.drain {
            drain.began = now;
        }
        out.push(Command::Pause);
        State::DrainPausing { dirty, first }
    }

    pub(super) fn drain_pausing(
        &mut self,
        dirty: DirtySet,
        first: bool,
        input: Input,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Paused if first => {
                out.push(Command::Resume);
                Ok(State::DrainResuming { dirty })
            }
            Input::Paused => {
                out.push(Command::Scan);
                Ok(State::DrainScanning { dirty })
            }
            input => stay(State::DrainPausing { dirty, first }, input),
        }
    }

    pub(super) fn drain_scanning(
        &mut self,
        mut dirty: DirtySet,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Scanned(found) => {
                dirty.union_with(&found);
                if let Some(drain) = &mut self.drain {
                    dirty.union_with(&drain.reported);
                    drain.reported.clear();
                }
                self.last_scan = now;
                out.push(Command::Resume);
                Ok(State::DrainResuming { dirty })
            }
            input => stay(State::DrainScanning { dirty }, input),
        }
    }

    pub(super) fn drain_resuming(
        &mut self,
        dirty: DirtySet,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Resumed => {
                if let Some(drain) = &mut self.drain {
                    drain.cost = now.saturating_sub(drain.began);
                }
                Ok(self.start_round(dirty, false, now, out))
            }
            input => stay(State::DrainResuming { dirty }, input),
        }
    }
}
