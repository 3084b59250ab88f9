//! What a migration from this host would use, and why.

use serde::{Deserialize, Serialize};

use super::Facts;
use super::memory::page_name;
use super::tracking::Outcome;

/// What would be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The tracker; its name is null when none works.
    pub tracker: Choice,
    /// The transport.
    pub transport: Choice,
}

/// One choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// What, by the name it has in reports; null when there is none.
    pub name: Option<String>,
    /// Why.
    pub reason: String,
}

impl Verdict {
    /// As far as one side can tell: the target has a say too.
    pub fn of(facts: &Facts) -> Self {
        Self { tracker: tracker(facts), transport: transport(facts) }
    }
}

fn tracker(facts: &Facts) -> Choice {
    let works: Vec<String> = facts
        .tracking
        .iter()
        .filter(|tried| tried.outcome == Outcome::Works)
        .map(|tried| page_name(tried.page_bytes))
        .collect();
    if works.is_empty() {
        let reason = "no write tracking works here: see Dirty tracking above".into();
        return Choice { name: None, reason };
    }
    let reason = format!(
        "test writes to {} pages were reported; uffd-two-phase under KVM, whose MMU listens",
        works.join(" and ")
    );
    Choice { name: Some("uffd-one-phase".into()), reason }
}

fn transport(facts: &Facts) -> Choice {
    let no_rdma = match facts.rdma.as_ref().map(|probe| &probe.why_none) {
        Some(None) => "RDMA is taken instead where both hosts reach each other by it".to_owned(),
        Some(Some(why)) => format!("no RDMA: {why}"),
        None => "RDMA was not looked at".into(),
    };
    let (name, reason) = match (facts.uring.works(), facts.uring.has_send_zero_copy) {
        (true, true) => ("tcp-uring", "io_uring works and can send without a copy"),
        (true, false) => ("tcp-uring", "io_uring works; each page sent is copied"),
        (false, _) => ("tcp-plain", "io_uring can't be used"),
    };
    Choice { name: Some(name.into()), reason: format!("{reason}; {no_rdma}") }
}
