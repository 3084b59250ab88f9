//! What every transport's lanes have in common: the events they report and what they count.
//!
//! A lane is one connection with its worker. The source's lanes pull batches from a
//! [`RoundWork`], and when it is empty send a barrier; the target
//! acknowledges it once every byte before it is in guest memory. Implemented by `uring` (TCP) and
//! by `rdma`; nothing here knows which.

use std::io;
use std::sync::Arc;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::extent::Extent;
use crate::framing::FramingError;
use crate::framing::hello::Refusal;
use crate::ids::{LaneId, RoundIndex};
use crate::region::RegionError;
use crate::work::RoundWork;

/// The transport a lane runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LanePath {
    /// TCP, one io_uring per worker.
    TcpUring,
    /// TCP by plain system calls, where io_uring is disabled.
    TcpPlain,
    /// RDMA WRITE on a reliable-connected queue pair.
    Rdma,
}

impl LanePath {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::TcpUring => "TCP by io_uring",
            Self::TcpPlain => "TCP by plain sockets",
            Self::Rdma => "RDMA",
        }
    }
}

/// Whether the kernel sent from guest memory without copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroCopy {
    /// Sent from guest memory.
    Yes,
    /// Asked for, but the kernel reported that it copied; switched off since.
    Copied,
    /// Not asked for (plain sockets, or told so).
    Off,
}

/// Who encrypts a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SealedBy {
    /// The kernel, in the socket.
    Kernel,
    /// This process, from a copy of guest memory.
    Process,
}

/// The encryption of one lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealing {
    /// Who does it.
    pub by: SealedBy,
    /// Why not the other.
    pub reason: String,
    /// TLS's cipher suite.
    pub suite: String,
    /// Time spent copying and sealing (target: opening), in ns; 0 where the kernel does it.
    pub ns: u64,
}

/// What a lane compressed, over its whole life.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Packing {
    /// Guest memory that travelled in chunks.
    pub raw_bytes: u64,
    /// The chunks' bytes.
    pub packed_bytes: u64,
    /// Time spent in packing or unpacking, in ns.
    pub ns: u64,
    /// The codec in use at the end; `None` if memory travelled as it is.
    pub codec: Option<Codec>,
    /// Why that one, or why none.
    pub reason: String,
}

/// What a lane left out of huge pages, over its whole life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Narrowing {
    /// Guest memory that was hashed.
    pub hashed_bytes: u64,
    /// Of it, what the target held already, and that did not travel.
    pub spared_bytes: u64,
    /// Time spent in it, in ns.
    pub ns: u64,
    /// Memory for the tags of all lanes together.
    pub table_bytes: u64,
    /// Why so much of it, or why not at all.
    pub reason: String,
}

/// Counters of one lane, over its whole life.
#[derive(Clone, Debug)]
pub struct LaneStats {
    /// The path this lane took.
    pub path: LanePath,
    /// Why this path: what was asked for, what the host refused, what was measured.
    pub path_reason: String,
    /// Zero-copy state at the end.
    pub zero_copy: ZeroCopy,
    /// Why: what was asked for, what the kernel refused or reported.
    pub zero_copy_reason: String,
    /// The core its worker was pinned to.
    pub cpu: Option<usize>,
    /// Bytes of guest memory moved, zero pages not counted.
    pub moved_bytes: u64,
    /// Bytes of guest memory that were zero, and did not travel.
    pub zero_bytes: u64,
    /// Of them, those that became holes at the target.
    pub hole_bytes: u64,
    /// What moved as it travelled: with headers, compressed where it was.
    pub wire_bytes: u64,
    /// How it was encrypted, if it was.
    pub sealing: Option<Sealing>,
    /// What was compressed, and why or why not.
    pub packing: Packing,
    /// What was left out of huge pages, and why or why not.
    pub narrowing: Narrowing,
    /// System calls of the worker's loop.
    pub syscalls: u64,
    /// CPU time of the worker's thread, in ns; what the kernel did for it in interrupts is not in.
    pub cpu_ns: u64,
    /// Source: from a batch's submission until the kernel took all of it. Target: until it is in
    /// guest memory. In ns.
    pub batch_ns: Histogram<u64>,
    /// From a barrier's submission until its acknowledgement, in ns.
    pub barrier_ns: Histogram<u64>,
}

/// What a lane tells its driver. Sent on a crossbeam channel given at start.
#[derive(Debug)]
pub enum LaneEvent {
    /// Source: all batches this lane took of `round` are placed in the target's memory, and there
    /// was no more work. Target: every byte before this barrier is placed.
    Placed {
        /// Which lane.
        lane: LaneId,
        /// Which round's barrier.
        round: RoundIndex,
    },
    /// The lane is gone; its connection is closed on this side. `unacked` may or may not be in
    /// target memory: fence the lane at the target before sending them again.
    Failed {
        /// Which lane.
        lane: LaneId,
        /// What happened.
        error: LaneError,
        /// Extents sent since the last acknowledged barrier (empty on the target).
        unacked: Vec<Extent>,
    },
    /// Target: the source closed the lane in order.
    Closed {
        /// Which lane.
        lane: LaneId,
    },
}

/// Why a lane failed, grouped by who did it.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The peer broke the framing or named memory outside the agreed regions.
    #[error("lane {lane}: peer misbehaved")]
    PeerMisbehaved {
        /// Which lane.
        lane: LaneId,
        /// What it did.
        #[source]
        source: FramingError,
    },
    /// The target acknowledged a barrier that was not the one outstanding.
    #[error("lane {lane}: peer acknowledged another barrier")]
    WrongAck {
        /// Which lane.
        lane: LaneId,
    },
    /// The target did not admit the lane.
    #[error("lane {lane}: refused by the target: {refusal}")]
    Refused {
        /// Which lane.
        lane: LaneId,
        /// Its reason.
        refusal: Refusal,
    },
    /// The round's work names memory this guest does not have.
    #[error("lane {lane}: work outside guest memory")]
    OutsideMemory {
        /// Which lane.
        lane: LaneId,
        /// The range.
        #[source]
        source: RegionError,
    },
    /// The connection ended where it must not.
    #[error("lane {lane}: connection closed by the peer")]
    PeerClosed {
        /// Which lane.
        lane: LaneId,
    },
    /// A system call failed.
    #[error("lane {lane}: {call} failed")]
    Host {
        /// Which lane.
        lane: LaneId,
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// What the transport has words of its own for.
    #[error("lane {lane}: {}", path.name())]
    Transport {
        /// Which lane.
        lane: LaneId,
        /// Which transport.
        path: LanePath,
        /// What the operator can do about it.
        hint: Option<String>,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No progress for the time given.
    #[error("lane {lane}: no progress for {waited_ms} ms")]
    Timeout {
        /// Which lane.
        lane: LaneId,
        /// How long.
        waited_ms: u64,
    },
}

impl LaneError {
    /// Which lane.
    pub fn lane(&self) -> LaneId {
        match self {
            Self::PeerMisbehaved { lane, .. }
            | Self::WrongAck { lane }
            | Self::Refused { lane, .. }
            | Self::OutsideMemory { lane, .. }
            | Self::PeerClosed { lane }
            | Self::Host { lane, .. }
            | Self::Transport { lane, .. }
            | Self::Timeout { lane, .. } => *lane,
        }
    }
}

/// A source's open lanes, whatever they run on.
pub trait SourceLanes: Send {
    /// Number of lanes that are alive.
    fn alive(&self) -> usize;

    /// Starts one round on every live lane and returns at once; each answers with
    /// [`LaneEvent::Placed`] or [`LaneEvent::Failed`]. One round at a time.
    fn move_round(&mut self, work: Arc<RoundWork>);

    /// Bytes of guest memory handed to the transport so far, all lanes together; cheap.
    fn moved_bytes(&self) -> u64;

    /// Bytes of guest memory found to be zero so far, all lanes together; cheap.
    fn zero_bytes(&self) -> u64;

    /// Closes every lane, joins the workers, and returns their counters. After an abort the
    /// connections are reset rather than drained.
    fn close(self: Box<Self>, abort: bool) -> Vec<LaneStats>;
}
