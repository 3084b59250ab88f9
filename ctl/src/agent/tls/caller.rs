//! The source's side: whom it wants to talk to, and how it makes sure.

use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use pageferry_uring::handshake::{self, HandshakeError};
use pageferry_uring::plan::LaneTls;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection};

use super::{ADMITTED, Channel, Security, TlsError};
use crate::pki::credentials;
use crate::pki::layout::{End, Layout, default_dir};

/// Guest memory of which one lane may carry all, several times over, under one AES-GCM key: that
/// bears 2^24 records of 16 KiB (RFC 8446, 5.5), and ChaCha20 more than any lane sends.
const AES_BYTES_MAX: u64 = 32 << 30;

/// What the source was told about whom to believe.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Certificates; else the default place, and none are needed on loopback.
    pub tls_dir: Option<PathBuf>,
    /// Whom the target's certificate has to name, if not the host of `--to`.
    pub hostname: Option<String>,
    /// No TLS at all.
    pub insecure: bool,
    /// What was read of the certificates: after a cut they may not be readable any more, when the
    /// rights that it took have been dropped.
    pub loaded: Arc<OnceLock<Arc<ClientConfig>>>,
}

impl Caller {
    /// Makes a new connection to `address`, as it was given, one that can be trusted as far as was
    /// asked for.
    pub fn secure(
        &self,
        stream: TcpStream,
        address: &str,
        deadline: Instant,
    ) -> Result<Channel, TlsError> {
        if self.insecure {
            return Ok(Channel::plain(stream, Security::Insecure));
        }
        let loopback = stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback());
        if loopback && self.tls_dir.is_none() {
            return Ok(Channel::plain(stream, Security::Loopback));
        }
        let config = match self.loaded.get() {
            Some(config) => Arc::clone(config),
            None => {
                let config = Arc::new(credentials::client(&self.dir(address)?)?);
                Arc::clone(self.loaded.get_or_init(|| config))
            }
        };
        let tls = ClientConnection::new(config, self.name(address)?).map_err(|source| {
            TlsError::Handshake { peer: "target", error: HandshakeError::Tls { source } }
        })?;
        let mut tls = Connection::from(tls);
        let failed = |error| TlsError::Handshake { peer: "target", error };
        handshake::complete(&stream, &mut tls, deadline).map_err(failed)?;
        let mut word = [0; ADMITTED.len()];
        handshake::read_exact(&stream, &mut tls, &mut word, deadline).map_err(failed)?;
        if word != ADMITTED {
            let source = rustls::Error::NoApplicationProtocol;
            return Err(failed(HandshakeError::Tls { source }));
        }
        Ok(Channel::tls(stream, tls))
    }

    /// What lanes are encrypted with, to the target that was believed before. Of more guest memory
    /// than a lane may carry under one AES key, none is sent under such a key.
    pub fn lane_tls(&self, address: &str, guest_bytes: u64) -> Result<LaneTls, TlsError> {
        let dir = self.dir(address)?;
        let config = credentials::client_for_lanes(&dir, guest_bytes <= AES_BYTES_MAX)?;
        Ok(LaneTls { config: Arc::new(config), name: self.name(address)? })
    }

    /// Where this host's certificates are.
    fn dir(&self, address: &str) -> Result<PathBuf, TlsError> {
        if let Some(dir) = &self.tls_dir {
            return Ok(dir.clone());
        }
        let dir = default_dir();
        match Layout::of(&dir).require(End::Client) {
            Ok(()) => Ok(dir),
            Err(source) => {
                let (address, source) = (address.to_owned(), Box::new(source));
                Err(TlsError::NoCertificates { address, dir, source })
            }
        }
    }

    /// Whom the target's certificate has to name.
    fn name(&self, address: &str) -> Result<ServerName<'static>, TlsError> {
        let host = self.hostname.as_deref().unwrap_or_else(|| host_of(address));
        let name = ServerName::try_from(host.to_owned());
        name.map_err(|_| TlsError::Name { name: host.into() })
    }
}

/// The host of `HOST:PORT`, without the brackets of an IPv6 address.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _port)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_addresses() {
        assert_eq!(host_of("host-b:4777"), "host-b");
        assert_eq!(host_of("10.0.0.2:4777"), "10.0.0.2");
        assert_eq!(host_of("[fd00::2]:4777"), "fd00::2");
    }
}
