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
//! [`Message::Welcome`], which agree on all this.
//!
//! Locks, in this order: `writing`, `delivery`, `state`. Who holds `delivery` only tries `writing`;
//! nothing blocks while `state` is held. The reader waits for room ([`Backlog`]) with none of them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pageferry_datapath::control::{Heard, Hello, Message, Rejoin, Ticket, encode};
use pageferry_datapath::ids::SessionId;

use super::backlog::{Backlog, Room};
use super::link::{Link, LinkError};
use super::tls::Security;
use crate::{limits, privileges};

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

struct State {
    link: Link,
    /// Which connection this is; the readers of those before have nothing more to say.
    generation: u64,
    /// There is no connection.
    cut: bool,
    /// The peer is gone, or this side has done with it.
    ended: bool,
    /// One side has said its last: the end of the connection is the end.
    closing: bool,
    /// Something was to be said after the end.
    unsaid: bool,
    /// Source: who comes back.
    session: SessionId,
    /// Shown by the source when it comes back; `None` as long as it may not.
    key: Option<Ticket>,
    sent: u64,
    /// Frames that the peer may not have heard, the oldest first; the last is number `sent`.
    kept: VecDeque<Vec<u8>>,
    kept_bytes: usize,
    received: u64,
    /// How much of it the peer knows.
    told: u64,
    heard_at: Instant,
    patience: Duration,
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
        let mut on_event = lock(&self.shared.delivery);
        let mut state = self.state();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        state.link.close();
        drop(state);
        self.shared.changed.notify_all();
        on_event(Event::Message(message, self.shared.backlog.take(0)));
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

    /// Target: the source came back on `link`, and has heard `received` messages. An error if it is
    /// not the source of this session.
    pub fn adopt(&self, link: Link, rejoin: &Rejoin) -> Result<(), NotAdopted> {
        let mut state = self.state();
        let known = state.key == Some(rejoin.key)
            && state.session == rejoin.session
            && state.link.security() == link.security();
        if state.ended || !known {
            return Err(NotAdopted);
        }
        // Whoever is stuck in a write to the old connection gets out of it, and what is still read
        // from it is not counted any more.
        state.leave();
        drop(state);
        let _nothing_in_between = lock(&self.shared.writing);
        let received = self.state().received;
        if link.send(&Message::Rejoined(Heard { received })).is_err() {
            return Ok(()); // It was the source, and is gone once more.
        }
        self.install(link, rejoin.received).map_err(|_| NotAdopted)
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
        state.closing |= matches!(message, Message::Running(_) | Message::Abort(_));
        let untold = state.received - state.told;
        let tell = state.key.is_some() && (untold >= limits::HEARD_EVERY || is_last(&message));
        drop(state);
        if tell {
            self.tell();
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

    /// A connection is gone; the reader of it says so, or who wrote to it.
    fn cut(&self, generation: u64, error: LinkError) {
        let mut on_event = lock(&self.shared.delivery);
        let mut state = self.state();
        if state.generation != generation || state.ended || state.cut {
            return;
        }
        let comes_back =
            state.key.is_some() && !state.closing && !matches!(error, LinkError::Misbehaved(_));
        state.leave();
        state.ended = !comes_back;
        drop(state);
        self.shared.changed.notify_all();
        if !comes_back {
            return on_event(Event::Lost(error));
        }
        on_event(Event::Cut(error));
        if self.shared.connect.is_some() {
            let control = self.clone();
            spawn("pf-rejoin", move || control.rejoin());
        }
    }

    /// The peer is gone for good.
    fn lose(&self, error: LinkError) {
        let mut on_event = lock(&self.shared.delivery);
        let mut state = self.state();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        state.link.close();
        drop(state);
        self.shared.changed.notify_all();
        on_event(Event::Lost(error));
    }

    /// Source: tries to come back until it is there or the patience is over.
    fn rejoin(&self) {
        let connect = self.shared.connect.as_ref().expect("a source has a way back");
        let mut pause = limits::REJOIN_PAUSE_MIN;
        let mut refused = 0;
        loop {
            let state = self.state();
            let left = state.patience.saturating_sub(state.heard_at.elapsed());
            if state.ended {
                return;
            }
            drop(state);
            let error = match self.try_rejoin(&**connect, left.min(limits::REJOIN_TRY_MAX)) {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::debug!(%error, "not back yet");
            refused += u32::from(error.is_refused());
            // The host is there, and nobody listens: whoever knew of this session is gone.
            let gone = refused >= limits::REJOIN_REFUSALS_MAX || error.is_final();
            if gone || left.is_zero() {
                return self.lose(error);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(limits::REJOIN_PAUSE_MAX);
        }
    }

    fn try_rejoin(&self, connect: &Connect, within: Duration) -> Result<(), LinkError> {
        let within = within.max(limits::REJOIN_PAUSE_MIN);
        let link = connect(within)?;
        // Nobody writes in between; and the count that is told is one of a reader that is gone.
        let _nothing_in_between = lock(&self.shared.writing);
        let state = self.state();
        let (session, received) = (state.session, state.received);
        let key = state.key.ok_or(LinkError::Closed)?;
        drop(state);
        link.send(&Message::Rejoin(Rejoin { session, key, received }))?;
        match link.receive(within)? {
            Message::Rejoined(Heard { received }) => self.install(link, received),
            Message::Abort(abort) => Err(LinkError::NotRejoined { text: abort.text }),
            _ => Err(LinkError::NotRejoined { text: "it answered with something else".into() }),
        }
    }

    /// Goes on with a new connection, whose other end has heard `received` messages. The caller
    /// holds `writing`.
    fn install(&self, link: Link, received: u64) -> Result<(), LinkError> {
        let mut state = self.state();
        if state.ended {
            return Err(LinkError::Closed);
        }
        state.forget(received)?;
        let kept: Vec<_> = state.kept.iter().cloned().collect();
        let away = state.heard_at.elapsed();
        state.generation += 1;
        state.told = state.received;
        state.heard_at = Instant::now();
        (state.cut, state.link) = (false, link.clone());
        let generation = state.generation;
        drop(state);
        self.shared.changed.notify_all();
        let (control, reads) = (self.clone(), link.clone());
        spawn("pf-restored", move || {
            lock(&control.shared.delivery)(Event::Restored { away });
            control.read(generation, &reads);
        });
        for frame in kept {
            if link.send_frame(&frame).is_err() {
                break; // The reader sees that it is gone again, and says so.
            }
        }
        Ok(())
    }

    /// Twice a second says what was heard, and looks whether the peer is still heard.
    fn beat(&self) {
        let mut beat_at = Instant::now();
        loop {
            let state = self.state();
            if state.ended {
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, limits::HEART_LOOKS_EVERY);
            let mut state = waited.unwrap_or_else(|poison| poison.into_inner()).0;
            if state.ended || state.key.is_none() {
                continue;
            }
            // Who is not listened to is not silent. A cut is seen when there is room again.
            if !state.cut && self.shared.backlog.is_full() {
                state.heard_at = Instant::now();
            }
            let (silent, generation) = (state.heard_at.elapsed(), state.generation);
            let (cut, patience) = (state.cut, state.patience);
            drop(state);
            if silent > patience && (!cut || self.shared.connect.is_none()) {
                self.lose(LinkError::Silent { waited: silent });
            } else if silent > limits::SILENCE_MAX && !cut {
                self.cut(generation, LinkError::Silent { waited: silent });
            }
            if beat_at.elapsed() >= limits::HEARD_SAID_EVERY {
                beat_at = Instant::now();
                self.tell();
            }
        }
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// Whoever came back is not the source of this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no such session to go on with")]
pub struct NotAdopted;

impl State {
    fn new(link: Link, session: SessionId, key: Option<Ticket>, patience: Duration) -> Self {
        Self {
            link,
            generation: 0,
            cut: false,
            ended: false,
            closing: false,
            unsaid: false,
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
    fn leave(&mut self) {
        self.cut = true;
        self.generation += 1;
        self.link.close();
    }

    /// Whether what is sent may have to be sent again. A source does not know before the welcome.
    fn keeps(&self) -> bool {
        self.key.is_some() || self.sent <= 1
    }

    /// The peer has heard so many messages; what it says is checked against what was sent.
    fn forget(&mut self, received: u64) -> Result<(), LinkError> {
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

/// After these a side may go: the other must know soon that they were heard.
fn is_last(message: &Message) -> bool {
    matches!(message, Message::Commit | Message::Running(_) | Message::Abort(_))
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
