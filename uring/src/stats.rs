//! A worker's counters while it runs; [`LaneStats`] when it ends.

use std::time::Instant;

use hdrhistogram::Histogram;
use pageferry_datapath::lane::{LanePath, LaneStats, Narrowing, Packing, ZeroCopy};

use crate::limits::LATENCY_NS_MAX;
use crate::sys;

/// Counters of one worker, on its own thread.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) moved_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) hole_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) packing: Packing,
    pub(crate) narrowing: Narrowing,
    pub(crate) batch_ns: Histogram<u64>,
    pub(crate) barrier_ns: Histogram<u64>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            moved_bytes: 0,
            zero_bytes: 0,
            hole_bytes: 0,
            wire_bytes: 0,
            packing: Packing::default(),
            narrowing: Narrowing::default(),
            batch_ns: histogram(),
            barrier_ns: histogram(),
        }
    }

    /// The end result: the path and zero-copy each with its reason. Called on the worker's thread: its CPU time is read here.
    pub(crate) fn finish(
        self,
        (path, path_reason): (LanePath, String),
        (zero_copy, zero_copy_reason): (ZeroCopy, String),
        cpu: Option<usize>,
        syscalls: u64,
    ) -> LaneStats {
        LaneStats {
            path,
            path_reason,
            zero_copy,
            zero_copy_reason,
            cpu,
            moved_bytes: self.moved_bytes,
            zero_bytes: self.zero_bytes,
            hole_bytes: self.hole_bytes,
            wire_bytes: self.wire_bytes,
            sealing: None,
            packing: self.packing,
            narrowing: self.narrowing,
            syscalls,
            cpu_ns: sys::thread_cpu_ns(),
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
