//! A lane's connection as its worker sees it: completions, messages and events, waited for.
//!
//! Owned by one worker thread; the [`Stop`] in it is shared with whoever may stop the lane. It
//! polls for as long as that pays, then sleeps on the completion channel, the connection's events
//! and the stop at once:
//!
//! ```text
//!   poll ... poll ─▶ arm ─▶ poll once more ─▶ poll(2) ─▶ take the event ─▶ poll
//!                            `- a completion that came before arming raises no event
//! ```

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry_datapath::ids::LaneId;

use crate::cm_sys::CmEvent;
use crate::error::{CmEventKind, RdmaError, Status};
use crate::limits::{EXPLAIN_WAIT, PROGRESS_WAIT_MAX};
use crate::mailbox::Mailbox;
use crate::message::Message;
use crate::plan::StillThere;
use crate::qp_sys::{Completion, QueuePair};
use crate::spin::Spin;
use crate::stop::Stop;

/// A connection and what came of it.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) qp: QueuePair,
    pub(crate) mailbox: Mailbox,
    stop: Arc<Stop>,
    /// Whom to ask when nothing arrives, and about which lane.
    still_there: Option<(LaneId, StillThere)>,
    spin: Spin,
    completions: Vec<Completion>,
    messages: VecDeque<Message>,
    /// Entries of WRITEs and READs that are done.
    done: VecDeque<u64>,
    /// Events of the connection that were looked at before they were due.
    unseen: VecDeque<CmEvent>,
    /// Times it slept: what a wait costs beyond polling.
    sleeps: u64,
}

impl Line {
    pub(crate) fn new(qp: QueuePair, mailbox: Mailbox, stop: Arc<Stop>) -> Self {
        Self {
            qp,
            mailbox,
            stop,
            still_there: None,
            spin: Spin::new(),
            completions: Vec::new(),
            messages: VecDeque::new(),
            done: VecDeque::new(),
            unseen: VecDeque::new(),
            sleeps: 0,
        }
    }

    /// From here on silence is no failure while this one says that the other end is there.
    pub(crate) fn ask_when_silent(&mut self, lane: LaneId, still_there: StillThere) {
        self.still_there = Some((lane, still_there));
    }

    pub(crate) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Times the worker slept.
    pub(crate) fn sleeps(&self) -> u64 {
        self.sleeps
    }

    /// The next message that has come.
    pub(crate) fn message(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    /// The next entry that is done.
    pub(crate) fn next_done(&mut self) -> Option<u64> {
        self.done.pop_front()
    }

    /// Sends a message once there is room for it.
    pub(crate) fn send(&mut self, message: &Message, wait: Duration) -> Result<(), RdmaError> {
        self.until(wait, |line| line.mailbox.can_send(&line.qp))?;
        self.mailbox.send(&mut self.qp, message)
    }

    /// Waits until `is_so`; anything that arrives counts as progress.
    pub(crate) fn until(
        &mut self,
        progress_wait: Duration,
        mut is_so: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), RdmaError> {
        while !is_so(self) {
            self.progress(progress_wait)?;
        }
        Ok(())
    }

    /// Waits for something to arrive; nothing for this long is an error, unless the other end is
    /// known to be there.
    pub(crate) fn progress(&mut self, limit: Duration) -> Result<(), RdmaError> {
        let since = Instant::now();
        while !self.wait(limit)? {
            if since.elapsed() >= PROGRESS_WAIT_MAX || !self.is_still_there() {
                let waited_ms = since.elapsed().as_millis() as u64;
                return Err(self.cause(RdmaError::Stalled { waited_ms }));
            }
        }
        Ok(())
    }

    fn is_still_there(&self) -> bool {
        self.still_there.as_ref().is_some_and(|(lane, still_there)| still_there.ask(*lane))
    }

    /// Waits for something to arrive, for at most this long; whether something did.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<bool, RdmaError> {
        self.stop.check()?;
        if self.collect()? {
            return Ok(true);
        }
        let start = Instant::now();
        let budget = self.spin.budget().min(limit);
        while start.elapsed() < budget {
            std::hint::spin_loop();
            if self.collect()? {
                self.spin.waited(start.elapsed());
                return Ok(true);
            }
        }
        loop {
            self.qp.arm()?;
            if self.collect()? {
                self.spin.waited(start.elapsed());
                return Ok(true);
            }
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(false);
            }
            let arrived = self.sleep(left)?;
            self.stop.check()?;
            // What arrived before the connection's end is for the caller: behind it nothing comes but
            // what was flushed.
            if arrived || self.collect()? {
                self.spin.waited(start.elapsed());
                return Ok(true);
            }
        }
    }

    /// Ends the connection, and takes note of a removal that something else was faster than.
    pub(crate) fn hang_up(&mut self) {
        let _noted = self.check_device();
        self.qp.hang_up();
    }

    /// For a line that nobody waits on: fails when its device is being removed, which waits for it.
    /// What else has happened is for the next wait.
    pub(crate) fn check_device(&mut self) -> Result<(), RdmaError> {
        if self.unseen.iter().any(|event| event.kind == CmEventKind::DeviceRemoval) {
            return Err(RdmaError::DeviceRemoved); // Noted when it was looked at first.
        }
        while let Some(event) = self.qp.connection_event()? {
            if event.kind == CmEventKind::DeviceRemoval {
                return Err(self.end_of(&event).expect("it ends connections"));
            }
            self.unseen.push_back(event);
        }
        Ok(())
    }

    /// Sleeps until something happens, for at most this long; whether it took what has completed.
    fn sleep(&mut self, limit: Duration) -> Result<bool, RdmaError> {
        self.sleeps += 1;
        // Rounded up: a wait of less than a millisecond must not become a loop.
        let limit = limit.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
        let timeout = match self.unseen.is_empty() {
            true => PollTimeout::try_from(limit).expect("not negative"),
            false => PollTimeout::ZERO,
        };
        let (completed, happened) = {
            let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [
                readable(self.qp.completion_fd()),
                readable(self.qp.connection_fd()),
                readable(self.stop.as_fd()),
            ];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(RdmaError::Call { call: "poll", source: errno.into() }),
            }
            let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
            (is_ready(&fds[0]), is_ready(&fds[1]) || !self.unseen.is_empty())
        };
        if completed {
            self.qp.take_completion_event();
        }
        match happened {
            true => self.events(),
            false => Ok(false),
        }
    }

    /// Takes the connection's events; one that ends it is an error, after what came before it:
    /// whether something did, in which case the event stays for the next to ask why it ended.
    fn events(&mut self) -> Result<bool, RdmaError> {
        while let Some(event) = self.next_event()? {
            if let Some(error) = self.end_of(&event) {
                // What had arrived before it counts: a close, an acknowledgement.
                return match self.collect() {
                    Ok(true) if !self.messages.is_empty() => {
                        self.unseen.push_front(event);
                        Ok(true)
                    }
                    // A request that ended badly by itself says more than that the peer is gone.
                    Err(cause @ RdmaError::Completion { .. }) => Err(cause),
                    _ => Err(self.cause(error)),
                };
            }
        }
        Ok(false)
    }

    /// Takes what has completed; whether anything has.
    fn collect(&mut self) -> Result<bool, RdmaError> {
        if let Err(error) = self.qp.poll(&mut self.completions) {
            return Err(self.cause(error));
        }
        let mut completions = std::mem::take(&mut self.completions);
        let any = !completions.is_empty();
        for completion in completions.drain(..) {
            match completion {
                Completion::Done { entry } if self.mailbox.sent(entry) => {}
                Completion::Done { entry } => self.done.push_back(entry),
                Completion::Received { slot, bytes } => {
                    match self.mailbox.receive(&mut self.qp, slot, bytes) {
                        Ok(message) => self.messages.push_back(message),
                        Err(error) => return Err(self.cause(error)),
                    }
                }
            }
        }
        self.completions = completions;
        Ok(any)
    }

    /// What was flushed says nothing of why, nor does silence: the connection's events may, or the
    /// device's.
    fn cause(&mut self, error: RdmaError) -> RdmaError {
        let error = match error {
            RdmaError::Completion { status: Status::Flushed, .. } => self.ended_by(),
            error => error,
        };
        let is_symptom = matches!(
            error,
            RdmaError::PeerClosed
                | RdmaError::Stalled { .. }
                | RdmaError::Completion {
                    // Soft-RoCE's word for a packet that no route takes is the last of these.
                    status: Status::RetryExceeded
                        | Status::ResponseTimeout
                        | Status::Fatal
                        | Status::LocalOperation,
                    ..
                }
        );
        if !is_symptom {
            return error;
        }
        let since = Instant::now();
        loop {
            match self.qp.explain() {
                Some(cause) => return cause,
                None if since.elapsed() >= EXPLAIN_WAIT => return error,
                None => thread::sleep(EXPLAIN_WAIT / 10),
            }
        }
    }

    fn ended_by(&mut self) -> RdmaError {
        while let Ok(Some(event)) = self.next_event() {
            if let Some(cause) = self.end_of(&event) {
                return cause;
            }
        }
        RdmaError::PeerClosed
    }

    fn next_event(&mut self) -> Result<Option<CmEvent>, RdmaError> {
        match self.unseen.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.qp.connection_event(),
        }
    }

    /// The error that an event means, if it ends the connection.
    fn end_of(&self, event: &CmEvent) -> Option<RdmaError> {
        if event.kind == CmEventKind::DeviceRemoval {
            self.qp.note_removed();
        }
        ending(event)
    }
}

/// The error that an event means for a connection that stands.
fn ending(event: &CmEvent) -> Option<RdmaError> {
    match event.kind {
        CmEventKind::Established | CmEventKind::TimeWaitExit => None,
        CmEventKind::Disconnected => Some(RdmaError::PeerClosed),
        CmEventKind::DeviceRemoval => Some(RdmaError::DeviceRemoved),
        CmEventKind::AddressChange => Some(RdmaError::AddressChanged),
        // The target let go of the lane before it was established there.
        CmEventKind::Rejected => Some(RdmaError::Rejected { status: event.status }),
        CmEventKind::ConnectError | CmEventKind::Unreachable => {
            Some(RdmaError::Unreachable { status: event.status })
        }
        kind => Some(RdmaError::Event { event: kind, status: event.status }),
    }
}
