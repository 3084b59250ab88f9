//! The rights to open lanes: one secret per lane and opening, good once.
//!
//! ```text
//! secret = exporter of the control connection's TLS, or random bytes where there is none
//! ticket = HMAC-SHA256(secret, session | opening | lane | transport)
//! ```
//!
//! So a ticket of another session, of an earlier opening or of another lane is never the same, and
//! what was seen on a lane in the clear opens nothing: it was used up by the lane it was seen on.
//! Owned by the target's session.

use pageferry_datapath::control::Ticket;
use pageferry_datapath::framing::hello::{Hello, Refusal};
use pageferry_datapath::ids::{LaneId, SessionId};
use ring::hmac;

/// What a lane runs on, as far as its ticket goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// An accepted TCP connection.
    Tcp,
    /// A queue pair.
    Rdma,
    /// An accepted TCP connection, while other lanes are over queue pairs.
    BesideRdma,
}

/// The tickets of one session.
#[derive(Debug)]
pub struct Tickets {
    key: hmac::Key,
    session: SessionId,
    opening: u32,
    /// What was given out and not used, by lane.
    unused: Vec<(LaneId, Over, Ticket)>,
}

impl Tickets {
    /// For a session whose control connection has this secret.
    pub fn new(session: SessionId, secret: &[u8; 32]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self { key, session, opening: 0, unused: Vec::new() }
    }

    /// From here on only tickets drawn after this are good.
    pub fn begin_opening(&mut self) {
        self.opening += 1;
        self.unused.clear();
    }

    /// Draws the ticket of one lane of this opening.
    pub fn draw(&mut self, lane: LaneId, over: Over) -> Ticket {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&self.session.0.to_le_bytes());
        context.update(&self.opening.to_le_bytes());
        context.update(&lane.0.to_le_bytes());
        context.update(&[over as u8]);
        let mut ticket = [0; 32];
        ticket.copy_from_slice(context.sign().as_ref());
        self.unused.push((lane, over, Ticket(ticket)));
        Ticket(ticket)
    }

    /// Uses up the ticket of a hello. One that was used, or is another's, is refused.
    pub fn redeem(&mut self, hello: &Hello, over: Over) -> Result<LaneId, Refusal> {
        if hello.session != self.session {
            return Err(Refusal::Ticket);
        }
        // Compared in the same time wherever they differ: see `Ticket`.
        let index = self.unused.iter().position(|(lane, path, ticket)| {
            *lane == hello.lane && *path == over && *ticket == hello.ticket
        });
        let (lane, ..) = self.unused.swap_remove(index.ok_or(Refusal::Ticket)?);
        Ok(lane)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId(7);

    fn hello(lane: u16, ticket: Ticket) -> Hello {
        Hello { session: SESSION, lane: LaneId(lane), ticket }
    }

    #[test]
    fn a_ticket_is_good_once() {
        let mut tickets = Tickets::new(SESSION, &[1; 32]);
        tickets.begin_opening();
        let (first, second) =
            (tickets.draw(LaneId(0), Over::Tcp), tickets.draw(LaneId(1), Over::Tcp));
        assert_eq!(tickets.redeem(&hello(1, first), Over::Tcp), Err(Refusal::Ticket));
        assert_eq!(tickets.redeem(&hello(0, first), Over::Tcp), Ok(LaneId(0)));
        assert_eq!(tickets.redeem(&hello(0, first), Over::Tcp), Err(Refusal::Ticket), "replayed");
        assert_eq!(tickets.redeem(&hello(1, second), Over::Tcp), Ok(LaneId(1)));
    }

    #[test]
    fn a_ticket_is_of_one_session_one_secret_and_one_transport() {
        let mut tickets = Tickets::new(SESSION, &[1; 32]);
        tickets.begin_opening();
        let ticket = tickets.draw(LaneId(0), Over::Rdma);
        for (session, secret) in [(SESSION, [2; 32]), (SessionId(8), [1; 32])] {
            let mut others = Tickets::new(session, &secret);
            others.begin_opening();
            assert_ne!(others.draw(LaneId(0), Over::Rdma), ticket);
            let hello = Hello { session, ..hello(0, ticket) };
            assert_eq!(others.redeem(&hello, Over::Rdma), Err(Refusal::Ticket));
        }
        let other_session = Hello { session: SessionId(8), ..hello(0, ticket) };
        assert_eq!(tickets.redeem(&other_session, Over::Rdma), Err(Refusal::Ticket));
        assert_eq!(tickets.redeem(&hello(0, ticket), Over::Tcp), Err(Refusal::Ticket));
        assert_eq!(tickets.redeem(&hello(0, ticket), Over::Rdma), Ok(LaneId(0)));
    }

    #[test]
    fn lanes_that_are_opened_again_need_fresh_tickets() {
        let mut tickets = Tickets::new(SESSION, &[1; 32]);
        tickets.begin_opening();
        let old = tickets.draw(LaneId(0), Over::Tcp);
        tickets.begin_opening();
        let new = tickets.draw(LaneId(0), Over::Tcp);
        assert_ne!(old, new);
        assert_eq!(tickets.redeem(&hello(0, old), Over::Tcp), Err(Refusal::Ticket));
        assert_eq!(tickets.redeem(&hello(0, new), Over::Tcp), Ok(LaneId(0)));
    }
}
