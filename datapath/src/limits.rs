//! Every bound of this crate, each with its reason.

/// Regions in one guest: QEMU allows 256 DIMMs, and NUMA nodes add a few.
pub const REGIONS_MAX: usize = 512;

/// Lanes of one session: eight fill 100 GbE; more rails may want a multiple of that.
pub const LANES_MAX: usize = 256;

/// Extents in one batch: what one 512-byte lane header holds (see `framing`).
pub const BATCH_EXTENTS_MAX: usize = 31;

/// Bytes in one batch: larger batches push a lane's bytes in flight out of the cache, smaller ones
/// cost system calls (measured on loopback: 1 MiB is the plateau).
pub const BATCH_BYTES_MAX: u64 = 1 << 20;

/// Bytes of memory behind one page table of 4 KiB pages: the step in which page tables exist.
pub const PAGE_TABLE_BYTES: u64 = 2 << 20;

/// Runs that one scan call may report: 192 KiB of buffer; 1 % of 1 GiB fits in one call.
pub const SCAN_RUNS_MAX: usize = 8192;

/// Bytes write-protected by one call: 2 ms at most, during which the monitor can't map or unmap.
pub const PROTECT_STEP_BYTES: u64 = 1 << 30;

/// Tries at protecting a range while the monitor is changing its mappings.
pub const PROTECT_RETRIES_MAX: u32 = 10_000;
