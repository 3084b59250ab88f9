//! Making a lane's connection: at the source by asking, at the target by taking.
//!
//! ```text
//!   source                               target
//!   address, route, queue pair
//!   request (ticket)  ----------------->  judged by the caller, before a queue pair exists
//!   scratch page's key, slices  <-------  queue pair, acceptance; or refusal
//!   WRITE scratch, READ it back
//! ```

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pageferry_datapath::framing::hello::{Hello, Refusal, Reply};

use crate::cm_sys::{CmEvent, CmId, ConnectionTerms};
use crate::error::{CmEventKind, RdmaError};
use crate::guest::RdmaMemory;
use crate::limits::{self, MESSAGE_BYTES};
use crate::line::Line;
use crate::mailbox::Mailbox;
use crate::message::{self, LaneAccept};
use crate::plan::{ConnectPlan, LanePlan};
use crate::qp_sys::{QueuePair, RemoteAddr, Write};
use crate::registration::RegisteredMemory;
use crate::stop::Stop;
use crate::sys::{Context, DeviceLimits};

/// A source's connection that has been tried.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) line: Line,
    pub(crate) registered: Arc<RegisteredMemory>,
    /// The device, for the report.
    pub(crate) device: String,
}

/// Connects one lane and proves that WRITE and READ work on it.
pub(crate) fn dial(
    plan: &ConnectPlan,
    lane: &LanePlan,
    memory: &RdmaMemory,
    stop: &Arc<Stop>,
) -> Result<Dialled, RdmaError> {
    let deadline = Instant::now() + plan.connect_wait;
    let id = CmId::new()?;
    id.set_ack_timeout(limits::ACK_TIMEOUT_EXPONENT);
    let (from, to) = plan.way(lane);
    resolve(&id, from, to, deadline, stop)?;
    let context = Context::open(id.verbs())?;
    let domain = memory.domain(&context)?;
    let mut qp = QueuePair::new(id, &domain, plan.depth, lane.lane.0.into())?;
    let mailbox = Mailbox::new(&domain)?;
    mailbox.open(&mut qp)?;
    let hello = Hello { session: plan.session, lane: lane.lane, ticket: lane.ticket };
    let terms = terms(context.limits());
    qp.connect(terms, &message::encode_request(&hello)).map_err(refused_at_once)?;
    let event = wait_event(&qp.connection_fd(), deadline, stop, || qp.connection_event())?;
    let accept = match event.kind {
        CmEventKind::Established => {
            LaneAccept::decode(&event.private_data).map_err(RdmaError::Misbehaved)?
        }
        CmEventKind::Rejected => {
            return Err(match message::refusal_in(&event.private_data) {
                Some(refusal) => RdmaError::Refused { refusal },
                None => RdmaError::Rejected { status: event.status },
            });
        }
        _ => return Err(ended_early(&qp, &event)),
    };
    let registered = memory.registered(&domain, Some(accept.slice_bytes))?;
    let mut line = Line::new(qp, mailbox, Arc::clone(stop));
    try_scratch(&mut line, accept.scratch, deadline)?;
    if let Some(still_there) = &plan.still_there {
        line.ask_when_silent(lane.lane, still_there.clone());
    }
    Ok(Dialled { line, registered, device: context.limits().name.clone() })
}

/// Finds the device and the way to an address.
pub(crate) fn resolve(
    id: &CmId,
    from: Option<IpAddr>,
    to: SocketAddr,
    deadline: Instant,
    stop: &Stop,
) -> Result<(), RdmaError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let wait_ms = left.as_millis().min(i32::MAX as u128) as i32;
    let no_device = |error| match error {
        RdmaError::Call { source, .. } => RdmaError::NoDevice { to, source },
        other => other,
    };
    id.resolve_address(from, to, wait_ms).map_err(no_device)?;
    let event = wait_event(&id, deadline, stop, || id.event())?;
    match event.kind {
        CmEventKind::AddressResolved if !id.verbs().is_null() => {}
        CmEventKind::AddressResolved | CmEventKind::AddressError => {
            return Err(RdmaError::NoDevice { to, source: errno_of(event.status) });
        }
        _ => return Err(unexpected(&event)),
    }
    id.resolve_route(wait_ms)?;
    let event = wait_event(&id, deadline, stop, || id.event())?;
    match event.kind {
        CmEventKind::RouteResolved => Ok(()),
        CmEventKind::RouteError => Err(RdmaError::NoRoute { to, source: errno_of(event.status) }),
        _ => Err(unexpected(&event)),
    }
}

/// iWARP's connection is one of TCP, and some of its failures come at once.
pub(crate) fn refused_at_once(error: RdmaError) -> RdmaError {
    match &error {
        RdmaError::Call { source, .. } => match source.raw_os_error() {
            Some(errno @ libc::ECONNREFUSED) => RdmaError::Rejected { status: -errno },
            Some(errno @ (libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ETIMEDOUT)) => {
                RdmaError::Unreachable { status: -errno }
            }
            _ => error,
        },
        _ => error,
    }
}

/// Writes a page to the peer, reads it back, and compares.
///
/// One READ would do. But soft-iWARP now and then overlooks what arrives while it is still setting
/// a connection up, until something else arrives; so where no answer comes, it is asked for again.
fn try_scratch(line: &mut Line, scratch: RemoteAddr, deadline: Instant) -> Result<(), RdmaError> {
    let pattern: Vec<u8> = (0..MESSAGE_BYTES).map(|at| (at % 251) as u8 ^ 0x5a).collect();
    let from = Arc::clone(line.mailbox.scratch_region());
    from.lease().copy_in(0, &pattern).map_err(RdmaError::OutsideMemory)?;
    let write = Write { from, offset: 0, len: MESSAGE_BYTES as u32, to: scratch };
    let written = line.qp.post_writes(&[write])?;
    let since = Instant::now();
    for asked in 1..=limits::READS_MAX {
        // A send queue may be too short for all of them.
        if line.qp.free() > 0 {
            line.qp.post_read(line.mailbox.sink(), scratch)?;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = if asked < limits::READS_MAX { left.min(limits::SCRATCH_WAIT) } else { left };
        let until = Instant::now() + wait;
        loop {
            while let Some(entry) = line.next_done() {
                if entry > written {
                    return match line.mailbox.sink_bytes()?[..] == pattern[..] {
                        true => Ok(()),
                        false => Err(RdmaError::Probe),
                    };
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !line.wait(left)? {
                break;
            }
        }
        tracing::debug!(asked, "a scratch page is not there yet");
    }
    Err(RdmaError::Stalled { waited_ms: since.elapsed().as_millis() as u64 })
}

/// A lane that has asked to be taken, and waits for the answer.
#[derive(Debug)]
pub struct ArrivingLane {
    id: CmId,
    hello: Hello,
    reads: (u8, u8),
}

impl ArrivingLane {
    /// From a connection request; one that is not ours is refused here.
    pub(crate) fn of_request(mut event: CmEvent) -> Result<Self, RdmaError> {
        let Some(id) = event.requested.take() else { return Err(unexpected(&event)) };
        match message::decode_request(&event.private_data) {
            Ok(hello) => Ok(Self { id, hello, reads: event.reads }),
            Err(error) => {
                id.reject(&Reply::Refused(Refusal::Version).encode())?;
                Err(RdmaError::Misbehaved(error))
            }
        }
    }

    /// What it said.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Refuses it.
    pub fn refuse(self, refusal: Refusal) {
        if let Err(error) = self.id.reject(&Reply::Refused(refusal).encode()) {
            tracing::debug!(%error, "whoever asked is gone");
        }
    }

    /// Takes it: from here on the peer may write to the scratch page, and ask for keys.
    pub(crate) fn take(
        self,
        memory: &RdmaMemory,
        connect_wait: Duration,
        stop: &Arc<Stop>,
    ) -> Result<Dialled, RdmaError> {
        let Self { id, hello, reads } = self;
        let deadline = Instant::now() + connect_wait;
        let context = Context::open(id.verbs())?;
        let domain = memory.domain(&context)?;
        let registered = memory.registered(&domain, None)?;
        // It sends few messages: an answer to each question.
        let depth = 4 * limits::SEND_SLOTS as u32;
        let mut qp = QueuePair::new(id, &domain, depth, hello.lane.0.into())?;
        let mailbox = Mailbox::new(&domain)?;
        mailbox.open(&mut qp)?;
        let slice_bytes = registered.slices().slice_bytes();
        let accept = LaneAccept { slice_bytes, scratch: mailbox.scratch() };
        let own = terms(context.limits());
        let terms = ConnectionTerms {
            reads_answered: reads.1.min(own.reads_answered),
            reads_started: reads.0.min(own.reads_started),
        };
        qp.accept(terms, &accept.encode())?;
        let event = wait_event(&qp.connection_fd(), deadline, stop, || qp.connection_event())?;
        if event.kind != CmEventKind::Established {
            return Err(ended_early(&qp, &event));
        }
        let line = Line::new(qp, mailbox, Arc::clone(stop));
        Ok(Dialled { line, registered, device: context.limits().name.clone() })
    }
}

/// Takes connection requests.
#[derive(Debug)]
pub(crate) struct ListeningId {
    id: CmId,
    /// Its device, where it listens at an address of one.
    device: Option<Arc<Context>>,
    port: u16,
}

impl ListeningId {
    pub(crate) fn at(address: SocketAddr) -> Result<Self, RdmaError> {
        let id = CmId::new()?;
        let port = id.listen(address)?;
        let verbs = id.verbs();
        let device = (!verbs.is_null()).then(|| Context::open(verbs)).transpose()?;
        Ok(Self { id, device, port })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The next request, or what was wrong with it; an error of the listener itself ends it.
    pub(crate) fn next(&self, stop: &Stop) -> Result<Result<ArrivingLane, RdmaError>, RdmaError> {
        loop {
            let far = Instant::now() + limits::TICK;
            match wait_event(&self.id, far, stop, || self.id.event()) {
                Ok(event) if event.kind == CmEventKind::ConnectRequest => {
                    return Ok(ArrivingLane::of_request(event));
                }
                Ok(event) if event.kind == CmEventKind::DeviceRemoval => {
                    self.device.iter().for_each(|device| device.note_removed());
                    return Err(RdmaError::DeviceRemoved);
                }
                Ok(_) | Err(RdmaError::Stalled { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits for the next event of an identifier.
pub(crate) fn wait_event(
    fd: &impl AsFd,
    deadline: Instant,
    stop: &Stop,
    mut take: impl FnMut() -> Result<Option<CmEvent>, RdmaError>,
) -> Result<CmEvent, RdmaError> {
    let since = Instant::now();
    loop {
        stop.check()?;
        if let Some(event) = take()? {
            return Ok(event);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RdmaError::Stalled { waited_ms: since.elapsed().as_millis() as u64 });
        }
        let left = left.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
        let timeout = PollTimeout::try_from(left).expect("not negative");
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        match poll(&mut [readable(fd.as_fd()), readable(stop.as_fd())], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(RdmaError::Call { call: "poll", source: errno.into() }),
        }
    }
}

pub(crate) fn terms(device: &DeviceLimits) -> ConnectionTerms {
    ConnectionTerms {
        reads_answered: device.reads_answered_max.min(limits::READS_MAX),
        reads_started: device.reads_started_max.min(limits::READS_MAX),
    }
}

pub(crate) fn unexpected(event: &CmEvent) -> RdmaError {
    match event.kind {
        CmEventKind::Unreachable | CmEventKind::ConnectError => {
            RdmaError::Unreachable { status: event.status }
        }
        CmEventKind::Rejected => RdmaError::Rejected { status: event.status },
        CmEventKind::Disconnected => RdmaError::PeerClosed,
        CmEventKind::DeviceRemoval => RdmaError::DeviceRemoved,
        kind => RdmaError::Event { event: kind, status: event.status },
    }
}

/// The same of a connection that was not established yet. A removed device is noted: its other users
/// here let go of it, for which its removal waits.
fn ended_early(qp: &QueuePair, event: &CmEvent) -> RdmaError {
    if event.kind == CmEventKind::DeviceRemoval {
        qp.note_removed();
    }
    unexpected(event)
}

fn errno_of(status: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(status.saturating_abs())
}
