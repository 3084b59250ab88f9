//! The switchover: what the phases from its preparation to the recorded decision make of their
//! input. The guest stands still in all of them but the first.

use std::time::Duration;

use super::ending::{differing, misbehaved};
use super::input::{Command, Input};
use super::phases::{Step, stay};
use super::state::{Context, State};
use crate::bitmap::DirtySet;
use crate::control::{DigestReport, Message};
use crate::digest::MemoryDigest;

impl Context {
    pub(super) fn preparing(
        &mut self,
        here: bool,
        there: bool,
        dirty: DirtySet,
        input: Input,
        out: &mut Vec<Command>,
    ) -> Step {
        let (here, there) = match input {
            Input::SwitchoverPrepared => (true, there),
            Input::Message(Message::Prepared) => (here, true),
            input => return stay(State::Preparing { here, there, dirty }, input),
        };
        if !(here && there) {
            return Ok(State::Preparing { here, there, dirty });
        }
        out.push(Command::Pause);
        Ok(State::Pausing { dirty })
    }

    pub(super) fn pausing(
        &mut self,
        dirty: DirtySet,
        input: Input,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Paused => {
                out.push(Command::Scan);
                Ok(State::LastScanning { dirty })
            }
            input => stay(State::Pausing { dirty }, input),
        }
    }

    pub(super) fn last_scanning(
        &mut self,
        mut dirty: DirtySet,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        match input {
            Input::Scanned(found) => {
                dirty.union_with(&found);
                if let Some(drain) = &self.drain {
                    dirty.union_with(&drain.reported);
                }
                Ok(self.start_round(dirty, true, now, out))
            }
            input => stay(State::LastScanning { dirty }, input),
        }
    }

    pub(super) fn last_round_closed(&mut self, out: &mut Vec<Command>) -> State {
        if self.config.offer.verify {
            out.push(Command::Send(Message::Verify));
            out.push(Command::Digest);
            return State::Verifying { here: None, there: None };
        }
        out.push(Command::SaveDeviceState);
        State::Saving { sent: false, ready: false }
    }

    pub(super) fn verifying(
        &mut self,
        here: Option<MemoryDigest>,
        there: Option<MemoryDigest>,
        input: Input,
        out: &mut Vec<Command>,
    ) -> Step {
        let (here, there) = match input {
            Input::Digested(digest) => (Some(digest), there),
            Input::Message(Message::DigestReport(DigestReport { digest, .. })) => (
                here,
                Some(
                    MemoryDigest::decode(&digest)
                        .map_err(|_| misbehaved("its digest does not decode"))?,
                ),
            ),
            input => return stay(State::Verifying { here, there }, input),
        };
        let (Some(ours), Some(theirs)) = (&here, &there) else {
            return Ok(State::Verifying { here, there });
        };
        if ours != theirs {
            return Err(differing(ours, theirs));
        }
        self.report.verified = true;
        out.push(Command::SaveDeviceState);
        Ok(State::Saving { sent: false, ready: false })
    }

    pub(super) fn saving(
        &mut self,
        sent: bool,
        ready: bool,
        input: Input,
        now: Duration,
        out: &mut Vec<Command>,
    ) -> Step {
        let (sent, ready) = match input {
            Input::DeviceStateSent => {
                self.report.state_sent = Some(now);
                (true, ready)
            }
            Input::Message(Message::Ready) => (sent, true),
            input => return stay(State::Saving { sent, ready }, input),
        };
        // The monitor's own word that all is sent is not enough: it says so even when nobody
        // took it. Only the target's `Ready` says that the state is loaded.
        if !(sent && ready) {
            return Ok(State::Saving { sent, ready });
        }
        out.push(Command::Record);
        Ok(State::Deciding)
    }

    pub(super) fn deciding(&mut self, input: Input, out: &mut Vec<Command>) -> Step {
        match input {
            Input::Recorded => {
                out.push(Command::Send(Message::Commit));
                Ok(State::Committed)
            }
            input => stay(State::Deciding, input),
        }
    }
}
