//! TLS handshakes, and the few bytes that follow them, with a deadline for all of it.
//!
//! Blocking calls for the short-lived thread that opens or greets one connection. Which
//! certificates are shown and believed is the caller's configuration.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::Connection;

/// Why a connection is not secured.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// One side does not believe the other, or one of them is no TLS.
    #[error("no TLS connection")]
    Tls {
        /// What rustls found, or was told by the peer.
        #[source]
        source: rustls::Error,
    },
    /// The peer closed the connection.
    #[error("connection closed by the peer")]
    PeerClosed,
    /// The deadline passed.
    #[error("no complete TLS handshake before the deadline")]
    Timeout,
    /// A system call failed.
    #[error("socket call failed")]
    Host {
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// Shakes hands. A byte a second does not extend the deadline.
pub fn complete(
    stream: &TcpStream,
    tls: &mut Connection,
    deadline: Instant,
) -> Result<(), HandshakeError> {
    while tls.is_handshaking() {
        flush(stream, tls, deadline)?;
        if tls.is_handshaking() {
            take_in(stream, tls, deadline)?;
        }
    }
    flush(stream, tls, deadline)
}

/// Sends bytes that follow the handshake.
pub fn write_all(
    stream: &TcpStream,
    tls: &mut Connection,
    bytes: &[u8],
    deadline: Instant,
) -> Result<(), HandshakeError> {
    tls.writer().write_all(bytes).map_err(failed)?;
    flush(stream, tls, deadline)
}

/// Takes bytes that follow the handshake, and no more than those.
pub fn read_exact(
    stream: &TcpStream,
    tls: &mut Connection,
    mut bytes: &mut [u8],
    deadline: Instant,
) -> Result<(), HandshakeError> {
    while !bytes.is_empty() {
        match tls.reader().read(bytes) {
            Ok(0) => return Err(HandshakeError::PeerClosed),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                take_in(stream, tls, deadline)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

fn flush(
    mut stream: &TcpStream,
    tls: &mut Connection,
    deadline: Instant,
) -> Result<(), HandshakeError> {
    while tls.wants_write() {
        stream.set_write_timeout(Some(left(deadline)?)).map_err(failed)?;
        match tls.write_tls(&mut stream) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

fn take_in(
    mut stream: &TcpStream,
    tls: &mut Connection,
    deadline: Instant,
) -> Result<(), HandshakeError> {
    stream.set_read_timeout(Some(left(deadline)?)).map_err(failed)?;
    match tls.read_tls(&mut stream) {
        Ok(0) => return Err(HandshakeError::PeerClosed),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match tls.process_new_packets() {
        Ok(_) => Ok(()),
        Err(source) => {
            // The alert tells the peer why; it may be gone.
            let _best_effort = flush(stream, tls, deadline);
            Err(HandshakeError::Tls { source })
        }
    }
}

fn left(deadline: Instant) -> Result<Duration, HandshakeError> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(HandshakeError::Timeout),
        left => Ok(left),
    }
}

fn failed(source: io::Error) -> HandshakeError {
    match source.kind() {
        // Linux reports an expired socket timeout as EAGAIN.
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => HandshakeError::Timeout,
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => HandshakeError::PeerClosed,
        _ => HandshakeError::Host { source },
    }
}
