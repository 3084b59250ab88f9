//! What the agents may do, and give up as soon as they don't need it any more.
//!
//! | subcommand | needs | for | until |
//! |---|---|---|---|
//! | `migrate` | `CAP_SYS_PTRACE` | one call inside QEMU, its page map, its descriptors | attached |
//! | | `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` | `/proc/PID/map_files` | attached |
//! | | `CAP_DAC_OVERRIDE` | a QEMU of another user: its QMP socket, its memory's files | attached |
//! | | `CAP_NET_ADMIN` | socket buffers past the system's limit; without it smaller ones | attached |
//! | `target` | the same, without the call inside QEMU | | memory mapped |
//! | both | `CAP_IPC_LOCK` (or memlock) | memory that RDMA devices write to | the end |
//! | | `CAP_SYS_NICE` | coming back from giving way to the guest | the end |
//! | `guard` | `CAP_DAC_OVERRIDE` | the QMP socket of another user's QEMU | the end |
//! | | `CAP_SYS_PTRACE` | closing what an agent killed while it attached has left in QEMU | attached |
//! | `drain` | as `migrate` | looking into each QEMU; the agents that it starts | the end |
//! | `demo` | root | network namespaces | the end |
//! | `probe`, `pki` | none | | |
//!
//! None of them is needed where agents and QEMU are one user's, `kernel.yama.ptrace_scope` is 0 and
//! memory has a file with a name. Capabilities are a thread's own: threads that read what a peer
//! sends drop them when they start ([`drop_on_this_thread`]), the agent's own thread when it has
//! attached.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::geteuid;

/// Of what an agent needs, what it needs to the end.
const TO_THE_END: [Capability; 2] = [Capability::CAP_IPC_LOCK, Capability::CAP_SYS_NICE];

/// Whether this process is an agent and nothing else: in others the rights are not ours to drop.
static AGENT: AtomicBool = AtomicBool::new(false);

/// This process is an agent: from here on its rights are dropped when they are not needed any more,
/// and nothing that it starts gets more than it has (no set-user-id bit, no file capabilities).
pub fn this_is_an_agent() {
    AGENT.store(true, Ordering::Relaxed);
    if let Err(error) = nix::sys::prctl::set_no_new_privs() {
        tracing::warn!(%error, "programs started by this one may gain rights");
    }
}

/// Gives up, on this thread and for good, all that only attaching takes; `besides` is kept too.
pub fn drop_on_this_thread(besides: &[Capability]) {
    if !AGENT.load(Ordering::Relaxed) {
        return;
    }
    let kept: CapsHashSet = TO_THE_END.iter().chain(besides).copied().collect();
    if let Err(error) = drop_all_but(&kept) {
        tracing::warn!(%error, "capabilities could not be dropped");
    }
}

/// What writing in a folder to the end takes: nothing where it is our own.
pub fn to_write_in(folder: &Path) -> &'static [Capability] {
    let own = geteuid().as_raw();
    match std::fs::metadata(folder) {
        Ok(metadata) if metadata.uid() == own => &[],
        _ => &[Capability::CAP_DAC_OVERRIDE],
    }
}

fn drop_all_but(kept: &CapsHashSet) -> Result<(), caps::errors::CapsError> {
    // From the outermost inwards: nothing may be in a set that is not in the one it is bounded by.
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        let now = caps::read(None, set)?;
        caps::set(None, set, &now.intersection(kept).copied().collect())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_does_not_come_back_and_other_threads_keep_theirs() {
        AGENT.store(true, Ordering::Relaxed);
        let before = caps::read(None, CapSet::Permitted).expect("readable");
        let before_drop: CapsHashSet =
            before.iter().filter(|it| !TO_THE_END.contains(it)).copied().collect();
        let after = std::thread::spawn(move || {
            drop_on_this_thread(&[]);
            let again = caps::set(None, CapSet::Effective, &before_drop);
            assert!(again.is_err() || before_drop.is_empty(), "it came back");
            caps::read(None, CapSet::Effective).expect("readable")
        });
        let after = after.join().expect("no panic");
        assert!(after.iter().all(|capability| TO_THE_END.contains(capability)), "{after:?}");
        assert_eq!(caps::read(None, CapSet::Permitted).expect("readable"), before);
    }
}
