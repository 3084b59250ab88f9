//! What the fuzzers run: one function for each place where bytes or events of somebody else come in.
//!
//! ```text
//!   fuzz/fuzz_targets/*.rs   libFuzzer, guided by coverage    ┐
//!   tests/tests/fuzz_short   corpus and mutations, in CI      ┴──> TARGETS: fn(&[u8])
//! ```
//!
//! Each function takes any bytes and returns, or panics because a rule was broken. It has no state
//! and reads no clock but where a deadline needs one, so that the same bytes do the same again.

mod admin;
mod bitmap;
mod control;
mod events;
mod lanes;
mod mutate;
mod qmp;
mod rdma;
mod source;
mod target;

pub use mutate::{Mutator, corpus, crash_file};

/// One thing to fuzz.
#[derive(Clone, Copy, Debug)]
pub struct FuzzTarget {
    /// Its name: of the libFuzzer binary, and of its folder below `fuzz/corpus`.
    pub name: &'static str,
    /// Takes any bytes and returns, or panics because something is wrong with us.
    pub run: fn(&[u8]),
    /// Longer inputs show nothing new.
    pub bytes_max: usize,
}

/// Everything that is fuzzed.
pub const TARGETS: &[FuzzTarget] = &[
    FuzzTarget { name: "control", run: control::run, bytes_max: 4096 },
    FuzzTarget { name: "lanes", run: lanes::run, bytes_max: 4096 },
    FuzzTarget { name: "bitmap", run: bitmap::run, bytes_max: 512 },
    FuzzTarget { name: "qmp", run: qmp::run, bytes_max: 2048 },
    FuzzTarget { name: "rdma", run: rdma::run, bytes_max: 4200 },
    FuzzTarget { name: "source", run: source::run, bytes_max: 512 },
    FuzzTarget { name: "target", run: target::run, bytes_max: 512 },
    FuzzTarget { name: "admin", run: admin::run, bytes_max: 512 },
];

/// The one with this name.
///
/// # Panics
/// If there is none.
pub fn by_name(name: &str) -> &'static FuzzTarget {
    TARGETS.iter().find(|target| target.name == name).expect("one of the names in TARGETS")
}
