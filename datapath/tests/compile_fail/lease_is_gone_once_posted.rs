//! Posting takes ownership: until the completion hands the lease back, nobody can drop it.

use pageferry_datapath::region::Lease;

fn post(in_flight: &mut Vec<Lease>, lease: Lease) {
    in_flight.push(lease);
    drop(lease);
}

fn main() {}
