//! Guest memory as the simulation sees it: a few numbered pages whose content is one number.
//!
//! A content is a stamp of one counter, so a later one is a larger one; 0 is a hole or a page of
//! zeros. Two regions of different page size, the first one not a whole number of bitmap words.

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::RegionIndex;

/// `(pages, page_bytes)` of each region.
pub(crate) const SHAPE: [(u64, u64); 2] = [(35, 4096), (5, 65536)];
/// Pages in all, numbered through the regions.
pub(crate) const PAGES: usize = 40;
/// What a page of the target may hold before the migration: belongs to no guest.
pub(crate) const GARBAGE: u64 = 1 << 63;

/// The set of these pages.
pub(crate) fn set_of(pages: impl IntoIterator<Item = usize>) -> DirtySet {
    let mut set = DirtySet::new(SHAPE);
    for page in pages {
        set.set_extent(extent_of(page)).expect("a page of the guest");
    }
    set
}

/// The pages of this set, in order.
pub(crate) fn pages_of(set: &DirtySet) -> Vec<usize> {
    let mut pages = Vec::new();
    for extent in set.extents() {
        let (first, page_bytes) = place(extent.region);
        let from = first + (extent.offset / page_bytes) as usize;
        pages.extend(from..from + (extent.len / page_bytes) as usize);
    }
    pages
}

pub(crate) fn holds(set: &DirtySet, page: usize) -> bool {
    let extent = extent_of(page);
    let (_, page_bytes) = place(extent.region);
    set.get(extent.region).is_some_and(|bitmap| bitmap.contains(extent.offset / page_bytes))
}

fn extent_of(page: usize) -> Extent {
    let small = SHAPE[0].0 as usize;
    let (region, index) = if page < small { (0, page) } else { (1, page - small) };
    let page_bytes = SHAPE[region].1;
    Extent {
        region: RegionIndex(region as u16),
        offset: index as u64 * page_bytes,
        len: page_bytes,
    }
}

/// Chunks of one page: their content.
pub(crate) fn digest_of(pages: &[u64]) -> MemoryDigest {
    let (first, second) = pages.split_at(SHAPE[0].0 as usize);
    MemoryDigest::new(vec![first.to_vec(), second.to_vec()])
}

/// The number of a region's first page, and its page size.
fn place(region: RegionIndex) -> (usize, u64) {
    match region.0 {
        0 => (0, SHAPE[0].1),
        _ => (SHAPE[0].0 as usize, SHAPE[1].1),
    }
}
