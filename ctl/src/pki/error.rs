//! What can be wrong with certificates and their files, and what to do about it.

use std::path::{Path, PathBuf};

/// Something is wrong with certificates or their files.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be read or written.
    #[error("{} could not be {step}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// `read`, `created`, `written`.
        step: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is something already that is not overwritten.
    #[error("{} is there already", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// A directory has no certificates that could be used.
    #[error("{} has no {missing}", dir.display())]
    Incomplete {
        /// Which.
        dir: PathBuf,
        /// The file that is missing, relative to it.
        missing: String,
    },
    /// A file is not what its name says.
    #[error("{} holds no {what}", path.display())]
    NotPem {
        /// Which.
        path: PathBuf,
        /// `certificate`, `private key`, `revocation list`.
        what: &'static str,
    },
    /// A private key that everybody can read is not private.
    #[error("{} can be read by every user (mode {mode:04o})", path.display())]
    KeyOpen {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate that nobody takes any more, or not yet.
    #[error("{} is valid from {from} until {until}, and it is {now}", path.display())]
    NotValidNow {
        /// Which.
        path: PathBuf,
        /// First moment.
        from: String,
        /// Last moment.
        until: String,
        /// This host's time.
        now: String,
    },
    /// The private key is another certificate's.
    #[error("{} and {} do not belong together", certificate.display(), key.display())]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// Neither a host name nor an address.
    #[error("{name:?} is neither a host name nor an IP address")]
    Name {
        /// As it was given.
        name: String,
    },
    /// A certificate could not be made.
    #[error("a certificate could not be made")]
    Make(#[source] rcgen::Error),
    /// TLS takes none of it.
    #[error("TLS does not take what is in {}", dir.display())]
    Tls {
        /// Where it lies.
        dir: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

impl PkiError {
    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        let in_dir = |path: &Path| path.parent().unwrap_or(path).display().to_string();
        Some(match self {
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                "run it as the user whose file it is, or name another directory with --dir or \
                 --tls-dir"
                    .into()
            }
            Self::File { .. } => return None,
            Self::Exists { path } => format!(
                "it is not overwritten: what it has signed would no longer be believed; remove {} \
                 yourself if that is meant",
                path.display()
            ),
            Self::Incomplete { missing, .. }
                if missing.contains("key.pem") && missing.contains("ca") =>
            {
                "only where `pageferry pki init` was run can certificates be issued; name that \
                 directory with --dir"
                    .into()
            }
            Self::Incomplete { dir, .. } => format!(
                "`pageferry pki init` makes a CA, `pageferry pki issue HOST` what belongs into {} \
                 on HOST",
                dir.display()
            ),
            Self::NotPem { path, .. } => {
                format!("`openssl asn1parse -in {}` shows what is in it", path.display())
            }
            Self::KeyOpen { path, .. } => format!("chmod 600 {}", path.display()),
            Self::NotValidNow { path, .. } => format!(
                "look at this host's clock; `pageferry pki issue HOST` makes new ones for {}",
                in_dir(path)
            ),
            Self::Mismatch { certificate, .. } => {
                format!("copy both files of one certificate into {} again", in_dir(certificate))
            }
            Self::Name { .. } => "name the host as sources will name it in --to".into(),
            Self::Make(_) => return None,
            Self::Tls { dir, .. } => format!("see `pageferry pki show --dir {}`", dir.display()),
        })
    }
}
