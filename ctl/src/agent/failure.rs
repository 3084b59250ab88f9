//! Errors of this host, as the state machines and people want them: a reason, a text, a hint.

use std::error::Error;

use pageferry_datapath::control::AbortReason;
use pageferry_datapath::source::Failure;

/// `what: error: its source: its source`.
pub fn chain(what: &str, error: &(dyn Error + 'static)) -> String {
    let mut text = what.to_owned();
    let mut next = Some(error);
    while let Some(error) = next {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

/// Something failed on this host.
pub fn host(what: &str, error: &(dyn Error + 'static), hint: Option<String>) -> Failure {
    Failure { reason: AbortReason::HostFailed, by_peer: false, text: chain(what, error), hint }
}

/// The monitor's process ended under way.
pub fn monitor_gone(side: &str) -> Failure {
    Failure {
        reason: AbortReason::HostFailed,
        by_peer: false,
        text: format!("the {side}'s QEMU ended"),
        hint: Some("its standard error tells why".into()),
    }
}

/// Something here does not fit; nothing was touched.
pub fn refused(error: &(dyn Error + 'static), hint: Option<String>) -> Failure {
    Failure { reason: AbortReason::Refused, by_peer: false, text: chain("", error), hint }
}

/// RDMA was asked for, and there is none.
pub fn no_rdma(why: &str, hint: &str) -> Failure {
    Failure {
        reason: AbortReason::Refused,
        by_peer: false,
        text: format!("no lanes over RDMA: {why}"),
        hint: Some(hint.into()),
    }
}

/// Text that may come from the peer, fit for a terminal: one line, no control characters, bounded.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(2000).collect()
}
