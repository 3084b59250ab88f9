//! Request and response over one TCP connection without Nagle's delay: by calls that sleep, by calls
//! that never do, or by an io_uring.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use pageferry_uring::bare::{Bare, BareTerms};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::BenchError;
use crate::places::Order;
use crate::recorder::{Pace, Recorded, run};
use crate::serve::{Peer, Request};

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Calls {
    /// send and recv, which sleep.
    Sleep,
    /// The same without sleeping: both ends ask the kernel again and again.
    Poll,
    /// An io_uring at each end, which is waited for asleep.
    Uring,
}

/// One way to use it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    /// Of one message.
    pub(crate) bytes: u32,
    /// Of what comes back for it.
    pub(crate) answer_bytes: u32,
    pub(crate) calls: Calls,
    /// What answers are taken from and put into, in a scattered order; 0 is one answer's memory.
    pub(crate) memory_bytes: u64,
}

impl Way {
    /// One message of one size each way.
    pub(crate) fn echo(bytes: u32, calls: Calls) -> Self {
        Self { bytes, answer_bytes: bytes, calls, memory_bytes: 0 }
    }

    fn request(&self) -> Messages {
        Messages::new(self.bytes, 0)
    }

    fn answer(&self) -> Messages {
        Messages::new(self.answer_bytes, self.memory_bytes)
    }
}

/// Round trips, one after the other.
pub(crate) fn ping_pong(peer: &mut Peer, way: &Way, pace: Pace) -> Result<Recorded, BenchError> {
    let to = peer.ask(&Request::TcpPong(*way))?;
    let stream = TcpStream::connect(to).map_err(BenchError::io("connect to", to))?;
    let mut end = End::new(stream, way.calls, way.request(), way.answer())?;
    let recorded = run(pace, u64::from(way.bytes.max(way.answer_bytes)), || {
        end.send()?;
        end.receive().and_then(|open| if open { Ok(()) } else { Err(closed()) })
    });
    let recorded = recorded.map_err(BenchError::io("talk over", "TCP"))?;
    drop(end);
    peer.done()?;
    Ok(recorded)
}

/// The other end of [`ping_pong`].
pub(crate) fn serve_pong(
    at: IpAddr,
    way: &Way,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    let address = SocketAddr::new(at, 0);
    let io = || BenchError::io("listen on", address);
    let listener = TcpListener::bind(address).map_err(io())?;
    ready(listener.local_addr().map_err(io())?.port())?;
    let (stream, _) = listener.accept().map_err(io())?;
    let mut end = End::new(stream, way.calls, way.answer(), way.request())?;
    let mut answer_all = || -> std::io::Result<()> {
        while end.receive()? {
            end.send()?;
        }
        Ok(())
    };
    answer_all().map_err(BenchError::io("talk over", "TCP"))?;
    Ok(Value::Null)
}

/// Where messages of one size lie, one after the other or scattered over memory.
struct Messages {
    memory: Vec<u8>,
    each: usize,
    order: Order,
    next: u64,
}

impl Messages {
    /// In as much memory, or in one message's.
    fn new(bytes: u32, memory_bytes: u64) -> Self {
        let each = bytes as usize;
        let places = (memory_bytes / u64::from(bytes.max(1))).max(1);
        // Written: memory that was never touched would be one page of zeros.
        let memory = vec![0x5a; places as usize * each];
        Self { memory, each, order: Order::new(Some(places)), next: 0 }
    }

    /// Both are one message of the same size.
    fn is_one_like(&self, other: &Self) -> bool {
        let each = self.each;
        other.each == each && self.memory.len() == each && other.memory.len() == each
    }

    fn next(&mut self) -> &mut [u8] {
        // Two divisions would be a hundredth of a small message's time.
        if self.memory.len() == self.each {
            return &mut self.memory;
        }
        let places = (self.memory.len() / self.each.max(1)) as u64;
        let at = self.order.place(self.next % places.max(1)) as usize * self.each;
        self.next += 1;
        &mut self.memory[at..at + self.each]
    }
}

/// One end.
enum End {
    /// An echo has one message's memory for both ways, as the tools' have.
    Calls {
        stream: TcpStream,
        out: Messages,
        into: Option<Messages>,
    },
    Ring(Box<Bare>),
}

impl End {
    /// What it sends and what it receives have a size each.
    fn new(
        stream: TcpStream,
        calls: Calls,
        out: Messages,
        into: Messages,
    ) -> Result<Self, BenchError> {
        let io = || BenchError::io("set up", "a socket");
        stream.set_nodelay(true).map_err(io())?;
        if calls == Calls::Uring {
            // Of one message's memory: there is no scattered memory behind a ring.
            let (send_bytes, receive_bytes) = (out.each as u64, into.each as u64);
            let terms = BareTerms { send_bytes, receive_bytes, depth: 1, zero_copy: false };
            let ring = Bare::new(stream, terms).map_err(BenchError::io("set up", "an io_uring"))?;
            return Ok(Self::Ring(Box::new(ring)));
        }
        stream.set_nonblocking(calls == Calls::Poll).map_err(io())?;
        let into = (!out.is_one_like(&into)).then_some(into);
        Ok(Self::Calls { stream, out, into })
    }

    fn send(&mut self) -> std::io::Result<()> {
        match self {
            Self::Calls { stream, out, .. } => send_all(stream, out.next()),
            Self::Ring(ring) => ring.send(),
        }
    }

    /// One message; false if the other end has closed instead.
    fn receive(&mut self) -> std::io::Result<bool> {
        match self {
            Self::Calls { stream, out, into } => {
                receive_all(stream, into.as_mut().unwrap_or(out).next())
            }
            Self::Ring(ring) => ring.receive(),
        }
    }
}

pub(crate) fn send_all(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let mut at = 0;
    while at < message.len() {
        match stream.write(&message[at..]) {
            Ok(0) => return Err(closed()),
            Ok(bytes) => at += bytes,
            Err(error) if is_soon(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn receive_all(stream: &mut TcpStream, message: &mut [u8]) -> std::io::Result<bool> {
    let mut at = 0;
    while at < message.len() {
        match stream.read(&mut message[at..]) {
            Ok(0) if at == 0 => return Ok(false),
            Ok(0) => return Err(closed()),
            Ok(bytes) => at += bytes,
            Err(error) if is_soon(&error) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset && at == 0 => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn is_soon(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn closed() -> std::io::Error {
    ErrorKind::UnexpectedEof.into()
}
