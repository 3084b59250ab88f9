//! librdmacm, as much of it as lanes need: identifiers, their events, connecting and accepting.
//!
//! A [`CmId`] owns its event channel, so that no two lanes share anything here; an identifier that
//! came with a connection request is moved to a channel of its own at once. Calls that take time
//! return at once and end with an event.
#![allow(unsafe_code)]

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};

use rdma_sys::{
    ibv_context, ibv_qp, ibv_qp_init_attr, rdma_accept, rdma_ack_cm_event, rdma_bind_addr,
    rdma_cm_event, rdma_cm_id, rdma_conn_param, rdma_connect, rdma_create_event_channel,
    rdma_create_id, rdma_create_qp, rdma_destroy_event_channel, rdma_destroy_id, rdma_destroy_qp,
    rdma_disconnect, rdma_event_channel, rdma_get_cm_event, rdma_get_src_port, rdma_listen,
    rdma_migrate_id, rdma_port_space, rdma_reject, rdma_resolve_addr, rdma_resolve_route,
    rdma_set_option,
};

use crate::error::{CmEventKind, RdmaError};
use crate::limits;
use crate::sys::{ProtectionDomain, set_nonblocking};

/// `RDMA_OPTION_ID` and what of it is used; the header has them as anonymous enums.
const OPTION_ID: i32 = 0;
const OPTION_ID_REUSEADDR: i32 = 1;
const OPTION_ID_ACK_TIMEOUT: i32 = 3;

/// What happened to an identifier.
#[derive(Debug)]
pub(crate) struct CmEvent {
    pub(crate) kind: CmEventKind,
    /// 0, a negative errno, or the transport's reason of a rejection.
    pub(crate) status: i32,
    /// What the peer sent with it; padded with zeros by some transports.
    pub(crate) private_data: Vec<u8>,
    /// READs that the peer would have us answer, and start.
    pub(crate) reads: (u8, u8),
    /// The identifier of a connection request.
    pub(crate) requested: Option<CmId>,
}

/// What is agreed when connecting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionTerms {
    /// READs of the peer answered at a time.
    pub(crate) reads_answered: u8,
    /// READs started at a time.
    pub(crate) reads_started: u8,
}

impl ConnectionTerms {
    fn param(self, private_data: &[u8]) -> rdma_conn_param {
        rdma_conn_param {
            private_data: private_data.as_ptr().cast(),
            private_data_len: u8::try_from(private_data.len()).expect("at most 56 bytes"),
            responder_resources: self.reads_answered,
            initiator_depth: self.reads_started,
            flow_control: 1,
            retry_count: limits::RETRY_COUNT,
            rnr_retry_count: limits::RNR_RETRY_COUNT,
            srq: 0,
            qp_num: 0,
        }
    }
}

#[derive(Debug)]
struct EventChannel {
    raw: NonNull<rdma_event_channel>,
}

impl EventChannel {
    fn new() -> Result<Self, RdmaError> {
        // SAFETY: no precondition.
        let raw = unsafe { rdma_create_event_channel() };
        let raw = NonNull::new(raw).ok_or_else(|| RdmaError::last("rdma_create_event_channel"))?;
        let channel = Self { raw };
        set_nonblocking(channel.as_fd(), "event channel")?;
        Ok(channel)
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open while this is, and its descriptor never changes.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: made in `new`; its only identifier was destroyed before (the order of fields in
        // `CmId`), and every event was acknowledged when it was taken.
        unsafe { rdma_destroy_event_channel(self.raw.as_ptr()) };
    }
}

/// The identifier itself, destroyed before its channel.
#[derive(Debug)]
struct RawId(NonNull<rdma_cm_id>);

impl Drop for RawId {
    fn drop(&mut self) {
        // SAFETY: made by librdmacm and owned by this; its queue pair, if there was one, was
        // destroyed by its owner before.
        unsafe { rdma_destroy_id(self.0.as_ptr()) };
    }
}

/// One end of a connection to be, or a listener.
#[derive(Debug)]
pub(crate) struct CmId {
    raw: RawId,
    channel: EventChannel,
}

// SAFETY: librdmacm locks what identifiers share; this one has a channel of its own.
unsafe impl Send for CmId {}

impl CmId {
    pub(crate) fn new() -> Result<Self, RdmaError> {
        let channel = EventChannel::new()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is alive and outlives the identifier; `raw` is writable.
        let failed = unsafe {
            let (channel, space) = (channel.raw.as_ptr(), rdma_port_space::RDMA_PS_TCP);
            rdma_create_id(channel, &mut raw, ptr::null_mut(), space)
        };
        check("rdma_create_id", failed)?;
        let raw = NonNull::new(raw).expect("rdma_create_id succeeded");
        Ok(Self { raw: RawId(raw), channel })
    }

    /// Takes an identifier that came with an event of `listener`, whose channel it still shares.
    fn of_request(raw: NonNull<rdma_cm_id>) -> Result<Self, RdmaError> {
        let raw = RawId(raw);
        let channel = EventChannel::new()?;
        // SAFETY: both are alive; every event taken was acknowledged, as the call requires.
        let failed = unsafe { rdma_migrate_id(raw.0.as_ptr(), channel.raw.as_ptr()) };
        check("rdma_migrate_id", failed)?;
        Ok(Self { raw, channel })
    }

    fn as_ptr(&self) -> *mut rdma_cm_id {
        self.raw.0.as_ptr()
    }

    /// How long the device waits for an acknowledgement, as an exponent. Transports with a timer of
    /// their own don't take it.
    pub(crate) fn set_ack_timeout(&self, exponent: u8) {
        if let Err(error) = self.set_option(OPTION_ID_ACK_TIMEOUT, &exponent) {
            tracing::debug!(%error, "the acknowledgement timeout is the transport's own");
        }
    }

    fn set_option<T>(&self, option: i32, value: &T) -> Result<(), RdmaError> {
        let value: *const T = value;
        // SAFETY: the identifier is alive; `value` is readable for its size and only read.
        let failed = unsafe {
            let value = value.cast_mut().cast();
            rdma_set_option(self.as_ptr(), OPTION_ID, option, value, size_of::<T>())
        };
        check("rdma_set_option", failed)
    }

    /// Listens; port 0 lets the kernel choose one.
    pub(crate) fn listen(&self, at: SocketAddr) -> Result<u16, RdmaError> {
        if at.port() != 0 {
            // A port whose last connections are only just gone.
            self.set_option(OPTION_ID_REUSEADDR, &1i32)?;
        }
        let mut address = SockAddr::from(at);
        // SAFETY: the identifier is alive; the address is readable for its family's size.
        check("rdma_bind_addr", unsafe { rdma_bind_addr(self.as_ptr(), address.as_mut_ptr()) })?;
        // SAFETY: the identifier is alive.
        check("rdma_listen", unsafe { rdma_listen(self.as_ptr(), limits::BACKLOG) })?;
        // SAFETY: the identifier is alive and bound.
        Ok(u16::from_be(unsafe { rdma_get_src_port(self.as_ptr()) }))
    }

    /// Finds the device that leads to `to`; ends with [`CmEventKind::AddressResolved`].
    pub(crate) fn resolve_address(
        &self,
        from: Option<IpAddr>,
        to: SocketAddr,
        wait_ms: i32,
    ) -> Result<(), RdmaError> {
        let mut from = from.map(|ip| SockAddr::from(SocketAddr::new(ip, 0)));
        let mut to = SockAddr::from(to);
        let from = from.as_mut().map_or(ptr::null_mut(), SockAddr::as_mut_ptr);
        // SAFETY: the identifier is alive; both addresses are readable for their family's size.
        let failed = unsafe { rdma_resolve_addr(self.as_ptr(), from, to.as_mut_ptr(), wait_ms) };
        check("rdma_resolve_addr", failed)
    }

    /// Finds the way there; ends with [`CmEventKind::RouteResolved`].
    pub(crate) fn resolve_route(&self, wait_ms: i32) -> Result<(), RdmaError> {
        // SAFETY: the identifier is alive.
        check("rdma_resolve_route", unsafe { rdma_resolve_route(self.as_ptr(), wait_ms) })
    }

    /// The device it is bound to; null before the address is resolved.
    pub(crate) fn verbs(&self) -> *mut ibv_context {
        // SAFETY: the identifier is alive.
        unsafe { (*self.as_ptr()).verbs }
    }

    /// Makes its queue pair.
    ///
    /// # Safety
    /// The queues and the domain named must outlive the queue pair, which is destroyed by
    /// [`Self::destroy_queue_pair`] before this identifier is dropped.
    pub(crate) unsafe fn create_queue_pair(
        &self,
        domain: &ProtectionDomain,
        attributes: &mut ibv_qp_init_attr,
    ) -> Result<*mut ibv_qp, RdmaError> {
        // SAFETY: identifier and domain are alive; the rest is the caller's promise.
        let failed = unsafe { rdma_create_qp(self.as_ptr(), domain.as_ptr(), attributes) };
        check("rdma_create_qp", failed)?;
        // SAFETY: the call has set it.
        Ok(unsafe { (*self.as_ptr()).qp })
    }

    /// Destroys its queue pair: when it returns, the device touches nothing for it any more.
    ///
    /// # Safety
    /// There is one, and the pointer to it is not used again.
    pub(crate) unsafe fn destroy_queue_pair(&self) {
        // SAFETY: the caller's promise.
        unsafe { rdma_destroy_qp(self.as_ptr()) };
    }

    /// Asks the peer; ends with [`CmEventKind::Established`] or another.
    pub(crate) fn connect(&self, terms: ConnectionTerms, said: &[u8]) -> Result<(), RdmaError> {
        let mut param = terms.param(said);
        // SAFETY: the identifier is alive; `said` is readable for the call, which copies it.
        check("rdma_connect", unsafe { rdma_connect(self.as_ptr(), &mut param) })
    }

    /// Accepts a request; ends with [`CmEventKind::Established`].
    pub(crate) fn accept(&self, terms: ConnectionTerms, said: &[u8]) -> Result<(), RdmaError> {
        let mut param = terms.param(said);
        // SAFETY: as in `connect`.
        check("rdma_accept", unsafe { rdma_accept(self.as_ptr(), &mut param) })
    }

    /// Refuses a request.
    pub(crate) fn reject(&self, said: &[u8]) -> Result<(), RdmaError> {
        let len = u8::try_from(said.len()).expect("a few bytes");
        // SAFETY: as in `connect`.
        check("rdma_reject", unsafe { rdma_reject(self.as_ptr(), said.as_ptr().cast(), len) })
    }

    /// Ends the connection and puts the queue pair into its error state.
    pub(crate) fn disconnect(&self) {
        // SAFETY: the identifier is alive.
        if unsafe { rdma_disconnect(self.as_ptr()) } != 0 {
            tracing::debug!(error = %std::io::Error::last_os_error(), "disconnected already");
        }
    }

    /// The next event that has arrived, without waiting.
    pub(crate) fn event(&self) -> Result<Option<CmEvent>, RdmaError> {
        let mut raw: *mut rdma_cm_event = ptr::null_mut();
        // SAFETY: the channel is alive, and its descriptor does not block; `raw` is writable.
        if unsafe { rdma_get_cm_event(self.channel.raw.as_ptr(), &mut raw) } != 0 {
            let error = std::io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                _ => Err(RdmaError::Call { call: "rdma_get_cm_event", source: error }),
            };
        }
        // SAFETY: an event was returned, and is valid until acknowledged.
        let (event, requested) = unsafe { copy_event(&*raw) };
        // SAFETY: as above; acknowledged once, and nothing of it is used afterwards.
        unsafe { rdma_ack_cm_event(raw) };
        let requested = requested.map(Self::of_request).transpose()?;
        Ok(Some(CmEvent { requested, ..event }))
    }
}

impl AsFd for CmId {
    /// Readable when an event has arrived.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// # Safety
/// The event was not acknowledged yet.
unsafe fn copy_event(raw: &rdma_cm_event) -> (CmEvent, Option<NonNull<rdma_cm_id>>) {
    let kind = CmEventKind::from_number(raw.event);
    // SAFETY: identifiers of the space RDMA_PS_TCP have the parameters of connections.
    let conn = unsafe { raw.param.conn };
    let has_data = !conn.private_data.is_null()
        && matches!(
            kind,
            CmEventKind::ConnectRequest | CmEventKind::Established | CmEventKind::Rejected
        );
    let private_data = match has_data {
        // SAFETY: readable for this length until the event is acknowledged.
        true => unsafe {
            let len = conn.private_data_len.into();
            std::slice::from_raw_parts(conn.private_data.cast::<u8>(), len).to_vec()
        },
        false => Vec::new(),
    };
    let requested = match kind {
        CmEventKind::ConnectRequest => NonNull::new(raw.id),
        _ => None,
    };
    let reads = (conn.responder_resources, conn.initiator_depth);
    (CmEvent { kind, status: raw.status, private_data, reads, requested: None }, requested)
}

/// A socket address in C's form.
enum SockAddr {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl SockAddr {
    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        match self {
            Self::V4(address) => ptr::from_mut(address).cast(),
            Self::V6(address) => ptr::from_mut(address).cast(),
        }
    }
}

impl From<SocketAddr> for SockAddr {
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(v4) => Self::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => Self::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }
}

fn check(call: &'static str, failed: i32) -> Result<(), RdmaError> {
    if failed == 0 { Ok(()) } else { Err(RdmaError::last(call)) }
}
