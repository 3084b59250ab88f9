//! What crosses crates: the laboratory of guests and namespaces that tests and benchmarks share.
#![forbid(unsafe_code)]
