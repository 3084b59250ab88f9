//! Attaching to a monitor from outside: its mappings, its descriptors, one system call inside it.
//!
//! ```text
//!   agent                                  monitor
//!     Process::open ── pidfd_open ──────▶
//!     tracked_ranges ── /proc/PID/maps ─▶
//!     take_userfaultfd ── ptrace ───────▶ userfaultfd()      (one thread stops for some 30 µs)
//!                 ◀── pidfd_getfd ───────  fd
//!                      ptrace ──────────▶ close(fd)
//! ```
//!
//! Afterwards nothing of it is left in the monitor: no descriptor, no mapping, no tracer. What is
//! registered through the descriptor ends with it. Only an agent that is killed between the two calls
//! leaves the descriptor there, for [`close_leftovers`] to find.

#[cfg(target_arch = "x86_64")]
mod inject;
mod leftover;
mod maps;
mod process;
mod sys;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use crate::ids::RegionIndex;
use crate::limits;
use crate::region::{GuestMemory, Region};
use crate::thp;
use crate::tracker::TrackedRange;

pub use leftover::close_leftovers;
pub use maps::{Access, Mapping};
pub use process::Process;

/// Why attaching did not work. Unless it says otherwise the monitor is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such process.
    #[error("there is no process {pid}")]
    NoSuchProcess {
        /// The process id asked for.
        pid: libc::pid_t,
    },
    /// The process exited.
    #[error("process {pid} is gone")]
    Gone {
        /// Its id.
        pid: libc::pid_t,
    },
    /// This process may not do that to the other one.
    #[error("{call} on process {pid} is not permitted")]
    Denied {
        /// Its id.
        pid: libc::pid_t,
        /// The call.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A debugger, or another agent, traces the process.
    #[error("process {pid} is traced by process {tracer} already")]
    Traced {
        /// Its id.
        pid: libc::pid_t,
        /// The id of its tracer.
        tracer: libc::pid_t,
    },
    /// The process was stopped by a signal (`SIGSTOP`, or a terminal's).
    #[error("process {pid} is stopped by a signal")]
    Stopped {
        /// Its id.
        pid: libc::pid_t,
    },
    /// Its thread sits in the kernel and does not come to a stop. It was let go.
    #[error("process {pid} did not stop within {waited_ms} ms")]
    NoStop {
        /// Its id.
        pid: libc::pid_t,
        /// How long was waited.
        waited_ms: u64,
    },
    /// Calls can be injected into x86-64 processes only, by an agent that is one.
    #[error("process {pid} does not run 64-bit x86 code")]
    Architecture {
        /// Its id.
        pid: libc::pid_t,
    },
    /// Nowhere in the process is there an instruction to make a call with.
    #[error("process {pid} has no system call instruction mapped")]
    NoSyscallInstruction {
        /// Its id.
        pid: libc::pid_t,
    },
    /// The call was made in the process, and failed there.
    #[error("{call} inside process {pid} failed")]
    Injected {
        /// Its id.
        pid: libc::pid_t,
        /// The call.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A call injected did not come back as it should; the registers were restored.
    #[error("a call inside process {pid} did not come back")]
    NoReturn {
        /// Its id.
        pid: libc::pid_t,
    },
    /// The process did not get its registers and signals back and is likely to crash.
    #[error("process {pid} could not be restored, {call} failed")]
    NotRestored {
        /// Its id.
        pid: libc::pid_t,
        /// The call.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A userfaultfd was created inside and could not be closed there. It does nothing.
    #[error("descriptor {fd} stayed open inside process {pid}")]
    LeftOpen {
        /// Its id.
        pid: libc::pid_t,
        /// Number of the descriptor in that process.
        fd: i32,
        /// Why it could not be closed.
        #[source]
        source: Box<AttachError>,
    },
    /// A part of a region is not mapped shared in the process.
    #[error("process {pid} does not map region {region} shared at offset {offset:#x}")]
    NotMapped {
        /// Its id.
        pid: libc::pid_t,
        /// The region.
        region: RegionIndex,
        /// The first byte that is not.
        offset: u64,
    },
    /// A line of `/proc/PID/maps` that is none.
    #[error("/proc/{pid}/maps holds a line of unknown form: {line:?}")]
    MalformedMaps {
        /// Its id.
        pid: libc::pid_t,
        /// The line.
        line: Box<str>,
    },
    /// A system call failed.
    #[error("{call} on process {pid} failed")]
    Host {
        /// Its id.
        pid: libc::pid_t,
        /// The call.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// How much a userfaultfd may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UffdPrivilege {
    /// Everything.
    Full,
    /// Faults that the kernel takes on the process's behalf are not handed out: enough to track
    /// writes (also the kernel's), too little to fill in missing pages.
    UserModeOnly,
}

/// A userfaultfd that acts on another process's memory.
#[derive(Debug)]
pub struct TakenUffd {
    /// The descriptor, open here and nowhere else.
    pub fd: OwnedFd,
    /// What it may do.
    pub privilege: UffdPrivilege,
    /// How long one thread of the process was stopped, at most.
    pub stopped: Duration,
}

/// Creates a userfaultfd inside `process` and takes it out: afterwards it is open here only. One
/// thread of the process is stopped meanwhile; the result says for how long. What an earlier attempt
/// has left there is closed first.
pub fn take_userfaultfd(process: &Process) -> Result<TakenUffd, AttachError> {
    let closed = close_leftovers(process)?;
    if closed > 0 {
        tracing::info!(pid = process.pid(), closed, "an attach was cut short here before");
    }
    #[cfg(target_arch = "x86_64")]
    return inject::take_userfaultfd(process);
    #[cfg(not(target_arch = "x86_64"))]
    return Err(AttachError::Architecture { pid: process.pid() });
}

/// Where `process` has the regions of `memory` mapped, found by their files: what a tracker has to
/// watch. Each byte of each region is mapped shared at least once, or this fails; where it is
/// mapped more often, all places are watched.
pub fn tracked_ranges(
    process: &Process,
    memory: &GuestMemory,
) -> Result<Vec<TrackedRange>, AttachError> {
    let maps = process.maps()?;
    let mut ranges = Vec::new();
    for region in memory.regions() {
        let stat = fstat(region.file()).map_err(|errno| process.host("fstat", errno.into()))?;
        let of_region = ranges_of(&maps, (stat.st_dev, stat.st_ino), region);
        if let Some(offset) = first_gap(&of_region, region.len()) {
            let (pid, region) = (process.pid(), region.index());
            return Err(AttachError::NotMapped { pid, region, offset });
        }
        ranges.extend(of_region);
    }
    Ok(ranges)
}

/// The shared mappings of one file, neighbours that continue each other joined.
fn ranges_of(maps: &[Mapping], identity: (u64, u64), region: &Region) -> Vec<TrackedRange> {
    let mut ranges: Vec<TrackedRange> = Vec::new();
    let may_be_huge = region.page_bytes() == limits::PAGE_BYTES && thp::may_be_huge(region.file());
    let shared =
        |mapping: &&Mapping| mapping.is_of(identity) && mapping.access.contains(Access::SHARED);
    for mapping in maps.iter().filter(shared) {
        let (host, offset) = (mapping.range.start, mapping.offset);
        let len = mapping.len().min(region.len().saturating_sub(offset));
        match ranges.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.host + last.len == host && last.offset + last.len == offset => {
                last.len += len;
            }
            _ => {
                let (region, page_bytes) = (region.index(), region.page_bytes());
                ranges.push(TrackedRange { region, offset, host, len, page_bytes, may_be_huge });
            }
        }
    }
    ranges
}

/// The first byte below `len` that none of `ranges` covers.
fn first_gap(ranges: &[TrackedRange], len: u64) -> Option<u64> {
    let mut ranges: Vec<_> = ranges.iter().map(|range| (range.offset, range.len)).collect();
    ranges.sort_unstable();
    let mut covered = 0;
    for (offset, len) in ranges {
        if offset > covered {
            break;
        }
        covered = covered.max(offset + len);
    }
    (covered < len).then_some(covered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;

    fn mapping(start: u64, end: u64, access: &str, offset: u64) -> Mapping {
        Mapping::parse(&format!("{start:x}-{end:x} {access} {offset:x} 00:01 77 /x")).unwrap()
    }

    #[test]
    fn mappings_of_a_region_are_joined_and_gaps_found() {
        let backing = Backing::memfd("attach-test", 0x8000, None).unwrap();
        let region = Region::open(RegionIndex(4), backing).unwrap();
        let range = |offset, host, len| TrackedRange {
            region: RegionIndex(4),
            offset,
            host,
            len,
            page_bytes: 4096,
            may_be_huge: thp::may_be_huge(region.file()),
        };
        let maps = [
            mapping(0x10000, 0x12000, "rw-s", 0),
            mapping(0x12000, 0x13000, "r--s", 0x2000),
            mapping(0x13000, 0x14000, "rw-p", 0x3000),
            mapping(0x20000, 0x25000, "rw-s", 0x3000),
            mapping(0x30000, 0x31000, "rw-s", 0),
        ];
        let ranges = ranges_of(&maps, (1, 77), &region);
        let expected = [range(0, 0x10000, 0x3000), range(0x3000, 0x20000, 0x5000)];
        assert_eq!(ranges, [&expected[..], &[range(0, 0x30000, 0x1000)]].concat());
        assert_eq!(first_gap(&ranges, 0x8000), None);
        assert_eq!(first_gap(&ranges[..1], 0x8000), Some(0x3000));
        assert_eq!(first_gap(&ranges[1..], 0x8000), Some(0x1000));
        assert_eq!(first_gap(&[], 1), Some(0));
        assert!(ranges_of(&maps, (2, 77), &region).is_empty());
    }

    #[test]
    fn own_memory_is_found() {
        let backing = Backing::memfd("attach-test", 0x8000, None).unwrap();
        let region = Region::open(RegionIndex(0), backing).unwrap();
        let process = Process::open(std::process::id() as libc::pid_t).unwrap();
        let memory = GuestMemory::new(vec![region]);
        let ranges = tracked_ranges(&process, &memory).unwrap();
        assert_eq!(ranges.len(), 1);
        assert_eq!(ranges[0].host, memory.regions()[0].base().addr() as u64);
    }
}
