//! Who talks to whom: TLS on the control connection, or the word that there is none.
//!
//! ```text
//!   source (Caller)                          target (Door)
//!   ClientHello, ALPN pageferry-control ──>
//!                      <── ServerHello, certificate, CertificateRequest
//!   certificate, Finished               ──>  believed? an alert says why not
//!                      <── "PFRY": admitted
//!   control frames     <──────────────>      control frames
//! ```
//!
//! TLS 1.3 with certificates on both sides is what happens between hosts; without it there is no
//! connection unless `--insecure` says so, or the connection never leaves this host (loopback).

mod caller;
mod channel;
mod door;
mod error;
mod identity;

use rustls::Connection;

pub use caller::Caller;
pub use channel::Channel;
pub use door::{Door, Greeted};
pub use error::TlsError;
pub use identity::Identity;

use crate::pki::certificate::Certificate;

/// What the target says first inside TLS: only then does the source know that it was believed.
const ADMITTED: [u8; 4] = *b"PFRY";

/// How a control connection is secured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// Both sides have shown who they are.
    Tls {
        /// `TLS13_AES_256_GCM_SHA384` and the like.
        suite: String,
        /// Whom the peer's certificate names.
        peer: String,
        /// Every name in it, the subject's first.
        names: Vec<String>,
    },
    /// Not at all: it never leaves this host.
    Loopback,
    /// Not at all: asked for.
    Insecure,
}

impl Security {
    /// Of a connection whose handshake is complete.
    fn of(tls: &Connection) -> Self {
        let suite = tls.negotiated_cipher_suite().map_or_else(String::new, |suite| {
            suite.suite().as_str().map_or_else(String::new, str::to_owned)
        });
        let shown = tls.peer_certificates().and_then(|chain| chain.first());
        let certificate = shown.and_then(Certificate::read);
        let peer = certificate.as_ref().map_or_else(|| "unnamed".into(), Certificate::identity);
        let names = certificate.map_or_else(Vec::new, |it| {
            let mut names = vec![it.subject];
            names.extend(it.names);
            names.dedup();
            names
        });
        Self::Tls { suite, peer, names }
    }

    /// Every name in the peer's certificate; none where there is none.
    pub fn names(&self) -> &[String] {
        match self {
            Self::Tls { names, .. } => names,
            Self::Loopback | Self::Insecure => &[],
        }
    }

    /// Who the peer is, for another day; `None` where nobody knows.
    pub fn identity(&self) -> Option<Identity> {
        match self {
            Self::Tls { names, .. } => Some(Identity::of(names)),
            Self::Loopback | Self::Insecure => None,
        }
    }

    /// Whether this is the peer of that connection, too, as far as anybody knows.
    pub fn is_same_peer(&self, other: &Self) -> bool {
        match (self.identity(), other.identity()) {
            (Some(one), Some(other)) => one.is(&other),
            (None, None) => self == other,
            _ => false,
        }
    }

    /// What to say loudly, for this side.
    pub fn warning(&self, side: &str) -> Option<String> {
        (*self == Self::Insecure).then(|| {
            format!(
                "--insecure: the {side} does not know whom it talks to; whoever is on the network \
                 in between can read and change the guest"
            )
        })
    }
}
