//! An extent: a run of bytes within one region.

use serde::{Deserialize, Serialize};

use crate::ids::RegionIndex;

/// `len` bytes at `offset` of a region; never empty, always whole pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    /// Which region.
    pub region: RegionIndex,
    /// Byte offset of the first byte in the region.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Extent {
    /// One past the last byte; saturates, so that a hostile offset can't wrap.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}
