//! The control connection: messages over one stream, through TLS where that was agreed.
//!
//! The writer half is shared (the agent's loop and the device state relay both send) behind a
//! lock held for one frame; the reader half is a thread that decodes and hands on. What the
//! messages mean is none of its business.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use pageferry_datapath::control::{Abort, AbortReason, Decoder, FrameError, Message, encode};
use pageferry_datapath::ids::SessionId;

use super::failure;
use super::tls::{Caller, Channel, Security, TlsError};
use crate::privileges;

/// A peer whose host is gone is noticed after this long, also when nothing is being said.
const DEAD_AFTER: Duration = Duration::from_secs(20);
/// Bytes taken from the socket at once.
const READ_BYTES: usize = 256 << 10;

/// What ended a control connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers at that address.
    #[error("no connection to {address}")]
    Connect {
        /// As it was given.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The name or address is not one.
    #[error("{address} is not a host and port")]
    Address {
        /// As it was given.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is somebody, but not securely.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The peer closed the connection, or died.
    #[error("the peer closed the control connection")]
    Closed,
    /// Nothing came.
    #[error("the peer said nothing for {} s", waited.as_secs())]
    Silent {
        /// For how long it was waited.
        waited: Duration,
    },
    /// It says that it heard what was never said, or forgot what it had heard.
    #[error("the peer lost count of the messages")]
    Miscounted,
    /// The target does not go on with this session.
    #[error("the target does not go on with this session: {text}")]
    NotRejoined {
        /// Its words.
        text: String,
    },
    /// While this session's connection was cut another came for the same guest.
    #[error("another session came while this one's connection was cut")]
    Superseded,
    /// The connection broke.
    #[error("the control connection broke")]
    Broken(#[source] std::io::Error),
    /// The peer sent what is not ours.
    #[error("the peer broke the control protocol")]
    Misbehaved(#[source] FrameError),
}

impl LinkError {
    /// The peer's host is there, and nobody listens.
    pub fn is_refused(&self) -> bool {
        let refused = std::io::ErrorKind::ConnectionRefused;
        matches!(self, Self::Connect { source, .. } if source.kind() == refused)
    }

    /// Trying again is of no use.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::NotRejoined { .. } | Self::Misbehaved(_) | Self::Miscounted)
    }
}

/// The sending half, shared.
#[derive(Clone, Debug)]
pub struct Link {
    channel: Arc<Channel>,
    /// What arrived and was not asked for yet; the reader's.
    decoder: Arc<Mutex<Decoder>>,
}

impl Link {
    /// Connects to a target's control port, trying each of its addresses until `within` is over,
    /// and makes sure of who answers.
    pub fn connect(address: &str, caller: &Caller, within: Duration) -> Result<Self, LinkError> {
        let named = |source| LinkError::Address { address: address.to_owned(), source };
        let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(named)?.collect();
        let until = Instant::now() + within;
        let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for candidate in addresses {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&candidate, left) {
                Ok(stream) => return Self::over(caller.secure(stream, address, until)?),
                Err(error) => last = error,
            }
        }
        Err(LinkError::Connect { address: address.to_owned(), source: last })
    }

    /// Connects to another address of the target at `address`, and makes sure that it is the same.
    pub fn connect_at(
        at: SocketAddr,
        address: &str,
        caller: &Caller,
        within: Duration,
    ) -> Result<Self, LinkError> {
        let until = Instant::now() + within;
        let failed = |source| LinkError::Connect { address: at.to_string(), source };
        let stream = TcpStream::connect_timeout(&at, within).map_err(failed)?;
        Self::over(caller.secure(stream, address, until)?)
    }

    /// Takes an accepted or connected stream.
    pub fn over(channel: Channel) -> Result<Self, LinkError> {
        let stream = channel.stream();
        let set = || -> std::io::Result<()> {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
            setsockopt(stream, sockopt::KeepAlive, &true)?;
            setsockopt(stream, sockopt::TcpKeepIdle, &5)?;
            setsockopt(stream, sockopt::TcpKeepInterval, &3)?;
            setsockopt(stream, sockopt::TcpKeepCount, &5)?;
            setsockopt(stream, sockopt::TcpUserTimeout, &(DEAD_AFTER.as_millis() as u32))?;
            Ok(())
        };
        set().map_err(LinkError::Broken)?;
        Ok(Self {
            channel: Arc::new(channel),
            decoder: Arc::new(Mutex::new(Decoder::of_stranger())),
        })
    }

    /// Sends one message; returns when the kernel has all of it.
    pub fn send(&self, message: &Message) -> Result<(), LinkError> {
        self.send_frame(&encode(message))
    }

    /// Sends one encoded message.
    pub fn send_frame(&self, frame: &[u8]) -> Result<(), LinkError> {
        self.channel.send(frame).map_err(LinkError::Broken)
    }

    /// Waits for one message, for as long as `within`; not while the reader runs.
    pub fn receive(&self, within: Duration) -> Result<Message, LinkError> {
        let until = Instant::now() + within;
        let mut decoder = self.decoder.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (mut buffer, mut bytes) = (vec![0; READ_BYTES], Vec::new());
        let received = loop {
            match decoder.next_message() {
                Ok(Some(message)) => break Ok(message),
                Ok(None) => {}
                Err(error) => break Err(LinkError::Misbehaved(error)),
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(LinkError::Silent { waited: within });
            }
            self.channel.stream().set_read_timeout(Some(left)).map_err(LinkError::Broken)?;
            bytes.clear();
            match self.channel.receive(&mut buffer, &mut bytes) {
                Ok(0) => break Err(LinkError::Closed),
                Ok(_) => decoder.push(&bytes),
                Err(error) if waits(&error) => {}
                Err(error) => break Err(LinkError::Broken(error)),
            }
        };
        self.channel.stream().set_read_timeout(None).map_err(LinkError::Broken)?;
        received
    }

    /// Starts the reader: every message goes to `on_message` on a thread of its own, with the bytes
    /// it took on the wire, and what ended the connection at last. It ends with the connection, and
    /// reads nothing while `on_message` does not return.
    pub fn read_with(
        &self,
        mut on_message: impl FnMut(Result<(Message, usize), LinkError>) + Send + 'static,
    ) -> thread::JoinHandle<()> {
        let (channel, decoder) = (Arc::clone(&self.channel), Arc::clone(&self.decoder));
        thread::Builder::new()
            .name("pf-control".into())
            .spawn(move || {
                privileges::drop_on_this_thread(&[]);
                let mut decoder = decoder.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let ended = read_all(&channel, &mut decoder, |message| on_message(Ok(message)));
                on_message(Err(ended));
            })
            .expect("the process can start threads")
    }

    /// Ends the connection in both directions; the reader ends with [`LinkError::Closed`].
    pub fn close(&self) {
        self.channel.close();
    }

    /// Tells the peer that nothing more will be sent.
    pub fn finish(&self) {
        self.channel.finish();
    }

    /// Tells a peer that broke the protocol, or never said who it is, what it did. Nothing more is sent
    /// after that.
    pub fn turn_away(&self, error: &LinkError) {
        let reason = match error {
            LinkError::Misbehaved(_) => AbortReason::PeerMisbehaved,
            _ => AbortReason::Timeout,
        };
        let text = failure::chain("", error);
        // Whoever it was may be gone again.
        let _nothing_to_do_about_it =
            self.send(&Message::Abort(Abort { reason, text, hint: None }));
        self.finish();
    }

    /// How it is secured, and who the peer is.
    pub fn security(&self) -> &Security {
        self.channel.security()
    }

    /// What tickets of this connection's lanes are made from, known to its two ends only.
    pub fn lane_secret(&self, session: SessionId) -> std::io::Result<[u8; 32]> {
        self.channel.lane_secret(session)
    }

    /// This end's address.
    pub fn local(&self) -> Option<SocketAddr> {
        self.channel.stream().local_addr().ok()
    }

    /// The peer's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.channel.stream().peer_addr().ok()
    }
}

fn read_all(
    channel: &Channel,
    decoder: &mut Decoder,
    mut on_message: impl FnMut((Message, usize)),
) -> LinkError {
    let (mut buffer, mut bytes) = (vec![0; READ_BYTES], Vec::new());
    loop {
        loop {
            let before = decoder.pending_bytes();
            match decoder.next_message() {
                Ok(Some(message)) => on_message((message, before - decoder.pending_bytes())),
                Ok(None) => break,
                Err(error) => return LinkError::Misbehaved(error),
            }
        }
        bytes.clear();
        match channel.receive(&mut buffer, &mut bytes) {
            Ok(0) => return LinkError::Closed,
            Ok(_) => decoder.push(&bytes),
            Err(error) if waits(&error) => {}
            Err(error) => return LinkError::Broken(error),
        }
    }
}

/// Nothing is wrong: a signal came, or the time is over.
fn waits(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
