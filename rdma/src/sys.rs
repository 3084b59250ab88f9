//! libibverbs, as much of it as lanes need. Unsafe code lives here, in [`qp_sys`](crate::qp_sys),
//! [`cm_sys`](crate::cm_sys), [`events_sys`](crate::events_sys) and [`kept_sys`](crate::kept_sys).
//!
//! Everything holds its parent by `Arc`, so nothing is closed under what was made from it:
//!
//! ```text
//! Context <- ProtectionDomain <- MemoryRegion -> Lease of guest memory
//!      ^---- CompletionQueue
//! ```
//!
//! A [`MemoryRegion`] holds the lease of what it registers, and every posted work request holds the
//! `Arc` of its memory region: neither can memory be unmapped while it is registered, nor a region
//! deregistered while the device may use it.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use pageferry_datapath::region::Lease;
use rdma_sys::{
    ibv_access_flags, ibv_ack_cq_events, ibv_alloc_pd, ibv_comp_channel, ibv_context, ibv_cq,
    ibv_create_comp_channel, ibv_create_cq, ibv_dealloc_pd, ibv_dereg_mr, ibv_destroy_comp_channel,
    ibv_destroy_cq, ibv_device_attr, ibv_get_cq_event, ibv_get_device_name, ibv_mr, ibv_pd,
    ibv_poll_cq, ibv_qp, ibv_query_device, ibv_reg_mr, ibv_req_notify_cq, ibv_transport_type,
    ibv_wc,
};

use crate::error::RdmaError;
use crate::events_sys::DeviceEvents;
use crate::kept_sys::Kept;

// The declarations with unions are written by hand in rdma-sys: check them against the C headers.
const _: () = {
    assert!(size_of::<rdma_sys::ibv_send_wr>() == 128);
    assert!(std::mem::offset_of!(rdma_sys::ibv_send_wr, wr) == 40);
    assert!(size_of::<ibv_wc>() == 48);
    assert!(std::mem::offset_of!(ibv_wc, qp_num) == 28);
    assert!(size_of::<rdma_sys::rdma_cm_event>() == 80);
};

/// What a device can do, as far as lanes want to know.
#[derive(Clone, Debug)]
pub(crate) struct DeviceLimits {
    /// The kernel's name of it.
    pub(crate) name: String,
    pub(crate) is_iwarp: bool,
    pub(crate) send_depth_max: u32,
    pub(crate) completions_max: u32,
    pub(crate) region_bytes_max: u64,
    /// READs and atomics it answers at a time, and has under way itself.
    pub(crate) reads_answered_max: u8,
    pub(crate) reads_started_max: u8,
    pub(crate) completion_vectors: i32,
}

/// One open device.
#[derive(Debug)]
pub(crate) struct Context {
    raw: NonNull<ibv_context>,
    limits: DeviceLimits,
    events: DeviceEvents,
    kept: Kept,
}

// SAFETY: libibverbs locks what of a context is written after it was opened.
unsafe impl Send for Context {}
// SAFETY: as for `Send`.
unsafe impl Sync for Context {}

impl Context {
    /// The device with this address, as a connection names it.
    pub(crate) fn open(verbs: *mut ibv_context) -> Result<Arc<Self>, RdmaError> {
        let raw = NonNull::new(verbs).ok_or(RdmaError::DeviceRemoved)?;
        let kept = Kept::open(verbs)?;
        // SAFETY: plain numbers, for which zero bytes are valid.
        let mut attr: ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open while `kept` is held; `attr` is writable.
        let failed = unsafe { ibv_query_device(raw.as_ptr(), &mut attr) };
        if failed != 0 {
            return Err(of_errno("ibv_query_device", failed));
        }
        // SAFETY:
        // - the context is open, and its `device` is set for as long.
        // - the name is a NUL-terminated array inside the device.
        let (name, transport, completion_vectors) = unsafe {
            let device = (*raw.as_ptr()).device;
            let name = CStr::from_ptr(ibv_get_device_name(device)).to_string_lossy().into_owned();
            (name, (*device).transport_type, (*raw.as_ptr()).num_comp_vectors)
        };
        let limits = DeviceLimits {
            name,
            is_iwarp: transport == ibv_transport_type::IBV_TRANSPORT_IWARP,
            send_depth_max: attr.max_qp_wr.max(1) as u32,
            completions_max: attr.max_cqe.max(1) as u32,
            region_bytes_max: attr.max_mr_size,
            reads_answered_max: attr.max_qp_rd_atom.clamp(0, 255) as u8,
            reads_started_max: attr.max_qp_init_rd_atom.clamp(0, 255) as u8,
            completion_vectors: completion_vectors.max(1),
        };
        // SAFETY: the context is open.
        let events = unsafe { DeviceEvents::prepare(raw) }?;
        Ok(Arc::new(Self { raw, limits, events, kept }))
    }

    /// The number of the device's next event.
    pub(crate) fn mark_events(&self) -> u64 {
        // SAFETY: the context is open while this is.
        unsafe { self.events.mark(self.raw) }
    }

    /// What the device's events since `mark` say of why this queue pair failed.
    pub(crate) fn explain(&self, qp: *mut ibv_qp, mark: u64) -> Option<RdmaError> {
        // SAFETY: as above; the queue pair's address is only compared.
        unsafe { self.events.explain(self.raw, &self.limits.name, qp, mark) }
    }

    /// The device is being taken away, which waits for all who use it: closed once nothing of ours
    /// is left of it.
    pub(crate) fn note_removed(&self) {
        self.kept.note_removed();
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.kept.is_removed()
    }

    pub(crate) fn limits(&self) -> &DeviceLimits {
        &self.limits
    }
}

/// Ties memory regions to the queue pairs that may use them.
#[derive(Debug)]
pub(crate) struct ProtectionDomain {
    raw: NonNull<ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: libibverbs only reads it after it was made.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Send`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(crate) fn new(context: Arc<Context>) -> Result<Arc<Self>, RdmaError> {
        // SAFETY: the context is open, and stays so while this is.
        let raw = unsafe { ibv_alloc_pd(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| RdmaError::last("ibv_alloc_pd"))?;
        Ok(Arc::new(Self { raw, context }))
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn as_ptr(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; regions and queue pairs hold an `Arc`, so none is left.
        let failed = unsafe { ibv_dealloc_pd(self.raw.as_ptr()) };
        debug_assert_eq!(failed, 0, "ibv_dealloc_pd");
    }
}

/// What may be done with registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// The device reads it for what is posted here: the source's guest memory.
    LocalRead,
    /// What is posted here also writes to it: receives. On iWARP the answer to a READ is a WRITE
    /// of the peer, so the place for it has to allow those.
    LocalWrite,
    /// The peer writes to it: the target's guest memory.
    RemoteWrite,
    /// The peer reads and writes it: the scratch page.
    RemoteReadWrite,
}

impl Access {
    fn flags(self, is_iwarp: bool) -> i32 {
        const LOCAL: u32 = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        const WRITE: u32 = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
        const READ: u32 = ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        let flags = match self {
            Self::LocalRead => 0,
            Self::LocalWrite if is_iwarp => LOCAL | WRITE,
            Self::LocalWrite => LOCAL,
            Self::RemoteWrite => LOCAL | WRITE,
            Self::RemoteReadWrite => LOCAL | WRITE | READ,
        };
        flags as i32
    }
}

/// A leased range of memory that the device may use.
#[derive(Debug)]
pub(crate) struct MemoryRegion {
    raw: NonNull<ibv_mr>,
    lkey: u32,
    rkey: u32,
    lease: Lease,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs only reads it after it was made, and the memory behind it is never accessed
// but by the device and by the lease's volatile copies.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for `Send`.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers a lease, which pins its pages and populates its holes.
    pub(crate) fn register(
        domain: &Arc<ProtectionDomain>,
        lease: Lease,
        access: Access,
    ) -> Result<Arc<Self>, RdmaError> {
        let len = lease.extent().len;
        let flags = access.flags(domain.context.limits.is_iwarp);
        // SAFETY:
        // - the domain is alive, and stays so while this is.
        // - the range is mapped for as long: the lease is kept until after `ibv_dereg_mr`.
        // - nobody has a reference into it: there is never one into guest memory.
        let raw =
            unsafe { ibv_reg_mr(domain.as_ptr(), lease.as_ptr().cast(), len as usize, flags) };
        let Some(raw) = NonNull::new(raw) else {
            return Err(RdmaError::Register { len, source: io::Error::last_os_error() });
        };
        // SAFETY: just made, and written by nobody any more.
        let (lkey, rkey) = unsafe { (raw.as_ref().lkey, raw.as_ref().rkey) };
        Ok(Arc::new(Self { raw, lkey, rkey, lease, _domain: Arc::clone(domain) }))
    }

    /// The memory.
    pub(crate) fn lease(&self) -> &Lease {
        &self.lease
    }

    pub(crate) fn len(&self) -> u64 {
        self.lease.extent().len
    }

    /// Its first byte's address, here and on the wire.
    pub(crate) fn addr(&self) -> u64 {
        self.lease.as_ptr() as u64
    }

    pub(crate) fn lkey(&self) -> u32 {
        self.lkey
    }

    pub(crate) fn rkey(&self) -> u32 {
        self.rkey
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY:
        // - registered in `register`, deregistered once.
        // - nothing posted uses it: the table of what is in flight holds an `Arc`.
        // - the lease is dropped after this.
        let failed = unsafe { ibv_dereg_mr(self.raw.as_ptr()) };
        if failed != 0 {
            // Still registered, so still pinned, but no longer used by anything of ours.
            tracing::warn!(errno = failed, "memory could not be deregistered");
        }
    }
}

/// Where completions arrive, with the channel that tells of them.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    raw: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
    _context: Arc<Context>,
}

// SAFETY: libibverbs locks a queue; nothing here is tied to a thread.
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    /// A queue for `entries` completions, interrupting by the device's vector `vector`, modulo how
    /// many it has.
    pub(crate) fn new(
        context: &Arc<Context>,
        entries: u32,
        vector: usize,
    ) -> Result<Self, RdmaError> {
        let entries = entries.min(context.limits.completions_max) as i32;
        let vector = (vector % context.limits.completion_vectors as usize) as i32;
        // SAFETY: the context is open, and stays so while this is.
        let channel = unsafe { ibv_create_comp_channel(context.raw.as_ptr()) };
        let channel =
            NonNull::new(channel).ok_or_else(|| RdmaError::last("ibv_create_comp_channel"))?;
        // SAFETY: as above; the channel was just made, and no context pointer is wanted back.
        let raw = unsafe {
            let (context, channel) = (context.raw.as_ptr(), channel.as_ptr());
            ibv_create_cq(context, entries, ptr::null_mut(), channel, vector)
        };
        let Some(raw) = NonNull::new(raw) else {
            let error = RdmaError::last("ibv_create_cq");
            // SAFETY: made above, and no queue uses it.
            unsafe { ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self { raw, channel, _context: Arc::clone(context) };
        set_nonblocking(queue.as_fd(), "completion channel")?;
        Ok(queue)
    }

    pub(crate) fn as_ptr(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// Takes completions that have arrived, as many as fit, without waiting.
    pub(crate) fn poll(&self, entries: &mut [ibv_wc]) -> Result<usize, RdmaError> {
        // SAFETY: the queue is alive; `entries` is writable for its length.
        let count =
            unsafe { ibv_poll_cq(self.as_ptr(), entries.len() as i32, entries.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| of_errno("ibv_poll_cq", count))
    }

    /// Asks for one event at the next completion. One that came before this is not told of: poll
    /// once more after it.
    pub(crate) fn arm(&self) -> Result<(), RdmaError> {
        // SAFETY: the queue is alive.
        let failed = unsafe { ibv_req_notify_cq(self.as_ptr(), 0) };
        if failed == 0 { Ok(()) } else { Err(of_errno("ibv_req_notify_cq", failed)) }
    }

    /// Takes an event off the channel, if there is one.
    pub(crate) fn take_event(&self) {
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: channel and queue are alive; both places are writable. The channel's descriptor
        // does not block.
        let failed = unsafe { ibv_get_cq_event(self.channel.as_ptr(), &mut queue, &mut context) };
        if failed == 0 {
            // SAFETY: this queue is the channel's only one, and one event of it was just taken.
            unsafe { ibv_ack_cq_events(self.as_ptr(), 1) };
        }
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open while this is, and its descriptor never changes.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd) }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY:
        // - both made in `new`, destroyed once, the queue before its channel.
        // - queue pairs own their completion queue and are destroyed before it.
        // - every event taken was acknowledged at once, so this does not wait.
        unsafe {
            ibv_destroy_cq(self.raw.as_ptr());
            ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

/// libibverbs returns errno, some providers its negative.
pub(crate) fn of_errno(call: &'static str, number: i32) -> RdmaError {
    RdmaError::Call { call, source: io::Error::from_raw_os_error(number.saturating_abs()) }
}

pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>, what: &'static str) -> Result<(), RdmaError> {
    let set = fcntl(fd, FcntlArg::F_GETFL).and_then(|flags| {
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(fd, FcntlArg::F_SETFL(flags))
    });
    set.map(drop).map_err(|errno| RdmaError::Call { call: what, source: errno.into() })
}
