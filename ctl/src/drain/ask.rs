//! Asks a target whether it would take a guest in, before the first guest is moved.
//!
//! It is a session that ends with the target's choice: hello, welcome, offer, choice, abort. The
//! target's agent has then looked at the QEMU that waits there as it will for the migration itself,
//! and no page has moved.

use std::time::Instant;

use pageferry_datapath::control::{Abort, AbortReason, Hello, Message};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::source::Failure;

use crate::agent::failure;
use crate::agent::link::{Link, LinkError};
use crate::agent::monitor::GuestFacts;
use crate::agent::source::{self, SourceOptions};
use crate::host;
use crate::limits::CHECK_ANSWER_MAX;

/// Why not.
pub(super) enum No {
    /// Nobody answers there, for any guest.
    Unreachable(Failure),
    /// This guest is not taken in.
    Refused(Failure),
}

/// Whether the target of `options` would take in a guest with these `facts`.
pub(super) fn would_take(options: &SourceOptions, facts: &GuestFacts) -> Result<(), No> {
    let link = Link::connect(&options.to, &options.caller, CHECK_ANSWER_MAX)
        .map_err(|error| No::Unreachable(not_connected(&error)))?;
    let answer = ask(&link, options, facts);
    if answer.is_ok() {
        // Until it has let go of the QEMU that waits: the migration itself may come at once.
        let until = Instant::now() + CHECK_ANSWER_MAX;
        while link.receive(until.saturating_duration_since(Instant::now())).is_ok() {}
    }
    link.close();
    answer.map_err(No::Refused)
}

fn ask(link: &Link, options: &SourceOptions, facts: &GuestFacts) -> Result<(), Failure> {
    let lost = |error: LinkError| failure::host("target", &error, None);
    let session = SessionId::random()
        .map_err(|error| failure::host("session", &std::io::Error::other(error), None))?;
    let hello = Hello {
        session,
        software: host::software(),
        host: host::name(),
        boot_id: host::boot_id(),
        rejoins: false,
    };
    for (said, heard) in [
        (Message::Hello(hello), "welcome"),
        (Message::Offer(source::offer(options, facts)), "choice"),
    ] {
        link.send(&said).map_err(lost)?;
        match (link.receive(CHECK_ANSWER_MAX).map_err(lost)?, heard) {
            (Message::Welcome(_), "welcome") | (Message::Choice(_), "choice") => {}
            (Message::Abort(abort), _) => return Err(abort.into()),
            _ => return Err(out_of_turn(heard)),
        }
    }
    let text = "a drain asked only whether this guest would be taken in".into();
    let abort = Abort { reason: AbortReason::Cancelled, text, hint: None };
    link.send(&Message::Abort(abort)).map_err(lost)?;
    link.finish();
    Ok(())
}

fn out_of_turn(heard: &str) -> Failure {
    Failure {
        reason: AbortReason::PeerMisbehaved,
        by_peer: true,
        text: format!("target: it answered with something else than its {heard}"),
        hint: None,
    }
}

fn not_connected(error: &LinkError) -> Failure {
    let hint = match error {
        LinkError::Tls(error) => error.hint(),
        _ => Some("is `pageferry target --listen` running there, and the port open?".into()),
    };
    failure::refused(error, hint)
}
