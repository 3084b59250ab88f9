//! `pageferry pki show`: what a directory holds, and what is wrong with it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::certificate::{Certificate, date};
use super::credentials;
use super::error::PkiError;
use super::layout::{self, End, Layout};

/// A certificate with less left than this is worth a word.
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a directory holds, as text, and whether anything in it is wrong.
pub(super) fn show(dir: &Path) -> Result<(String, bool), PkiError> {
    let layout = Layout::of(dir);
    if !layout.authority().exists() {
        return Err(layout.missing(&layout.authority()));
    }
    let mut shown = Shown { text: format!("{}\n", dir.display()), wrong: false };
    shown.certificate("CA", &layout.authority(), |certificate| {
        (!certificate.is_authority).then_some("it is not a CA's")
    });
    if layout.authority_key().exists() {
        shown.line("CA key", &layout.authority_key().display().to_string());
        if let Err(error) = layout::private_key(&layout.authority_key()) {
            shown.problem(&error);
        }
    }
    for (end, role) in [(End::Server, "target"), (End::Client, "source")] {
        if !layout.certificate(end).exists() && !layout.key(end).exists() {
            shown.line(role, "none: this host can't be one");
            continue;
        }
        shown.certificate(role, &layout.certificate(end), |certificate| match end {
            End::Server if !certificate.for_server => Some("it is not for who listens"),
            End::Server if certificate.names.is_empty() => {
                Some("it names no host (subjectAltName): no source will believe it")
            }
            End::Client if !certificate.for_client => Some("it is not for who connects"),
            _ => None,
        });
        if let Err(error) = credentials::check(&layout, end) {
            shown.problem(&error);
        }
    }
    match layout::revocations(&layout.revoked()) {
        Ok(lists) if lists.is_empty() => {}
        Ok(_) => shown.line("revoked", &layout.revoked().display().to_string()),
        Err(error) => shown.problem(&error),
    }
    Ok((shown.text, shown.wrong))
}

struct Shown {
    text: String,
    wrong: bool,
}

impl Shown {
    fn line(&mut self, name: &str, value: &str) {
        self.text.push_str(&format!("  {name:<8}{value}\n"));
    }

    fn problem(&mut self, error: &PkiError) {
        self.wrong = true;
        self.line("", &format!("WRONG: {}", crate::agent::failure::chain("", error)));
        if let Some(hint) = error.hint() {
            self.line("", &format!("hint: {hint}"));
        }
    }

    fn certificate(
        &mut self,
        role: &str,
        path: &Path,
        wrong: impl FnOnce(&Certificate) -> Option<&'static str>,
    ) {
        let read = layout::certificates(path).map(|found| Certificate::read(&found[0]));
        let certificate = match read {
            Ok(Some(certificate)) => certificate,
            Ok(None) => {
                let error = PkiError::NotPem { path: path.into(), what: "certificate" };
                return self.problem(&error);
            }
            Err(error) => return self.problem(&error),
        };
        self.line(role, &certificate.identity());
        let now = SystemTime::now();
        let state = match certificate.valid_at(now) {
            false => "  WRONG: not valid now",
            true if certificate.until < now + SOON => "  (soon)",
            true => "",
        };
        self.wrong |= !certificate.valid_at(now);
        let (from, until) = (date(certificate.from), date(certificate.until));
        self.line("", &format!("valid {from} to {until}{state}"));
        self.line("", &format!("signed by {}", certificate.issuer));
        self.line("", &format!("sha256 {}", certificate.fingerprint));
        if let Some(wrong_with_it) = wrong(&certificate) {
            self.wrong = true;
            self.line("", &format!("WRONG: {wrong_with_it}"));
        }
    }
}
