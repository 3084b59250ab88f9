//! What a target may be used for: which QEMUs, which memory, which guests, by whom.
//!
//! Rules are `KIND=PATTERN`, with `*` (not across `/`), `**` and `?`. Of a kind with rules only what
//! one of them matches is allowed. Of a kind without any: everything that the operator named
//! (`--qmp`, and that QEMU's memory), nothing that a peer names.

use std::path::Path;
use std::str::FromStr;

use glob::{MatchOptions, Pattern};
use pageferry_datapath::control::{AbortReason, Offer};
use pageferry_datapath::source::Failure;

use super::tls::Security;

/// One `--allow`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    kind: Kind,
    pattern: Pattern,
}

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A QMP socket that the source names.
    Qmp,
    /// A file of guest memory.
    Memory,
    /// QEMU's `-name`.
    Guest,
    /// A name in the source's certificate.
    Peer,
}

/// Not a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a rule looks like qmp=/run/vms/*.qmp, memory=/dev/hugepages/*, guest=web-* or peer=host-a"
)]
pub struct RuleError;

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, pattern) = text.split_once('=').ok_or(RuleError)?;
        let kind = match kind {
            "qmp" => Kind::Qmp,
            "memory" => Kind::Memory,
            "guest" => Kind::Guest,
            "peer" => Kind::Peer,
            _ => return Err(RuleError),
        };
        let absolute = !matches!(kind, Kind::Qmp | Kind::Memory) || pattern.starts_with('/');
        let pattern = Pattern::new(pattern).map_err(|_| RuleError)?;
        if absolute { Ok(Self { kind, pattern }) } else { Err(RuleError) }
    }
}

impl Rule {
    fn matches(&self, what: &str) -> bool {
        let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
        self.pattern.matches_with(what, options)
    }
}

/// What a target may be used for.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// Every `--allow`.
    pub rules: Vec<Rule>,
    /// Largest guest, in bytes.
    pub guest_bytes_max: Option<u64>,
}

impl Allowed {
    /// Whether this peer may bring a guest at all.
    pub fn peer(&self, security: &Security) -> Result<(), Failure> {
        let names = security.names();
        match self.rule_for(Kind::Peer, names.iter().map(String::as_str)) {
            Some(false) => {
                let who = names.first().map_or("a source without a certificate", String::as_str);
                Err(refused(&format!("{who} may not bring guests here"), "peer", who))
            }
            _ => Ok(()),
        }
    }

    /// Whether a source may have its guest taken in by the QEMU behind a socket that it names.
    /// Links and `..` are followed first: the rule is about where they lead.
    pub fn named_qmp(&self, named: &Path) -> Result<(), Failure> {
        let leads_to = std::fs::canonicalize(named).unwrap_or_else(|_| named.to_owned());
        let leads_to = leads_to.display().to_string();
        match self.rule_for(Kind::Qmp, [leads_to.as_str()]) {
            Some(true) if !leads_to.contains("/../") => Ok(()),
            _ => {
                let what = format!("the source may not choose the QMP socket {leads_to}");
                Err(refused(&what, "qmp", &leads_to))
            }
        }
    }

    /// Whether a guest may be written into this QEMU: its name and the files of its memory.
    pub fn monitor(&self, name: Option<&str>, memory: &[String]) -> Result<(), Failure> {
        if self.rule_for(Kind::Guest, name) == Some(false) {
            let name = name.unwrap_or("a QEMU without a -name");
            return Err(refused(&format!("{name} is not to be moved here"), "guest", name));
        }
        for file in memory {
            if self.rule_for(Kind::Memory, [file.as_str()]) == Some(false) {
                return Err(refused(&format!("{file} may not be written to"), "memory", file));
            }
        }
        Ok(())
    }

    /// Whether a guest of this size is taken in.
    pub fn size(&self, offer: &Offer) -> Result<(), Failure> {
        let bytes: u64 = offer.regions.iter().map(|region| region.bytes).sum();
        match self.guest_bytes_max {
            Some(most) if bytes > most => Err(Failure {
                reason: AbortReason::Refused,
                by_peer: false,
                text: format!("a guest of {bytes} bytes; this target takes at most {most}"),
                hint: Some("start the target with a larger --guest-max-mib".into()),
            }),
            _ => Ok(()),
        }
    }

    /// Whether a rule of this kind matches any of them; `None` if there is no such rule.
    fn rule_for<'a>(&self, kind: Kind, what: impl IntoIterator<Item = &'a str>) -> Option<bool> {
        let mut rules = self.rules.iter().filter(|rule| rule.kind == kind).peekable();
        rules.peek()?;
        let rules: Vec<&Rule> = rules.collect();
        Some(what.into_iter().any(|what| rules.iter().any(|rule| rule.matches(what))))
    }
}

fn refused(what: &str, kind: &str, example: &str) -> Failure {
    Failure {
        reason: AbortReason::Refused,
        by_peer: false,
        text: format!("not allowed at the target: {what}"),
        hint: Some(format!("start the target with --allow {kind}={example}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(rules: &[&str]) -> Allowed {
        let rules = rules.iter().map(|rule| rule.parse().expect("a rule")).collect();
        Allowed { rules, guest_bytes_max: None }
    }

    fn tls(name: &str) -> Security {
        let names = vec![name.to_owned(), "10.0.0.1".into()];
        Security::Tls { suite: String::new(), peer: name.into(), names }
    }

    #[test]
    fn rules_are_parsed() {
        for bad in ["", "qmp", "qmp=run/x", "disk=/x", "memory=[", "Peer=x"] {
            assert_eq!(bad.parse::<Rule>(), Err(RuleError), "{bad}");
        }
    }

    #[test]
    fn a_socket_that_a_source_names_needs_a_rule() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let dir = dir.path().canonicalize().expect("it exists");
        let (inside, outside) = (dir.join("vms/a.qmp"), dir.join("secret"));
        std::fs::create_dir(dir.join("vms")).expect("created");
        for file in [&inside, &outside] {
            std::fs::write(file, "").expect("written");
        }
        let rules = allowed(&[&format!("qmp={}/vms/*", dir.display())]);
        rules.named_qmp(&inside).expect("allowed");
        let escaping = dir.join("vms/../secret");
        let link = dir.join("vms/link");
        std::os::unix::fs::symlink(&outside, &link).expect("linked");
        for path in [&outside, &escaping, &link, &dir.join("vms/../vms2/a")] {
            rules.named_qmp(path).expect_err(&path.display().to_string());
        }
        let failure = allowed(&[]).named_qmp(&inside).expect_err("nothing is allowed by itself");
        assert!(failure.hint.is_some_and(|hint| hint.contains("--allow qmp=")));
    }

    #[test]
    fn peers_guests_and_memory_are_free_until_there_is_a_rule() {
        let none = allowed(&[]);
        none.peer(&Security::Insecure).expect("no rule");
        none.monitor(None, &["/memfd:x (deleted)".into()]).expect("no rule");
        let some = allowed(&["peer=host-*", "guest=web-*", "memory=/dev/hugepages/**"]);
        some.peer(&tls("host-a")).expect("allowed");
        some.peer(&tls("other")).expect_err("another");
        some.peer(&Security::Insecure).expect_err("nobody knows who");
        let huge = ["/dev/hugepages/vms/a".to_owned()];
        some.monitor(Some("web-1"), &huge).expect("allowed");
        some.monitor(Some("db-1"), &huge).expect_err("another guest");
        some.monitor(None, &huge).expect_err("no name");
        some.monitor(Some("web-1"), &["/dev/shm/a".into()]).expect_err("another file");
    }
}
