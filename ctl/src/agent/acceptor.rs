//! Accepts connections and finds out what they are, without letting a slow one hold up the rest.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry_datapath::control::Message;
use pageferry_datapath::framing::FramingError;
use pageferry_datapath::framing::hello::{Greeting, HELLO_BYTES, Hello, Refusal, Reply};
use pageferry_datapath::limits::LANES_MAX;
use pageferry_uring::greet::{self, GreetError};
use pageferry_uring::handshake;
use pageferry_uring::limits::GREETING_WAIT_MAX;
use pageferry_uring::target::Accepted;
use rustls::Connection;

use super::failure;
use super::link::Link;
use super::tls::{Channel, Door, Greeted, TlsError};
use crate::privileges;

/// Connections being greeted at once; more are dropped, so that strangers can't use up threads.
const GREETINGS_MAX: usize = 512;
/// Of one peer: more than all lanes of a session ([`LANES_MAX`]), and less than all there are, so
/// that no peer keeps out the others.
const GREETINGS_PER_PEER_MAX: usize = LANES_MAX + 64;

/// Connections that were greeted and not yet taken; more wait in their greeting's place. All lanes of
/// a large session come at once, and are taken in no time.
const GREETED_MAX: usize = 64;

/// A connection that has said what it is.
#[derive(Debug)]
pub enum Arrival {
    /// A control connection and the first that it said.
    Control {
        /// The connection; its reader does not run yet.
        link: Link,
        /// Its first message.
        first: Box<Message>,
    },
    /// A lane that has said its hello and waits for the reply.
    Lane(ArrivingLane),
    /// Something else; already closed.
    Stranger {
        /// From where.
        from: SocketAddr,
        /// What was wrong.
        reason: String,
    },
}

/// A lane that waits for its reply.
#[derive(Debug)]
pub struct ArrivingLane {
    stream: TcpStream,
    hello: Hello,
    tls: Option<Box<Connection>>,
}

impl ArrivingLane {
    /// What it said.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Where it comes from, and to which address of ours; nothing of one that is gone again.
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((self.stream.peer_addr().ok()?, self.stream.local_addr().ok()?))
    }

    /// Whether it came in through TLS.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Refuses it.
    pub fn refuse(self, refusal: Refusal) {
        let _closed_either_way = self.reply(Reply::Refused(refusal));
    }

    /// Replies; the connection, unless the peer is gone.
    pub fn reply(mut self, reply: Reply) -> Option<Accepted> {
        let deadline = Instant::now() + GREETING_WAIT_MAX;
        match &mut self.tls {
            None => greet::send_reply(&self.stream, reply, deadline).ok()?,
            Some(tls) => {
                handshake::write_all(&self.stream, tls, &reply.encode(), deadline).ok()?;
            }
        }
        Some(Accepted { stream: self.stream, tls: self.tls })
    }
}

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is not this host's, or taken.
    #[error(transparent)]
    Socket(#[from] std::io::Error),
    /// It may not listen there as it was told to.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A listening socket and its threads.
#[derive(Debug)]
pub struct Acceptor {
    address: SocketAddr,
    door: Door,
    arrivals: Receiver<Arrival>,
}

impl Acceptor {
    /// Listens at `address`, with the door that belongs there; port 0 lets the kernel choose one.
    pub fn listen(
        address: &str,
        door: impl FnOnce(SocketAddr) -> Result<Door, TlsError>,
    ) -> Result<Self, ListenError> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let door = door(address)?;
        let (to_arrivals, arrivals) = bounded(GREETED_MAX);
        let theirs = door.clone();
        thread::Builder::new()
            .name("pf-accept".into())
            .spawn(move || accept_all(&listener, &theirs, &to_arrivals))?;
        Ok(Self { address, door, arrivals })
    }

    /// Who may come in.
    pub fn door(&self) -> &Door {
        &self.door
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections as they are greeted.
    pub fn arrivals(&self) -> &Receiver<Arrival> {
        &self.arrivals
    }
}

fn accept_all(listener: &TcpListener, door: &Door, arrivals: &Sender<Arrival>) {
    let greetings = Arc::new(Greetings::default());
    loop {
        let Ok((stream, from)) = listener.accept() else {
            // Out of descriptors, or a connection that was gone again: the next may be fine.
            thread::sleep(std::time::Duration::from_millis(10));
            continue;
        };
        let Some(counted) = Greetings::begin(&greetings, from.ip()) else { continue };
        let (to_arrivals, door) = (arrivals.clone(), door.clone());
        // Where no thread can be started, the connection and its count are dropped with it.
        let _more_may_come = thread::Builder::new().name("pf-greet".into()).spawn(move || {
            privileges::drop_on_this_thread(&[]);
            if let Some(arrival) = greet(stream, from, &door) {
                let _nobody_listens_after_the_end = to_arrivals.send(arrival);
            }
            drop(counted);
        });
    }
}

/// How many connections are being greeted, in all and of each peer.
#[derive(Debug, Default)]
struct Greetings(Mutex<HashMap<IpAddr, usize>>);

/// One that is being greeted.
struct Counted {
    of: Arc<Greetings>,
    peer: IpAddr,
}

impl Greetings {
    /// Counts one more, unless there are enough.
    fn begin(of: &Arc<Self>, peer: IpAddr) -> Option<Counted> {
        let mut counts = of.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let peers = counts.get(&peer).copied().unwrap_or(0);
        if all >= GREETINGS_MAX || peers >= GREETINGS_PER_PEER_MAX {
            return None;
        }
        counts.insert(peer, peers + 1);
        Some(Counted { of: Arc::clone(of), peer })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.of.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.remove(&self.peer)),
        }
    }
}

/// What a connection is; nothing, if it says nothing and goes: a source looks so whether it reaches us.
fn greet(stream: TcpStream, from: SocketAddr, door: &Door) -> Option<Arrival> {
    let deadline = Instant::now() + GREETING_WAIT_MAX;
    let stranger = |reason: String| Arrival::Stranger { from, reason };
    let hello = match greet::peek_greeting(&stream, deadline) {
        Ok(Greeting::Control) => {
            return Some(match door.plain() {
                Some(security) => listen_to(Channel::plain(stream, security.clone()), from),
                None => {
                    Door::turn_away(&stream);
                    stranger("the source speaks no TLS: it was started with --insecure".into())
                }
            });
        }
        Ok(Greeting::Tls) => match door.shake_hands(stream, deadline) {
            Ok(Greeted::Control(channel)) => return Some(listen_to(channel, from)),
            Ok(Greeted::Lane(stream, tls)) => {
                return Some(encrypted_lane(stream, tls, deadline).unwrap_or_else(stranger));
            }
            Err(error) => return Some(stranger(with_hint(&error))),
        },
        Ok(Greeting::Lane) => greet::read_hello(&stream, deadline),
        Err(GreetError::PeerClosed) => return None,
        Err(error) => Err(error),
    };
    Some(match hello {
        Ok(hello) => Arrival::Lane(ArrivingLane { stream, hello, tls: None }),
        Err(error) => {
            // A source of another version is told so, whatever the rest of its hello means.
            if let GreetError::Malformed { source: FramingError::Version { .. } } = error {
                let refused = Reply::Refused(Refusal::Version);
                let _it_may_be_gone = greet::send_reply(&stream, refused, deadline);
            }
            stranger(failure::chain("", &error))
        }
    })
}

/// A lane's hello inside TLS.
fn encrypted_lane(
    stream: TcpStream,
    mut tls: Box<Connection>,
    deadline: Instant,
) -> Result<Arrival, String> {
    let mut hello = [0; HELLO_BYTES];
    handshake::read_exact(&stream, &mut tls, &mut hello, deadline)
        .map_err(|error| failure::chain("an encrypted lane", &error))?;
    let hello = Hello::decode(&hello).map_err(|error| failure::chain("", &error))?;
    Ok(Arrival::Lane(ArrivingLane { stream, hello, tls: Some(tls) }))
}

/// The first that a control connection says.
fn listen_to(channel: Channel, from: SocketAddr) -> Arrival {
    let first = Link::over(channel).and_then(|link| match link.receive(GREETING_WAIT_MAX) {
        Ok(first) => Ok(Arrival::Control { link, first: Box::new(first) }),
        Err(error) => {
            link.turn_away(&error);
            Err(error)
        }
    });
    first.unwrap_or_else(|error| Arrival::Stranger { from, reason: failure::chain("", &error) })
}

fn with_hint(error: &TlsError) -> String {
    let text = failure::chain("", error);
    error.hint().map_or(text.clone(), |hint| format!("{text}\nhint: {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_does_not_keep_out_the_others() {
        let greetings = Arc::new(Greetings::default());
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let begin = |peer| Greetings::begin(&greetings, peer);
        let mut held: Vec<_> = std::iter::from_fn(|| begin(one)).take(GREETINGS_MAX).collect();
        assert_eq!(held.len(), GREETINGS_PER_PEER_MAX);
        held.extend(std::iter::from_fn(|| begin(other)).take(GREETINGS_MAX));
        assert_eq!(held.len(), GREETINGS_MAX);
        drop(held);
        assert!(greetings.0.lock().expect("not poisoned").is_empty());
        assert!(begin(one).is_some());
    }
}
