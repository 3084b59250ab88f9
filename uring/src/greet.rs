//! The acceptor's side of a greeting: which kind of connection, the hello, the reply.
//!
//! Blocking calls with a deadline, for the thread that the target's acceptor gives to one new
//! connection. Deliberately not here: sessions and tickets; the caller judges the [`Hello`].

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::framing::FramingError;
use pageferry_datapath::framing::hello::{
    Greeting, HELLO_BYTES, Hello, MAGIC_BYTES, REPLY_BYTES, Refusal, Reply,
};

use crate::limits;

/// Why a connection was not greeted.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// The peer speaks neither protocol.
    #[error("the first bytes are of no known protocol")]
    Unknown,
    /// The hello or reply is malformed.
    #[error("malformed greeting")]
    Malformed {
        /// What is wrong with it.
        #[source]
        source: FramingError,
    },
    /// The target refused this lane.
    #[error("refused by the target: {refusal}")]
    Refused {
        /// Its reason.
        refusal: Refusal,
    },
    /// The peer closed the connection.
    #[error("connection closed by the peer")]
    PeerClosed,
    /// The deadline passed.
    #[error("no complete greeting before the deadline")]
    Timeout,
    /// A system call failed.
    #[error("socket call failed")]
    Host {
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// Looks at the first four bytes of a connection without taking them, so that either protocol can
/// read its own hello whole.
pub fn peek_greeting(stream: &TcpStream, deadline: Instant) -> Result<Greeting, GreetError> {
    let mut magic = [0; MAGIC_BYTES];
    loop {
        set_timeout(stream, deadline)?;
        match stream.peek(&mut magic) {
            Ok(0) => return Err(GreetError::PeerClosed),
            Ok(MAGIC_BYTES) => return Greeting::of(magic).ok_or(GreetError::Unknown),
            // A peek returns at once while some bytes are there: wait for the rest in small steps.
            Ok(_) => thread::sleep(limits::GREETING_POLL),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Reads a data connection's hello. The ticket in it is still to be judged.
pub fn read_hello(stream: &TcpStream, deadline: Instant) -> Result<Hello, GreetError> {
    let mut bytes = [0; HELLO_BYTES];
    read_exact(stream, &mut bytes, deadline)?;
    Hello::decode(&bytes).map_err(|source| GreetError::Malformed { source })
}

/// Answers a hello.
pub fn send_reply(stream: &TcpStream, reply: Reply, deadline: Instant) -> Result<(), GreetError> {
    stream.set_write_timeout(Some(left(deadline)?)).map_err(failed)?;
    // The socket buffer of a new connection takes sixteen bytes at once.
    (&*stream).write_all(&reply.encode()).map_err(failed)
}

/// The source's side: says hello and waits to be admitted.
pub(crate) fn say_hello(
    stream: &TcpStream,
    hello: &Hello,
    deadline: Instant,
) -> Result<(), GreetError> {
    stream.set_write_timeout(Some(left(deadline)?)).map_err(failed)?;
    (&*stream).write_all(&hello.encode()).map_err(failed)?;
    let mut bytes = [0; REPLY_BYTES];
    read_exact(stream, &mut bytes, deadline)?;
    match Reply::decode(&bytes).map_err(|source| GreetError::Malformed { source })? {
        Reply::Accepted => Ok(()),
        Reply::Refused(refusal) => Err(GreetError::Refused { refusal }),
    }
}

/// Like `Read::read_exact`, but the deadline covers all of it: a byte a second does not extend it.
fn read_exact(
    stream: &TcpStream,
    mut bytes: &mut [u8],
    deadline: Instant,
) -> Result<(), GreetError> {
    while !bytes.is_empty() {
        set_timeout(stream, deadline)?;
        match (&*stream).read(bytes) {
            Ok(0) => return Err(GreetError::PeerClosed),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

fn set_timeout(stream: &TcpStream, deadline: Instant) -> Result<(), GreetError> {
    stream.set_read_timeout(Some(left(deadline)?)).map_err(failed)
}

fn left(deadline: Instant) -> Result<Duration, GreetError> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(GreetError::Timeout),
        left => Ok(left),
    }
}

fn failed(source: io::Error) -> GreetError {
    match source.kind() {
        // Linux reports an expired SO_RCVTIMEO as EAGAIN.
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => GreetError::Timeout,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => GreetError::PeerClosed,
        _ => GreetError::Host { source },
    }
}
