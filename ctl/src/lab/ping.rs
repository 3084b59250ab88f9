//! Pings a guest while it moves: who was not answered, and for how long nobody was.
//!
//! The guest's kernel answers, so this shows the machine running, whatever its programs do. One
//! thread, in the namespace where it was started, sends and receives on a raw socket.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
    setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::error::{LabError, call};
use super::netns::Namespace;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const IP_HEADER_BYTES_MIN: usize = 20;
/// Replies to the last requests may still be under way when the pinger is stopped.
const STRAGGLERS: Duration = Duration::from_millis(500);

/// What a pinger saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u64,
    /// Requests that were answered.
    pub answered: u64,
    /// The longest time without an answer, from when the pinger was started until it was stopped.
    pub silence_max: Duration,
}

impl PingReport {
    /// Requests that never were answered.
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }
}

/// A thread that pings one address at steady intervals until it is stopped.
#[derive(Debug)]
pub struct Pinger {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<PingReport>>,
}

impl Pinger {
    /// Starts pinging `address` from `namespace` every `interval`.
    pub fn start(
        namespace: &Namespace,
        address: Ipv4Addr,
        interval: Duration,
    ) -> Result<Self, LabError> {
        let icmp = namespace.run(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Icmp)
        })?;
        let icmp = icmp.map_err(call("socket"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let session = Session { icmp, address, interval, stop: Arc::clone(&stop) };
        let thread = Some(std::thread::spawn(move || session.run()));
        Ok(Self { stop, thread })
    }

    /// Stops it and says what it saw.
    pub fn stop(mut self) -> PingReport {
        self.finish()
    }

    fn finish(&mut self) -> PingReport {
        self.stop.store(true, Relaxed);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.finish();
    }
}

struct Session {
    icmp: OwnedFd,
    address: Ipv4Addr,
    interval: Duration,
    stop: Arc<AtomicBool>,
}

impl Session {
    fn run(self) -> PingReport {
        let id = (std::process::id() as u16) ^ (self.icmp.as_raw_fd() as u16).rotate_left(8);
        let mut report = PingReport::default();
        let mut pending = Vec::new();
        let mut last_answer = Instant::now();
        let mut due = Instant::now();
        let mut stop_by = None;
        loop {
            if self.stop.load(Relaxed) && stop_by.is_none() {
                let now = Instant::now();
                report.silence_max = report.silence_max.max(now - last_answer);
                stop_by = Some(now + STRAGGLERS);
            }
            if stop_by.is_some_and(|by| pending.is_empty() || Instant::now() >= by) {
                return report;
            }
            if stop_by.is_none() && Instant::now() >= due {
                let sequence = report.sent as u16;
                let _ = self.send(id, sequence);
                pending.push(sequence);
                report.sent += 1;
                due = (due + self.interval).max(Instant::now());
            }
            let Some(sequence) = self.receive(id, due) else { continue };
            if let Some(at) = pending.iter().position(|sent| *sent == sequence) {
                pending.swap_remove(at);
                report.answered += 1;
                let now = Instant::now();
                report.silence_max = report.silence_max.max(now - last_answer);
                last_answer = now;
            }
        }
    }

    fn send(&self, id: u16, sequence: u16) -> nix::Result<usize> {
        let mut packet = [ECHO_REQUEST, 0, 0, 0, 0, 0, 0, 0];
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&sequence.to_be_bytes());
        let checksum = checksum(&packet);
        packet[2..4].copy_from_slice(&checksum.to_be_bytes());
        let to = SockaddrIn::from(std::net::SocketAddrV4::new(self.address, 0));
        sendto(self.icmp.as_raw_fd(), &packet, &to, MsgFlags::MSG_DONTWAIT)
    }

    /// The sequence of a reply to us, waiting until `due` at most.
    fn receive(&self, id: u16, due: Instant) -> Option<u16> {
        let wait = due.saturating_duration_since(Instant::now()).as_micros().clamp(100, 100_000);
        setsockopt(&self.icmp, ReceiveTimeout, &TimeVal::microseconds(wait as i64)).ok()?;
        let mut packet = [0; 256];
        let length = recv(self.icmp.as_raw_fd(), &mut packet, MsgFlags::empty()).ok()?;
        let header_bytes = usize::from(packet[0] & 15) * 4;
        if header_bytes < IP_HEADER_BYTES_MIN || length < header_bytes + 8 {
            return None;
        }
        let echo = &packet[header_bytes..header_bytes + 8];
        let ours = echo[0] == ECHO_REPLY && echo[4..6] == id.to_be_bytes();
        ours.then(|| u16::from_be_bytes([echo[6], echo[7]]))
    }
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_to_zero() {
        let mut packet = [8, 0, 0, 0, 0x12, 0x34, 0xff, 0xfe];
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&packet), 0);
    }
}
