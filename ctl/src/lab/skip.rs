//! Tests that need what this machine lacks, and tests that want it for themselves.

use std::fs::File;
use std::io::Write;

use nix::fcntl::{Flock, FlockArg};

/// Says `SKIP name: reason`, past the test runner's capture so that the count at the end of
/// `make test` sees it. With `PAGEFERRY_REQUIRE_ALL=1` it panics instead.
pub fn skip(name: &str, reason: impl std::fmt::Display) {
    assert!(
        std::env::var_os("PAGEFERRY_REQUIRE_ALL").is_none_or(|value| value != "1"),
        "{name} must not be skipped (PAGEFERRY_REQUIRE_ALL=1): {reason}"
    );
    let _ = writeln!(std::io::stderr(), "SKIP {name}: {reason}");
}

/// Waits until no other test or benchmark on this machine runs a guest. Held until dropped: real
/// guests under emulation need both of two cores, and their timings mean nothing otherwise.
#[must_use = "the others start when this is dropped"]
pub fn one_at_a_time() -> Option<Flock<File>> {
    lock_file("pageferry-lab.lock")
}

/// Takes the machine-wide lock called `name`, in the folder for temporary files.
pub(super) fn lock_file(name: &str) -> Option<Flock<File>> {
    let path = std::env::temp_dir().join(name);
    // A file of another user in /tmp can be opened but not with O_CREAT (fs.protected_regular).
    let file = File::open(&path).or_else(|_| File::create(&path)).ok()?;
    Flock::lock(file, FlockArg::LockExclusive).ok()
}

/// True for root, who may make namespaces, mounts and huge pages.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
