//! The control connection of one session; it outlives the TCP connections under it.
//!
//! ```text
//!   agent ── send ──> kept until heard ──> Link ══ TCP ══> peer
//!   agent <─ event ── counted <────────── reader           waits while too much is not handled yet
//!                     heart: `Heard` twice a second; silence is a cut
//!            source: makes a new Link, and says Rejoin     (pf-rejoin)
//!            target: is given the new Link by its server   ([`Control::adopt`])
//! ```
//!
//! Every message is counted on either side, and kept until the peer has heard it, so that after a
//! cut each side sends what the other has not heard, once and in order. A cut that lasts longer than
//! the patience, or a peer that does not rejoin, is a lost peer; the state machines never hear of
//! any other. What the messages mean is none of its business, except [`Message::Hello`] and
//! [`Message::Welcome`], which agree on all this, and [`Message::Recover`]: that the peer has not only
//! heard the end, but acted on it ([`Control::settled`]).
//!
//! Locks, in this order: `writing`, `delivery`, `state`. Who holds `delivery` only tries `writing`;
//! nothing blocks while `state` is held. The reader waits for room ([`Backlog`]) with none of them.

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pageferry_datapath::control::{Heard, Hello, Message, Recover, Ticket, Word, encode};
use pageferry_datapath::ids::SessionId;

use self::state::State;
use super::backlog::{Backlog, Room};
use super::link::{Link, LinkError};
use super::tls::Security;
use crate::{limits, privileges};

mod cuts;
mod state;

pub use self::cuts::NotAdopted;

/// What happens on a control connection.
#[derive(Debug)]
pub enum Event {
    /// The peer said this. Until the room is dropped it counts as not handled.
    Message(Message, Room),
    /// The connection under it is gone; what is sent from here on waits.
    Cut(LinkError),
    /// There is a new one, and nothing was lost.
    Restored {
        /// Since the peer was heard last.
        away: Duration,
    },
    /// The peer is gone for good: nothing will come any more.
    Lost(LinkError),
}

type Connect = dyn Fn(Duration) -> Result<Link, LinkError> + Send + Sync;
type OnEvent = dyn FnMut(Event) + Send;

/// A control connection, shared by those who send on it.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    delivery: Mutex<Box<OnEvent>>,
    writing: Mutex<()>,
    state: Mutex<State>,
    /// Told when messages were heard, and when the connection is cut, restored or ended.
    changed: Condvar,
    /// What was handed on and not handled yet.
    backlog: Arc<Backlog>,
    /// Source: how to come back.
    connect: Option<Box<Connect>>,
}

impl Control {
    /// The source's, on a new connection; `connect` makes others after a cut.
    pub fn source(
        link: Link,
        session: SessionId,
        patience: Duration,
        connect: impl Fn(Duration) -> Result<Link, LinkError> + Send + Sync + 'static,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Self {
        let state = State::new(link, session, None, patience);
        let reads = state.link.clone();
        let control = Self::start(state, Some(Box::new(connect)), Box::new(on_event));
        control.read(0, &reads);
        control
    }

    /// The target's, on a connection that began with `hello`.
    pub fn target(
        link: Link,
        hello: Hello,
        patience: Duration,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Self {
        let key = hello.rejoins.then(|| Ticket::random().expect("the kernel has random bytes"));
        let state = State::new(link, hello.session, key, patience);
        let reads = state.link.clone();
        let control = Self::start(state, None, Box::new(on_event));
        control.deliver(0, Message::Hello(hello), 0);
        control.read(0, &reads);
        control
    }

    fn start(state: State, connect: Option<Box<Connect>>, on_event: Box<OnEvent>) -> Self {
        let shared = Shared {
            delivery: Mutex::new(on_event),
            writing: Mutex::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            backlog: Arc::default(),
            connect,
        };
        let control = Self { shared: Arc::new(shared) };
        let theirs = control.clone();
        spawn("pf-heart", move || theirs.beat());
        control
    }

    /// Target: what the source has to show when it comes back, if it may.
    pub fn key(&self) -> Option<Ticket> {
        self.state().key
    }

    /// Sends one message; while the connection is cut it is kept. Blocks for a peer that doesn't
    /// keep up; one that keeps an agent from saying why it gives up is lost.
    pub fn send(&self, message: &Message) -> Result<(), LinkError> {
        let frame = encode(message);
        if matches!(message, Message::Abort(_)) {
            self.interrupt();
        }
        let (_whole_frames_in_order, mut state) = self.room_to_send();
        if state.ended {
            state.unsaid = true;
            return Err(LinkError::Closed);
        }
        state.sent += 1;
        let (link, cut, keeps) = (state.link.clone(), state.cut, state.keeps());
        let generation = state.generation;
        if keeps {
            state.kept_bytes += frame.len();
            state.kept.push_back(frame.clone());
        }
        drop(state);
        if cut {
            return Ok(());
        }
        match link.send_frame(&frame) {
            Err(error) if keeps => {
                self.cut(generation, error);
                Ok(())
            }
            sent => sent,
        }
    }

    /// Waits while the connection is cut and enough is kept; whoever comes back with a new one needs
    /// the lock for writing meanwhile.
    fn room_to_send(&self) -> (MutexGuard<'_, ()>, MutexGuard<'_, State>) {
        loop {
            let writing = lock(&self.shared.writing);
            let state = self.state();
            let full = state.cut && state.kept_bytes > limits::CONTROL_KEPT_BYTES_MAX;
            if !full || state.ended {
                return (writing, state);
            }
            drop(writing);
            drop(self.shared.changed.wait(state));
        }
    }

    /// Somebody may be writing to a peer that takes nothing: it gets a moment to, and is lost then.
    fn interrupt(&self) {
        let until = Instant::now() + limits::LAST_WORD_WAIT_MAX;
        while let Err(TryLockError::WouldBlock) = self.shared.writing.try_lock() {
            if self.is_cut() {
                return; // It is one that comes back; that has a time of its own.
            }
            if Instant::now() >= until {
                return self.lose(LinkError::Silent { waited: limits::LAST_WORD_WAIT_MAX });
            }
            thread::sleep(limits::LAST_WORD_LOOK);
        }
    }

    /// How long the peer may be silent from now on.
    pub fn set_patience(&self, patience: Duration) {
        self.state().patience = patience;
    }

    /// The source's word, by other ways than this connection: its agent is gone, and with it
    /// whatever it had still to say here.
    pub fn hear_otherwise(&self, message: Message) {
        self.end(Event::Message(message, self.shared.backlog.take(0)));
    }

    /// The connection's NIC has no carrier: comes back another way now, rather than after a silence.
    pub fn lost_carrier(&self) {
        let generation = self.state().generation;
        self.cut(generation, LinkError::Broken(Errno::ENETDOWN.into()));
    }

    /// The peer is not waited for any longer.
    pub fn give_up(&self) {
        self.lose(LinkError::Superseded);
    }

    /// Whether a cut is got over.
    pub fn rejoins(&self) -> bool {
        self.state().key.is_some()
    }

    /// Whether there is no connection at the moment.
    pub fn is_cut(&self) -> bool {
        self.state().cut
    }

    /// Waits until the peer has heard everything, at most so long, `through_cuts` or until the
    /// connection is cut; then tells it that nothing more will come. A peer that does not say what
    /// it has heard is waited for until it closes. Returns whether it has heard everything, as far
    /// as it says.
    pub fn finish(&self, within: Duration, through_cuts: bool) -> bool {
        let until = Instant::now() + within;
        // Whoever writes just now may be stuck, or be done in a moment.
        while !self.tell() && Instant::now() < until {
            thread::sleep(limits::TELL_AGAIN_PAUSE);
        }
        self.wait_while(until, |state| {
            let unheard = state.key.is_some() && !state.kept.is_empty();
            !state.ended && unheard && (through_cuts || !state.cut)
        });
        let mut state = self.state();
        state.closing = true;
        let (link, tells) = (state.link.clone(), state.key.is_some());
        let heard = tells && state.kept.is_empty() && !state.unsaid;
        drop(state);
        link.finish();
        if tells {
            return heard;
        }
        self.wait_while(until, |state| !state.ended);
        self.state().ended
    }

    /// Says what the record here says, now that this side has acted on the end: `none` if there is no
    /// record any more. Nobody may be there to hear it.
    pub fn settle(&self, word: Word) -> bool {
        let session = self.state().session;
        self.send(&Message::Recover(Recover { session, word })).is_ok()
    }

    /// Waits until the peer has heard everything, through cuts and at most `within`, and then a while
    /// for what its record says now that it has acted on it. To have heard is not enough: it may be
    /// killed, or its disk fail, before it acts.
    pub fn settled(&self, within: Duration) -> Option<Word> {
        self.wait_while(Instant::now() + within, |state| {
            let unheard = state.key.is_some() && !state.kept.is_empty();
            state.settled.is_none() && !state.ended && unheard
        });
        self.wait_while(Instant::now() + limits::SETTLE_MAX, |state| {
            state.settled.is_none() && !state.ended && !state.cut
        });
        self.state().settled
    }

    fn wait_while(&self, until: Instant, mut condition: impl FnMut(&State) -> bool) {
        let mut state = self.state();
        while condition(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poison| poison.into_inner()).0;
        }
    }

    /// Ends the connection in both directions, and this.
    pub fn close(&self) {
        let mut state = self.state();
        state.ended = true;
        state.link.close();
        self.shared.changed.notify_all();
    }

    /// How the connection is secured, and who the peer is.
    pub fn security(&self) -> Security {
        self.state().link.security().clone()
    }

    /// What the session's lane tickets are drawn from.
    pub fn lane_secret(&self) -> std::io::Result<[u8; 32]> {
        // One guard for both: two in one statement would wait for each other for ever.
        let (link, session) = {
            let state = self.state();
            (state.link.clone(), state.session)
        };
        link.lane_secret(session)
    }

    /// This end's address.
    pub fn local(&self) -> Option<SocketAddr> {
        self.state().link.local()
    }

    /// The peer's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.state().link.peer()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn read(&self, generation: u64, link: &Link) {
        let (control, ours) = (self.clone(), link.clone());
        link.read_with(move |message| match message {
            Ok((message, bytes)) => {
                control.deliver(generation, message, bytes);
                // With no lock held. Behind an answered one may be thousands that nobody asked for.
                control.shared.backlog.wait_for_room();
            }
            Err(error) => {
                if let LinkError::Misbehaved(_) = error {
                    ours.turn_away(&error);
                }
                control.cut(generation, error);
            }
        });
    }

    /// Counts a message of so many bytes and hands it on.
    fn deliver(&self, generation: u64, message: Message, bytes: usize) {
        let mut on_event = lock(&self.shared.delivery);
        let mut state = self.state();
        if state.generation != generation || state.ended {
            return;
        }
        state.heard_at = Instant::now();
        match &message {
            Message::Heard(Heard { received }) => {
                if state.forget(*received).is_err() {
                    drop((state, on_event));
                    return self.lose(LinkError::Miscounted);
                }
                self.shared.changed.notify_all();
                return;
            }
            Message::Welcome(welcome) if self.shared.connect.is_some() => {
                state.key = welcome.rejoin_key;
                if state.key.is_none() {
                    state.kept.clear();
                    state.kept_bytes = 0;
                }
            }
            _ => {}
        }
        state.received += 1;
        let settles = match &message {
            Message::Recover(Recover { word, .. }) => {
                state.settled = Some(*word);
                true
            }
            _ => false,
        };
        state.closing |= settles || matches!(message, Message::Running(_) | Message::Abort(_));
        let untold = state.received - state.told;
        let tell = state.key.is_some() && (untold >= limits::HEARD_EVERY || is_last(&message));
        drop(state);
        if tell {
            self.tell();
        }
        if settles {
            self.shared.changed.notify_all();
            return;
        }
        on_event(Event::Message(message, self.shared.backlog.take(bytes)));
    }

    /// Tells the peer what was heard, unless somebody is writing: then it is told later.
    fn tell(&self) -> bool {
        let Ok(_whole_frames) = self.shared.writing.try_lock() else { return false };
        let mut state = self.state();
        if state.cut || state.ended || state.key.is_none() {
            return true;
        }
        state.told = state.received;
        let (link, heard) = (state.link.clone(), Heard { received: state.received });
        drop(state);
        // The reader sees a connection that is gone.
        let _the_reader_sees_it = link.send(&Message::Heard(heard));
        true
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// After these a side may go: the other must know soon that they were heard.
fn is_last(message: &Message) -> bool {
    use Message::{Abort, Commit, Recover, Running};
    matches!(message, Commit | Running(_) | Abort(_) | Recover(_))
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let body = move || {
        privileges::drop_on_this_thread(&[]);
        body();
    };
    thread::Builder::new().name(name.into()).spawn(body).expect("the process can start threads");
}

#[cfg(test)]
mod tests;
