//! Dirty tracking: which pages did the guest write since they were last looked at?
//!
//! One trait, several sources of truth. A tracker belongs to the migration's driver and is called
//! from one thread, once a round and once more after the pause. It never reads guest memory.
//!
//! **Invariant:** protect before read. When [`DirtyTracker::scan`] returns, every page it reported
//! is tracked again, so a write that comes while its bytes are being read is reported next time.

pub mod fed;
mod own;
pub mod probe;
pub(crate) mod sys;
pub mod uffd;

use std::fmt;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bitmap::DirtySet;
use crate::holes::HolesError;
use crate::ids::RegionIndex;

pub use fed::{FedHandle, FedTracker};
pub use probe::{ProbeError, ProbeReport, ProbedMemory};
pub use uffd::{ScanPhases, TrackedRange, UffdTracker};

/// Which tracker, as named in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// Asynchronous userfaultfd write protection; one call reports and protects.
    UffdOnePhase,
    /// The same; one call reports, then only the reported runs are protected.
    UffdTwoPhase,
    /// Bitmaps that the monitor hands in.
    Fed,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UffdOnePhase => "uffd-one-phase",
            Self::UffdTwoPhase => "uffd-two-phase",
            Self::Fed => "fed",
        })
    }
}

/// What one scan did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanStats {
    /// Bytes of guest memory reported as written since the last scan.
    pub reported_bytes: u64,
    /// Runs they came in.
    pub runs: u64,
    /// System calls made.
    pub calls: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Why tracking can't start, or can't be trusted any longer. After an error of a scan nothing is
/// known about what was written: the migration has to fail with the guest at the source.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The kernel lacks userfaultfd features that tracking needs.
    #[error("userfaultfd offers features {offered:#x}, tracking needs {wanted:#x}")]
    Features {
        /// The feature bits needed.
        wanted: u64,
        /// The feature bits there are.
        offered: u64,
    },
    /// The kernel registers the range, but can't write-protect it.
    #[error("userfaultfd can't write-protect the memory at {host:#x}")]
    NotProtectable {
        /// Host virtual address of the range in the monitor.
        host: u64,
    },
    /// A range that does not fit its page size. A scan of an unaligned hugetlb range would silently
    /// report nothing.
    #[error("range at {host:#x}+{len:#x} is not made of whole {page_bytes}-byte pages")]
    Unaligned {
        /// Host virtual address of the range in the monitor.
        host: u64,
        /// Length in bytes.
        len: u64,
        /// The page size it must be a multiple of.
        page_bytes: u64,
    },
    /// A region that the set to scan into, or the tracker, does not know.
    #[error("region {region} is not among those tracked")]
    UnknownRegion {
        /// The region asked for.
        region: RegionIndex,
    },
    /// The monitor exited, or replaced its address space.
    #[error("the monitor's memory is gone")]
    MonitorGone,
    /// A range of the monitor's memory is no longer what was registered: unmapped, or mapped anew.
    #[error("the monitor changed the mapping at {host:#x}")]
    MappingChanged {
        /// Host virtual address of the range in the monitor.
        host: u64,
    },
    /// A scan came back without having moved.
    #[error("a scan made no progress at {host:#x}")]
    NoProgress {
        /// Host virtual address where it stands.
        host: u64,
    },
    /// Whoever feeds bitmaps in failed to.
    #[error("fetching the dirty log failed")]
    Feed {
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Where data is could not be looked up.
    #[error("looking for new data failed")]
    Holes {
        /// Why.
        #[source]
        source: HolesError,
    },
    /// A system call failed.
    #[error("{call} for dirty tracking failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// A source of dirty bitmaps that is already tracking.
pub trait DirtyTracker: Send {
    /// Which one, for reports.
    fn kind(&self) -> TrackerKind;

    /// The granule in which writes to `region` are reported, in bytes; `None` if it is not tracked.
    fn page_bytes(&self, region: RegionIndex) -> Option<u64>;

    /// Adds to `into` what was written since the last scan (or since tracking started), and goes
    /// on tracking. What is in `into` already stays, also after an error.
    fn scan(&mut self, into: &mut DirtySet) -> Result<ScanStats, TrackerError>;

    /// Ends tracking and takes its protection off the guest's memory. Dropping a tracker does the
    /// same, but can't say whether it worked.
    fn stop(self: Box<Self>) -> Result<(), TrackerError>;
}
