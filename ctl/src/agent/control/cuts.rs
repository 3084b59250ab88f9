//! Cuts of a control connection: noticed by the heart, got over by a new connection, or the end.
//!
//! The source comes back on a thread of its own; the target is given the new connection by its
//! server. What is sent meanwhile is kept by [`Control::send`].

use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::control::{Heard, Message, Rejoin};

use super::{Connect, Control, Event, lock, spawn};
use crate::agent::link::{Link, LinkError};
use crate::limits;

impl Control {
    /// Twice a second says what was heard, and looks whether the peer is still heard.
    pub(super) fn beat(&self) {
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

    /// A connection is gone; the reader of it says so, or who wrote to it.
    pub(super) fn cut(&self, generation: u64, error: LinkError) {
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
    pub(super) fn lose(&self, error: LinkError) {
        self.end(Event::Lost(error));
    }

    /// Ends it with one last event, unless it has ended.
    pub(super) fn end(&self, last: Event) {
        let mut on_event = lock(&self.shared.delivery);
        let mut state = self.state();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        state.link.close();
        drop(state);
        self.shared.changed.notify_all();
        on_event(last);
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
}

/// Whoever came back is not the source of this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no such session to go on with")]
pub struct NotAdopted;
