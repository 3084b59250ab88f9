//! A region over memory that it did not map would unmap it.

use std::fs::File;
use std::ptr::NonNull;

use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::Region;

fn forge(file: File, base: NonNull<u8>) -> Region {
    Region { index: RegionIndex(1), file, base, len: 4096, page_bytes: 4096 }
}

fn main() {}
