//! The guest writes there: a slice would promise the compiler that nobody does.

use pageferry_datapath::region::Lease;

fn slice(lease: &Lease) -> &[u8] {
    lease
}

fn main() {}
