//! One thing looked at: what it is, whether it will do, and if not why that matters and what to do.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Whether it will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Works, but slower or less than it could.
    Warn,
    /// Not there.
    Missing,
}

/// What a finding is about; shown together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// The kernel.
    Kernel,
    /// What this process may do.
    Privileges,
    /// Dirty tracking.
    Tracking,
    /// io_uring.
    IoUring,
    /// Huge pages and limits.
    Memory,
    /// Cores.
    Cpu,
    /// NICs and sockets.
    Network,
    /// RDMA.
    Rdma,
    /// Virtual machine monitors.
    Qemu,
}

impl Group {
    /// Its heading.
    pub fn title(self) -> &'static str {
        match self {
            Self::Kernel => "Kernel",
            Self::Privileges => "Privileges",
            Self::Tracking => "Dirty tracking",
            Self::IoUring => "io_uring",
            Self::Memory => "Memory",
            Self::Cpu => "CPU",
            Self::Network => "Network",
            Self::Rdma => "RDMA",
            Self::Qemu => "QEMU",
        }
    }
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is about.
    pub group: Group,
    /// Its name: unique and stable, `memory.huge_2m`.
    pub name: String,
    /// Whether it will do.
    pub state: State,
    /// A migration can't work while it is missing.
    pub required: bool,
    /// What was found.
    pub value: String,
    /// Why it matters; null when all is well.
    pub why: Option<String>,
    /// The exact command that mends it; null when all is well or no command can.
    pub fix: Option<String>,
}

impl Finding {
    /// All is well.
    pub(super) fn ok(group: Group, name: &str, value: impl Into<String>) -> Self {
        let (name, value) = (name.to_owned(), value.into());
        Self { group, name, state: State::Ok, required: false, value, why: None, fix: None }
    }

    /// Works, but.
    pub(super) fn warn(
        group: Group,
        name: &str,
        value: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self { state: State::Warn, why: Some(why.into()), ..Self::ok(group, name, value) }
    }

    /// Not there.
    pub(super) fn missing(
        group: Group,
        name: &str,
        value: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self { state: State::Missing, ..Self::warn(group, name, value, why) }
    }

    /// With the command that mends it.
    pub(super) fn fix(self, command: impl Into<String>) -> Self {
        Self { fix: Some(command.into()), ..self }
    }

    /// Without it no migration can work.
    pub(super) fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// It is why a migration can't work.
    pub fn blocks(&self) -> bool {
        self.required && self.state == State::Missing
    }
}

/// A small file's text without the white space at its ends; `None` when it can't be read.
pub(super) fn text(root: &Path, path: &str) -> Option<String> {
    Some(fs::read_to_string(root.join(path)).ok()?.trim().to_owned())
}

/// A small file that holds a number.
pub(super) fn number(root: &Path, path: &str) -> Option<u64> {
    text(root, path)?.parse().ok()
}
