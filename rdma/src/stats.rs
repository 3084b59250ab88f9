//! A worker's counters while it runs; [`LaneStats`] when it ends. And its core.

use std::time::Instant;

use hdrhistogram::Histogram;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use pageferry_datapath::lane::{LanePath, LaneStats, Narrowing, Packing, ZeroCopy};

use crate::limits::LATENCY_NS_MAX;

/// Counters of one worker, on its own thread.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) moved_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) batch_ns: Histogram<u64>,
    pub(crate) barrier_ns: Histogram<u64>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            moved_bytes: 0,
            zero_bytes: 0,
            wire_bytes: 0,
            batch_ns: histogram(),
            barrier_ns: histogram(),
        }
    }

    /// The end result. Called on the worker's thread: its CPU time is read here.
    pub(crate) fn finish(self, reason: String, cpu: Option<usize>, syscalls: u64) -> LaneStats {
        let cpu_time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        LaneStats {
            path: LanePath::Rdma,
            path_reason: reason,
            zero_copy: ZeroCopy::Yes,
            zero_copy_reason: "the device reads guest memory".into(),
            cpu,
            moved_bytes: self.moved_bytes,
            zero_bytes: self.zero_bytes,
            // Memory that is registered is not punched.
            hole_bytes: 0,
            wire_bytes: self.wire_bytes,
            sealing: None,
            packing: Packing { reason: "RDMA writes memory as it is".into(), ..Packing::default() },
            narrowing: Narrowing {
                reason: "RDMA writes memory as it is".into(),
                ..Narrowing::default()
            },
            syscalls,
            cpu_ns: cpu_time.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64),
            batch_ns: self.batch_ns,
            barrier_ns: self.barrier_ns,
        }
    }
}

/// Counts the time since `start`.
pub(crate) fn record(histogram: &mut Histogram<u64>, start: Instant) {
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    histogram.saturating_record(ns);
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("1 < LATENCY_NS_MAX and 3 digits")
}

/// Pins the calling thread; says which core it is pinned to, `None` if it is not.
pub(crate) fn pin_to(cpu: Option<usize>) -> Option<usize> {
    let cpu = cpu?;
    let mut set = CpuSet::new();
    match set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
        Ok(()) => Some(cpu),
        Err(errno) => {
            tracing::warn!(cpu, %errno, "lane's worker could not be pinned");
            None
        }
    }
}
