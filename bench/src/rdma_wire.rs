//! RDMA itself, without lanes: request and response, and streams of WRITEs, as perftest does them.
//!
//! Everything polls: the completion queue at the end that posts, and memory at the end that is
//! written to. One thread at each end, whatever the number of queue pairs.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use pageferry_rdma::bare::{Bare, BareListener, BareTerms, Progress};
use pageferry_rdma::error::RdmaError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::BenchError;
use crate::places::Order;
use crate::recorder::{Pace, Recorded, run};
use crate::serve::{Peer, Request};

/// Connecting, beside a busy peer under emulation.
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// Looks between two questions whether the peer is still there: a system call each.
const LOOKS: u32 = 1 << 16;

/// Written to the other end once a receive is posted.
const READY: u8 = 1;

/// What is posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verb {
    /// A WRITE each way; both ends poll memory.
    Write,
    /// A READ: the other end's processor takes no part.
    Read,
    /// A SEND each way, into a receive.
    Send,
}

/// One way to use it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) verb: Verb,
    /// Of one message.
    pub(crate) bytes: u32,
    /// Requests that may be posted at a time on one queue pair.
    pub(crate) depth: u32,
    /// Every which request is signalled.
    pub(crate) signal_every: u32,
    /// Requests of one post.
    pub(crate) chain: u32,
    pub(crate) queue_pairs: u32,
    /// What READs are scattered over; 0 is one message's memory.
    pub(crate) memory_bytes: u64,
    /// Buffers of 2 MiB pages.
    pub(crate) huge: bool,
}

impl Way {
    fn terms(&self) -> BareTerms {
        let bytes = u64::from(self.bytes).max(self.memory_bytes).next_multiple_of(4096);
        BareTerms { bytes, depth: self.depth, huge: self.huge, wait: CONNECT_MAX }
    }
}

/// Round trips one after the other; of WRITE and SEND half of each, as perftest has it.
pub(crate) fn ping_pong(
    peer: &mut Peer,
    from: IpAddr,
    way: &Way,
    pace: Pace,
) -> Result<Recorded, BenchError> {
    let to = peer.ask(&Request::RdmaPong(*way))?;
    let mut end = Bare::connect(Some(from), to, way.terms())?;
    let (mut seq, mut seen) = (0u8, Seen::default());
    let places = (way.memory_bytes / u64::from(way.bytes)).max(1);
    let (order, mut reads) = (Order::new(Some(places)), 0);
    if way.verb == Verb::Send {
        end.receive(way.bytes)?;
        write_one(&mut end, &mut seen, way.bytes, READY)?;
        await_ready(&end, way.bytes)?;
    }
    let recorded = run(pace, u64::from(way.bytes), || match way.verb {
        Verb::Write => {
            seq = seq.wrapping_add(1);
            write_one(&mut end, &mut seen, way.bytes, seq)?;
            await_byte(&end, way.bytes, seq)
        }
        Verb::Read => {
            let at = order.place(reads % places) * u64::from(way.bytes);
            reads += 1;
            end.read_at(at, way.bytes)?;
            seen.wait(&mut end, 1, 0)
        }
        Verb::Send => {
            end.send(way.bytes)?;
            seen.wait(&mut end, 1, 1)?;
            end.receive(way.bytes)
        }
    })?;
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
    let listener = BareListener::at(SocketAddr::new(at, 0))?;
    ready(listener.port())?;
    let mut end = listener.accept(way.terms())?;
    let (mut seq, mut seen) = (0u8, Seen::default());
    // A message that finds no receive is tried again over RoCE, and ends the connection over iWARP. A
    // WRITE needs none; over iWARP who connected comes first.
    if way.verb == Verb::Send {
        end.receive(way.bytes)?;
        await_ready(&end, way.bytes)?;
        write_one(&mut end, &mut seen, way.bytes, READY)?;
    }
    let mut answer = || match way.verb {
        Verb::Write => {
            seq = seq.wrapping_add(1);
            await_byte(&end, way.bytes, seq)?;
            write_one(&mut end, &mut seen, way.bytes, seq)
        }
        Verb::Read => {
            std::thread::sleep(Duration::from_millis(20));
            end.check()
        }
        Verb::Send => {
            seen.wait(&mut end, 0, 1)?;
            end.receive(way.bytes)?;
            end.send(way.bytes)?;
            seen.wait(&mut end, 1, 0)
        }
    };
    loop {
        match answer() {
            Ok(()) => {}
            Err(error) if is_over(&error) => return Ok(Value::Null),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Streams `operations` WRITEs of each queue pair, dealt to them in turns.
pub(crate) fn stream(
    peer: &mut Peer,
    from: IpAddr,
    way: &Way,
    warm_up: u64,
    operations: u64,
) -> Result<Recorded, BenchError> {
    let to = peer.ask(&Request::RdmaSink(*way))?;
    let connect = |_| Bare::connect(Some(from), to, way.terms());
    let mut ends = (0..way.queue_pairs).map(connect).collect::<Result<Vec<_>, _>>()?;
    write_all(&mut ends, way, warm_up)?;
    let began = Instant::now();
    write_all(&mut ends, way, operations)?;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = operations * u64::from(way.queue_pairs) * u64::from(way.bytes);
    drop(ends);
    peer.done()?;
    Ok(Recorded { bytes, seconds, ..Recorded::default() })
}

fn write_all(ends: &mut [Bare], way: &Way, operations: u64) -> Result<(), RdmaError> {
    let chain = u64::from(way.chain.max(1));
    let mut posted = vec![0u64; ends.len()];
    let mut left = ends.len() as u64 * operations;
    while left > 0 {
        for (end, posted) in ends.iter_mut().zip(&mut posted) {
            while *posted < operations {
                let count = chain.min(operations - *posted);
                if u64::from(end.free()) < count {
                    break;
                }
                *posted += count;
                let every = u64::from(way.signal_every.max(1));
                let due = *posted / every != (*posted - count) / every;
                // One that fills the queue is signalled too, or it would stay full.
                let is_last = *posted == operations || u64::from(end.free()) < 2 * count;
                end.write(way.bytes, count as u32, due || is_last)?;
            }
            let before = end.free();
            end.poll()?;
            left -= u64::from(end.free() - before);
        }
    }
    Ok(())
}

/// The other end of [`stream`]: it only holds the memory.
pub(crate) fn serve_sink(
    at: IpAddr,
    way: &Way,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    let listener = BareListener::at(SocketAddr::new(at, 0))?;
    ready(listener.port())?;
    let accept = |_| listener.accept(way.terms());
    let ends = (0..way.queue_pairs).map(accept).collect::<Result<Vec<_>, _>>()?;
    loop {
        for end in &ends {
            match end.check() {
                Ok(()) => {}
                Err(error) if is_over(&error) => return Ok(Value::Null),
                Err(error) => return Err(error.into()),
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Posts a WRITE that ends in this byte and waits for its completion.
fn write_one(end: &mut Bare, seen: &mut Seen, bytes: u32, seq: u8) -> Result<(), RdmaError> {
    end.stamp(bytes, seq)?;
    end.write(bytes, 1, true)?;
    seen.wait(end, 1, 0)
}

fn await_byte(end: &Bare, bytes: u32, seq: u8) -> Result<(), RdmaError> {
    loop {
        for _ in 0..LOOKS {
            if end.arrived(bytes)? == seq {
                return Ok(());
            }
        }
        end.check()?;
    }
}

/// Waits for the other end's first receive. One that is not heard of in time is tried all the same.
fn await_ready(end: &Bare, bytes: u32) -> Result<(), RdmaError> {
    let until = Instant::now() + CONNECT_MAX;
    while end.arrived(bytes)? != READY && Instant::now() < until {
        end.check()?;
    }
    Ok(())
}

/// Completions that were seen and not yet waited for: the answer to a message may come before its own
/// completion, and the next message before that of the answer.
#[derive(Clone, Copy, Debug, Default)]
struct Seen(Progress);

impl Seen {
    /// Waits for so many posts and receives; what came beside them is kept for the next time.
    fn wait(&mut self, end: &mut Bare, done: u32, received: u32) -> Result<(), RdmaError> {
        loop {
            for _ in 0..LOOKS {
                if self.take(done, received) {
                    return Ok(());
                }
                let progress = end.poll()?;
                self.0.done += progress.done;
                self.0.received += progress.received;
            }
            end.check()?;
        }
    }

    fn take(&mut self, done: u32, received: u32) -> bool {
        let is_there = self.0.done >= done && self.0.received >= received;
        if is_there {
            self.0.done -= done;
            self.0.received -= received;
        }
        is_there
    }
}

/// The client has what it wanted and hung up.
fn is_over(error: &RdmaError) -> bool {
    use pageferry_rdma::error::{CmEventKind, Status};
    matches!(
        error,
        RdmaError::PeerClosed
            | RdmaError::Event { event: CmEventKind::TimeWaitExit, .. }
            | RdmaError::Completion { status: Status::Flushed | Status::RetryExceeded, .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_overtakes_a_completion_is_not_forgotten() {
        let mut seen = Seen(Progress { done: 1, received: 1 });
        assert!(seen.take(1, 0));
        assert!(!seen.take(1, 0), "waited for");
        assert!(seen.take(0, 1), "came beside it");
    }
}
