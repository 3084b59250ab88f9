//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// Regions in one guest: QEMU allows 256 DIMMs, and NUMA nodes add a few.
pub const REGIONS_MAX: usize = 512;

/// Lanes of one session: eight fill 100 GbE; more rails may want a multiple of that.
pub const LANES_MAX: usize = 256;

/// Extents in one batch: what one lane header of 4096 bytes holds (see `framing`), nearly 1 MiB of
/// scattered 4 KiB pages.
pub const BATCH_EXTENTS_MAX: usize = 255;

/// Bytes in one batch: larger batches push a lane's bytes in flight out of the cache, smaller ones
/// cost system calls (measured on loopback: 1 MiB is the plateau).
pub const BATCH_BYTES_MAX: u64 = 1 << 20;

/// What is counted at once to find holes in it: a huge page, whose holes are sought one by one.
pub const HOLE_PIECE_BYTES: u64 = 2 << 20;

/// A look for holes may take this share, in percent, of the time since the one before: it is the driver
/// that looks, while the lanes stand still.
pub const HOLE_LOOK_PERCENT: u32 = 5;

/// A look that takes no longer is made in any case, in the pause too, which takes ten times that.
pub const HOLE_LOOK_FREE: Duration = Duration::from_millis(2);

/// The longest run that travels as one hole: the largest huge page there is, and within what an entry
/// can say.
pub const HOLE_RUN_BYTES_MAX: u64 = 1 << 30;

/// Bytes of guest memory in one compressed chunk: twice the window of LZ4, so that little is lost at
/// its edges, and small enough that both buffers stay in the second-level cache.
pub const CHUNK_BYTES_MAX: u64 = 128 << 10;

/// Compressed chunks in one batch: all are full but the last.
pub const CHUNKS_MAX: usize = (BATCH_BYTES_MAX / CHUNK_BYTES_MAX) as usize;

/// Bytes of memory behind one page table of 4 KiB pages: the step in which page tables exist.
pub const PAGE_TABLE_BYTES: u64 = 2 << 20;

/// Holes smaller than this are tracked with what is around them: a look at a hole costs a
/// microsecond, as much as walking the page tables of 1 MiB to 2 MiB takes; and there may be as many
/// of them as fit into the guest.
pub const HOLE_BYTES_MIN: u64 = 16 << 20;

/// Runs that one scan call may report: 192 KiB of buffer; 1 % of 1 GiB fits in one call.
pub const SCAN_RUNS_MAX: usize = 8192;

/// Bytes write-protected by one call: 2 ms at most, during which the monitor can't map or unmap.
pub const PROTECT_STEP_BYTES: u64 = 1 << 30;

/// Tries at protecting a range while the monitor is changing its mappings.
pub const PROTECT_RETRIES_MAX: u32 = 10_000;

/// The page size of everything that is not hugetlbfs, and the smallest that extents are made of.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes populated by one call: a cancelled migration waits for one of these per thread at most
/// (20 ms at the slowest first touch seen).
pub const POPULATE_STEP_BYTES: u64 = 8 << 20;

/// What a thread that gives way to the guest moves in a second at least, or it gives way less: a
/// seventh of 1 GbE, a minute for each GiB. A tenth of a core does that on slow machines, so below it
/// the guest would gain little more, and the migration never end.
pub const GIVES_WAY_BYTES_MIN: u64 = 16 << 20;

/// How often it looks at that: many turns of the scheduler, and three of these are all it takes to come
/// back wholly.
pub const GIVES_WAY_LOOK_EVERY: Duration = Duration::from_secs(1);

/// Memory for the tags of huge pages that were sent: 256 GiB of guest, a 256th of it. What is beyond
/// is sent whole.
pub const NARROW_TABLE_BYTES_MAX: u64 = 1 << 30;

/// Size of a transparent huge page.
pub const THP_BYTES: u64 = 2 << 20;

/// Ranges for which huge pages are asked on tmpfs: each may split the mapping, and a process has
/// 65,530 mappings.
pub const THP_RANGES_MAX: usize = 4096;

/// Bytes of guest memory copied at a time to be hashed: stays in the second-level cache, and the
/// hash's cost per call does not show.
pub const DIGEST_PIECE_BYTES: usize = 64 << 10;

/// How long a monitor's thread may take to stop, or to come back from a call made in it: far more
/// than seen (28 ms on busy cores), and no longer than a guest may stand still.
pub const INJECT_WAIT_MAX: Duration = Duration::from_secs(2);

/// How often a thread that is not polling is let go on and stopped again.
pub const INJECT_TRIES: u32 = 40;

/// Between two such tries: longer than what a main loop does between two polls.
pub const INJECT_AGAIN_PAUSE: Duration = Duration::from_millis(1);

/// How long that is waited for without sleeping: it takes some ten microseconds.
pub const INJECT_SPIN_MAX: Duration = Duration::from_millis(1);

/// Bytes of one mapping searched for a `syscall` instruction; the vdso is smaller.
pub const CODE_SEARCH_BYTES: u64 = 1 << 20;

/// Bytes of a NIC's RSS key: drivers have 40 to 52, the kernel's own buffer 52.
pub const RSS_KEY_BYTES_MAX: usize = 256;

/// Entries of a NIC's indirection table: NICs of today have up to 2048.
pub const RSS_TABLE_MAX: usize = 4096;

/// Queues of one NIC that lanes may be told to land on: as many as there may be lanes.
pub const RSS_QUEUES_MAX: usize = LANES_MAX;

/// Addresses of one NIC that are told with its queues.
pub const RSS_ADDRESSES_MAX: usize = 64;

/// NICs whose queues are told: each with a table of 2048 entries they fill a quarter of a header.
pub const RSS_NICS_MAX: usize = 16;

/// Cores whose use is told; the kernel's NR_CPUS is at most 8192.
pub const CORES_MAX: usize = 8192;

/// A control header: an offer of [`REGIONS_MAX`] regions with long names is about 200 KiB.
pub const CONTROL_HEADER_BYTES_MAX: u64 = 1 << 20;

/// The header of a connection's first control frame, which has no body: a name, a version and an id
/// are some hundred bytes.
pub const CONTROL_INTRODUCTION_BYTES_MAX: u64 = 16 << 10;

/// A control body: the raw bitmap of 2 TiB of guest memory in 4 KiB pages.
pub const CONTROL_BODY_BYTES_MAX: u64 = 64 << 20;

/// One guest's memory; larger than any host of today, small enough for every sum in a `u64`.
pub const GUEST_BYTES_MAX: u64 = 1 << 50;

/// Device state carried by one control frame: large enough to be cheap, small enough that an
/// abort waits for no more than this.
pub const STATE_CHUNK_BYTES_MAX: usize = 256 << 10;

/// Device state in all: QEMU sends 0.3 to 1 MiB; video memory and firmware come to tens of MiB.
pub const STATE_BYTES_MAX: u64 = 4 << 30;

/// How long a source waits for the target to close the last round: every lane has acknowledged it
/// already, and the guest stands still.
pub const LAST_CLOSING_MAX: Duration = Duration::from_secs(10);

/// How long a source waits in a phase before it calls the peer dead. Phases whose end depends on
/// the amount of memory (moving, scanning) are watched by the lanes' own progress instead.
pub fn source_phase_max(phase: crate::source::Phase) -> Option<Duration> {
    use crate::source::Phase;
    match phase {
        Phase::Greeting => Some(Duration::from_secs(10)),
        // The target maps and checks guest memory, and asks its monitor.
        Phase::Offering | Phase::Opening | Phase::Preparing => Some(Duration::from_secs(30)),
        // Clearing what the target's memory had before takes its time on the first round; the last
        // one has `LAST_CLOSING_MAX`.
        Phase::Closing => Some(Duration::from_secs(120)),
        // Inside the pause: a guest that stands still this long is better off at the source.
        Phase::Saving => Some(Duration::from_secs(30)),
        Phase::Verifying => Some(Duration::from_secs(600)),
        // Past it the answer is lost, not late: only records can tell then. A cut of the length that
        // agents get over by default fits in.
        Phase::Committed => Some(Duration::from_secs(45)),
        _ => None,
    }
}

/// How long a target waits in a phase before it calls the source dead. While memory is on its way
/// the lanes watch their own progress, and the guest may be written to for as long as it likes.
pub fn target_phase_max(phase: crate::target::Phase) -> Option<Duration> {
    use crate::target::Phase;
    match phase {
        Phase::Greeting | Phase::Offered => Some(Duration::from_secs(10)),
        Phase::Loading => Some(Duration::from_secs(60)),
        _ => None,
    }
}

/// The smallest page of any host we run on; every extent is whole pages of it.
pub const PAGE_BYTES_MIN: u64 = 4096;
