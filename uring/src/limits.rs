//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// Iovecs of one operation: a full batch's extents, its chunks and one header.
pub(crate) const IOVECS_MAX: usize = pageferry_datapath::limits::BATCH_EXTENTS_MAX + 2;

/// A peer sends its first bytes within this, or is dropped: a connection held open by trickling
/// bytes must not keep a place in the acceptor.
pub const GREETING_WAIT_MAX: Duration = Duration::from_secs(5);

/// Between two looks at a greeting that has begun to arrive; loopback and LAN never get here.
pub(crate) const GREETING_POLL: Duration = Duration::from_millis(2);

/// Connecting one lane, hello and reply included: three SYN retries (1 + 2 + 4 s).
pub const CONNECT_WAIT_MAX: Duration = Duration::from_secs(8);

/// A lane without progress for this long has failed. TCP recovers from a lost link within its
/// first few retransmissions or not at all.
pub const PROGRESS_WAIT_MAX: Duration = Duration::from_secs(10);

/// How long an orderly close waits for the peer to close too; by then the last barrier was
/// acknowledged, so nothing is lost if it does not.
pub(crate) const CLOSE_WAIT_MAX: Duration = Duration::from_secs(2);

/// Socket buffers of a lane whose two ends share a core, at most. Larger ones mean fewer switches
/// between the ends, until the bytes in flight fall out of the second-level cache: with 1 MiB of it
/// 384-512 KiB is the plateau, 256 KiB costs 5 % and 768 KiB 4 %.
pub const SAME_HOST_SOCKET_BUFFER_BYTES: usize = 512 << 10;

/// The same at least, on machines with little cache or that don't tell.
pub const SAME_HOST_SOCKET_BUFFER_BYTES_MIN: usize = 192 << 10;

/// Highest latency a lane's histograms tell apart, in ns; more is counted as this.
pub(crate) const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// Operations of one ring: the one being moved, and batches whose zero-copy notifications are
/// still out. A link with 1 MiB batches and this many out holds more than any socket buffer.
pub(crate) const RING_SLOTS: u16 = 64;

/// How long a lane that ends waits for the kernel to let go of guest memory; after that the memory
/// is left mapped for good.
pub(crate) const SETTLE_WAIT_MAX: Duration = Duration::from_secs(5);

/// Between two looks while a lane settles.
pub(crate) const SETTLE_TICK: Duration = Duration::from_millis(50);

/// A lane that waits for its turn under a rate looks this often whether the rate was changed or the
/// lane stopped.
pub(crate) const PACE_TICK: Duration = Duration::from_millis(20);

/// A connection is paced by the kernel at this share, in percent, of its part of the rate: it only
/// smooths what our own pacing lets through, and must never be what holds a lane back.
pub(crate) const KERNEL_PACING_PERCENT: u64 = 150;

/// Between two looks at how busy the processors are: a window that the scheduler's slices don't
/// show in.
pub(crate) const CPU_LOOK_EVERY: Duration = Duration::from_millis(250);
