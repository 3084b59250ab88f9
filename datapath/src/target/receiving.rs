//! Memory on its way in: rounds, barriers, and which pages are stale at each moment.

use super::input::{Command, Input};
use super::state::{State, Step, feed, misbehaved, stay};
use crate::bitmap::DirtySet;
use crate::control::{DigestReport, Message, RoundStart};
use crate::ids::RoundIndex;
use crate::source::Failure;

/// Memory on its way in.
#[derive(Clone, Debug, Hash)]
pub(super) struct Receiving {
    /// Pages whose bytes here are older than the guest's: all of them until the first round has
    /// closed, then what was announced by a round not yet closed.
    stale: DirtySet,
    /// The round on its way.
    current: Option<Current>,
    /// Rounds begun.
    rounds: u32,
    /// The newest round of which every lane has placed everything. The lanes are connections of
    /// their own: they may be ahead of the control connection's word that the round began.
    placed: Option<RoundIndex>,
    /// The last round has closed: the guest is paused, and nothing more will be written.
    complete: bool,
    /// The monitor waits for its device state.
    preparing: Asked,
    /// All guest memory was digested.
    digesting: Asked,
}

/// Something that the source asks for once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Asked {
    NotYet,
    OnItsWay,
    Done,
}

#[derive(Clone, Debug, Hash)]
struct Current {
    round: RoundIndex,
    pages: DirtySet,
    last: bool,
    cleared: bool,
    ended: bool,
}

impl Receiving {
    pub(super) fn new(shape: Vec<(u64, u64)>) -> Self {
        Self {
            stale: DirtySet::full(shape),
            current: None,
            rounds: 0,
            placed: None,
            complete: false,
            preparing: Asked::NotYet,
            digesting: Asked::NotYet,
        }
    }

    pub(super) fn stale(&self) -> &DirtySet {
        &self.stale
    }

    pub(super) fn take(mut self: Box<Self>, input: Input, out: &mut Vec<Command>) -> Step {
        match (input, self.current.as_mut()) {
            (Input::Message(Message::RoundStart(start)), None) if !self.complete => {
                self.begin(start, out)?;
            }
            (Input::Cleared(round), Some(current)) if current.round == round => {
                current.cleared = true;
            }
            (Input::Placed(round), _) => self.placed(round)?,
            (Input::Message(Message::RoundEnd(round)), Some(current))
                if current.round == round && !current.ended =>
            {
                current.ended = true;
            }
            (Input::Message(Message::Prepare), _) if self.preparing == Asked::NotYet => {
                self.preparing = Asked::OnItsWay;
                out.push(Command::PrepareIncoming);
            }
            (Input::IncomingPrepared, _) if self.preparing == Asked::OnItsWay => {
                self.preparing = Asked::Done;
                out.push(Command::Send(Message::Prepared));
            }
            (Input::Message(Message::Verify), None)
                if self.complete && self.digesting == Asked::NotYet =>
            {
                self.digesting = Asked::OnItsWay;
                out.push(Command::Digest);
            }
            (Input::Digested { digest, took }, _) if self.digesting == Asked::OnItsWay => {
                self.digesting = Asked::Done;
                out.push(Command::Send(Message::DigestReport(DigestReport {
                    took_us: took.as_micros() as u64,
                    digest: digest.encode(),
                })));
            }
            (Input::Message(Message::DeviceState(bytes)), None)
                if self.complete
                    && self.preparing == Asked::Done
                    && self.digesting != Asked::OnItsWay =>
            {
                assert!(self.stale.is_empty(), "every announced round has closed");
                return feed(0, bytes, out);
            }
            (input, _) => return stay(State::Receiving(self), input),
        }
        self.close(out);
        Ok(State::Receiving(self))
    }

    /// The lanes' word that a round is in this memory. They may be ahead of the source's that it
    /// began, but not by a round that can't have begun.
    fn placed(&mut self, round: RoundIndex) -> Result<(), Failure> {
        let due = self.current.as_ref().map_or(RoundIndex(self.rounds), |current| current.round);
        if self.complete || round != due || self.placed == Some(round) {
            return Err(misbehaved("its lanes ended a round that had not begun"));
        }
        self.placed = Some(round);
        Ok(())
    }

    fn begin(&mut self, start: RoundStart, out: &mut Vec<Command>) -> Result<(), Failure> {
        let RoundStart { round, last, bitmap } = start;
        let shape: Vec<_> = self.stale.shape().collect();
        let pages = DirtySet::decode(&bitmap, shape)
            .map_err(|_| misbehaved("the bitmap of a round does not decode"))?;
        if round.0 != self.rounds {
            return Err(misbehaved("a round is out of order"));
        }
        self.rounds += 1;
        self.stale.union_with(&pages);
        out.push(Command::BeginRound { round, pages: pages.clone() });
        self.current = Some(Current { round, pages, last, cleared: false, ended: false });
        Ok(())
    }

    /// Closes the round when the source said that it ended, every lane placed it, and nothing of
    /// ours is still at work on its pages.
    fn close(&mut self, out: &mut Vec<Command>) {
        let placed = self.placed;
        let done = |c: &mut Current| c.cleared && c.ended && placed == Some(c.round);
        let Some(current) = self.current.take_if(done) else { return };
        // What the first round did not bring is cleared, as the guest has it.
        match current.round {
            RoundIndex(0) => self.stale.clear(),
            _ => self.stale.subtract(&current.pages),
        }
        self.complete = current.last;
        out.push(Command::Send(Message::RoundClosed(current.round)));
    }
}
