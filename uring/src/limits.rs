//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// Iovecs of one operation: a full batch's extents and one header.
pub(crate) const IOVECS_MAX: usize = pageferry_datapath::limits::BATCH_EXTENTS_MAX + 1;

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

/// Socket buffers of a lane whose two ends share a machine: what is in flight stays in the cache
/// (measured on loopback: 128-256 KiB is the plateau, 512 KiB costs 8 %).
pub const SAME_HOST_SOCKET_BUFFER_BYTES: usize = 256 << 10;

/// Highest latency a lane's histograms tell apart, in ns; more is counted as this.
pub(crate) const LATENCY_NS_MAX: u64 = 60_000_000_000;
