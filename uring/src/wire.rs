//! A lane's connection as its worker sees it: parcels go, parcels come.
//!
//! Owned by one worker thread; the [`Line`] under it is shared with whoever may stop the lane. A
//! wire knows no frames and no rounds.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use pageferry_datapath::framing::ACK_BYTES;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LanePath, LaneStats, SealedBy, Sealing, ZeroCopy};
use rustls::Connection;

use crate::kernel_tls;
use crate::plain::PlainWire;
use crate::plan::{PathWish, ZeroCopyWish};
use crate::ring::RingWire;
use crate::sealed::Sealed;
use crate::stats::Tally;
use crate::sys::{self, Parcel};

/// Why a wire can't go on.
#[derive(Debug)]
pub(crate) enum WireError {
    /// This side was told to stop.
    Stopped,
    /// The peer ended the connection.
    PeerClosed,
    /// No byte moved for this long.
    Stalled { waited: Duration },
    /// A system call failed.
    Host { call: &'static str, source: io::Error },
}

impl WireError {
    /// Sorts an errno by who caused it.
    pub(crate) fn of(call: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted => Self::PeerClosed,
            // The kernel gave up retransmitting.
            io::ErrorKind::TimedOut => Self::Stalled { waited: Duration::ZERO },
            _ => Self::Host { call, source },
        }
    }

    /// As the lane reports it; `None` if the lane was told to stop: then whatever call was in
    /// progress fails, and it is nobody's fault.
    pub(crate) fn into_lane_error(self, lane: LaneId, line: &Line) -> Option<LaneError> {
        if line.check_stop().is_err() {
            return None;
        }
        match self {
            Self::Stopped => None,
            Self::PeerClosed => Some(LaneError::PeerClosed { lane }),
            Self::Stalled { waited } => {
                Some(LaneError::Timeout { lane, waited_ms: waited.as_millis() as u64 })
            }
            Self::Host { call, source } => Some(LaneError::Host { lane, call, source }),
        }
    }
}

/// A connected socket that another thread may stop.
#[derive(Debug)]
pub(crate) struct Line {
    socket: TcpStream,
    stopping: AtomicBool,
    progress_wait: Duration,
    tls: Tls,
}

/// How a line is encrypted.
#[derive(Debug)]
enum Tls {
    None,
    /// By the socket itself.
    Kernel {
        suite: &'static str,
    },
    /// By whoever uses the socket, for want of a kernel that does.
    Process {
        sealed: Box<Mutex<Sealed>>,
        why: String,
    },
}

impl Line {
    /// Takes a connected and tuned socket, and sets what every lane wants.
    pub(crate) fn new(socket: TcpStream, progress_wait: Duration) -> io::Result<Self> {
        // Half of it, so that a stall is noticed at most half as late again.
        let tick = (progress_wait / 2).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(tick))?;
        socket.set_write_timeout(Some(tick))?;
        let stopping = AtomicBool::new(false);
        Ok(Self { socket, stopping, progress_wait, tls: Tls::None })
    }

    /// The same for a connection whose TLS handshake is complete: the kernel goes on with it where
    /// it can, this process where not.
    pub(crate) fn encrypted(
        socket: TcpStream,
        tls: Box<Connection>,
        progress_wait: Duration,
    ) -> io::Result<Self> {
        let mut line = Self::new(socket, progress_wait)?;
        line.tls = match kernel_tls::prepare(&line.socket) {
            Ok(()) => {
                let suite = tls.negotiated_cipher_suite().and_then(|it| it.suite().as_str());
                kernel_tls::install(&line.socket, *tls)?;
                Tls::Kernel { suite: suite.unwrap_or("TLS 1.3") }
            }
            Err(errno) => Tls::Process {
                sealed: Box::new(Mutex::new(Sealed::new(tls))),
                why: format!("the kernel has no TLS for sockets: {}", errno.desc()),
            },
        };
        Ok(line)
    }

    /// Whether what leaves it is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        !matches!(self.tls, Tls::None)
    }

    /// TLS that whoever uses the socket has to go through.
    pub(crate) fn sealed(&self) -> Option<MutexGuard<'_, Sealed>> {
        match &self.tls {
            Tls::Process { sealed, .. } => {
                Some(sealed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
            }
            _ => None,
        }
    }

    fn sealing(&self) -> Option<Sealing> {
        match &self.tls {
            Tls::None => None,
            Tls::Kernel { suite } => Some(Sealing {
                by: SealedBy::Kernel,
                reason: "the kernel can".into(),
                suite: (*suite).into(),
                ns: 0,
            }),
            Tls::Process { why, .. } => self.sealed().map(|sealed| Sealing {
                by: SealedBy::Process,
                reason: why.clone(),
                suite: sealed.suite().into(),
                ns: sealed.spent().as_nanos() as u64,
            }),
        }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(crate) fn progress_wait(&self) -> Duration {
        self.progress_wait
    }

    /// Makes the worker's call in progress return, and its next one fail. Bytes already received
    /// by the kernel may still be placed by the call in progress, so join the worker after it.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.hang_up();
    }

    /// Ends the connection in both directions; the peer notices at once.
    pub(crate) fn hang_up(&self) {
        // Fails only if the peer was faster.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Makes the last close reset the connection instead of draining it.
    pub(crate) fn reset_on_close(&self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // Fails on no connected TCP socket; a drained close would be harmless too.
        let _ = setsockopt(&self.socket, sockopt::Linger, &linger);
    }

    pub(crate) fn check_stop(&self) -> Result<(), WireError> {
        if self.stopping.load(Ordering::SeqCst) { Err(WireError::Stopped) } else { Ok(()) }
    }

    /// Throws away what the socket still holds to send.
    pub(crate) fn discard(&self) {
        // Fails on a connection that is gone already.
        let _ = sys::disconnect(self.socket.as_fd());
    }

    /// Changes whenever a byte moves, in either direction.
    fn progress(&self) -> u64 {
        sys::socket_progress(self.socket.as_fd())
    }

    /// Waits for the peer to hang up, for at most this long.
    pub(crate) fn await_hang_up(&self, wait: Duration) {
        let _ = self.socket.set_read_timeout(Some(wait));
        // Whatever comes instead is of no interest any more.
        let _ = (&self.socket).read(&mut [0; 1]);
    }

    /// Sends a barrier's acknowledgement.
    pub(crate) fn send_ack(&self, ack: &[u8; ACK_BYTES]) -> Result<(), WireError> {
        let mut stall = Stall::new(self.progress_wait);
        if let Some(mut sealed) = self.sealed() {
            sealed.seal_bytes(ack).map_err(|error| WireError::of("TLS", error))?;
            return self.flush(&mut sealed, &mut stall);
        }
        let mut left = &ack[..];
        while !left.is_empty() {
            self.check_stop()?;
            match (&self.socket).write(left) {
                Ok(bytes) => {
                    left = &left[bytes..];
                    stall.moved();
                }
                Err(error) => stall.forgive("send", error)?,
            }
        }
        Ok(())
    }

    /// Receives a barrier's acknowledgement.
    pub(crate) fn receive_ack(&self) -> Result<[u8; ACK_BYTES], WireError> {
        let mut stall = Stall::new(self.progress_wait);
        let mut ack = [0; ACK_BYTES];
        let mut done = 0;
        while done < ACK_BYTES {
            self.check_stop()?;
            if let Some(mut sealed) = self.sealed() {
                let opened = sealed.open_bytes(&mut ack[done..]);
                done += opened.map_err(|error| WireError::of("TLS", error))?;
                if done < ACK_BYTES {
                    self.take_in(&mut sealed, &mut stall)?;
                }
                continue;
            }
            match (&self.socket).read(&mut ack[done..]) {
                Ok(0) => return Err(WireError::PeerClosed),
                Ok(bytes) => {
                    done += bytes;
                    stall.moved();
                }
                Err(error) => stall.forgive("recv", error)?,
            }
        }
        Ok(ack)
    }

    /// Sends everything that was sealed.
    pub(crate) fn flush(&self, sealed: &mut Sealed, stall: &mut Stall) -> Result<(), WireError> {
        while sealed.must_flush() {
            self.check_stop()?;
            match sealed.flush(&self.socket) {
                Ok(_) => stall.moved(),
                Err(error) => stall.forgive("send", error)?,
            }
        }
        Ok(())
    }

    /// Takes in what comes next, if anything does before the tick.
    pub(crate) fn take_in(&self, sealed: &mut Sealed, stall: &mut Stall) -> Result<(), WireError> {
        match sealed.take_in(&self.socket) {
            Ok(0) => Err(WireError::PeerClosed),
            Ok(_) => {
                stall.moved();
                Ok(())
            }
            Err(error) => stall.forgive("recv", error),
        }
    }
}

/// Tells a slow operation from one that stands still.
#[derive(Debug)]
pub(crate) struct Stall {
    since: Instant,
    limit: Duration,
}

impl Stall {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { since: Instant::now(), limit }
    }

    /// Bytes moved.
    pub(crate) fn moved(&mut self) {
        self.since = Instant::now();
    }

    /// A tick passed without any.
    pub(crate) fn check(&self) -> Result<(), WireError> {
        let waited = self.since.elapsed();
        if waited < self.limit { Ok(()) } else { Err(WireError::Stalled { waited }) }
    }

    /// Lets a tick or a signal pass while the lane is not stalled.
    pub(crate) fn forgive(&self, call: &'static str, error: io::Error) -> Result<(), WireError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            // Linux reports an expired socket timeout as EAGAIN.
            io::ErrorKind::WouldBlock => self.check(),
            _ => Err(WireError::of(call, error)),
        }
    }
}

/// The same for an operation that reports only its end: asks the socket whether bytes move.
#[derive(Debug)]
pub(crate) struct SocketStall {
    stall: Stall,
    progress: u64,
    begun: bool,
}

impl SocketStall {
    /// Watches from now on; what moved before is not known.
    pub(crate) fn new(line: &Line) -> Self {
        let stall = Stall::new(line.progress_wait());
        Self { stall, progress: line.progress(), begun: false }
    }

    /// Another tick passed. An `idle` line may be silent until its first byte.
    pub(crate) fn tick(&mut self, line: &Line, idle: bool) -> Result<(), WireError> {
        line.check_stop()?;
        let progress = line.progress();
        if progress != self.progress {
            (self.progress, self.begun) = (progress, true);
            self.stall.moved();
        }
        if idle && !self.begun { Ok(()) } else { self.stall.check() }
    }
}

/// What a worker moves parcels with, and why that.
#[derive(Debug)]
pub(crate) struct Wire {
    means: Means,
    reason: String,
}

#[derive(Debug)]
enum Means {
    Plain(PlainWire),
    Ring(Box<RingWire>, ZeroCopyWish),
}

impl Wire {
    /// Opens what is wished for, on the thread that will use it.
    pub(crate) fn open(path: PathWish, zero_copy: ZeroCopyWish) -> Result<Self, WireError> {
        let reason = match path {
            PathWish::Plain => return Ok(Self::plain("asked for")),
            PathWish::Uring => "asked for",
            PathWish::Auto => "available",
        };
        match RingWire::new(zero_copy == ZeroCopyWish::Try) {
            Ok(ring) => {
                Ok(Self { means: Means::Ring(Box::new(ring), zero_copy), reason: reason.into() })
            }
            Err(error) if path == PathWish::Auto => {
                Ok(Self::plain(format!("io_uring is not to be had: {error}")))
            }
            Err(error) => Err(WireError::of("io_uring_setup", error)),
        }
    }

    /// A wire of plain system calls, for this reason.
    pub(crate) fn plain(reason: impl Into<String>) -> Self {
        Self { means: Means::Plain(PlainWire::new()), reason: reason.into() }
    }

    /// An empty parcel to load.
    pub(crate) fn blank(&mut self, line: &Line) -> Result<Box<Parcel>, WireError> {
        match &mut self.means {
            Means::Plain(wire) => Ok(wire.blank()),
            Means::Ring(wire, _) => wire.blank(line),
        }
    }

    /// Sends all of a parcel; returns once the kernel took it. Its leases are held for as long as
    /// the kernel may read from them.
    pub(crate) fn send(&mut self, line: &Line, parcel: Box<Parcel>) -> Result<(), WireError> {
        match &mut self.means {
            Means::Plain(wire) => wire.send(line, parcel),
            Means::Ring(wire, _) => wire.send(line, parcel),
        }
    }

    /// Receives all of a parcel. An `idle` line may be silent until its first byte.
    pub(crate) fn receive(
        &mut self,
        line: &Line,
        parcel: Box<Parcel>,
        idle: bool,
    ) -> Result<Box<Parcel>, WireError> {
        match &mut self.means {
            Means::Plain(wire) => wire.receive(line, parcel, idle),
            Means::Ring(wire, _) => wire.receive(line, parcel, idle),
        }
    }

    /// Ends the wire, whatever state it is in; returns when the kernel touches none of its memory
    /// any more. The line was hung up before.
    pub(crate) fn finish(self, line: &Line, tally: Tally, cpu: Option<usize>) -> LaneStats {
        let Self { means, reason } = self;
        let mut stats = match means {
            Means::Plain(wire) => {
                let why = "plain sockets copy".to_owned();
                let path = (LanePath::TcpPlain, reason);
                let syscalls = wire.syscalls() + line.sealed().map_or(0, |it| it.calls());
                tally.finish(path, (ZeroCopy::Off, why), cpu, syscalls)
            }
            Means::Ring(mut wire, wish) => {
                wire.settle(line);
                let why = match (wire.zero_copy(), wire.refusal(), wish) {
                    (_, Some(error), _) => format!("the kernel refused: {error}"),
                    (ZeroCopy::Copied, ..) => "the kernel reported that it copied".to_owned(),
                    (_, _, ZeroCopyWish::Not(reason)) => reason.to_owned(),
                    _ => "the kernel sends from guest memory".to_owned(),
                };
                let (zero_copy, syscalls) = ((wire.zero_copy(), why), wire.syscalls());
                tally.finish((LanePath::TcpUring, reason), zero_copy, cpu, syscalls)
            }
        };
        stats.sealing = line.sealing();
        stats
    }
}
