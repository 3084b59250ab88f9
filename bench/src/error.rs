//! What can go wrong in a benchmark.

use std::path::PathBuf;
use std::process::ExitStatus;

use pageferry_ctl::lab::LabError;
use pageferry_ctl::qmp::QmpError;
use pageferry_datapath::backing::BackingError;
use pageferry_datapath::region::RegionError;
use pageferry_uring::ceiling::CeilingError;

/// Why a benchmark could not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// A guest, a namespace, huge pages.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The plain-socket ceiling.
    #[error("the plain-socket ceiling")]
    Ceiling(#[from] CeilingError),
    /// The memory that is moved.
    #[error("memory to move")]
    Backing(#[from] BackingError),
    /// The memory that is moved.
    #[error("memory to move")]
    Region(#[from] RegionError),
    /// Dirty tracking.
    #[error("dirty tracking")]
    Tracker(#[from] pageferry_datapath::tracker::TrackerError),
    /// RDMA.
    #[error("RDMA")]
    Rdma(#[from] pageferry_rdma::error::RdmaError),
    /// A lane.
    #[error("a lane")]
    Lane(#[from] pageferry_datapath::lane::LaneError),
    /// A file or socket.
    #[error("can't {action} {what}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A system call.
    #[error("{call} failed")]
    Call {
        /// Its name.
        call: &'static str,
        /// The system's answer.
        source: nix::Error,
    },
    /// A program that ended badly.
    #[error("{program} ended with {status}: {said}")]
    Program {
        /// Which one.
        program: String,
        /// How.
        status: ExitStatus,
        /// The end of what it said.
        said: String,
    },
    /// Something that took too long.
    #[error("waited {waited_s} s for {what}")]
    Timeout {
        /// For what.
        what: String,
        /// How long.
        waited_s: u64,
    },
    /// A program's output that is not what was agreed on.
    #[error("can't make sense of what {program} said: {said}")]
    Unexpected {
        /// Which one.
        program: String,
        /// The part that was not understood.
        said: String,
    },
    /// A migration that did not happen.
    #[error("{by} did not move the guest: {reason}")]
    NotMoved {
        /// Whose.
        by: String,
        /// As it was told.
        reason: String,
    },
    /// The guest's own check failed after a move.
    #[error("the guest found {bad} bad pages of {pages} after it was moved by {by}")]
    MemoryLost {
        /// Who moved it last.
        by: String,
        /// Bad pages.
        bad: u64,
        /// All pages.
        pages: u64,
    },
    /// Signals can't be caught.
    #[error("signal handler")]
    Signals {
        /// Why not.
        source: ctrlc::Error,
    },
    /// Someone pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Two options that do not go together.
    #[error("{what}")]
    Usage {
        /// Why not.
        what: &'static str,
    },
    /// A comparison that shows a step back.
    #[error("{count} readings are worse by more than {allowed_percent} %, {gone} series are gone")]
    Worse {
        /// How many.
        count: u32,
        /// Series without a run now.
        gone: u32,
        /// What is allowed.
        allowed_percent: f64,
    },
    /// The report could not be written.
    #[error("can't write {}", path.display())]
    Report {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl BenchError {
    /// The error and everything under it: `a: b: c`.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut under = std::error::Error::source(self);
        while let Some(error) = under {
            text.push_str(&format!(": {error}"));
            under = error.source();
        }
        text
    }

    /// As of other tools that compare: 1 is a difference, 2 is that nothing could be told.
    pub(crate) fn exit_code(&self) -> u8 {
        if matches!(self, Self::Worse { .. }) { 1 } else { 2 }
    }

    /// The command or setting that helps.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Lab(error) => error.hint().map(Into::into),
            Self::Qmp(error) => error.hint().map(Into::into),
            Self::Rdma(error) => error.hint(),
            _ => None,
        }
    }

    /// For `map_err`: what was tried on what.
    pub(crate) fn io(
        action: &'static str,
        what: impl ToString,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.to_string();
        move |source| Self::Io { action, what, source }
    }

    /// For `map_err`: the system call that failed.
    pub(crate) fn call(call: &'static str) -> impl FnOnce(nix::Error) -> Self {
        move |source| Self::Call { call, source }
    }
}
