//! Two holders of one lease could disagree about when the operation is over.

use pageferry_datapath::region::Lease;

fn twice(lease: &Lease) -> Lease {
    Clone::clone(lease)
}

fn main() {}
