//! One agent per guest: a lock on its memory, held for as long as an agent may write there or reads
//! there to move it.
//!
//! The lock lies on the files of guest memory themselves, so it holds across namespaces, state
//! directories and names; it is advisory (agents ask for it, QEMU does not), and it goes with the
//! process that holds it, however that ends.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use pageferry_datapath::control::AbortReason;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;

use crate::agent::failure;

/// The right to move a guest, or to take one in. Dropped, somebody else may.
#[derive(Debug)]
pub(super) struct Claim {
    _locked: Vec<Flock<File>>,
}

impl Claim {
    /// Claims the guest with this memory; refused while somebody else has.
    pub(super) fn on(memory: &GuestMemory) -> Result<Self, Failure> {
        let mut locked = Vec::new();
        for region in memory.regions() {
            // Opened once more: a lock on a descriptor that QEMU shares would outlive us with it.
            let path = format!("/proc/self/fd/{}", region.file().as_raw_fd());
            let file = File::open(path)
                .map_err(|error| failure::host("claiming guest memory", &error, None))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => locked.push(lock),
                Err((_, Errno::EWOULDBLOCK)) => return Err(taken()),
                Err((_, errno)) => {
                    return Err(failure::host("claiming guest memory", &errno, None));
                }
            }
        }
        Ok(Self { _locked: locked })
    }
}

fn taken() -> Failure {
    Failure {
        reason: AbortReason::Refused,
        by_peer: false,
        text: "another agent has claimed this guest".into(),
        hint: Some(
            "one migration at a time for each guest: wait for it, or end it; on one host, source \
                        and target need memory files of their own"
                .into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use pageferry_datapath::backing::Backing;
    use pageferry_datapath::ids::RegionIndex;
    use pageferry_datapath::region::Region;

    use super::*;

    #[test]
    fn a_guest_is_claimed_once_until_it_is_let_go() {
        let backing = Backing::memfd("claim-test", 8192, None).expect("memory");
        let region = Region::open(RegionIndex(0), backing).expect("mapped");
        let memory = GuestMemory::new(vec![region]);
        let claim = Claim::on(&memory).expect("free");
        let refused = Claim::on(&memory).expect_err("taken");
        assert!(refused.text.contains("another agent"), "{}", refused.text);
        drop(claim);
        Claim::on(&memory).expect("free again");
    }
}
