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
