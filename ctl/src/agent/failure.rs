//! Errors of this host, as the state machines and people want them: a reason, a text, a hint.

use std::error::Error;

use pageferry_datapath::control::AbortReason;
use pageferry_datapath::lane::LaneError;
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

/// A lane failed on this host. `otherwise` is the hint where its transport has none of its own.
pub fn lane(what: &str, error: &LaneError, otherwise: Option<&str>) -> Failure {
    let own = match error {
        LaneError::Transport { hint, .. } => hint.clone(),
        _ => None,
    };
    host(what, error, own.or_else(|| otherwise.map(Into::into)))
}

/// What is said of lanes that were over RDMA, and now are over TCP.
pub fn carried_on(lost: &Failure) -> String {
    let why = format!("carried on over TCP after RDMA was lost: {}", lost.text);
    lost.hint.as_ref().map_or(why.clone(), |hint| format!("{why} ({hint})"))
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

#[cfg(test)]
mod tests {
    use std::io;

    use pageferry_datapath::ids::LaneId;
    use pageferry_datapath::lane::LanePath;

    use super::*;

    fn lost(hint: Option<&str>) -> Failure {
        let error = LaneError::Transport {
            lane: LaneId(3),
            path: LanePath::Rdma,
            hint: hint.map(Into::into),
            source: Box::new(io::Error::other("the device was removed")),
        };
        lane("moving memory", &error, Some("look at the link"))
    }

    #[test]
    fn a_transports_own_hint_is_told_where_it_has_one() {
        assert_eq!(lost(Some("`rdma link` lists them")).hint.unwrap(), "`rdma link` lists them");
        assert_eq!(lost(None).hint.unwrap(), "look at the link");
        let closed = LaneError::PeerClosed { lane: LaneId(0) };
        assert_eq!(lane("", &closed, Some("look at the link")).hint.unwrap(), "look at the link");
        assert_eq!(lane("", &closed, None).hint, None);
    }

    #[test]
    fn carrying_on_over_tcp_tells_what_happened_to_rdma_and_what_to_do() {
        let why = "carried on over TCP after RDMA was lost: moving memory: lane 3: RDMA: the device \
                   was removed";
        let told = carried_on(&lost(Some("`rdma link` lists them")));
        assert_eq!(told, format!("{why} (`rdma link` lists them)"));
        assert_eq!(carried_on(&Failure { hint: None, ..lost(None) }), why);
    }
}
