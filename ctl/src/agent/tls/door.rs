//! The target's side: who may come in.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_datapath::control::{Abort, AbortReason, Message, encode};
use pageferry_uring::handshake::{self, HandshakeError};
use rustls::{Connection, ServerConfig, ServerConnection};

use super::{ADMITTED, Channel, Security, TlsError};
use crate::pki::credentials;
use crate::pki::layout::{End, Layout, default_dir};

/// A fatal TLS alert, `handshake_failure`: what a client understands before anything is agreed.
const NO_TLS: [u8; 7] = [21, 3, 3, 0, 2, 2, 40];

/// How long a peer that was turned away may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// Who may come in.
#[derive(Clone, Debug)]
pub enum Door {
    /// Who shows a certificate that is believed.
    Tls(Arc<ServerConfig>),
    /// Whoever can reach it.
    Plain(Security),
}

/// A connection that came in through TLS, by what it wants to be.
#[derive(Debug)]
pub enum Greeted {
    /// A control connection.
    Control(Channel),
    /// A lane: the hello comes next, inside TLS.
    Lane(TcpStream, Box<Connection>),
}

impl Door {
    /// The door of a target that listens at `address`: TLS wherever certificates are given or the
    /// network can be reached.
    pub fn of(
        address: SocketAddr,
        tls_dir: Option<&Path>,
        insecure: bool,
    ) -> Result<Self, TlsError> {
        if insecure {
            return Ok(Self::Plain(Security::Insecure));
        }
        let dir = match tls_dir {
            Some(dir) => dir.to_owned(),
            None if address.ip().is_loopback() => return Ok(Self::Plain(Security::Loopback)),
            None => {
                let dir = default_dir();
                if let Err(source) = Layout::of(&dir).require(End::Server) {
                    let (address, source) = (address.ip().to_string(), Box::new(source));
                    return Err(TlsError::NoCertificates { address, dir, source });
                }
                dir
            }
        };
        Ok(Self::Tls(Arc::new(credentials::server(&dir)?)))
    }

    /// How connections through it are secured, if not by TLS.
    pub fn plain(&self) -> Option<&Security> {
        match self {
            Self::Tls(_) => None,
            Self::Plain(security) => Some(security),
        }
    }

    /// Shakes hands with a connection that began with TLS.
    pub fn shake_hands(&self, stream: TcpStream, deadline: Instant) -> Result<Greeted, TlsError> {
        let failed = |error| TlsError::Handshake { peer: "source", error };
        let tls_failed = |source| failed(HandshakeError::Tls { source });
        let Self::Tls(config) = self else {
            let _it_may_be_gone = (&stream).write_all(&NO_TLS);
            linger(&stream);
            return Err(tls_failed(rustls::Error::General(
                "it speaks TLS, and this target was started without certificates".into(),
            )));
        };
        let tls = ServerConnection::new(Arc::clone(config)).map_err(tls_failed)?;
        let mut tls = Connection::from(tls);
        handshake::complete(&stream, &mut tls, deadline).map_err(failed)?;
        match tls.alpn_protocol() {
            Some(credentials::LANE) => return Ok(Greeted::Lane(stream, Box::new(tls))),
            Some(credentials::CONTROL) => {}
            _ => return Err(tls_failed(rustls::Error::NoApplicationProtocol)),
        }
        handshake::write_all(&stream, &mut tls, &ADMITTED, deadline).map_err(failed)?;
        Ok(Greeted::Control(Channel::tls(stream, tls)))
    }

    /// Tells a source that came without TLS that this is not how one comes in.
    pub fn turn_away(stream: &TcpStream) {
        let refusal = Message::Abort(Abort {
            reason: AbortReason::Refused,
            text: "the target takes only connections with certificates (TLS)".into(),
            hint: Some(
                "give this side certificates too: `pageferry pki issue`, --tls-dir; or both sides \
                 --insecure, where the network is yours alone"
                    .into(),
            ),
        });
        let _it_may_be_gone = (&*stream).write_all(&encode(&refusal));
        linger(stream);
    }
}

/// Lets the peer read what it was told: a socket closed with unread bytes in it is reset, and the
/// words with it.
fn linger(stream: &TcpStream) {
    let _nothing_more_is_said = stream.shutdown(std::net::Shutdown::Write);
    let until = Instant::now() + LINGER;
    let mut unread = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let waits = !left.is_zero() && stream.set_read_timeout(Some(left)).is_ok();
        if !waits || !matches!((&*stream).read(&mut unread), Ok(1..)) {
            break;
        }
    }
}
