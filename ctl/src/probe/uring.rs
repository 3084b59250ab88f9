//! io_uring: whether a ring can be had, and with what.

use std::io;
use std::path::Path;

use io_uring::{IoUring, Probe, opcode};

use super::finding::{Finding, Group, number};
use super::kernel::{Kernel, NEWER_KERNEL};

/// Entries of the ring that is tried; a lane's are larger, but of the same kind.
const TRIED_ENTRIES: u32 = 8;

/// What came of trying.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uring {
    /// `kernel.io_uring_disabled`: 0 nobody, 1 the unprivileged, 2 everybody. None before 6.6.
    pub disabled: Option<u64>,
    /// Why no ring could be had.
    pub error: Option<io::ErrorKind>,
    /// `SINGLE_ISSUER` and `DEFER_TASKRUN` (6.1): completions come when the worker asks.
    pub has_deferred_taskrun: bool,
    /// `SENDMSG_ZC` (6.1): sent from guest memory without a copy.
    pub has_send_zero_copy: bool,
}

impl Uring {
    /// Tries it in this process.
    pub fn try_here(root: &Path) -> Self {
        let disabled = number(root, "proc/sys/kernel/io_uring_disabled");
        let deferred =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(TRIED_ENTRIES);
        let has_deferred_taskrun = deferred.is_ok();
        let ring = match deferred.or_else(|_| IoUring::new(TRIED_ENTRIES)) {
            Ok(ring) => ring,
            Err(error) => {
                return Self { disabled, error: Some(error.kind()), ..Self::default() };
            }
        };
        let mut probe = Probe::new();
        let has_send_zero_copy = ring.submitter().register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::SendMsgZc::CODE);
        Self { disabled, error: None, has_deferred_taskrun, has_send_zero_copy }
    }

    /// A lane can use it.
    pub fn works(&self) -> bool {
        self.error.is_none()
    }

    /// Judges it; nothing here is required, plain sockets always are there.
    pub(super) fn findings(&self, kernel: &Kernel) -> Vec<Finding> {
        let group = Group::IoUring;
        if let Some(error) = self.error {
            return vec![self.no_ring(error)];
        }
        let mut findings = vec![match self.has_deferred_taskrun {
            true => Finding::ok(group, "io_uring.ring", "works, with deferred task work"),
            false => Finding::warn(
                group,
                "io_uring.ring",
                "works, without deferred task work",
                "completions interrupt the workers; Linux 6.1 has it",
            )
            .fix(NEWER_KERNEL),
        }];
        findings.push(match self.has_send_zero_copy {
            true => Finding::ok(group, "io_uring.send_zc", "supported"),
            false => Finding::warn(
                group,
                "io_uring.send_zc",
                format!("not in {}", kernel.release),
                "each page is copied once more on its way out; Linux 6.1 has it",
            )
            .fix(NEWER_KERNEL),
        });
        findings
    }

    fn no_ring(&self, error: io::ErrorKind) -> Finding {
        let (name, group) = ("io_uring.ring", Group::IoUring);
        let why = "lanes use plain sockets: more system calls and a copy for each page sent";
        match self.disabled {
            Some(disabled @ 1..) => {
                let whom = if disabled == 1 { "for the unprivileged" } else { "for everybody" };
                let value = format!("disabled {whom} (kernel.io_uring_disabled={disabled})");
                Finding::missing(group, name, value, why)
                    .fix("sysctl -w kernel.io_uring_disabled=0")
            }
            // Not the sysctl: no kernel support, a seccomp filter, or no memory to lock.
            _ => Finding::missing(group, name, format!("can't be set up: {error}"), why),
        }
    }
}
