//! The ceiling beside our lanes: what bare `send` and `recv` reach on the same memory.
//!
//! No headers, no barriers, no checks: threads that push each connection's share of guest memory
//! through a socket in chunks. For benchmarks; no lane uses it.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::extent::Extent;
use pageferry_datapath::region::{GuestMemory, Lease, Region, RegionError};

use crate::plan::SocketTuning;
use crate::{limits, placement, socket, sys};

/// How the ceiling is measured.
#[derive(Clone, Debug)]
pub struct Ceiling {
    /// The core of each connection's two ends; as many connections as entries.
    pub cpus: Vec<(Option<usize>, Option<usize>)>,
    /// Bytes of one call.
    pub chunk_bytes: u64,
    /// How the sockets are tuned.
    pub tuning: SocketTuning,
}

/// Why the ceiling could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum CeilingError {
    /// A system call failed.
    #[error("{call} failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The two guests are not of one size.
    #[error("memory of different sizes")]
    Memory {
        /// The range that exists on one side only.
        #[source]
        source: RegionError,
    },
}

impl Ceiling {
    /// As [`Ceiling::run_over`], over loopback.
    pub fn run(&self, from: &GuestMemory, to: &GuestMemory) -> Result<Duration, CeilingError> {
        let host = |call| move |source| CeilingError::Host { call, source };
        let listener = TcpListener::bind("127.0.0.1:0").map_err(host("bind"))?;
        let addr = listener.local_addr().map_err(host("getsockname"))?;
        let mut pairs = Vec::new();
        for _ in &self.cpus {
            let source = socket::open(addr, None, None, self.tuning, limits::CONNECT_WAIT_MAX)
                .map_err(host("connect"))?;
            let (target, _) = listener.accept().map_err(host("accept"))?;
            socket::tune(&target, self.tuning).map_err(host("setsockopt"))?;
            pairs.push((source, target));
        }
        self.run_over(&pairs, from, to)
    }

    /// Moves the first region of `from` into that of `to` once, over connections (source's socket,
    /// target's socket) that were made and tuned before, as many as `cpus` has entries; the time
    /// from the first byte until the last one is placed. Threads are started before the clock.
    pub fn run_over(
        &self,
        pairs: &[(TcpStream, TcpStream)],
        from: &GuestMemory,
        to: &GuestMemory,
    ) -> Result<Duration, CeilingError> {
        assert_eq!(pairs.len(), self.cpus.len(), "each connection has its cores");
        let host = |call| move |source| CeilingError::Host { call, source };
        let (go, gate) = crossbeam_channel::bounded::<()>(0);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (index, (pair, cpu)) in pairs.iter().zip(&self.cpus).enumerate() {
                let out = self.chunks(&from.regions()[0], index)?;
                let into = self.chunks(&to.regions()[0], index)?;
                let (source_gate, target_gate) = (gate.clone(), gate.clone());
                threads.push(scope.spawn(move || {
                    placement::pin(cpu.0);
                    let _ = source_gate.recv();
                    each(&out, |lease, done| sys::send_range(pair.0.as_fd(), lease, done))
                }));
                threads.push(scope.spawn(move || {
                    placement::pin(cpu.1);
                    let _ = target_gate.recv();
                    each(&into, |lease, done| sys::receive_range(pair.1.as_fd(), lease, done))
                }));
            }
            // Long enough for every thread to stand at the gate.
            thread::sleep(Duration::from_millis(20));
            let start = Instant::now();
            drop(go);
            for thread in threads {
                let done = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                done.map_err(host("send or recv"))?;
            }
            Ok(start.elapsed())
        })
    }

    /// One connection's share of a region, in chunks: neighbours stay together.
    fn chunks(
        &self,
        region: &std::sync::Arc<Region>,
        index: usize,
    ) -> Result<Vec<Lease>, CeilingError> {
        let share = region.len() / self.cpus.len() as u64;
        let (from, until) = (share * index as u64, share * (index as u64 + 1));
        (from..until)
            .step_by(self.chunk_bytes as usize)
            .map(|offset| {
                let len = self.chunk_bytes.min(until - offset);
                let extent = Extent { region: region.index(), offset, len };
                region
                    .lease(extent.offset, extent.len)
                    .map_err(|source| CeilingError::Memory { source })
            })
            .collect()
    }
}

fn each(leases: &[Lease], step: impl Fn(&Lease, u64) -> io::Result<usize>) -> io::Result<()> {
    for lease in leases {
        let mut done = 0;
        while done < lease.extent().len {
            match step(lease, done)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                bytes => done += bytes as u64,
            }
        }
    }
    Ok(())
}
