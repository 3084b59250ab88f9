//! A bare connection moved by an io_uring, to measure what lanes are made of beside other tools. No
//! lane uses it.
//!
//! Every message is the same memory, which nobody looks at. Owned by one thread, which sleeps in the
//! kernel until something has completed.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use pageferry_datapath::backing::Backing;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::Region;

use crate::limits;
use crate::sys::{Completion, Operation, Order, Parcel, Ring};

/// How it is used.
#[derive(Clone, Copy, Debug)]
pub struct BareTerms {
    /// Of a message that is sent.
    pub send_bytes: u64,
    /// Of one that is received.
    pub receive_bytes: u64,
    /// Operations in flight at most.
    pub depth: u16,
    /// Sends from memory without copying, where the kernel can.
    pub zero_copy: bool,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Bare {
    ring: Ring,
    socket: TcpStream,
    region: Arc<Region>,
    terms: BareTerms,
    spare: Vec<Box<Parcel>>,
    copied: u64,
    sent: u64,
}

impl Bare {
    /// A ring of its own for the calling thread, and memory for one message.
    pub fn new(socket: TcpStream, terms: BareTerms) -> io::Result<Self> {
        let bytes = terms.send_bytes.max(terms.receive_bytes).next_multiple_of(4096);
        let backing = Backing::memfd("bare", bytes, None).map_err(io::Error::other)?;
        let region = Region::open(RegionIndex(0), backing).map_err(io::Error::other)?;
        let lease = region.lease(0, bytes).map_err(io::Error::other)?;
        for at in (0..bytes).step_by(4096) {
            lease.touch(at).map_err(io::Error::other)?;
        }
        let ring = Ring::new(terms.depth.max(1))?;
        Ok(Self { ring, socket, region, terms, spare: Vec::new(), copied: 0, sent: 0 })
    }

    /// Sends a message; returns when the kernel has taken all of it, and with zero-copy also when
    /// it reads the memory no more.
    pub fn send(&mut self) -> io::Result<()> {
        self.post(Operation::Send)?;
        self.settle()
    }

    /// Posts a message, and waits only while there are as many in flight as there may be. Messages
    /// may overtake each other, which nobody notices who does not look at them.
    pub fn stream(&mut self) -> io::Result<()> {
        while self.ring.is_full() {
            self.collect()?;
        }
        let operation =
            if self.terms.zero_copy { Operation::SendZeroCopy } else { Operation::Send };
        self.post(operation)
    }

    /// Waits until nothing is in flight.
    pub fn settle(&mut self) -> io::Result<()> {
        while self.ring.in_flight() > 0 {
            self.collect()?;
        }
        Ok(())
    }

    /// Receives a message; false if the peer has closed instead.
    pub fn receive(&mut self) -> io::Result<bool> {
        let mut parcel = self.blank(self.terms.receive_bytes)?;
        while !parcel.is_done() {
            self.ring.post(Operation::Receive, self.socket.as_fd(), parcel);
            let (filled, bytes) = loop {
                match self.completion()? {
                    Completion::Moved { parcel, result } => break (parcel, result?),
                    _ => continue,
                }
            };
            parcel = filled;
            match (bytes, parcel.done()) {
                (0, 0) => return Ok(false),
                (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {}
            }
        }
        self.spare.push(parcel);
        Ok(true)
    }

    /// Messages that were sent without copying as far as was asked for, and those of them that the
    /// kernel copied all the same.
    pub fn copied(&self) -> (u64, u64) {
        (self.sent, self.copied)
    }

    /// The connection, to end its sending half.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    fn blank(&mut self, bytes: u64) -> io::Result<Box<Parcel>> {
        let mut parcel = self.spare.pop().unwrap_or_else(Parcel::new);
        parcel.clear(Order::Bare);
        parcel.push(self.region.lease(0, bytes).map_err(io::Error::other)?);
        Ok(parcel)
    }

    fn post(&mut self, operation: Operation) -> io::Result<()> {
        let parcel = self.blank(self.terms.send_bytes)?;
        self.ring.post(operation, self.socket.as_fd(), parcel);
        Ok(())
    }

    /// Takes one completion; what the kernel sent only a part of is posted again.
    fn collect(&mut self) -> io::Result<()> {
        match self.completion()? {
            Completion::Moved { parcel, result } => {
                result?;
                if !parcel.is_done() {
                    self.ring.post(Operation::Send, self.socket.as_fd(), parcel);
                    return Ok(());
                }
                self.spare.push(parcel);
            }
            Completion::Taken { result, .. } => result?,
            Completion::Released { parcel, copied } => {
                self.sent += 1;
                self.copied += u64::from(copied);
                if !parcel.is_done() {
                    self.ring.post(Operation::Send, self.socket.as_fd(), parcel);
                    return Ok(());
                }
                self.spare.push(parcel);
            }
        }
        Ok(())
    }

    fn completion(&mut self) -> io::Result<Completion> {
        loop {
            if let Some(completion) = self.ring.completion() {
                return Ok(completion);
            }
            self.ring.wait(limits::PROGRESS_WAIT_MAX)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Where there is no ring to be had these tests did not run, and say so.
    fn has_ring(name: &str) -> bool {
        let Err(error) = Ring::new(1) else { return true };
        println!("SKIP {name}: io_uring: {error}");
        assert!(std::env::var_os("PAGEFERRY_REQUIRE_ALL").is_none_or(|v| v != "1"), "{error}");
        false
    }

    fn ends() -> io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let one = TcpStream::connect(listener.local_addr()?)?;
        Ok((one, listener.accept()?.0))
    }

    /// Sizes below and above a page, and above what a socket buffers; an end that is closed.
    #[test]
    fn messages_come_back() -> io::Result<()> {
        if !has_ring("messages_come_back") {
            return Ok(());
        }
        for bytes in [8, 5000, 1 << 20] {
            let (one, other) = ends()?;
            let terms =
                BareTerms { send_bytes: bytes, receive_bytes: 100, depth: 1, zero_copy: false };
            let pong = thread::spawn(move || -> io::Result<u32> {
                let terms = BareTerms { send_bytes: 100, receive_bytes: bytes, ..terms };
                let (mut end, mut messages) = (Bare::new(other, terms)?, 0);
                while end.receive()? {
                    end.send()?;
                    messages += 1;
                }
                Ok(messages)
            });
            let mut end = Bare::new(one, terms)?;
            for _ in 0..5 {
                end.send()?;
                assert!(end.receive()?);
            }
            drop(end);
            assert_eq!(pong.join().expect("no panic")?, 5);
        }
        Ok(())
    }

    #[test]
    fn streams_arrive_whole() -> io::Result<()> {
        if !has_ring("streams_arrive_whole") {
            return Ok(());
        }
        for (depth, zero_copy) in [(1, false), (4, false), (4, true)] {
            let (one, mut other) = ends()?;
            let count = thread::spawn(move || io::copy(&mut other, &mut io::sink()));
            let (send_bytes, receive_bytes) = (70_000, 1);
            let mut end =
                Bare::new(one, BareTerms { send_bytes, receive_bytes, depth, zero_copy })?;
            for _ in 0..40 {
                end.stream()?;
            }
            end.settle()?;
            let (sent, copied) = end.copied();
            assert!(copied <= sent && (sent > 0) == zero_copy, "{sent} {copied}");
            drop(end);
            assert_eq!(count.join().expect("no panic")?, 40 * 70_000);
        }
        Ok(())
    }
}
