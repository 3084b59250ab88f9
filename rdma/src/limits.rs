//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// Work requests a lane may have posted and not yet seen completed: 1 MiB of scattered pages, twice
/// what 100 Gbit/s need at 40 us; with the receives a power of two, to which devices round up. Not
/// more: siw of Linux 6.1 runs out of places for queues of four times this from four lanes on.
/// Bounded by the device.
pub(crate) const SEND_DEPTH: u32 = 256 - RECEIVE_SLOTS as u32;

/// Bytes of WRITEs in flight on one lane. 100 Gbit/s over 0.5 ms is 6 MiB; more only makes the end
/// of a round longer, as what a lane has posted no other lane can take.
pub(crate) const IN_FLIGHT_BYTES_MAX: u64 = 8 << 20;

/// Receives kept posted: a peer has one request or reply under way, and a close behind it.
pub(crate) const RECEIVE_SLOTS: usize = 4;

/// Messages that may be on their way out; each waits for its completion before its slot is reused.
pub(crate) const SEND_SLOTS: usize = 4;

/// One message: a header and 254 keys.
pub(crate) const MESSAGE_BYTES: usize = 4096;

/// Bytes a SEND or WRITE may carry inside its work request: a barrier's acknowledgement fits, and
/// every provider that has inline at all has this much.
pub(crate) const INLINE_BYTES: u32 = 64;

/// Locked beside guest memory: messages of eight lanes, 40 KiB each, and their queues, which some
/// drivers pin as well. A limit of exactly what we say is needed has to be enough.
pub const LOCKED_BESIDE_BYTES: u64 = 1 << 20;

/// The smallest slice of guest memory registered at once: a huge page's size, and small enough that
/// a guest of holes is not pinned whole for a few pages.
pub const SLICE_BYTES_MIN: u64 = 2 << 20;

/// A slice where only touched memory is pinned.
pub(crate) const SLICE_BYTES_TOUCHED: u64 = 16 << 20;

/// A slice where all memory is pinned: registering one takes some 10 ms, so the first WRITE does
/// not wait long, and the lookup tables stay small.
pub(crate) const SLICE_BYTES_ALL: u64 = 64 << 20;

/// Slices of one guest; larger guests get larger slices. Devices have from 2^16 regions on.
pub const SLICES_MAX: u64 = 1 << 14;

/// Threads that register ahead: registering is bound by the kernel's page table walk and, from a
/// few threads on, by its locks.
pub(crate) const REGISTER_THREADS_MAX: usize = 4;

/// `retry_count` of a connection. Not 7, which rxe takes as for ever.
pub(crate) const RETRY_COUNT: u8 = 6;

/// `rnr_retry_count`: receives are posted before they are needed, so not ready means broken.
pub(crate) const RNR_RETRY_COUNT: u8 = 6;

/// The local ACK timeout as an exponent: 4.096 us * 2^15 = 134 ms; with the retries a dead link is
/// noticed after about a second, and a lost last packet costs one of them. iWARP has TCP's own.
pub(crate) const ACK_TIMEOUT_EXPONENT: u8 = 15;

/// RDMA READs under way on one connection; a lane does one at a time, some devices want more.
pub(crate) const READS_MAX: u8 = 4;

/// A send queue is not made smaller than this where the device has no room for a longer one.
pub(crate) const SEND_DEPTH_MIN: u32 = 32;

/// Connections waiting to be accepted.
pub(crate) const BACKLOG: i32 = 256;

/// Resolving, connecting and probing one lane.
pub const CONNECT_WAIT_MAX: Duration = Duration::from_secs(8);

/// How long a scratch page's READ may take before another is posted.
pub(crate) const SCRATCH_WAIT: Duration = Duration::from_millis(500);

/// How long after a connection was closed a device's event may tell why: soft-iWARP ends its
/// connections a moment before it says that the port went down.
pub(crate) const EXPLAIN_WAIT: Duration = Duration::from_millis(50);

/// A lane without progress for this long has failed.
pub const PROGRESS_WAIT_MAX: Duration = Duration::from_secs(10);

/// How long a slice may not be registered yet, by either side: a target first clears what its memory
/// held where the guest has holes, which takes a second for 10 GiB.
pub const REGISTER_WAIT_MAX: Duration = Duration::from_secs(60);

/// How often a target that has no key yet says so: the source takes silence for a dead link.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// Zero pages named in one message: clearing them at the target shows no other sign of life, and
/// memory touched for the first time takes up to 2.5 s a GiB.
pub(crate) const ZERO_BYTES_MAX: u64 = 256 << 20;

/// Events of a device kept to explain failures: a port that flaps tells two each time.
pub(crate) const EVENTS_MAX: usize = 64;

/// How long an orderly close waits for the peer to hang up.
pub(crate) const CLOSE_WAIT_MAX: Duration = Duration::from_secs(2);

/// The longest a worker polls before it sleeps: what sleeping and being woken costs about.
pub(crate) const SPIN_MAX: Duration = Duration::from_micros(50);

/// The shortest: a completion that is there already, or about to be.
pub(crate) const SPIN_MIN: Duration = Duration::from_micros(1);

/// Between two looks at a silent connection.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// Highest latency a lane's histograms tell apart, in ns; more is counted as this.
pub(crate) const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// A lane that waits for its turn under a rate looks this often whether the rate was changed or the
/// lane stopped.
pub(crate) const PACE_TICK: Duration = Duration::from_millis(20);
