//! What a control connection brought and nobody has handled yet: counted, and bounded.
//!
//! ```text
//!   socket ──> reader ── Room taken ──> queue ──> agent's loop ── Room dropped: handled
//!                │ waits while there is none: TCP tells the peer to wait, too
//! ```
//!
//! The reader waits between two messages, and holds no lock meanwhile: an agent whose loop is busy
//! still sends, says what it heard, and ends its connection. What is said behind the messages that
//! wait is heard late, a `Heard` too; that is why a connection that is not read from is not called
//! silent ([`Control`](super::control::Control)).
//!
//! Both sides may stop reading at once. Neither waits for the other for ever, because what an agent's
//! loop sends without having handled what came is a handful of small messages, which fit into the
//! sockets: it asks, and waits for the answer. Whatever comes in a stream (device state) is sent by a
//! thread of its own, while the loop goes on handling. A peer that keeps to none of this fills its
//! own window, and is given up by TCP's timeout.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::limits;

/// Messages that were received and not handled yet.
#[derive(Debug, Default)]
pub struct Backlog {
    waiting: Mutex<Waiting>,
    /// There is room again.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: usize,
    bytes: usize,
}

impl Waiting {
    fn is_full(&self) -> bool {
        self.messages >= limits::BACKLOG_MESSAGES_MAX || self.bytes >= limits::BACKLOG_BYTES_MAX
    }
}

/// The room of one message; who has handled the message drops it.
#[derive(Debug)]
pub struct Room {
    backlog: Arc<Backlog>,
    bytes: usize,
}

impl Backlog {
    /// For a message of so many bytes on the wire. The last one may go past the limit: what it
    /// takes is in memory already.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Room {
        let mut waiting = self.lock();
        waiting.messages += 1;
        waiting.bytes += bytes;
        Room { backlog: Arc::clone(self), bytes }
    }

    /// Waits until there is room for another message. Rooms come back when they are handled, and
    /// when the agent that should have handled them is gone.
    pub(super) fn wait_for_room(&self) {
        let mut waiting = self.lock();
        while waiting.is_full() {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the connection is not read from just now.
    pub(super) fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut waiting = self.backlog.lock();
        waiting.messages -= 1;
        waiting.bytes -= self.bytes;
        drop(waiting);
        self.backlog.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_is_full_by_bytes_and_by_messages_until_something_is_handled() {
        for (bytes, count) in [
            (limits::BACKLOG_BYTES_MAX / 2, 2),
            (1, limits::BACKLOG_MESSAGES_MAX),
            (usize::MAX >> 8, 1),
        ] {
            let backlog = Arc::new(Backlog::default());
            let mut rooms: Vec<_> = (1..count).map(|_| backlog.take(bytes)).collect();
            assert!(!backlog.is_full());
            backlog.wait_for_room();
            rooms.push(backlog.take(bytes));
            assert!(backlog.is_full());
            let theirs = Arc::clone(&backlog);
            let waits = thread::spawn(move || theirs.wait_for_room());
            thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished());
            rooms.pop();
            waits.join().expect("there is room");
        }
    }
}
