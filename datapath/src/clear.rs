//! Clears guest memory at the target that no round will write.
//!
//! The target's file may hold something from before: another guest's memory, or what the monitor
//! wrote at its start. Where the guest has holes that would stay and be read as its memory. Run
//! once, before the first round may be said to be closed.

use crate::bitmap::DirtySet;
use crate::extent::Extent;
use crate::holes::{self, HolesError};
use crate::region::{GuestMemory, RegionError};

/// Bytes looked at and punched at once: a huge page, so that punching one frees it.
const STEP_BYTES: u64 = 2 << 20;
/// Bytes copied out of guest memory at once, to be looked at; stays in the first-level cache.
const LOOK_BYTES: usize = 16 << 10;

/// Why memory could not be cleared.
#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    /// Its extents could not be listed.
    #[error("its populated extents could not be listed")]
    Holes(#[from] HolesError),
    /// It could not be read or punched.
    #[error("it could not be read or punched")]
    Region(#[from] RegionError),
}

/// What clearing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClearReport {
    /// Populated bytes outside of `pages`, looked at.
    pub looked_bytes: u64,
    /// Of these, bytes that were not zero and are a hole now.
    pub punched_bytes: u64,
}

/// Makes everything outside `pages` read as zeros. Pages of zeros stay populated: they may have
/// been populated on purpose.
pub fn outside(memory: &GuestMemory, pages: &DirtySet) -> Result<ClearReport, ClearError> {
    let mut stray = DirtySet::for_memory(memory);
    for extent in holes::guest_data_extents(memory)? {
        stray.set_extent(extent)?;
    }
    stray.subtract(pages);
    let mut report = ClearReport::default();
    for extent in stray.extents() {
        let region = &memory.regions()[usize::from(extent.region.0)];
        let step = STEP_BYTES.max(region.page_bytes());
        let mut offset = extent.offset;
        while offset < extent.end() {
            // Up to the next step boundary, so that whole huge pages are punched where they can be.
            let len = (step - offset % step).min(extent.end() - offset);
            report.looked_bytes += len;
            if !is_zero(memory, Extent { offset, len, ..extent })? {
                region.punch(offset, len)?;
                report.punched_bytes += len;
            }
            offset += len;
        }
    }
    Ok(report)
}

fn is_zero(memory: &GuestMemory, extent: Extent) -> Result<bool, RegionError> {
    let lease = memory.lease(extent)?;
    let mut bytes = [0; LOOK_BYTES];
    let mut at = 0;
    while at < extent.len {
        let count = (extent.len - at).min(LOOK_BYTES as u64) as usize;
        lease.copy_out(at, &mut bytes[..count])?;
        if bytes[..count].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += count as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;
    use crate::region::Region;

    #[test]
    fn what_no_round_writes_is_punched_unless_it_is_zero() {
        let backing = Backing::memfd("clear", 8 << 20, None).expect("a memfd");
        let region = Region::open(RegionIndex(0), backing).expect("mapped");
        let memory = GuestMemory::new(vec![region]);
        let at = |offset, len| Extent { region: RegionIndex(0), offset, len };
        let write = |extent: Extent, byte: u8| {
            let bytes = vec![byte; extent.len as usize];
            memory.lease(extent).expect("inside").copy_in(0, &bytes).expect("written");
        };
        write(at(0, 4096), 1); // moved by the first round
        write(at(2 << 20, 8192), 2); // stray
        write(at(6 << 20, 4096), 0); // stray, zero
        let mut pages = DirtySet::for_memory(&memory);
        pages.set_extent(at(0, 4096)).expect("inside");
        let report = outside(&memory, &pages).expect("cleared");
        assert_eq!(report, ClearReport { looked_bytes: 12288, punched_bytes: 8192 });
        let left = holes::guest_data_extents(&memory).expect("listed");
        assert_eq!(left, [at(0, 4096), at(6 << 20, 4096)]);
    }
}
