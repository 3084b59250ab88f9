//! Opening the source's connections: socket, buffers, hello, reply.
//!
//! Runs once, on one short-lived thread per lane, so that many lanes cost one round trip.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pageferry_datapath::framing::FramingError;
use pageferry_datapath::framing::hello::{Hello, REPLY_BYTES, Refusal, Reply};
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LanePath};
use rustls::{ClientConnection, Connection};

use crate::greet::{self, GreetError};
use crate::handshake::{self, HandshakeError};
use crate::plan::{ConnectPlan, LanePlan, LaneTls};
use crate::socket;
use crate::wire::Line;

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
    let stream = dial(plan, lane).map_err(|source| match source.raw_os_error() {
        // A blocking connect that outlives SO_SNDTIMEO says EINPROGRESS.
        Some(libc::EINPROGRESS | libc::EAGAIN | libc::ETIMEDOUT) => timeout(lane.lane, plan),
        _ => LaneError::Host { lane: lane.lane, call: "connect", source },
    })?;
    let hello = Hello { session: plan.session, lane: lane.lane, ticket: lane.ticket };
    if let Some(tls) = &plan.tls {
        let tls = secure(&stream, tls, &hello, deadline).map_err(|error| match error {
            NotSecured::Refused(refusal) => LaneError::Refused { lane: lane.lane, refusal },
            NotSecured::Handshake(HandshakeError::Timeout) => timeout(lane.lane, plan),
            NotSecured::Handshake(HandshakeError::PeerClosed) => {
                LaneError::PeerClosed { lane: lane.lane }
            }
            NotSecured::Handshake(error) => LaneError::Transport {
                lane: lane.lane,
                path: LanePath::TcpPlain,
                hint: None,
                source: Box::new(error),
            },
            NotSecured::Reply(source) => LaneError::PeerMisbehaved { lane: lane.lane, source },
        })?;
        return Line::encrypted(stream, tls, plan.progress_wait).map_err(host("setsockopt"));
    }
    greet::say_hello(&stream, &hello, deadline).map_err(|error| match error {
        GreetError::Timeout => timeout(lane.lane, plan),
        GreetError::PeerClosed => LaneError::PeerClosed { lane: lane.lane },
        GreetError::Refused { refusal } => LaneError::Refused { lane: lane.lane, refusal },
        GreetError::Malformed { source } => LaneError::PeerMisbehaved { lane: lane.lane, source },
        GreetError::Host { source } => host("hello")(source),
        GreetError::Unknown => unreachable!("only peek_greeting says so"),
    })?;
    Line::new(stream, plan.progress_wait).map_err(host("setsockopt"))
}

/// Connects from the first of the addresses wanted that is to be had. A lane from another is a lane
/// all the same: which queue it lands on is no reason to have none.
fn dial(plan: &ConnectPlan, lane: &LanePlan) -> io::Result<TcpStream> {
    let route = lane.route.as_ref();
    let to = route.map_or(plan.addr, |route| route.to);
    let open = |from| socket::open(to, route, from, plan.tuning, plan.connect_wait);
    for &from in &lane.from {
        match open(Some(from)) {
            // In use, or not allowed to be bound to; not what is wrong with the target.
            Err(error) if is_about_the_address(&error) => {
                tracing::debug!(%error, %from, "a lane's port is not to be had");
            }
            opened => return opened,
        }
    }
    open(None)
}

fn is_about_the_address(error: &io::Error) -> bool {
    let errnos = [libc::EADDRINUSE, libc::EADDRNOTAVAIL, libc::EACCES, libc::EPERM];
    error.raw_os_error().is_some_and(|errno| errnos.contains(&errno))
}

/// Why a lane has no TLS, or no place at the target.
enum NotSecured {
    Handshake(HandshakeError),
    Reply(FramingError),
    Refused(Refusal),
}

/// Shakes hands, and says the hello inside TLS: the ticket is not seen on the way.
fn secure(
    stream: &TcpStream,
    tls: &LaneTls,
    hello: &Hello,
    deadline: Instant,
) -> Result<Box<Connection>, NotSecured> {
    let failed = |source| NotSecured::Handshake(HandshakeError::Tls { source });
    let client = ClientConnection::new(Arc::clone(&tls.config), tls.name.clone());
    let mut tls = Box::new(Connection::from(client.map_err(failed)?));
    handshake::complete(stream, &mut tls, deadline).map_err(NotSecured::Handshake)?;
    handshake::write_all(stream, &mut tls, &hello.encode(), deadline)
        .map_err(NotSecured::Handshake)?;
    let mut reply = [0; REPLY_BYTES];
    handshake::read_exact(stream, &mut tls, &mut reply, deadline).map_err(NotSecured::Handshake)?;
    match Reply::decode(&reply).map_err(NotSecured::Reply)? {
        Reply::Accepted => Ok(tls),
        Reply::Refused(refusal) => Err(NotSecured::Refused(refusal)),
    }
}

fn timeout(lane: LaneId, plan: &ConnectPlan) -> LaneError {
    LaneError::Timeout { lane, waited_ms: plan.connect_wait.as_millis() as u64 }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use pageferry_datapath::framing::hello::Ticket;
    use pageferry_datapath::ids::SessionId;

    use super::*;

    #[test]
    fn a_lane_leaves_from_the_first_of_its_ports_that_is_free() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let not_ours: SocketAddr = "192.0.2.1:50000".parse().unwrap();
        let lane = |from| LanePlan {
            lane: LaneId(0),
            ticket: Ticket([0; 32]),
            cpu: None,
            from,
            route: None,
        };
        let plan = ConnectPlan::new(listener.local_addr().unwrap(), SessionId(1), vec![]);
        let from =
            |wanted: Vec<SocketAddr>| dial(&plan, &lane(wanted)).unwrap().local_addr().unwrap();
        let taken = taken.local_addr().unwrap();
        assert_eq!(from(vec![taken, not_ours, free]), free);
        // None of them is to be had: the kernel's choice.
        assert!(![taken, not_ours].contains(&from(vec![taken, not_ours])));
    }
}
