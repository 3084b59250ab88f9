//! Where certificates lie: QEMU's names for the files, or libvirt's, so that directories which
//! exist already can be used as they are.
//!
//! ```text
//! QEMU (tls-creds-x509)      libvirt, below /etc/pki
//! ca-cert.pem                CA/cacert.pem
//! ca-crl.pem                 CA/cacrl.pem
//! server-cert.pem            libvirt/servercert.pem
//! server-key.pem             libvirt/private/serverkey.pem
//! client-cert.pem            libvirt/clientcert.pem
//! client-key.pem             libvirt/private/clientkey.pem
//! ```

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::error::PkiError;

/// Certificates and keys of one host, unless told otherwise, when run as root.
pub const SYSTEM_DIR: &str = "/etc/pageferry/pki";

/// Which end of a connection a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Who listens: the target.
    Server,
    /// Who connects: the source.
    Client,
}

/// A directory's files by their use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    dir: PathBuf,
    libvirt: bool,
}

impl Layout {
    /// The layout of a directory that exists, by what is in it; QEMU's if neither is.
    pub fn of(dir: &Path) -> Self {
        let libvirt = !dir.join("ca-cert.pem").exists() && dir.join("CA/cacert.pem").exists();
        Self { dir: dir.into(), libvirt }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Who signs for everybody.
    pub fn authority(&self) -> PathBuf {
        self.dir.join(if self.libvirt { "CA/cacert.pem" } else { "ca-cert.pem" })
    }

    /// Its key, where it was made.
    pub fn authority_key(&self) -> PathBuf {
        self.dir.join(if self.libvirt { "CA/cakey.pem" } else { "ca-key.pem" })
    }

    /// What it has taken back, if the file exists.
    pub fn revoked(&self) -> PathBuf {
        self.dir.join(if self.libvirt { "CA/cacrl.pem" } else { "ca-crl.pem" })
    }

    /// This host's certificate.
    pub fn certificate(&self, end: End) -> PathBuf {
        self.dir.join(match (self.libvirt, end) {
            (false, End::Server) => "server-cert.pem",
            (false, End::Client) => "client-cert.pem",
            (true, End::Server) => "libvirt/servercert.pem",
            (true, End::Client) => "libvirt/clientcert.pem",
        })
    }

    /// Its key.
    pub fn key(&self, end: End) -> PathBuf {
        self.dir.join(match (self.libvirt, end) {
            (false, End::Server) => "server-key.pem",
            (false, End::Client) => "client-key.pem",
            (true, End::Server) => "libvirt/private/serverkey.pem",
            (true, End::Client) => "libvirt/private/clientkey.pem",
        })
    }

    /// Whether one end has all that it needs.
    pub fn require(&self, end: End) -> Result<(), PkiError> {
        for path in [self.authority(), self.certificate(end), self.key(end)] {
            if !path.exists() {
                return Err(self.missing(&path));
            }
        }
        Ok(())
    }

    /// That a file is missing, by its name in the directory.
    pub fn missing(&self, path: &Path) -> PkiError {
        let missing = path.strip_prefix(&self.dir).unwrap_or(path).display().to_string();
        PkiError::Incomplete { dir: self.dir.clone(), missing }
    }
}

/// Where certificates lie unless told otherwise.
pub fn default_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return SYSTEM_DIR.into();
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home);
    config.map_or_else(|| SYSTEM_DIR.into(), |config| config.join("pageferry/pki"))
}

/// Every certificate of a file, the host's own first.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let pem = read(path)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match parsed {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(PkiError::NotPem { path: path.into(), what: "certificate" }),
    }
}

/// A private key. One that every user can read is refused.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PkiError> {
    let pem = read(path)?;
    let metadata = fs::metadata(path).map_err(file(path, "read"))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o007 != 0 {
        return Err(PkiError::KeyOpen { path: path.into(), mode });
    }
    let key = PrivateKeyDer::from_pem_slice(&pem);
    key.map_err(|_| PkiError::NotPem { path: path.into(), what: "private key" })
}

/// Revocation lists; none if there is no such file.
pub fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, PkiError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let pem = read(path)?;
    let parsed: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&pem).collect();
    match parsed {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(PkiError::NotPem { path: path.into(), what: "revocation list" }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    fs::read(path).map_err(file(path, "read"))
}

/// Makes a directory, and those above it, that only its owner may write.
pub fn create_dir(dir: &Path) -> Result<(), PkiError> {
    DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(file(dir, "created"))
}

/// Writes a file that is not there yet, never through a link; `mode` from the first moment on.
pub fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut opened = match opened {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(PkiError::Exists { path: path.into() });
        }
        opened => opened.map_err(file(path, "created"))?,
    };
    opened.write_all(text.as_bytes()).map_err(file(path, "written"))?;
    opened.sync_all().map_err(file(path, "written"))
}

fn file(path: &Path, step: &'static str) -> impl FnOnce(std::io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::File { path, step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirt_s_directory_is_told_from_qemu_s() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        assert!(Layout::of(dir.path()).certificate(End::Server).ends_with("server-cert.pem"));
        fs::create_dir(dir.path().join("CA")).expect("created");
        fs::write(dir.path().join("CA/cacert.pem"), "").expect("written");
        let layout = Layout::of(dir.path());
        assert!(layout.key(End::Client).ends_with("libvirt/private/clientkey.pem"));
        let missing = layout.require(End::Server).expect_err("nothing else is there");
        assert!(missing.to_string().ends_with("has no libvirt/servercert.pem"), "{missing}");
        assert!(missing.hint().expect("a hint").contains("pageferry pki issue"));
    }

    #[test]
    fn a_key_that_everybody_can_read_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("server-key.pem");
        write_new(&path, "-----BEGIN PRIVATE KEY-----\n", 0o600).expect("written");
        assert!(matches!(private_key(&path), Err(PkiError::NotPem { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("changed");
        assert!(matches!(private_key(&path), Err(PkiError::KeyOpen { mode: 0o644, .. })));
        assert!(matches!(write_new(&path, "", 0o600), Err(PkiError::Exists { .. })));
    }
}
