//! What a control connection counts and keeps: all of it behind one lock, which is never held while
//! anything blocks.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pageferry_datapath::control::{Ticket, Word};
use pageferry_datapath::ids::SessionId;

use crate::agent::link::{Link, LinkError};

pub(super) struct State {
    pub(super) link: Link,
    /// Which connection this is; the readers of those before have nothing more to say.
    pub(super) generation: u64,
    /// There is no connection.
    pub(super) cut: bool,
    /// The peer is gone, or this side has done with it.
    pub(super) ended: bool,
    /// One side has said its last: the end of the connection is the end.
    pub(super) closing: bool,
    /// Something was to be said after the end.
    pub(super) unsaid: bool,
    /// What the peer's record says now that it has acted on the end.
    pub(super) settled: Option<Word>,
    /// Source: who comes back.
    pub(super) session: SessionId,
    /// Shown by the source when it comes back; `None` as long as it may not.
    pub(super) key: Option<Ticket>,
    pub(super) sent: u64,
    /// Frames that the peer may not have heard, the oldest first; the last is number `sent`.
    pub(super) kept: VecDeque<Vec<u8>>,
    pub(super) kept_bytes: usize,
    pub(super) received: u64,
    /// How much of it the peer knows.
    pub(super) told: u64,
    pub(super) heard_at: Instant,
    pub(super) patience: Duration,
}

impl State {
    pub(super) fn new(
        link: Link,
        session: SessionId,
        key: Option<Ticket>,
        patience: Duration,
    ) -> Self {
        Self {
            link,
            generation: 0,
            cut: false,
            ended: false,
            closing: false,
            unsaid: false,
            settled: None,
            session,
            key,
            sent: 0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            received: 0,
            told: 0,
            heard_at: Instant::now(),
            patience,
        }
    }

    /// There is no connection any more; what its reader still brings does not count.
    pub(super) fn leave(&mut self) {
        self.cut = true;
        self.generation += 1;
        self.link.close();
    }

    /// Whether what is sent may have to be sent again. A source does not know before the welcome.
    pub(super) fn keeps(&self) -> bool {
        self.key.is_some() || self.sent <= 1
    }

    /// The peer has heard so many messages; what it says is checked against what was sent.
    pub(super) fn forget(&mut self, received: u64) -> Result<(), LinkError> {
        let unheard = self.sent.checked_sub(received).ok_or(LinkError::Miscounted)?;
        if unheard > self.kept.len() as u64 {
            return Err(LinkError::Miscounted);
        }
        while self.kept.len() as u64 > unheard {
            self.kept_bytes -= self.kept.pop_front().map_or(0, |frame| frame.len());
        }
        Ok(())
    }
}
