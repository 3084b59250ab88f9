//! The kernel's version, and what comes with it.

use std::path::Path;

use super::finding::{Finding, Group, text};

/// Asynchronous write protection and `PAGEMAP_SCAN` came with 6.7.
const TRACKING_SINCE: (u32, u32) = (6, 7);

/// The running kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// As `uname -r` has it.
    pub release: String,
    /// Its first two numbers; `None` when they can't be read.
    pub version: Option<(u32, u32)>,
}

impl Kernel {
    /// Reads it below `root`.
    pub fn read(root: &Path) -> Self {
        let release = text(root, "proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into());
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        let version = match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
            _ => None,
        };
        Self { release, version }
    }

    /// Known to be older than `version`.
    pub fn is_before(&self, version: (u32, u32)) -> bool {
        self.version.is_some_and(|ours| ours < version)
    }

    /// Known to be too old to track writes.
    pub fn is_too_old(&self) -> bool {
        self.is_before(TRACKING_SINCE)
    }

    /// Judges it. The tracking findings prove what the version promises.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let name = "kernel.version";
        vec![match self.is_too_old() {
            false => Finding::ok(Group::Kernel, name, &self.release),
            true => Finding::missing(
                Group::Kernel,
                name,
                &self.release,
                "tracking writes from outside the monitor needs Linux 6.7",
            )
            .fix(NEWER_KERNEL)
            .required(),
        }]
    }
}

/// Debian stable before 13 has it in backports only.
pub(super) const NEWER_KERNEL: &str = "apt-get install -y linux-image-amd64/$(. /etc/os-release; \
     echo $VERSION_CODENAME)-backports && reboot";
