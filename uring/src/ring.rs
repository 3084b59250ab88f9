//! The wire of one io_uring: one system call per batch, zero-copy where the kernel means it.
//!
//! Owned by one lane's worker. At most one parcel is being sent or received at a time, because a
//! stream has an order; parcels that were sent without copying stay in flight behind it until
//! their notifications come, and are collected when there is a completion to look at anyway.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use pageferry_datapath::lane::ZeroCopy;

use crate::limits;
use crate::sys::{Completion, Operation, Order, Parcel, Ring};
use crate::wire::{Line, SocketStall, WireError};

/// A connection moved by an io_uring.
#[derive(Debug)]
pub(crate) struct RingWire {
    ring: Ring,
    zero_copy: ZeroCopy,
    spare: Vec<Box<Parcel>>,
    syscalls: u64,
    refusal: Option<io::Error>,
}

impl RingWire {
    /// A ring of its own for the calling thread.
    pub(crate) fn new(zero_copy: bool) -> io::Result<Self> {
        let ring = Ring::new(limits::RING_SLOTS)?;
        let zero_copy = if zero_copy { ZeroCopy::Yes } else { ZeroCopy::Off };
        Ok(Self { ring, zero_copy, spare: Vec::new(), syscalls: 0, refusal: None })
    }

    pub(crate) fn syscalls(&self) -> u64 {
        self.syscalls
    }

    pub(crate) fn zero_copy(&self) -> ZeroCopy {
        self.zero_copy
    }

    /// Why the kernel would not send without copying, if it said so by an errno.
    pub(crate) fn refusal(&self) -> Option<&io::Error> {
        self.refusal.as_ref()
    }

    /// An empty parcel; waits for a notification if too many are out.
    pub(crate) fn blank(&mut self, line: &Line) -> Result<Box<Parcel>, WireError> {
        while self.ring.is_full() {
            let completion = self.completion(line, false)?;
            self.collect(completion);
        }
        Ok(self.spare.pop().unwrap_or_else(Parcel::new))
    }

    /// Sends all of a parcel.
    pub(crate) fn send(&mut self, line: &Line, mut parcel: Box<Parcel>) -> Result<(), WireError> {
        while !parcel.is_done() {
            line.check_stop()?;
            parcel = if self.zero_copy == ZeroCopy::Yes {
                match self.send_zero_copy(line, parcel)? {
                    None => return Ok(()),
                    Some(rest) => rest,
                }
            } else {
                self.ring.post(Operation::Send, line.socket().as_fd(), parcel);
                self.moved(line, "sendmsg", false)?.0
            };
        }
        self.keep(parcel);
        Ok(())
    }

    /// Receives all of a parcel. An `idle` line may be silent until its first byte.
    pub(crate) fn receive(
        &mut self,
        line: &Line,
        mut parcel: Box<Parcel>,
        idle: bool,
    ) -> Result<Box<Parcel>, WireError> {
        while !parcel.is_done() {
            line.check_stop()?;
            self.ring.post(Operation::Receive, line.socket().as_fd(), parcel);
            let (filled, bytes) = self.moved(line, "recvmsg", idle)?;
            parcel = filled;
            if bytes == 0 {
                return Err(WireError::PeerClosed);
            }
        }
        Ok(parcel)
    }

    /// Waits until the kernel touches no memory of this wire any more. The line was hung up before;
    /// what is in the socket's buffer is thrown away, because only that ends notifications soon.
    pub(crate) fn settle(&mut self, line: &Line) {
        if self.ring.in_flight() > 0 {
            line.discard();
        }
        let until = Instant::now() + limits::SETTLE_WAIT_MAX;
        while self.ring.in_flight() > 0 && Instant::now() < until {
            if let Some(completion) = self.ring.completion() {
                self.collect(completion);
            } else if self.ring.wait(limits::SETTLE_TICK).is_err() {
                break;
            }
        }
        if self.ring.in_flight() > 0 {
            let operations = self.ring.in_flight();
            tracing::error!(operations, "the kernel keeps guest memory; it stays mapped");
        }
    }

    /// The outcome of the copying operation just posted.
    fn moved(
        &mut self,
        line: &Line,
        call: &'static str,
        idle: bool,
    ) -> Result<(Box<Parcel>, usize), WireError> {
        loop {
            match self.completion(line, idle)? {
                Completion::Moved { parcel, result: Ok(bytes) } => return Ok((parcel, bytes)),
                Completion::Moved { parcel, result: Err(error) } => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => return Ok((parcel, 0)),
                    _ => return Err(WireError::of(call, error)),
                },
                other => self.collect(other),
            }
        }
    }

    /// Sends without copying. If the kernel can't, or not all of it, the parcel comes back with
    /// what is left, and the lane copies from here on.
    fn send_zero_copy(
        &mut self,
        line: &Line,
        parcel: Box<Parcel>,
    ) -> Result<Option<Box<Parcel>>, WireError> {
        self.ring.post(Operation::SendZeroCopy, line.socket().as_fd(), parcel);
        loop {
            match self.completion(line, false)? {
                Completion::Taken { result: Ok(()), whole: true } => return Ok(None),
                // Its notification brings the rest back.
                Completion::Taken { result, whole: _ } => self.refused(result)?,
                Completion::Released { parcel, .. } if !parcel.is_done() => {
                    return Ok(Some(parcel));
                }
                Completion::Moved { parcel, result } => {
                    self.refused(result.map(drop))?;
                    return Ok(Some(parcel));
                }
                other => self.collect(other),
            }
        }
    }

    /// Decides whether a failed zero-copy send means to copy instead, or the end of the lane.
    fn refused(&mut self, result: io::Result<()>) -> Result<(), WireError> {
        let Err(error) = result else { return Ok(()) };
        match error.raw_os_error() {
            // No memory may be pinned (memlock), or this kernel or socket can't.
            Some(libc::ENOBUFS | libc::ENOMEM | libc::EINVAL | libc::EOPNOTSUPP | libc::EFAULT) => {
                self.zero_copy = ZeroCopy::Off;
                self.refusal = Some(error);
                Ok(())
            }
            Some(libc::EINTR | libc::EAGAIN) => Ok(()),
            _ => Err(WireError::of("sendmsg", error)),
        }
    }

    /// The next completion; one that does not come while no byte moves either is a stall.
    fn completion(&mut self, line: &Line, idle: bool) -> Result<Completion, WireError> {
        // Between rounds the first byte must be told from what came before it.
        let mut stall = idle.then(|| SocketStall::new(line));
        loop {
            if let Some(completion) = self.ring.completion() {
                return Ok(completion);
            }
            self.syscalls += 1;
            let tick = line.progress_wait() / 2;
            self.ring.wait(tick).map_err(|error| WireError::of("io_uring_enter", error))?;
            if self.ring.is_silent() {
                stall.get_or_insert_with(|| SocketStall::new(line)).tick(line, idle)?;
            }
        }
    }

    /// Takes back a parcel that was sent without copying.
    fn collect(&mut self, completion: Completion) {
        match completion {
            Completion::Released { parcel, copied } => {
                if copied && self.zero_copy == ZeroCopy::Yes {
                    self.zero_copy = ZeroCopy::Copied;
                }
                self.keep(parcel);
            }
            Completion::Moved { parcel, .. } => self.keep(parcel),
            Completion::Taken { .. } => {}
        }
    }

    fn keep(&mut self, mut parcel: Box<Parcel>) {
        parcel.clear(Order::HeaderFirst);
        self.spare.push(parcel);
    }
}
