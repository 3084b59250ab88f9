//! A small certificate authority: one key that signs a certificate for each host.
//!
//! Keys are ECDSA P-256, which GnuTLS (QEMU, libvirt) and rustls both take. Every host gets two
//! certificates, one to be connected to and one to connect with: a stolen one is good for no more.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};

use super::error::PkiError;
use super::layout::{self, End, Layout};

/// Clocks of hosts differ: what is made now is valid since this long.
const CLOCK_SKEW: Duration = Duration::from_secs(24 * 3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Mode of a private key.
const PRIVATE: u32 = 0o600;
/// Mode of a certificate.
const PUBLIC: u32 = 0o644;

/// Makes an authority in `dir`, named for people.
pub fn init(dir: &Path, name: &str, days: u32) -> Result<(), PkiError> {
    let layout = Layout::of(dir);
    for path in [layout.authority(), layout.authority_key()] {
        if path.exists() {
            return Err(PkiError::Exists { path });
        }
    }
    let key = KeyPair::generate().map_err(PkiError::Make)?;
    let mut params = params(name, &[], Validity::days(days))?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(PkiError::Make)?;
    layout::create_dir(dir)?;
    layout::write_new(&layout.authority_key(), &key.serialize_pem(), PRIVATE)?;
    layout::write_new(&layout.authority(), &certificate.pem(), PUBLIC)
}

/// From when until when a certificate is taken.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    /// First moment.
    pub from: SystemTime,
    /// Last moment.
    pub until: SystemTime,
}

impl Validity {
    /// From now on, so many days.
    pub fn days(days: u32) -> Self {
        let now = SystemTime::now();
        Self { from: now - CLOCK_SKEW, until: now + DAY * days }
    }
}

/// Issues both certificates of a host into `out`, which then has all that the host needs. Nothing
/// is overwritten; what was made before something failed is taken away again.
pub fn issue(
    authority: &Path,
    out: &Path,
    names: &[String],
    validity: Validity,
) -> Result<(), PkiError> {
    let from = Layout::of(authority);
    let (authority_pem, issuer) = open(&from)?;
    let to = Layout::of(out);
    let in_place = from.dir() == to.dir();
    let mut files = Vec::new();
    for end in [End::Server, End::Client] {
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let mut params = params(&names[0], names, validity)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![match end {
            End::Server => ExtendedKeyUsagePurpose::ServerAuth,
            End::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let certificate = params.signed_by(&key, &issuer).map_err(PkiError::Make)?;
        files.push((to.key(end), key.serialize_pem(), PRIVATE));
        files.push((to.certificate(end), certificate.pem(), PUBLIC));
    }
    if !in_place {
        files.push((to.authority(), authority_pem, PUBLIC));
    }
    layout::create_dir(out)?;
    let mut written: Vec<PathBuf> = Vec::new();
    for (path, text, mode) in files {
        if let Err(error) = layout::write_new(&path, &text, mode) {
            for path in written {
                let _it_was_ours = std::fs::remove_file(path);
            }
            return Err(error);
        }
        written.push(path);
    }
    Ok(())
}

/// The authority's certificate as text, and what signs with its key.
fn open(layout: &Layout) -> Result<(String, Issuer<'static, KeyPair>), PkiError> {
    for path in [layout.authority(), layout.authority_key()] {
        if !path.exists() {
            return Err(layout.missing(&path));
        }
    }
    let (path, key_path) = (layout.authority(), layout.authority_key());
    layout::private_key(&key_path)?;
    let text = |path: &Path| {
        std::fs::read_to_string(path).map_err(|source| PkiError::File {
            path: path.into(),
            step: "read",
            source,
        })
    };
    let (pem, key) = (text(&path)?, text(&key_path)?);
    let key = KeyPair::from_pem(&key)
        .map_err(|_| PkiError::NotPem { path: key_path, what: "private key" })?;
    let issuer = Issuer::from_ca_cert_pem(&pem, key)
        .map_err(|_| PkiError::NotPem { path, what: "certificate" })?;
    Ok((pem, issuer))
}

fn params(
    common_name: &str,
    names: &[String],
    validity: Validity,
) -> Result<CertificateParams, PkiError> {
    if let Some(bad) = names.iter().find(|name| !is_host(name)) {
        return Err(PkiError::Name { name: bad.clone() });
    }
    let mut params = CertificateParams::new(names.to_vec()).map_err(PkiError::Make)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.distinguished_name.push(DnType::OrganizationName, "pageferry");
    (params.not_before, params.not_after) = (validity.from.into(), validity.until.into());
    Ok(params)
}

/// A DNS name as certificates have it, or an address.
fn is_host(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.parse::<IpAddr>().is_ok() || name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names() {
        for good in ["a", "host-1.example.org", "10.0.0.2", "fd00::2"] {
            assert!(is_host(good), "{good}");
        }
        for bad in ["", "a..b", "-a", "a b", "../x", "a/b", "*.example.org", "10.0.0.2:4777"] {
            assert!(!is_host(bad), "{bad}");
        }
    }
}
