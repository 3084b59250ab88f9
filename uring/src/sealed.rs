//! TLS of one lane in this process: what goes out is sealed, what comes in is opened.
//!
//! Owned by the lane's [`Line`](crate::wire::Line); used by the lane's worker alone. rustls wants
//! plaintext in memory that holds still, and guest memory does not: every byte is copied into a
//! buffer of ours and sealed from there, or opened there and copied to where it belongs. That copy
//! and the sealing are what encryption costs; both are counted.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::Connection;

use crate::sys::Parcel;

/// Plaintext sealed at a time, and ciphertext read at a time: stays in the second-level cache.
const STEP_BYTES: usize = 128 << 10;

/// A lane's TLS and its buffers.
pub(crate) struct Sealed {
    tls: Box<Connection>,
    plaintext: Vec<u8>,
    ciphertext: Vec<u8>,
    /// What of `ciphertext` has arrived and is not opened.
    pending: std::ops::Range<usize>,
    spent: Duration,
    calls: u64,
}

impl Sealed {
    /// Takes a connection whose handshake is complete.
    pub(crate) fn new(mut tls: Box<Connection>) -> Self {
        tls.set_buffer_limit(None);
        Self {
            tls,
            plaintext: vec![0; STEP_BYTES],
            ciphertext: vec![0; STEP_BYTES],
            pending: 0..0,
            spent: Duration::ZERO,
            calls: 0,
        }
    }

    /// The cipher suite.
    pub(crate) fn suite(&self) -> &'static str {
        let suite = self.tls.negotiated_cipher_suite();
        suite.and_then(|suite| suite.suite().as_str()).unwrap_or("TLS 1.3")
    }

    /// Time spent copying, sealing and opening.
    pub(crate) fn spent(&self) -> Duration {
        self.spent
    }

    /// System calls made.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    /// Seals as much of a parcel as one step takes; it is on its way after [`Sealed::flush`].
    pub(crate) fn seal(&mut self, parcel: &mut Parcel) -> io::Result<()> {
        let began = Instant::now();
        let count = parcel.gather(&mut self.plaintext);
        let sealed = self.tls.writer().write_all(&self.plaintext[..count]);
        self.spent += began.elapsed();
        sealed
    }

    /// Seals a few bytes.
    pub(crate) fn seal_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tls.writer().write_all(bytes)
    }

    /// Whether sealed bytes wait to be sent.
    pub(crate) fn must_flush(&self) -> bool {
        self.tls.wants_write()
    }

    /// Sends some of what was sealed; one system call.
    pub(crate) fn flush(&mut self, mut socket: &TcpStream) -> io::Result<usize> {
        self.calls += 1;
        self.tls.write_tls(&mut socket)
    }

    /// Opens what has arrived into a parcel, as far as it goes; the bytes placed.
    pub(crate) fn open(&mut self, parcel: &mut Parcel) -> io::Result<usize> {
        let began = Instant::now();
        let before = parcel.done();
        let opened = loop {
            if parcel.is_done() {
                break Ok(());
            }
            let want = parcel.left().min(self.plaintext.len());
            match self.open_into(want) {
                Ok(0) => break Ok(()),
                Ok(count) => parcel.scatter(&self.plaintext[..count]),
                Err(error) => break Err(error),
            }
        };
        self.spent += began.elapsed();
        opened.map(|()| parcel.done() - before)
    }

    /// Opens what has arrived into a few bytes; how many there were.
    pub(crate) fn open_bytes(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let want = bytes.len().min(self.plaintext.len());
        let count = self.open_into(want)?;
        bytes[..count].copy_from_slice(&self.plaintext[..count]);
        Ok(count)
    }

    /// Takes ciphertext from the socket; 0 at the end of the stream. One system call.
    pub(crate) fn take_in(&mut self, mut socket: &TcpStream) -> io::Result<usize> {
        assert!(self.pending.is_empty(), "what came before is opened first");
        self.calls += 1;
        let count = socket.read(&mut self.ciphertext)?;
        self.pending = 0..count;
        Ok(count)
    }

    /// At most `want` opened bytes into `plaintext`; 0 when more has to come first.
    fn open_into(&mut self, want: usize) -> io::Result<usize> {
        let mut done = 0;
        while done < want {
            match self.tls.reader().read(&mut self.plaintext[done..want]) {
                // The peer's goodbye: what is still missing will not come.
                Ok(0) => return Err(io::ErrorKind::ConnectionAborted.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.pending.is_empty() {
                        break;
                    }
                    let mut records = &self.ciphertext[self.pending.clone()];
                    self.pending.start += self.tls.read_tls(&mut records)?;
                    self.tls
                        .process_new_packets()
                        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed").field("suite", &self.suite()).finish_non_exhaustive()
    }
}
