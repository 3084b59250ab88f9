//! What can go wrong in the laboratory.

use std::path::{Path, PathBuf};

/// Why the laboratory could not do something. Nothing of it concerns a migration.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file or folder.
    #[error("can't {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A system call without a path of its own.
    #[error("{call} failed")]
    Call {
        /// The system call.
        call: &'static str,
        /// The system's answer.
        source: nix::Error,
    },
    /// A program that ended badly.
    #[error("{command} ended with {status}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The end of what it wrote to its standard error.
        stderr: String,
    },
    /// Something this machine does not have.
    #[error("{what} is missing")]
    Missing {
        /// What it is.
        what: String,
        /// The command or setting that helps.
        hint: &'static str,
    },
    /// A file or an answer that does not have the expected form.
    #[error("can't make sense of {what}: {found:?}")]
    Unexpected {
        /// What was read.
        what: &'static str,
        /// The part that was not understood.
        found: String,
    },
    /// Something did not happen in time.
    #[error("waited {waited_ms} ms for {what}; the last that was seen: {last_seen}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long, in milliseconds.
        waited_ms: u64,
        /// The end of the console or log.
        last_seen: String,
    },
    /// Throw-away certificates could not be made.
    #[error(transparent)]
    Certificates(#[from] crate::pki::PkiError),
    /// A guest's QEMU ended by itself.
    #[error("QEMU ended with {status}: {stderr}")]
    QemuEnded {
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The end of what it wrote to its standard error.
        stderr: String,
    },
}

impl LabError {
    /// The command that helps, where there is one.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Missing { hint, .. } => Some(hint),
            _ => None,
        }
    }
}

/// For `map_err`: what was tried on `path`.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LabError {
    let path = path.to_owned();
    move |source| LabError::Io { action, path, source }
}

/// For `map_err`: the system call that failed.
pub(crate) fn call(call: &'static str) -> impl FnOnce(nix::Error) -> LabError {
    move |source| LabError::Call { call, source }
}
