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
use std::ptr::{self, NonNull};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, types};
use pageferry_datapath::codec::PAYLOAD_BYTES_MAX;
use pageferry_datapath::framing::{HEADER_BYTES, HeaderBytes};
use pageferry_datapath::limits::BATCH_EXTENTS_MAX;
use pageferry_datapath::region::{Lease, RegionError};

use crate::limits::IOVECS_MAX;

/// Where the header stands among the bytes of a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Header, then extents, then chunks: a batch as it is sent.
    HeaderFirst,
    /// Extents, then chunks, then the next batch's header: as it is received.
    HeaderLast,
    /// No header: measurements.
    Bare,
}

impl Order {
    /// Bytes of header that a parcel has.
    fn header_bytes(self) -> usize {
        match self {
            Self::HeaderFirst | Self::HeaderLast => HEADER_BYTES,
            Self::Bare => 0,
        }
    }
}

/// The memory of one operation, with the right to touch it.
///
/// Always in a `Box`: the kernel is given addresses of its fields.
pub(crate) struct Parcel {
    order: Order,
    header: HeaderBytes,
    leases: Vec<Lease>,
    /// Compressed chunks; no memory until there are any, then always of the same size.
    packed: Vec<u8>,
    packed_bytes: usize,
    /// Bytes of header, leases and chunks together.
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
            leases: Vec::with_capacity(BATCH_EXTENTS_MAX),
            packed: Vec::new(),
            packed_bytes: 0,
            total: HEADER_BYTES,
            done: 0,
            iovecs: [NONE; IOVECS_MAX],
            msg,
        })
    }

    /// Empties it: nothing leased, only the header to move.
    pub(crate) fn clear(&mut self, order: Order) {
        self.leases.clear();
        self.packed_bytes = 0;
        self.order = order;
        self.total = order.header_bytes();
        self.done = 0;
    }

    /// Adds an extent, after those it has.
    ///
    /// # Panics
    /// If it has a full batch already, which the framing's limit on extents rules out.
    pub(crate) fn push(&mut self, lease: Lease) {
        assert!(self.leases.len() < BATCH_EXTENTS_MAX && self.done == 0);
        self.total += lease.extent().len as usize;
        self.leases.push(lease);
    }

    /// Room for chunks, to be packed into before [`Self::pack`] says how many bytes they are.
    pub(crate) fn packing_room(&mut self) -> &mut [u8] {
        self.packed.resize(PAYLOAD_BYTES_MAX, 0);
        &mut self.packed
    }

    /// Takes a buffer of [`PAYLOAD_BYTES_MAX`] for its room, and gives its own for it.
    pub(crate) fn exchange(&mut self, room: &mut Vec<u8>) {
        assert!(self.packed_bytes == 0 && self.done == 0 && room.len() == PAYLOAD_BYTES_MAX);
        mem::swap(&mut self.packed, room);
    }

    /// Adds the first `bytes` of the room, behind the extents: to be sent, or to be received into.
    pub(crate) fn pack(&mut self, bytes: usize) {
        assert!(self.packed_bytes == 0 && self.done == 0);
        self.packed.resize(PAYLOAD_BYTES_MAX, 0);
        assert!(bytes <= self.packed.len());
        self.packed_bytes = bytes;
        self.total += bytes;
    }

    /// The chunks' bytes.
    pub(crate) fn packed(&self) -> &[u8] {
        &self.packed[..self.packed_bytes]
    }

    /// Bytes of its extents.
    pub(crate) fn leased_bytes(&self) -> u64 {
        (self.total - self.order.header_bytes() - self.packed_bytes) as u64
    }

    /// Bytes of header, extents and chunks.
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

    /// Bytes not moved yet.
    pub(crate) fn left(&self) -> usize {
        self.total - self.done
    }

    /// Copies what comes next of it into `into`, as much as that holds, and counts it as moved.
    pub(crate) fn gather(&mut self, into: &mut [u8]) -> usize {
        let mut count = 0;
        self.walk(into.len(), |piece, from, len| {
            let into = &mut into[count..count + len];
            match piece {
                Piece::Header(header) => into.copy_from_slice(&header[from..from + len]),
                Piece::Lease(lease) => inside(lease.copy_out(from as u64, into)),
                Piece::Packed(packed) => into.copy_from_slice(&packed[from..from + len]),
            }
            count += len;
        });
        count
    }

    /// Copies `bytes` to where what comes next of it belongs, and counts them as moved.
    pub(crate) fn scatter(&mut self, bytes: &[u8]) {
        let mut count = 0;
        self.walk(bytes.len(), |piece, from, len| {
            let bytes = &bytes[count..count + len];
            match piece {
                Piece::Header(header) => header[from..from + len].copy_from_slice(bytes),
                Piece::Lease(lease) => inside(lease.copy_in(from as u64, bytes)),
                Piece::Packed(packed) => packed[from..from + len].copy_from_slice(bytes),
            }
            count += len;
        });
    }

    /// Goes over the next `most` bytes not yet moved, piece by piece.
    fn walk(&mut self, most: usize, mut each: impl FnMut(Piece<'_>, usize, usize)) {
        let (mut skip, mut room) = (self.done, most.min(self.left()));
        self.done += room;
        // Leases and chunks, between the places before and behind them where the header may stand.
        let leases = self.leases.len();
        for index in 0..leases + 3 {
            let at = index.wrapping_sub(1);
            let len = match (index, self.order) {
                (0, Order::HeaderFirst) => HEADER_BYTES,
                (0, Order::HeaderLast | Order::Bare) => 0,
                _ if at < leases => self.leases[at].extent().len as usize,
                _ if at == leases => self.packed_bytes,
                (_, Order::HeaderLast) => HEADER_BYTES,
                (_, Order::HeaderFirst | Order::Bare) => 0,
            };
            let taken = (len - skip.min(len)).min(room);
            if taken > 0 {
                let piece = match at {
                    _ if at < leases => Piece::Lease(&self.leases[at]),
                    _ if at == leases => Piece::Packed(&mut self.packed),
                    _ => Piece::Header(&mut self.header),
                };
                each(piece, skip, taken);
                room -= taken;
            }
            skip -= skip.min(len);
        }
    }

    /// Points the iovecs at everything not yet moved.
    fn arm(&mut self) -> &mut libc::msghdr {
        let header = (self.header.as_mut_ptr(), HEADER_BYTES);
        let (first, last) = match self.order {
            Order::HeaderFirst => (Some(header), None),
            Order::HeaderLast => (None, Some(header)),
            Order::Bare => (None, None),
        };
        let leased = self.leases.iter().map(|l| (l.as_ptr(), l.extent().len as usize));
        let packed = (self.packed.as_mut_ptr(), self.packed_bytes);
        let (mut skip, mut count) = (self.done, 0);
        for (base, len) in first.into_iter().chain(leased).chain([packed]).chain(last) {
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

/// What a parcel is made of.
enum Piece<'a> {
    Header(&'a mut HeaderBytes),
    Lease(&'a Lease),
    Packed(&'a mut [u8]),
}

fn inside(copied: Result<(), RegionError>) {
    copied.expect("a piece of a lease lies inside it");
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
    //   pointed them at its header, its chunks and memory its leases keep mapped.
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
    //   just pointed them at its header, its chunks and writable memory its leases keep mapped.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), msg, libc::MSG_WAITALL) };
    count(received, parcel)
}

fn count(result: isize, parcel: &mut Parcel) -> io::Result<usize> {
    let bytes = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
    parcel.advance(bytes);
    Ok(bytes)
}

/// Sends part of an extent; returns the bytes taken by the kernel, which has copied them.
pub(crate) fn send_range(socket: BorrowedFd<'_>, lease: &Lease, from: u64) -> io::Result<usize> {
    let (at, len) = part(lease, from);
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `at` and `len` lie inside the lease, which is borrowed for the call.
    let sent = unsafe { libc::send(socket.as_raw_fd(), at, len, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into part of an extent; returns the bytes placed, 0 at the end of the stream.
pub(crate) fn receive_range(socket: BorrowedFd<'_>, lease: &Lease, from: u64) -> io::Result<usize> {
    let (at, len) = part(lease, from);
    // SAFETY: as in `send_range`; the memory is mapped writable.
    let received = unsafe { libc::recv(socket.as_raw_fd(), at, len, libc::MSG_WAITALL) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

fn part(lease: &Lease, from: u64) -> (*mut libc::c_void, usize) {
    let len = lease.extent().len;
    assert!(from < len);
    (lease.as_ptr().wrapping_add(from as usize).cast(), (len - from) as usize)
}

/// Bytes of this connection that the peer has acknowledged, plus bytes received: whether anything
/// moves at all. 0 where the kernel does not tell.
pub(crate) fn socket_progress(socket: BorrowedFd<'_>) -> u64 {
    tcp_info(socket)
        .map_or(0, |info| info[TCPI_BYTES_ACKED].wrapping_add(info[TCPI_BYTES_RECEIVED]))
}

/// Places in `struct tcp_info` of linux/tcp.h, in 64-bit words.
const TCPI_BYTES_ACKED: usize = 120 / 8;
const TCPI_BYTES_RECEIVED: usize = 128 / 8;

fn tcp_info(socket: BorrowedFd<'_>) -> Option<[u64; 32]> {
    // `struct tcp_info` grows at its end; libc's copy may be too short.
    let mut info = [0u64; 32];
    let mut len = mem::size_of_val(&info) as libc::socklen_t;
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `info` is writable for `len` bytes, and the kernel writes no more than `len`.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    (got == 0).then_some(info)
}

/// The kernel's number for the receive queue that this connection's packets come from, and the core
/// that took the last of them from it; each `None` where it does not tell.
pub(crate) fn incoming(socket: BorrowedFd<'_>) -> (Option<u32>, Option<usize>) {
    let napi = socket_number(socket, libc::SO_INCOMING_NAPI_ID);
    let cpu = socket_number(socket, libc::SO_INCOMING_CPU);
    // Loopback and veth have no queues, and no number; -1 is a core that is not known.
    let napi = napi.and_then(|id| u32::try_from(id).ok()).filter(|id| *id > 0);
    (napi, cpu.and_then(|cpu| usize::try_from(cpu).ok()))
}

fn socket_number(socket: BorrowedFd<'_>, option: libc::c_int) -> Option<libc::c_int> {
    let mut number: libc::c_int = 0;
    let mut len = mem::size_of_val(&number) as libc::socklen_t;
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `number` is writable for `len` bytes, and the kernel writes no more than `len`.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut number).cast(),
            &mut len,
        )
    };
    (got == 0).then_some(number)
}

/// Throws away what a connection still has to send, and ends it: `connect` to nowhere.
pub(crate) fn disconnect(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `sockaddr` is plain data for which zero bytes mean the family AF_UNSPEC.
    let nowhere: libc::sockaddr = unsafe { mem::zeroed() };
    let len = mem::size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `nowhere` is readable for `len` bytes.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &nowhere, len) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that the peer has acknowledged on this connection; `None` where the kernel doesn't tell.
pub(crate) fn acked_bytes(socket: BorrowedFd<'_>) -> Option<u64> {
    tcp_info(socket).map(|info| info[TCPI_BYTES_ACKED])
}

/// Has the kernel pace a connection at this many bytes a second, or not at all.
pub(crate) fn set_pacing(socket: BorrowedFd<'_>, bytes_per_second: Option<u64>) -> io::Result<()> {
    let rate = bytes_per_second.unwrap_or(u64::MAX);
    // SAFETY:
    // - `socket` is open while borrowed.
    // - `rate` is readable for the length given; the kernel takes an unsigned long.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            mem::size_of_val(&rate) as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// CPU time of the calling thread, in ns.
pub(crate) fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable for the call.
    let got = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    if got == 0 { time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 } else { 0 }
}

/// `IORING_SEND_ZC_REPORT_USAGE`: the notification says whether the kernel copied after all.
const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
/// `IORING_NOTIF_USAGE_ZC_COPIED` in such a notification's result.
const NOTIFICATION_COPIED: i32 = i32::MIN;

/// How a parcel is moved by a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Copies into the socket's buffer.
    Send,
    /// Sends from guest memory; its parcel comes back with the notification.
    SendZeroCopy,
    /// Receives into guest memory.
    Receive,
}

/// What a ring reports.
#[derive(Debug)]
pub(crate) enum Completion {
    /// A [`Send`](Operation::Send) or [`Receive`](Operation::Receive) ended; the kernel does not
    /// touch the parcel any more.
    Moved { parcel: Box<Parcel>, result: io::Result<usize> },
    /// The kernel took the bytes of a [`SendZeroCopy`](Operation::SendZeroCopy), or failed to; it
    /// may still read them. `whole`: it took all of the parcel.
    Taken { result: io::Result<()>, whole: bool },
    /// The kernel does not read the parcel of a [`SendZeroCopy`](Operation::SendZeroCopy) any more.
    Released { parcel: Box<Parcel>, copied: bool },
}

/// An io_uring with its in-flight table. Dropping it while operations are in flight leaks their
/// parcels, and so keeps the guest memory mapped, rather than pulling it away under the kernel.
pub(crate) struct Ring {
    ring: IoUring,
    /// The parcels in flight, each leaked from its box: a `Box` that moves would claim to be the
    /// only user of its memory.
    slots: Vec<Option<NonNull<Parcel>>>,
    in_flight: usize,
}

impl Ring {
    /// A ring for `slots` operations at a time, with the leanest completion mode the kernel has.
    pub(crate) fn new(slots: u16) -> io::Result<Self> {
        let entries = u32::from(slots).next_power_of_two();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|error| match error.raw_os_error() {
                // Linux before 6.1 knows no deferred task work, before 5.19 not even this.
                Some(libc::EINVAL) => IoUring::builder().setup_coop_taskrun().build(entries),
                _ => Err(error),
            })
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(entries),
                _ => Err(error),
            })?;
        let slots = std::iter::repeat_with(|| None).take(slots.into()).collect();
        Ok(Self { ring, slots, in_flight: 0 })
    }

    /// Operations whose memory the kernel may still touch.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether another operation has to wait for a completion.
    pub(crate) fn is_full(&self) -> bool {
        self.in_flight == self.slots.len()
    }

    /// Queues an operation on everything not yet moved of a parcel, and takes the parcel over.
    ///
    /// # Panics
    /// If the ring [is full](Self::is_full).
    pub(crate) fn post(
        &mut self,
        operation: Operation,
        socket: BorrowedFd<'_>,
        parcel: Box<Parcel>,
    ) {
        let free = self.slots.iter().position(Option::is_none).expect("a full ring was posted to");
        let mut parcel = NonNull::from(Box::leak(parcel));
        // SAFETY: just leaked, so valid and not aliased; nothing is in flight on it.
        let msg: *mut libc::msghdr = unsafe { parcel.as_mut() }.arm();
        let fd = types::Fd(socket.as_raw_fd());
        // MSG_WAITALL makes the kernel go on after a short transfer, without this thread.
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let entry = match operation {
            Operation::Send => opcode::SendMsg::new(fd, msg).flags(flags).build(),
            Operation::SendZeroCopy => {
                opcode::SendMsgZc::new(fd, msg).flags(flags).ioprio(SEND_ZC_REPORT_USAGE).build()
            }
            Operation::Receive => {
                opcode::RecvMsg::new(fd, msg).flags(libc::MSG_WAITALL as u32).build()
            }
        };
        let entry = entry.user_data(free as u64);
        self.slots[free] = Some(parcel);
        self.in_flight += 1;
        // SAFETY:
        // - `msg`, its iovecs and the header are fields of the parcel, at an address that is stable
        //   until `take` turns it into a box again, after the last completion; so is the chunks'
        //   buffer, which nobody resizes meanwhile.
        // - the extents are mapped for as long: the parcel holds their leases.
        // - the socket is open here, and the kernel takes its own reference on submission, which
        //   happens before this returns to the owner of the borrow or not at all.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has a place for each slot");
    }

    /// Submits what was posted and waits for a completion, for at most this long; one system call.
    pub(crate) fn wait(&self, wait: Duration) -> io::Result<()> {
        let timespec = types::Timespec::from(wait);
        let args = types::SubmitArgs::new().timespec(&timespec);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            // Nothing in time, a signal, or completions to be collected first: look at the queue.
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Whether no completion has arrived.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.ring.completion().is_empty()
    }

    /// The next completion that has arrived.
    pub(crate) fn completion(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let index = entry.user_data() as usize;
        if cqueue::notif(entry.flags()) {
            let copied = entry.result() & NOTIFICATION_COPIED != 0;
            return Some(Completion::Released { parcel: self.take(index), copied });
        }
        let result = match entry.result() {
            negative @ ..0 => Err(io::Error::from_raw_os_error(-negative)),
            bytes => Ok(bytes as usize),
        };
        if cqueue::more(entry.flags()) {
            let parcel = self.parcel_mut(index);
            let result = result.map(|bytes| parcel.advance(bytes));
            return Some(Completion::Taken { result, whole: parcel.is_done() });
        }
        let mut parcel = self.take(index);
        if let Ok(bytes) = result {
            parcel.advance(bytes);
        }
        Some(Completion::Moved { parcel, result })
    }

    /// A parcel in flight, for its counters; nothing the kernel reads may be changed.
    fn parcel_mut(&mut self, index: usize) -> &mut Parcel {
        let parcel = self.slots[index].as_mut().expect("a completion of what was posted");
        // SAFETY: leaked in `post` and not yet taken; the kernel reads guest memory, the header and
        // at most the iovecs, and writes nothing of a parcel that is being sent.
        unsafe { parcel.as_mut() }
    }

    /// Gives a parcel back after its last completion.
    fn take(&mut self, index: usize) -> Box<Parcel> {
        let parcel = self.slots[index].take().expect("a completion of what was posted");
        self.in_flight -= 1;
        // SAFETY:
        // - `parcel` came from a box in `post`, and is taken out of its slot once.
        // - this was the operation's last completion, so the kernel does not touch it any more.
        unsafe { Box::from_raw(parcel.as_ptr()) }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}
