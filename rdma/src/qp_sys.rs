//! A queue pair: WRITEs, READs, SENDs and receives go in, completions come out.
//!
//! ```text
//!  post_*: [WRITE WRITE WRITE* ][SEND* ][WRITE WRITE* ]   * signalled
//!           `-- in flight: one entry each, with the memory regions it uses --'
//!  poll:   a completion of request N retires every entry whose last request is at most N
//! ```
//!
//! Requests of one queue pair complete in order, so one signal at the end of each entry is enough.
//! Posting takes shares of the memory regions; they come back with the entry's completion, or when
//! the queue pair is destroyed, after which the device touches nothing any more.
//!
//! Never overrun: [`QueuePair::free`] says how many requests still fit, and posting more is a bug.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use rdma_sys::{
    ibv_modify_qp, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_cap,
    ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_recv_wr, ibv_send_flags, ibv_send_wr, ibv_sge,
    ibv_wc, ibv_wr_opcode,
};

use crate::cm_sys::{CmEvent, CmId, ConnectionTerms};
use crate::error::{Operation, RdmaError, Status};
use crate::limits;
use crate::sys::{CompletionQueue, MemoryRegion, ProtectionDomain, of_errno};

/// Tells a receive's id from a request's number.
const RECEIVE: u64 = 1 << 63;
/// Completions taken at once.
const POLL_BATCH: usize = 32;

/// Memory of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RemoteAddr {
    pub(crate) addr: u64,
    pub(crate) rkey: u32,
}

/// One WRITE: a range of a registered region, and where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) from: Arc<MemoryRegion>,
    /// Counted from the region's first byte.
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) to: RemoteAddr,
}

/// A part of a region that a SEND, a READ or a receive uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    pub(crate) region: &'a Arc<MemoryRegion>,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// What has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// The entry with this number: its memory is not used any more.
    Done { entry: u64 },
    /// The receive that was posted with this number.
    Received { slot: usize, bytes: usize },
}

#[derive(Debug)]
struct InFlight {
    /// The number of its last request, which is signalled unless a later entry's is.
    last: u64,
    requests: u32,
    regions: Held,
}

/// What an entry keeps registered. Most use one region, and a list of one would be an allocation
/// for each post.
#[derive(Debug, Default)]
struct Held {
    first: Option<Arc<MemoryRegion>>,
    more: Vec<Arc<MemoryRegion>>,
}

impl Held {
    fn hold(&mut self, region: &Arc<MemoryRegion>) {
        match &self.first {
            None => self.first = Some(Arc::clone(region)),
            Some(first) if Arc::ptr_eq(self.more.last().unwrap_or(first), region) => {}
            Some(_) => self.more.push(Arc::clone(region)),
        }
    }
}

/// A reliable connection's end.
pub(crate) struct QueuePair {
    id: CmId,
    raw: *mut ibv_qp,
    cq: CompletionQueue,
    depth: u32,
    inline_bytes: u32,
    posted: u32,
    next: u64,
    in_flight: VecDeque<InFlight>,
    /// Completed by a poll that had found a failure behind it.
    failure: Option<RdmaError>,
    /// Where completions are taken to; clearing it for each look would cost more than the look.
    polled: Box<[ibv_wc; POLL_BATCH]>,
    /// Work requests of one post, kept for their allocation.
    requests: Vec<ibv_send_wr>,
    ranges: Vec<ibv_sge>,
    /// Receives use it for as long as the queue pair lives.
    _receives_into: Option<Arc<MemoryRegion>>,
    /// Of the device's events, the first that may be about this.
    events_from: u64,
    domain: Arc<ProtectionDomain>,
}

// SAFETY:
// - `raw` belongs to `id`, and is used through `&mut self` only.
// - the pointers in `requests` and `ranges` mean nothing between two posts.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes the queue pair of an identifier that is bound to the domain's device. `vector` spreads
    /// the interrupts of several over the device's completion vectors.
    pub(crate) fn new(
        id: CmId,
        domain: &Arc<ProtectionDomain>,
        depth: u32,
        vector: usize,
    ) -> Result<Self, RdmaError> {
        let device = domain.context().limits();
        // Receives have a queue of their own, but share the completions.
        let receives = limits::RECEIVE_SLOTS as u32;
        let depth = depth
            .min(device.send_depth_max)
            .min(device.completions_max.saturating_sub(receives))
            .max(2);
        let events_from = domain.context().mark_events();
        let mut depth = depth;
        // What a device says of its limits holds for each alone, not for all together, and what it
        // has left it does not say: halved until it has room.
        let (raw, cq, inline_bytes) = loop {
            match make(&id, domain, depth, receives, vector) {
                Err(RdmaError::Call { call, source }) if depth / 2 >= limits::SEND_DEPTH_MIN => {
                    tracing::debug!(depth, call, %source, "a shorter queue is tried");
                    depth /= 2;
                }
                made => break made?,
            }
        };
        Ok(Self {
            id,
            raw,
            cq,
            depth,
            inline_bytes,
            posted: 0,
            next: 0,
            in_flight: VecDeque::new(),
            failure: None,
            // SAFETY: plain numbers and a union of numbers, for which zero bytes are valid.
            polled: unsafe { Box::new(std::mem::zeroed()) },
            requests: Vec::new(),
            ranges: Vec::new(),
            _receives_into: None,
            events_from,
            domain: Arc::clone(domain),
        })
    }

    /// The send queue's length.
    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    /// Requests that still fit.
    pub(crate) fn free(&self) -> u32 {
        self.depth - self.posted
    }

    /// Posts WRITEs as one chain and one entry; returns the entry's number.
    ///
    /// # Panics
    /// Without any WRITE, with more than [fit](Self::free), or with one outside its region.
    pub(crate) fn post_writes(&mut self, writes: &[Write]) -> Result<u64, RdmaError> {
        self.post_chain(writes, true)
    }

    /// The same, with a completion of its own or with the next entry's that has one.
    pub(crate) fn post_chain(
        &mut self,
        writes: &[Write],
        signalled: bool,
    ) -> Result<u64, RdmaError> {
        let mut regions = Held::default();
        self.requests.clear();
        self.ranges.clear();
        for write in writes {
            let range = range_of(&write.from, write.offset, write.len);
            self.ranges.push(range);
            let mut request = request(ibv_wr_opcode::IBV_WR_RDMA_WRITE, write.to);
            if write.len <= self.inline_bytes {
                request.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
            }
            self.requests.push(request);
            regions.hold(&write.from);
        }
        self.post(regions, signalled)
    }

    /// Posts a READ of the peer's memory.
    pub(crate) fn post_read(&mut self, into: Part<'_>, from: RemoteAddr) -> Result<u64, RdmaError> {
        self.post_one(into, request(ibv_wr_opcode::IBV_WR_RDMA_READ, from))
    }

    /// Posts a SEND; inline where it is short enough, and the part can then be reused at once.
    pub(crate) fn post_send(&mut self, part: Part<'_>) -> Result<u64, RdmaError> {
        let mut send = request(ibv_wr_opcode::IBV_WR_SEND, RemoteAddr { addr: 0, rkey: 0 });
        if part.len <= self.inline_bytes {
            send.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
        }
        self.post_one(part, send)
    }

    fn post_one(&mut self, part: Part<'_>, request: ibv_send_wr) -> Result<u64, RdmaError> {
        self.requests.clear();
        self.ranges.clear();
        self.ranges.push(range_of(part.region, part.offset, part.len));
        self.requests.push(request);
        let mut regions = Held::default();
        regions.hold(part.region);
        self.post(regions, true)
    }

    /// Posts what stands in `requests` and `ranges`, one range each.
    fn post(&mut self, regions: Held, signalled: bool) -> Result<u64, RdmaError> {
        let count = self.requests.len();
        assert!(count > 0 && count <= self.free() as usize, "a send queue is never overrun");
        for index in 0..count {
            let next = match index + 1 < count {
                true => &raw mut self.requests[index + 1],
                false => ptr::null_mut(),
            };
            let request = &mut self.requests[index];
            request.wr_id = self.next + index as u64;
            request.sg_list = &raw mut self.ranges[index];
            request.num_sge = 1;
            request.next = next;
        }
        if signalled {
            self.requests[count - 1].send_flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        let last = self.next + count as u64 - 1;
        // Before it is posted: a chain that is refused half-way stays here until the queue pair is
        // destroyed.
        self.in_flight.push_back(InFlight { last, requests: count as u32, regions });
        self.posted += count as u32;
        self.next += count as u64;
        let mut refused = ptr::null_mut();
        // SAFETY:
        // - the queue pair is alive until `drop`.
        // - requests and ranges are valid for the call, which copies them; `next` ends with null.
        // - each range lies in a region whose `Arc` is in the table of what is in flight.
        let failed = unsafe { ibv_post_send(self.raw, self.requests.as_mut_ptr(), &mut refused) };
        if failed == 0 { Ok(last) } else { Err(of_errno("ibv_post_send", failed)) }
    }

    /// Says which region receives use; once, before the first.
    pub(crate) fn receive_into(&mut self, region: &Arc<MemoryRegion>) {
        assert!(self._receives_into.is_none());
        self._receives_into = Some(Arc::clone(region));
    }

    /// Posts a receive into `offset` of that region; its completion names `slot`.
    pub(crate) fn post_receive(
        &mut self,
        slot: usize,
        offset: u64,
        len: u32,
    ) -> Result<(), RdmaError> {
        let region = self._receives_into.as_ref().expect("said before the first receive");
        let mut range = range_of(region, offset, len);
        let mut request = ibv_recv_wr {
            wr_id: RECEIVE | slot as u64,
            next: ptr::null_mut(),
            sg_list: &mut range,
            num_sge: 1,
        };
        let mut refused = ptr::null_mut();
        // SAFETY:
        // - the queue pair is alive until `drop`; request and range are valid for the call.
        // - the range lies in a region that is kept until the queue pair is destroyed.
        let failed = unsafe { ibv_post_recv(self.raw, &mut request, &mut refused) };
        if failed == 0 { Ok(()) } else { Err(of_errno("ibv_post_recv", failed)) }
    }

    /// Adds what has completed to `done`, without waiting. After a failure the queue pair can only
    /// be dropped; what had completed before it is told first.
    pub(crate) fn poll(&mut self, done: &mut Vec<Completion>) -> Result<(), RdmaError> {
        if self.failure.is_some() {
            return self.failure.take().map_or(Ok(()), Err);
        }
        let count = self.cq.poll(&mut self.polled[..])?;
        for index in 0..count {
            if let Err(error) = self.completed(index, done) {
                if done.is_empty() {
                    return Err(error);
                }
                self.failure = Some(error);
                break;
            }
        }
        Ok(())
    }

    fn completed(&mut self, index: usize, done: &mut Vec<Completion>) -> Result<(), RdmaError> {
        let entry = &self.polled[index];
        let (id, bytes) = (entry.wr_id, entry.byte_len as usize);
        let is_receive = id & RECEIVE != 0;
        if entry.status != 0 {
            let operation = if is_receive { Operation::Receive } else { Operation::Request };
            let status = Status::from_number(entry.status);
            return Err(RdmaError::Completion { operation, status, vendor: entry.vendor_err });
        }
        if is_receive {
            done.push(Completion::Received { slot: (id & !RECEIVE) as usize, bytes });
            return Ok(());
        }
        while let Some(first) = self.in_flight.front()
            && first.last <= id
        {
            self.posted -= first.requests;
            done.push(Completion::Done { entry: first.last });
            drop(self.in_flight.pop_front().map(|entry| entry.regions));
        }
        Ok(())
    }

    /// Asks for an event at the next completion; poll once more after it.
    pub(crate) fn arm(&self) -> Result<(), RdmaError> {
        self.cq.arm()
    }

    /// Takes an event off the completion channel.
    pub(crate) fn take_completion_event(&self) {
        self.cq.take_event();
    }

    /// Readable when an event of the completion queue has arrived.
    pub(crate) fn completion_fd(&self) -> BorrowedFd<'_> {
        self.cq.as_fd()
    }

    /// Readable when an event of the connection has arrived.
    pub(crate) fn connection_fd(&self) -> BorrowedFd<'_> {
        self.id.as_fd()
    }

    /// The next event of the connection, without waiting.
    pub(crate) fn connection_event(&self) -> Result<Option<CmEvent>, RdmaError> {
        self.id.event()
    }

    /// What the device's own events say of why this failed, if anything.
    pub(crate) fn explain(&self) -> Option<RdmaError> {
        self.domain.context().explain(self.raw, self.events_from)
    }

    /// Its device is being taken away.
    pub(crate) fn note_removed(&self) {
        self.domain.context().note_removed();
    }

    /// Asks the peer.
    pub(crate) fn connect(&self, terms: ConnectionTerms, said: &[u8]) -> Result<(), RdmaError> {
        self.id.connect(terms, said)
    }

    /// Accepts the peer's request.
    pub(crate) fn accept(&self, terms: ConnectionTerms, said: &[u8]) -> Result<(), RdmaError> {
        self.id.accept(terms, said)
    }

    /// Ends the connection; the peer is told, and what it still sends is dropped by the device.
    pub(crate) fn hang_up(&self) {
        self.id.disconnect();
        // Also where the connection manager thinks that it was never established.
        // SAFETY: plain numbers, for which zero bytes are valid.
        let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        // SAFETY: the queue pair is alive; only its state is read from the attributes.
        let failed = unsafe {
            ibv_modify_qp(self.raw, &mut attributes, ibv_qp_attr_mask::IBV_QP_STATE.0 as i32)
        };
        if failed != 0 {
            tracing::debug!(errno = failed, "queue pair was in error already");
        }
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair")
            .field("depth", &self.depth)
            .field("posted", &self.posted)
            .finish_non_exhaustive()
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and destroyed once. From here on the device touches none of the
        // memory that is in flight, which is let go of after this.
        unsafe { self.id.destroy_queue_pair() };
    }
}

/// The queue pair of `id` with its completion queue, and the bytes that may be inline.
fn make(
    id: &CmId,
    domain: &Arc<ProtectionDomain>,
    depth: u32,
    receives: u32,
    vector: usize,
) -> Result<(*mut ibv_qp, CompletionQueue, u32), RdmaError> {
    let cq = CompletionQueue::new(domain.context(), depth + receives, vector)?;
    let mut attributes = ibv_qp_init_attr {
        qp_context: ptr::null_mut(),
        send_cq: cq.as_ptr(),
        recv_cq: cq.as_ptr(),
        srq: ptr::null_mut(),
        cap: ibv_qp_cap {
            max_send_wr: depth,
            max_recv_wr: receives,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: limits::INLINE_BYTES,
        },
        qp_type: ibv_qp_type::IBV_QPT_RC,
        sq_sig_all: 0,
    };
    // SAFETY: the caller keeps queue and domain until it has destroyed the queue pair.
    let created = unsafe { id.create_queue_pair(domain, &mut attributes) };
    let raw = match created {
        Ok(raw) => raw,
        Err(_) => {
            // Some devices have no inline at all.
            attributes.cap.max_inline_data = 0;
            // SAFETY: as above.
            unsafe { id.create_queue_pair(domain, &mut attributes) }?
        }
    };
    Ok((raw, cq, attributes.cap.max_inline_data))
}

fn range_of(region: &MemoryRegion, offset: u64, len: u32) -> ibv_sge {
    let end = offset.checked_add(len.into());
    assert!(len > 0 && end.is_some_and(|end| end <= region.len()), "inside its memory region");
    ibv_sge { addr: region.addr() + offset, length: len, lkey: region.lkey() }
}

fn request(opcode: ibv_wr_opcode::Type, remote: RemoteAddr) -> ibv_send_wr {
    // SAFETY: plain numbers, null pointers and unions of both, for which zero bytes are valid.
    let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
    request.opcode = opcode;
    request.wr.rdma = rdma_sys::rdma_t { remote_addr: remote.addr, rkey: remote.rkey };
    request
}
