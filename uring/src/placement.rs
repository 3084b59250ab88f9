//! Cores: pinning a worker, and what the first core's cache holds.
//!
//! Which cores lanes may use is decided by the caller, who knows the vCPUs and the NIC.

use std::fs;
use std::path::Path;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Pins the calling thread; says which core it is pinned to, `None` if it is not.
pub(crate) fn pin(cpu: Option<usize>) -> Option<usize> {
    let cpu = cpu?;
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    match pinned {
        Ok(()) => Some(cpu),
        Err(errno) => {
            tracing::warn!(cpu, %errno, "lane's worker could not be pinned");
            None
        }
    }
}

/// Size of a core's second-level cache; `None` where the kernel does not tell.
pub(crate) fn second_level_cache_bytes() -> Option<usize> {
    let caches = Path::new("/sys/devices/system/cpu/cpu0/cache");
    (0..8).find_map(|index| {
        let cache = caches.join(format!("index{index}"));
        let read = |name| fs::read_to_string(cache.join(name)).ok();
        if read("level")?.trim() != "2" {
            return None;
        }
        let kib: usize = read("size")?.trim().strip_suffix('K')?.parse().ok()?;
        kib.checked_mul(1024)
    })
}
