//! Whoever asks what became of a session that somebody else began.
//!
//! The source's word lets a loaded guest run, or gives it up: it is taken only from the peer that
//! began the session, by its certificate. Decided on the thread of whoever would answer, before
//! anything is touched. Without TLS nobody is known, and nobody told apart.

use pageferry_datapath::control::{Abort, AbortReason, Message};
use pageferry_datapath::ids::SessionId;

use super::link::Link;
use super::record::Record;
use super::tls::Security;

/// Not the source of a session.
#[derive(Debug, thiserror::Error)]
#[error("{who} is not the source of session {session}: nothing is done at its word")]
pub(super) struct Stranger {
    /// The first name of its certificate, or that it has none.
    who: String,
    /// What it asked about.
    session: SessionId,
}

impl Stranger {
    /// Whether `asks` is the source of the session with this record.
    pub(super) fn is_let_by(record: &Record, asks: &Security) -> Result<(), Self> {
        match &record.peer_identity {
            Some(known) if !asks.identity().is_some_and(|it| it.is(known)) => {
                Err(Self::of(asks, record.session))
            }
            _ => Ok(()),
        }
    }

    /// Whether `asks` is the source of a session that is on its way, which came as `source`.
    pub(super) fn is_let_in(
        source: &Security,
        asks: &Security,
        session: SessionId,
    ) -> Result<(), Self> {
        match asks.is_same_peer(source) {
            true => Ok(()),
            false => Err(Self::of(asks, session)),
        }
    }

    fn of(asks: &Security, session: SessionId) -> Self {
        let name = asks.names().first().filter(|name| !name.is_empty());
        let who = name.map_or("a peer without a name", String::as_str).to_owned();
        Self { who, session }
    }

    /// Tells it so, and whoever runs this host.
    pub(super) fn turn_away(&self, link: &Link) {
        match link.peer() {
            Some(from) => eprintln!("{from}: {self}"),
            None => eprintln!("{self}"),
        }
        let hint = "recover it from the host that began it, with that host's --tls-dir";
        let abort =
            Abort { reason: AbortReason::Refused, text: self.to_string(), hint: Some(hint.into()) };
        // Whoever it was may be gone again.
        let _nothing_to_do_about_it = link.send(&Message::Abort(abort)).map(|()| link.finish());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::record::Role;

    fn tls(name: &str, suite: &str) -> Security {
        let names = vec![name.to_owned(), "10.0.0.1".into()];
        Security::Tls { suite: suite.into(), peer: name.into(), names }
    }

    #[test]
    fn only_the_source_of_a_session_is_heard_about_it() {
        let (source, again) = (tls("host-a", "one"), tls("host-a", "another"));
        let strangers = [tls("host-b", "one"), Security::Insecure, Security::Loopback];
        let session = SessionId(7);
        let mut record = Record::attempting(session, Role::Target, "a".into(), "/q".into(), 1);
        // Begun without TLS, or written before this was.
        for asks in strangers.iter().chain([&source]) {
            Stranger::is_let_by(&record, asks).expect("nobody is known");
        }
        record.peer_identity = source.identity();
        Stranger::is_let_by(&record, &again).expect("the source");
        Stranger::is_let_in(&source, &again, session).expect("the source");
        for asks in strangers {
            Stranger::is_let_by(&record, &asks).expect_err("another");
            let error = Stranger::is_let_in(&source, &asks, session).expect_err("another");
            assert!(error.to_string().contains("is not the source of session"), "{error}");
        }
        Stranger::is_let_in(&Security::Loopback, &Security::Loopback, session).expect("the door's");
        Stranger::is_let_in(&Security::Insecure, &source, session).expect_err("another door's");
    }
}
