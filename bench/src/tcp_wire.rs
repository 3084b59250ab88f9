//! Request and response over one TCP connection without Nagle's delay: by calls that sleep, or by
//! calls that never do.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::BenchError;
use crate::recorder::{Pace, Recorded, run};
use crate::serve::{Peer, Request};

/// One way to use it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    /// Of one message, the same both ways.
    pub(crate) bytes: u32,
    /// Neither end sleeps: both ask the kernel again and again.
    pub(crate) poll: bool,
}

/// Round trips; half of each, as sockperf and qperf have it.
pub(crate) fn ping_pong(peer: &mut Peer, way: &Way, pace: Pace) -> Result<Recorded, BenchError> {
    let to = peer.ask(&Request::TcpPong(*way))?;
    let stream = TcpStream::connect(to).map_err(BenchError::io("connect to", to))?;
    let mut end = End::new(stream, way)?;
    let recorded = run(pace, u64::from(way.bytes), || {
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
    let mut end = End::new(stream, way)?;
    let mut answer_all = || -> std::io::Result<()> {
        while end.receive()? {
            end.send()?;
        }
        Ok(())
    };
    answer_all().map_err(BenchError::io("talk over", "TCP"))?;
    Ok(Value::Null)
}

struct End {
    stream: TcpStream,
    message: Vec<u8>,
}

impl End {
    fn new(stream: TcpStream, way: &Way) -> Result<Self, BenchError> {
        let set = stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(way.poll));
        set.map_err(BenchError::io("set up", "a socket"))?;
        Ok(Self { stream, message: vec![0x5a; way.bytes as usize] })
    }

    fn send(&mut self) -> std::io::Result<()> {
        let mut at = 0;
        while at < self.message.len() {
            match self.stream.write(&self.message[at..]) {
                Ok(0) => return Err(closed()),
                Ok(bytes) => at += bytes,
                Err(error) if is_soon(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One message; false if the other end has closed instead.
    fn receive(&mut self) -> std::io::Result<bool> {
        let mut at = 0;
        while at < self.message.len() {
            match self.stream.read(&mut self.message[at..]) {
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
}

fn is_soon(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn closed() -> std::io::Error {
    ErrorKind::UnexpectedEof.into()
}
