//! Which lane runs on which core.

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
