//! The system calls that take raw pointers: the only unsafe code of this crate.
//!
//! Owned by a lane's worker. A [`Parcel`] is what one operation moves: a header and leases on guest
//! memory. The leases stay in the parcel for as long as the kernel may touch the memory: during a
//! plain call the parcel is borrowed, in a ring it is owned by the in-flight table.
//!
//! Deliberately not here: what to send, when to give up, and what a header says.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use pageferry_datapath::framing::{HEADER_BYTES, HeaderBytes};
use pageferry_datapath::region::Lease;

use crate::limits::IOVECS_MAX;

/// Where the header stands among the bytes of a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Header, then extents: a batch as it is sent.
    HeaderFirst,
    /// Extents, then the next batch's header: as it is received.
    HeaderLast,
}

/// The memory of one operation, with the right to touch it.
///
/// Always in a `Box`: the kernel is given addresses of its fields.
pub(crate) struct Parcel {
    order: Order,
    header: HeaderBytes,
    leases: Vec<Lease>,
    /// Bytes of header and leases together.
    total: usize,
    /// How many of them have been moved.
    done: usize,
    iovecs: [libc::iovec; IOVECS_MAX],
    msg: libc::msghdr,
}

impl Parcel {
    /// An empty one.
    pub(crate) fn new() -> Box<Self> {
        const NONE: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        // SAFETY: `msghdr` is plain data for which zero bytes mean "no name, no control, no iovec".
        let msg = unsafe { mem::zeroed() };
        Box::new(Self {
            order: Order::HeaderFirst,
            header: [0; HEADER_BYTES],
            leases: Vec::with_capacity(IOVECS_MAX - 1),
            total: HEADER_BYTES,
            done: 0,
            iovecs: [NONE; IOVECS_MAX],
            msg,
        })
    }

    /// Empties it: nothing leased, only the header to move.
    pub(crate) fn clear(&mut self, order: Order) {
        self.leases.clear();
        self.order = order;
        self.total = HEADER_BYTES;
        self.done = 0;
    }

    /// Adds an extent, after those it has.
    ///
    /// # Panics
    /// If it has a full batch already, which the framing's limit on extents rules out.
    pub(crate) fn push(&mut self, lease: Lease) {
        assert!(self.leases.len() + 1 < IOVECS_MAX && self.done == 0);
        self.total += lease.extent().len as usize;
        self.leases.push(lease);
    }

    /// Bytes of its extents.
    pub(crate) fn leased_bytes(&self) -> u64 {
        (self.total - HEADER_BYTES) as u64
    }

    /// Bytes of header and extents.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.total as u64
    }

    /// The header's bytes.
    pub(crate) fn header(&self) -> &HeaderBytes {
        &self.header
    }

    /// The header's bytes, to encode one.
    pub(crate) fn header_mut(&mut self) -> &mut HeaderBytes {
        &mut self.header
    }

    /// Bytes moved so far.
    pub(crate) fn done(&self) -> usize {
        self.done
    }

    /// Whether every byte was moved.
    pub(crate) fn is_done(&self) -> bool {
        self.done == self.total
    }

    /// Counts bytes the kernel says it moved.
    fn advance(&mut self, bytes: usize) {
        self.done += bytes;
        assert!(self.done <= self.total, "the kernel moved more than it was given");
    }

    /// Points the iovecs at everything not yet moved.
    fn arm(&mut self) -> &mut libc::msghdr {
        let header = (self.header.as_mut_ptr(), HEADER_BYTES);
        let (first, last) = match self.order {
            Order::HeaderFirst => (Some(header), None),
            Order::HeaderLast => (None, Some(header)),
        };
        let leased = self.leases.iter().map(|l| (l.as_ptr(), l.extent().len as usize));
        let (mut skip, mut count) = (self.done, 0);
        for (base, len) in first.into_iter().chain(leased).chain(last) {
            let skipped = skip.min(len);
            skip -= skipped;
            if skipped < len {
                // In bounds: `skipped` is below the length of what `base` points to.
                let iov_base = base.wrapping_add(skipped).cast();
                self.iovecs[count] = libc::iovec { iov_base, iov_len: len - skipped };
                count += 1;
            }
        }
        self.msg.msg_iov = self.iovecs.as_mut_ptr();
        self.msg.msg_iovlen = count;
        &mut self.msg
    }
}

impl fmt::Debug for Parcel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parcel")
            .field("order", &self.order)
            .field("leases", &self.leases.len())
            .field("total", &self.total)
            .field("done", &self.done)
            .finish()
    }
}

/// Sends what is left of a parcel; returns the bytes taken by the kernel, which has copied them.
pub(crate) fn send_parcel(socket: BorrowedFd<'_>, parcel: &mut Box<Parcel>) -> io::Result<usize> {
    let msg: *const libc::msghdr = parcel.arm();
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `msg` and its iovecs are fields of `parcel`, borrowed for the call, and `arm` has just
    //   pointed them at its header and at memory its leases keep mapped.
    // - without MSG_ZEROCOPY the kernel keeps no reference after the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), msg, libc::MSG_NOSIGNAL) };
    count(sent, parcel)
}

/// Receives into what is left of a parcel; returns the bytes placed, 0 at the end of the stream.
pub(crate) fn receive_parcel(
    socket: BorrowedFd<'_>,
    parcel: &mut Box<Parcel>,
) -> io::Result<usize> {
    let msg: *mut libc::msghdr = parcel.arm();
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `msg` and its iovecs are fields of `parcel`, borrowed mutably for the call, and `arm` has
    //   just pointed them at its header and at writable memory its leases keep mapped.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), msg, libc::MSG_WAITALL) };
    count(received, parcel)
}

fn count(result: isize, parcel: &mut Parcel) -> io::Result<usize> {
    let bytes = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
    parcel.advance(bytes);
    Ok(bytes)
}

/// CPU time of the calling thread, in ns.
pub(crate) fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable for the call.
    let got = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    if got == 0 { time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 } else { 0 }
}
