//! The address is for the kernel and for devices.

use pageferry_datapath::region::Lease;

fn write(lease: &Lease) {
    *lease.as_ptr() = 1;
}

fn main() {}
