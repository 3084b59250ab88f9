//! A lane's connection as its worker sees it: parcels go, parcels come.
//!
//! Owned by one worker thread; the [`Line`] under it is shared with whoever may stop the lane. A
//! wire knows no frames and no rounds.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use pageferry_datapath::framing::ACK_BYTES;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LanePath, LaneStats, ZeroCopy};

use crate::plain::PlainWire;
use crate::plan::PathWish;
use crate::stats::Tally;
use crate::sys::Parcel;

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

    /// As the lane reports it; `None` if the lane was told to stop, which is nobody's fault.
    pub(crate) fn into_lane_error(self, lane: LaneId) -> Option<LaneError> {
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
}

impl Line {
    /// Takes a connected socket and sets what every lane wants.
    pub(crate) fn new(
        socket: TcpStream,
        socket_buffer_bytes: Option<usize>,
        progress_wait: Duration,
    ) -> io::Result<Self> {
        if let Some(bytes) = socket_buffer_bytes {
            set_buffers(&socket, bytes)?;
        }
        // A barrier must not wait for more bytes to share its packet.
        socket.set_nodelay(true)?;
        // Half of it, so that a stall is noticed at most half as late again.
        let tick = (progress_wait / 2).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(tick))?;
        socket.set_write_timeout(Some(tick))?;
        Ok(Self { socket, stopping: AtomicBool::new(false), progress_wait })
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

    /// What an end of the stream means.
    pub(crate) fn ended(&self) -> WireError {
        self.check_stop().err().unwrap_or(WireError::PeerClosed)
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
            match (&self.socket).read(&mut ack[done..]) {
                Ok(0) => return Err(self.ended()),
                Ok(bytes) => {
                    done += bytes;
                    stall.moved();
                }
                Err(error) => stall.forgive("recv", error)?,
            }
        }
        Ok(ack)
    }
}

/// Sets both socket buffers, past the system's limit where privileges allow it.
pub(crate) fn set_buffers(socket: &impl std::os::fd::AsFd, bytes: usize) -> io::Result<()> {
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        setsockopt(socket, sockopt::SndBuf, &bytes)?;
    }
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &bytes)?;
    }
    Ok(())
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

/// What a worker moves parcels with, and why that.
#[derive(Debug)]
pub(crate) struct Wire {
    means: Means,
    reason: String,
}

#[derive(Debug)]
enum Means {
    Plain(PlainWire),
}

impl Wire {
    /// Opens what is wished for, on the thread that will use it.
    pub(crate) fn open(_path: PathWish, _zero_copy: bool) -> Result<Self, WireError> {
        Ok(Self::plain("asked for"))
    }

    /// A wire of plain system calls, for this reason.
    pub(crate) fn plain(reason: impl Into<String>) -> Self {
        Self { means: Means::Plain(PlainWire::new()), reason: reason.into() }
    }

    /// An empty parcel to load.
    pub(crate) fn blank(&mut self, _line: &Line) -> Result<Box<Parcel>, WireError> {
        match &mut self.means {
            Means::Plain(wire) => Ok(wire.blank()),
        }
    }

    /// Sends all of a parcel; returns once the kernel took it. Its leases are held for as long as
    /// the kernel may read from them.
    pub(crate) fn send(&mut self, line: &Line, parcel: Box<Parcel>) -> Result<(), WireError> {
        match &mut self.means {
            Means::Plain(wire) => wire.send(line, parcel),
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
        }
    }

    /// Ends the wire, whatever state it is in; returns when the kernel touches none of its memory
    /// any more. The line was hung up before.
    pub(crate) fn finish(self, tally: Tally, cpu: Option<usize>) -> LaneStats {
        match self.means {
            Means::Plain(wire) => {
                tally.finish(LanePath::TcpPlain, self.reason, ZeroCopy::Off, cpu, wire.syscalls())
            }
        }
    }
}
