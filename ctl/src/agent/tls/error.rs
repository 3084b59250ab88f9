//! Why there is no secure connection, in words that name the knob.

use pageferry_uring::handshake::HandshakeError;
use rustls::{AlertDescription, CertificateError, Error};

use crate::pki::PkiError;

/// Why there is no secure connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// This host has no certificates, or they are not in order.
    #[error("certificates of this host")]
    Own(#[source] Box<PkiError>),
    /// The handshake failed.
    #[error("{}", words(.error, .peer))]
    Handshake {
        /// `source` or `target`.
        peer: &'static str,
        /// How.
        error: HandshakeError,
    },
    /// The name in `--to` or `--tls-hostname` is neither a host name nor an address.
    #[error("{name:?} is no host name that a certificate could have")]
    Name {
        /// As it was given.
        name: String,
    },
    /// Encrypted lanes were asked for where nobody knows who is on the other side.
    #[error("the control connection has no TLS")]
    NotEncrypted,
    /// An address that is not this host's, and no certificates.
    #[error("no certificates, and {address} is not loopback")]
    NoCertificates {
        /// Where it would listen, or connect to.
        address: String,
        /// Where they were looked for.
        dir: std::path::PathBuf,
        /// What is missing there.
        #[source]
        source: Box<PkiError>,
    },
}

impl From<PkiError> for TlsError {
    fn from(error: PkiError) -> Self {
        Self::Own(Box::new(error))
    }
}

impl TlsError {
    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Own(error) => error.hint(),
            Self::NotEncrypted => {
                Some("give both sides certificates: `pageferry pki issue`, --tls-dir".into())
            }
            Self::Name { .. } => Some("say with --tls-hostname whom the certificate names".into()),
            Self::NoCertificates { dir, .. } => Some(format!(
                "`pageferry pki init` and `pageferry pki issue HOST` make what belongs into {}; \
                 --tls-dir DIR takes QEMU's or libvirt's; --insecure does without, where the \
                 network is yours alone",
                dir.display()
            )),
            Self::Handshake { error, peer } => hint(error, peer),
        }
    }
}

/// What went wrong, seen from the side that says it; `peer` is the other.
fn words(error: &HandshakeError, peer: &str) -> String {
    let HandshakeError::Tls { source } = error else {
        return match error {
            HandshakeError::PeerClosed => {
                format!("the {peer} closed the connection in the TLS handshake")
            }
            HandshakeError::Timeout => format!("the {peer} did not complete the TLS handshake"),
            other => crate::agent::failure::chain("TLS handshake", other),
        };
    };
    match source {
        Error::NoCertificatesPresented => format!("the {peer} shows no certificate"),
        Error::InvalidCertificate(problem) => certificate(problem, peer),
        Error::AlertReceived(alert) => alerted(*alert, peer),
        Error::InvalidMessage(_) => format!("the {peer} does not speak TLS"),
        Error::PeerIncompatible(what) => {
            format!("the {peer} speaks another TLS than 1.3 ({what:?})")
        }
        Error::NoApplicationProtocol => format!("the {peer} is no pageferry"),
        other => format!("TLS with the {peer}: {other}"),
    }
}

fn certificate(problem: &CertificateError, peer: &str) -> String {
    use CertificateError as Problem;
    match problem {
        Problem::Expired | Problem::ExpiredContext { .. } => {
            format!("the {peer}'s certificate has expired")
        }
        Problem::NotValidYet | Problem::NotValidYetContext { .. } => {
            format!("the {peer}'s certificate is not valid yet")
        }
        Problem::UnknownIssuer | Problem::BadSignature => {
            format!("the {peer}'s certificate is signed by another CA than ours")
        }
        Problem::Revoked => format!("the {peer}'s certificate was revoked"),
        Problem::NotValidForNameContext { expected, presented } => {
            let presented: Vec<&str> = presented.iter().map(|name| readable(name)).collect();
            let presented = match presented.is_empty() {
                true => "no name at all".into(),
                false => presented.join(", "),
            };
            format!(
                "the {peer}'s certificate is not for {}, but for {presented}",
                expected.to_str()
            )
        }
        Problem::NotValidForName => format!("the {peer}'s certificate is for another name"),
        Problem::InvalidPurpose | Problem::InvalidPurposeContext { .. } => match peer {
            "target" => "the target's certificate is not for who listens".into(),
            _ => format!("the {peer}'s certificate is not for who connects"),
        },
        other => crate::agent::failure::one_line(&format!("the {peer}'s certificate: {other}")),
    }
}

/// `DnsName("host-b")` as rustls writes it, without its wrapping.
fn readable(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.unwrap_or(name).trim_matches('"')
}

fn alerted(alert: AlertDescription, peer: &str) -> String {
    use AlertDescription as Alert;
    match alert {
        Alert::UnknownCA | Alert::DecryptError => {
            format!("the {peer} does not believe our certificate: it knows another CA")
        }
        Alert::CertificateExpired => format!(
            "the {peer} does not believe our certificate: it has expired by the {peer}'s clock"
        ),
        Alert::CertificateRevoked => {
            format!("the {peer} does not believe our certificate: it was revoked")
        }
        Alert::BadCertificate | Alert::UnsupportedCertificate | Alert::CertificateUnknown => {
            format!("the {peer} does not take our certificate ({alert:?})")
        }
        Alert::CertificateRequired => format!("the {peer} demands a certificate"),
        Alert::NoApplicationProtocol => format!("the {peer} is no pageferry"),
        Alert::HandshakeFailure => format!("the {peer} takes no TLS"),
        other => format!("the {peer} ended the TLS handshake ({other:?})"),
    }
}

fn hint(error: &HandshakeError, peer: &str) -> Option<String> {
    use CertificateError as Problem;
    let same_ca = "both hosts need the same ca-cert.pem in their --tls-dir, and certificates that \
                   it signed: see `pageferry pki show` on both";
    let HandshakeError::Tls { source } = error else {
        return match error {
            HandshakeError::PeerClosed | HandshakeError::Timeout => {
                Some(format!("look at the {peer} agent's output, and at the link"))
            }
            _ => None,
        };
    };
    let text = match source {
        Error::InvalidCertificate(problem) => match problem {
            Problem::Expired
            | Problem::ExpiredContext { .. }
            | Problem::NotValidYet
            | Problem::NotValidYetContext { .. } => format!(
                "`pageferry pki issue` makes new ones for the {peer}; and look at both clocks"
            ),
            Problem::NotValidForName | Problem::NotValidForNameContext { .. } => {
                "name the target in --to as its certificate does, say with --tls-hostname whom it \
                 names, or issue it for that name too"
                    .into()
            }
            Problem::InvalidPurpose | Problem::InvalidPurposeContext { .. } => {
                "server-cert.pem and client-cert.pem are not the same: see `pageferry pki show`"
                    .into()
            }
            Problem::Revoked => format!("the {peer} needs a new certificate"),
            _ => same_ca.into(),
        },
        Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            same_ca.into()
        }
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "`pageferry pki show` on this host says until when it is valid; look at both clocks"
                .into()
        }
        Error::AlertReceived(AlertDescription::HandshakeFailure) | Error::InvalidMessage(_) => {
            "start it with --tls-dir or certificates in their default place; or both sides with \
             --insecure, where the network is yours alone"
                .into()
        }
        Error::NoCertificatesPresented
        | Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "give both sides certificates: `pageferry pki issue`".into()
        }
        Error::AlertReceived(_) => {
            format!("look at the {peer} agent's output; and see `pageferry pki show` on both")
        }
        _ => return None,
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_a_certificate_are_readable() {
        assert_eq!(readable(r#"DnsName("host-b")"#), "host-b");
        assert_eq!(readable("IpAddress(10.0.0.2)"), "10.0.0.2");
        assert_eq!(readable("else"), "else");
    }
}
