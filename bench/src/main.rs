//! Benchmarks of Pageferry beside the tools people trust.
#![forbid(unsafe_code)]

fn main() {}
