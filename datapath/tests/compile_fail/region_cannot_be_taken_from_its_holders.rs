//! A region is unmapped when its last holder lets go, and each lease holds it.

use std::sync::Arc;

use pageferry_datapath::region::{Lease, Region};

fn unmap(region: Arc<Region>, lease: &Lease) {
    let region: Region = *region;
    drop(region);
    let region: Region = *Arc::clone(lease.region());
    drop(region);
}

fn main() {}
