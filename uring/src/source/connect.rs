//! Opening the source's connections: socket, buffers, hello, reply.
//!
//! Runs once, on one short-lived thread per lane, so that many lanes cost one round trip.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use pageferry_datapath::framing::hello::Hello;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::LaneError;

use crate::greet::{self, GreetError};
use crate::plan::{ConnectPlan, LanePlan};
use crate::wire::{Line, set_buffers};

/// Opens every lane, in the plan's order.
pub(super) fn connect_all(plan: &ConnectPlan) -> Result<Vec<Line>, LaneError> {
    thread::scope(|scope| {
        let opening: Vec<_> =
            plan.lanes.iter().map(|lane| scope.spawn(move || open(plan, lane))).collect();
        opening
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn open(plan: &ConnectPlan, lane: &LanePlan) -> Result<Line, LaneError> {
    let deadline = Instant::now() + plan.connect_wait;
    let host = |call| move |source| LaneError::Host { lane: lane.lane, call, source };
    let stream = connect_to(plan, lane.bind).map_err(|source| match source.raw_os_error() {
        // A blocking connect that outlives SO_SNDTIMEO says EINPROGRESS.
        Some(libc::EINPROGRESS | libc::EAGAIN | libc::ETIMEDOUT) => timeout(lane.lane, plan),
        _ => LaneError::Host { lane: lane.lane, call: "connect", source },
    })?;
    stream.set_nodelay(true).map_err(host("setsockopt"))?;
    let hello = Hello { session: plan.session, lane: lane.lane, ticket: lane.ticket };
    greet::say_hello(&stream, &hello, deadline).map_err(|error| match error {
        GreetError::Timeout => timeout(lane.lane, plan),
        GreetError::PeerClosed => LaneError::PeerClosed { lane: lane.lane },
        GreetError::Refused { refusal } => LaneError::Refused { lane: lane.lane, refusal },
        GreetError::Malformed { source } => LaneError::PeerMisbehaved { lane: lane.lane, source },
        GreetError::Host { source } => host("hello")(source),
        GreetError::Unknown => unreachable!("only peek_greeting says so"),
    })?;
    Line::new(stream, None, plan.progress_wait).map_err(host("setsockopt"))
}

/// Connects, with the socket's options set before the handshake: buffers decide the window.
fn connect_to(plan: &ConnectPlan, local: Option<SocketAddr>) -> io::Result<TcpStream> {
    let family = if plan.addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(bytes) = plan.socket_buffer_bytes {
        set_buffers(&fd, bytes)?;
    }
    setsockopt(&fd, sockopt::SendTimeout, &time_val(plan.connect_wait))?;
    if let Some(local) = local {
        bind(fd.as_raw_fd(), &SockaddrStorage::from(local))?;
    }
    connect(fd.as_raw_fd(), &SockaddrStorage::from(plan.addr))?;
    Ok(TcpStream::from(fd))
}

fn time_val(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs() as i64, duration.subsec_micros().into())
}

fn timeout(lane: LaneId, plan: &ConnectPlan) -> LaneError {
    LaneError::Timeout { lane, waited_ms: plan.connect_wait.as_millis() as u64 }
}
