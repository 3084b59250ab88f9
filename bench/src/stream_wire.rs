//! Messages one after the other over TCP, from one thread for each connection: by send and recv, or
//! by an io_uring with several in flight, with and without copying.
//!
//! The other end counts what arrives and reads its own counter in intervals: a rate is what was
//! received, not what a socket's buffer took.

use std::io::Read;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageferry_uring::bare::{Bare, BareTerms};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::BenchError;
use crate::recorder::Recorded;
use crate::serve::{Peer, Request};
use crate::tcp_wire::{Calls, send_all};
use crate::turns::Taken;

/// Sent between two looks at the clock, where messages are small.
const LOOK_BYTES: u32 = 64 << 10;
const LOOK_MESSAGES_MAX: u32 = 64;

/// One way to use it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    /// Of one message.
    pub(crate) bytes: u32,
    /// What the other end's recv takes at most.
    pub(crate) receive_bytes: u32,
    /// Connections, each with a thread at either end.
    pub(crate) connections: u32,
    /// The sender's calls; the receiver's are recv.
    pub(crate) calls: Calls,
    /// Messages in flight on each io_uring.
    pub(crate) depth: u16,
    /// Sent from memory without copying, where the kernel can.
    pub(crate) zero_copy: bool,
    /// One point of the time series.
    pub(crate) interval_ms: u64,
}

/// How long.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Span {
    /// Dropped at the beginning.
    pub(crate) warm_up_s: f64,
    pub(crate) seconds: f64,
}

/// Streams for this long; how many bytes arrived after the warm-up.
pub(crate) fn stream(peer: &mut Peer, way: &Way, span: Span) -> Result<Taken, BenchError> {
    let to = peer.ask(&Request::TcpSink(*way))?;
    let io = || BenchError::io("stream over", "TCP");
    let connect = |_| TcpStream::connect(to).map_err(BenchError::io("connect to", to));
    let streams = (0..way.connections).map(connect).collect::<Result<Vec<_>, _>>()?;
    // One more interval: the last reading that counts comes at its end.
    let spare = Duration::from_millis(2 * way.interval_ms);
    let until = Instant::now() + Duration::from_secs_f64(span.warm_up_s + span.seconds) + spare;
    let sent: Vec<std::io::Result<(u64, u64)>> = std::thread::scope(|scope| {
        let send = |stream| scope.spawn(move || send_until(stream, way, until));
        let threads: Vec<_> = streams.into_iter().map(send).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    let (mut zero_copied, mut copied) = (0, 0);
    for sent in sent {
        let sent = sent.map_err(io())?;
        zero_copied += sent.0;
        copied += sent.1;
    }
    let readings: Vec<(f64, u64)> = serde_json::from_value(peer.done()?).unwrap_or_default();
    let recorded = Recorded::of_counter(&readings, span.warm_up_s, span.warm_up_s + span.seconds);
    let said = match way.zero_copy {
        true => json!({ "zero_copy_messages": zero_copied, "copied_all_the_same": copied }),
        false => Value::Null,
    };
    let too_short = BenchError::Usage { what: "--seconds is too short for --interval-ms" };
    Ok(Taken { recorded: recorded.ok_or(too_short)?, said })
}

/// Messages sent without copying, and how many of them the kernel copied.
fn send_until(mut stream: TcpStream, way: &Way, until: Instant) -> std::io::Result<(u64, u64)> {
    if way.calls != Calls::Uring {
        let message = vec![0x5a; way.bytes as usize];
        // The clock costs a fortieth of a small message: who is beside us looks at it less often.
        let each_look = (LOOK_BYTES / way.bytes.max(1)).clamp(1, LOOK_MESSAGES_MAX);
        while Instant::now() < until {
            for _ in 0..each_look {
                send_all(&mut stream, &message)?;
            }
        }
        stream.shutdown(Shutdown::Write)?;
        return Ok((0, 0));
    }
    let (bytes, depth, zero_copy) = (u64::from(way.bytes), way.depth, way.zero_copy);
    // Memory that is not copied is held until it is acknowledged. All that may be in flight is less
    // than a segment of the loopback device where messages are small: with Nagle's delay it would
    // wait for an acknowledgement that the receiver delays by 40 ms.
    stream.set_nodelay(zero_copy)?;
    let terms = BareTerms { send_bytes: bytes, receive_bytes: bytes, depth, zero_copy };
    let mut ring = Bare::new(stream, terms)?;
    while Instant::now() < until {
        ring.stream()?;
    }
    ring.settle()?;
    ring.socket().shutdown(Shutdown::Write)?;
    Ok(ring.copied())
}

/// The other end of [`stream`]: the readings of its counter, in seconds and bytes.
pub(crate) fn serve(
    at: IpAddr,
    way: &Way,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    let address = SocketAddr::new(at, 0);
    let io = || BenchError::io("receive on", address);
    let listener = TcpListener::bind(address).map_err(io())?;
    ready(listener.local_addr().map_err(io())?.port())?;
    let accept = |_| listener.accept().map(|(stream, _)| stream);
    let streams = (0..way.connections).map(accept).collect::<Result<Vec<_>, _>>().map_err(io())?;
    let (counter, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let (counter, ended) = (&counter, &ended);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_counter(counter, ended, way.interval_ms));
        let count = |stream| scope.spawn(move || count_all(stream, way.receive_bytes, counter));
        let threads: Vec<_> = streams.into_iter().map(count).collect();
        let mut outcome = Ok(());
        for thread in threads {
            let done = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(done);
        }
        ended.store(true, Ordering::Relaxed);
        let readings = reader.join().unwrap_or_default();
        outcome.map_err(io())?;
        Ok(json!(readings))
    })
}

fn count_all(mut stream: TcpStream, at_most: u32, counter: &AtomicU64) -> std::io::Result<()> {
    let mut message = vec![0; at_most as usize];
    // The rest of a message comes before the next one, as tools have it: what is copied begins where
    // pages of the kernel's do then.
    let mut at = 0;
    loop {
        let bytes = match stream.read(&mut message[at..])? {
            0 => return Ok(()),
            bytes => bytes,
        };
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        at = (at + bytes) % message.len();
    }
}

fn read_counter(counter: &AtomicU64, ended: &AtomicBool, interval_ms: u64) -> Vec<(f64, u64)> {
    let (began, mut readings) = (Instant::now(), Vec::new());
    while !ended.load(Ordering::Relaxed) {
        // The clock and the counter together: a sleep that is late does no harm.
        readings.push((began.elapsed().as_secs_f64(), counter.load(Ordering::Relaxed)));
        std::thread::sleep(Duration::from_millis(interval_ms.max(1)));
    }
    readings
}
