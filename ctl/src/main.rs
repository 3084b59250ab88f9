//! The binary `pageferry`.
#![forbid(unsafe_code)]

fn main() {}
