//! `RLIMIT_MEMLOCK`: whether registering will be allowed, asked before it is tried.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use crate::error::RdmaError;
use crate::limits::LOCKED_BESIDE_BYTES;

/// `CAP_IPC_LOCK` of capabilities(7): who has it is not limited.
const CAP_IPC_LOCK: u32 = 14;

/// Checks that this many bytes of guest memory may be locked, and what lanes lock beside them;
/// raises the soft limit as far as the hard one goes.
pub(crate) fn allow(guest_bytes: u64) -> Result<(), RdmaError> {
    let needed_bytes = guest_bytes.saturating_add(LOCKED_BESIDE_BYTES);
    // Unknown counts as no limit: registering says so itself.
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else { return Ok(()) };
    if is_enough(soft, needed_bytes) || has_cap_ipc_lock() {
        return Ok(());
    }
    let raised =
        is_enough(hard, needed_bytes) && setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard).is_ok();
    match raised {
        true => Ok(()),
        false => Err(RdmaError::Memlock { needed_bytes, limit_bytes: hard }),
    }
}

fn is_enough(limit: u64, needed_bytes: u64) -> bool {
    limit == RLIM_INFINITY || limit >= needed_bytes
}

fn has_cap_ipc_lock() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits >> CAP_IPC_LOCK & 1 == 1)
}
