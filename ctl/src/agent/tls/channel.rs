//! A stream of bytes to the peer, through TLS or not.
//!
//! Shared by one reader and one writer. TLS keeps both directions in one state, which is locked
//! only while bytes are turned into records or back, never while the socket is waited for: a peer
//! that does not read must not keep us from hearing it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard};

use pageferry_datapath::control::Ticket;
use pageferry_datapath::ids::SessionId;
use rustls::Connection;

use super::Security;

/// Bytes turned into records at a time.
const SEAL_BYTES: usize = 256 << 10;

/// Label of the exporter (RFC 8446, 7.5) that lane tickets are derived from.
const LANES: &[u8] = b"EXPORTER-pageferry-lanes";

/// A stream of bytes to the peer.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    tls: Option<Box<Mutex<Connection>>>,
    security: Security,
    /// Held for one whole send: records leave in the order in which they were made.
    writing: Mutex<()>,
}

impl Channel {
    /// Without TLS, for this reason.
    pub fn plain(stream: TcpStream, security: Security) -> Self {
        Self { stream, tls: None, security, writing: Mutex::new(()) }
    }

    /// Through TLS; the handshake is complete.
    pub fn tls(stream: TcpStream, mut tls: Connection) -> Self {
        let security = Security::of(&tls);
        // What is sealed is taken out at once, by `send`.
        tls.set_buffer_limit(None);
        Self { stream, tls: Some(Box::new(Mutex::new(tls))), security, writing: Mutex::new(()) }
    }

    /// How it is secured.
    pub fn security(&self) -> &Security {
        &self.security
    }

    /// Bytes that only the two ends of this connection can know, one and the same for a session; at
    /// random where there is no TLS to derive them from.
    pub fn lane_secret(&self, session: SessionId) -> io::Result<[u8; 32]> {
        match &self.tls {
            Some(tls) => lock(tls)
                .export_keying_material([0; 32], LANES, Some(&session.0.to_le_bytes()))
                .map_err(io::Error::other),
            None => Ok(Ticket::random().map_err(io::Error::other)?.0),
        }
    }

    /// The socket, to look at and to tune.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends all of it; sends of other threads wait.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let _whole = self.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(tls) = &self.tls else { return (&self.stream).write_all(bytes) };
        let mut sealed = Vec::new();
        for piece in bytes.chunks(SEAL_BYTES) {
            sealed.clear();
            {
                let mut tls = lock(tls);
                tls.writer().write_all(piece)?;
                drain(&mut tls, &mut sealed)?;
            }
            (&self.stream).write_all(&sealed)?;
        }
        Ok(())
    }

    /// Waits for bytes and appends them; 0 at the end. `buffer` is what a read of the socket may
    /// take.
    pub fn receive(&self, buffer: &mut [u8], into: &mut Vec<u8>) -> io::Result<usize> {
        let before = into.len();
        let Some(tls) = &self.tls else {
            let count = (&self.stream).read(buffer)?;
            into.extend_from_slice(&buffer[..count]);
            return Ok(count);
        };
        // The handshake may have left some.
        if open(&mut lock(tls), into)? {
            return Ok(into.len() - before);
        }
        while into.len() == before {
            let count = (&self.stream).read(buffer)?;
            if count == 0 {
                // Without TLS's own goodbye, too: every message says itself whether it is whole.
                return Ok(0);
            }
            let mut tls = lock(tls);
            let mut records = &buffer[..count];
            while !records.is_empty() {
                tls.read_tls(&mut records)?;
                tls.process_new_packets()
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                if open(&mut tls, into)? {
                    return Ok(into.len() - before);
                }
            }
        }
        Ok(into.len() - before)
    }

    /// Tells the peer that nothing more will be sent.
    pub fn finish(&self) {
        let _whole = self.writing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(tls) = &self.tls {
            let mut goodbye = Vec::new();
            let mut tls = lock(tls);
            tls.send_close_notify();
            if drain(&mut tls, &mut goodbye).is_ok() {
                drop(tls);
                let _the_peer_may_be_gone = (&self.stream).write_all(&goodbye);
            }
        }
        let _already_closed_is_fine = self.stream.shutdown(Shutdown::Write);
    }

    /// Ends it in both directions, at once.
    pub fn close(&self) {
        let _already_closed_is_fine = self.stream.shutdown(Shutdown::Both);
    }
}

fn lock(tls: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    tls.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn drain(tls: &mut Connection, sealed: &mut Vec<u8>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(sealed)?;
    }
    Ok(())
}

/// Takes what was decrypted; true when the peer has said its goodbye.
fn open(tls: &mut Connection, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut piece = [0; 16 << 10];
    loop {
        match tls.reader().read(&mut piece) {
            Ok(0) => return Ok(true),
            Ok(count) => into.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}
