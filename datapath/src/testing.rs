//! What tests need from the machine, and what they say when it is not there. Tests only.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

/// Says that a test did not run, past the test runner's capture so that the count at the end of
/// `make test` sees it. With `PAGEFERRY_REQUIRE_ALL=1` that is a failure.
pub(crate) fn skip(name: &str, reason: &str) {
    let _ = writeln!(io::stderr(), "SKIP {name}: {reason}");
    assert!(std::env::var_os("PAGEFERRY_REQUIRE_ALL").is_none_or(|v| v != "1"), "{name}: {reason}");
}

/// Huge pages added to the machine's pool, and given back when dropped.
#[derive(Debug)]
pub(crate) struct HugePages {
    page_bytes: u64,
    count: u64,
}

impl HugePages {
    /// Adds `count` pages; `None`, having said so, where that can't be done.
    pub(crate) fn reserve(page_bytes: u64, count: u64) -> Option<Self> {
        let pages = Self { page_bytes, count: 0 };
        let reserved = pages.change(|now| now + count);
        let got = match reserved {
            Ok((before, after)) => after.saturating_sub(before),
            Err(_) => 0,
        };
        let pages = Self { count: got, ..pages };
        if got == count {
            return Some(pages);
        }
        skip("huge pages", &format!("{got} of {count} pages of {page_bytes} bytes to be had"));
        None
    }

    /// Other tests change the same number: one at a time.
    fn change(&self, to: impl Fn(u64) -> u64) -> io::Result<(u64, u64)> {
        let lock =
            File::options().create(true).append(true).open("/tmp/pageferry-hugepages.lock")?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let knob = PathBuf::from(format!(
            "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
            self.page_bytes >> 10
        ));
        let read = || -> io::Result<u64> {
            std::fs::read_to_string(&knob)?.trim().parse().map_err(io::Error::other)
        };
        let before = read()?;
        std::fs::write(&knob, to(before).to_string())?;
        Ok((before, read()?))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.count > 0 {
            let _ = self.change(|now| now.saturating_sub(self.count));
        }
    }
}
