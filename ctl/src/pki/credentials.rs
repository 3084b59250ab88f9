//! One end's certificate, key and authority as rustls wants them.
//!
//! TLS 1.3 alone, with ring's cipher suites; both sides show a certificate of the same authority,
//! or there is no connection.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};

use super::certificate::{Certificate, date};
use super::error::PkiError;
use super::layout::{self, End, Layout};

/// ALPN of the control connection: no other protocol's client or server is talked to by mistake.
pub const CONTROL: &[u8] = b"pageferry-control/1";
/// ALPN of an encrypted lane.
pub const LANE: &[u8] = b"pageferry-lane/1";

/// What a target shows and believes.
pub fn server(dir: &Path) -> Result<ServerConfig, PkiError> {
    let layout = Layout::of(dir);
    let parts = Parts::read(&layout, End::Server)?;
    let tls = |source| PkiError::Tls { dir: dir.into(), source };
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(parts.roots), provider())
        .with_crls(layout::revocations(&layout.revoked())?)
        .build()
        .map_err(|error| tls(rustls::Error::General(error.to_string())))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(parts.own)));
    config.alpn_protocols = vec![CONTROL.to_vec(), LANE.to_vec()];
    // Nothing follows the handshake but records of ours: no session is resumed.
    config.send_tls13_tickets = 0;
    // The kernel may take over a lane's.
    config.enable_secret_extraction = true;
    Ok(config)
}

/// What a source shows and believes.
pub fn client(dir: &Path) -> Result<ClientConfig, PkiError> {
    client_with(dir, provider(), CONTROL)
}

/// The same for its lanes, whose keys the kernel may take over; with or without ciphers whose keys
/// wear out.
pub fn client_for_lanes(dir: &Path, aes: bool) -> Result<ClientConfig, PkiError> {
    let mut provider = ring::default_provider();
    let lasting = CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;
    provider.cipher_suites.retain(|suite| aes || suite.suite() == lasting);
    let mut config = client_with(dir, Arc::new(provider), LANE)?;
    config.enable_secret_extraction = true;
    Ok(config)
}

fn client_with(
    dir: &Path,
    provider: Arc<CryptoProvider>,
    protocol: &[u8],
) -> Result<ClientConfig, PkiError> {
    let layout = Layout::of(dir);
    let parts = Parts::read(&layout, End::Client)?;
    let tls = |source| PkiError::Tls { dir: dir.into(), source };
    let roots = Arc::new(parts.roots);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .with_crls(layout::revocations(&layout.revoked())?)
        .build()
        .map_err(|error| tls(rustls::Error::General(error.to_string())))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_webpki_verifier(verifier)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(parts.own)));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Whether one end's files fit together and are valid now.
pub fn check(layout: &Layout, end: End) -> Result<(), PkiError> {
    Parts::read(layout, end).map(drop)
}

struct Parts {
    roots: RootCertStore,
    own: CertifiedKey,
}

impl Parts {
    fn read(layout: &Layout, end: End) -> Result<Self, PkiError> {
        layout.require(end)?;
        let tls = |source| PkiError::Tls { dir: layout.dir().into(), source };
        let mut roots = RootCertStore::empty();
        for root in layout::certificates(&layout.authority())? {
            valid_now(&layout.authority(), &root)?;
            roots.add(root).map_err(tls)?;
        }
        let (path, key_path) = (layout.certificate(end), layout.key(end));
        let chain = layout::certificates(&path)?;
        valid_now(&path, &chain[0])?;
        let key = layout::private_key(&key_path)?;
        let own = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                PkiError::Mismatch { certificate: path, key: key_path }
            }
            error => tls(error),
        })?;
        Ok(Self { roots, own })
    }
}

/// Said here, with the file's name, and not only by the peer.
fn valid_now(path: &Path, der: &rustls::pki_types::CertificateDer<'_>) -> Result<(), PkiError> {
    let not_one = || PkiError::NotPem { path: path.into(), what: "certificate" };
    let certificate = Certificate::read(der).ok_or_else(not_one)?;
    let now = SystemTime::now();
    match certificate.valid_at(now) {
        true => Ok(()),
        false => Err(PkiError::NotValidNow {
            path: path.into(),
            from: date(certificate.from),
            until: date(certificate.until),
            now: date(now),
        }),
    }
}

/// Named, not the process's default: nothing global decides which cryptography is used.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
