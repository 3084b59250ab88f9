//! A running process, held so that its number can't come to mean another one.
//!
//! Everything under `/proc/PID` is opened by number, so each opening is followed by a look at the
//! pidfd: if the process is still there, the number meant it all the time. Owned by whoever
//! migrates the guest; nothing here changes the process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{AttachError, Mapping, sys};

/// A process that can be attached to.
#[derive(Debug)]
pub struct Process {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

impl Process {
    /// Takes hold of the process with this id.
    pub fn open(pid: libc::pid_t) -> Result<Self, AttachError> {
        match sys::pidfd_open(pid) {
            Ok(pidfd) => Ok(Self { pid, pidfd }),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {
                Err(AttachError::NoSuchProcess { pid })
            }
            Err(source) => Err(AttachError::Host { pid, call: "pidfd_open", source }),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Its pidfd, which polls readable when the process has exited.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether it has not exited yet.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// A duplicate of its descriptor `fd`, sharing the open file.
    pub fn take_fd(&self, fd: RawFd) -> Result<OwnedFd, AttachError> {
        sys::pidfd_getfd(self.pidfd.as_fd(), fd).map_err(|error| self.host("pidfd_getfd", error))
    }

    /// Its open descriptors, each with what the kernel calls the file.
    pub fn fds(&self) -> Result<Vec<(RawFd, PathBuf)>, AttachError> {
        let read = || -> io::Result<Vec<(RawFd, PathBuf)>> {
            let mut fds = Vec::new();
            for entry in std::fs::read_dir(self.proc("fd"))? {
                let entry = entry?;
                let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
                // One that was closed since the directory was read is none.
                if let (Some(fd), Ok(name)) = (fd, std::fs::read_link(entry.path())) {
                    fds.push((fd, name));
                }
            }
            Ok(fds)
        };
        self.checked("reading /proc/PID/fd", read())
    }

    /// What it has mapped, in order of address.
    pub fn maps(&self) -> Result<Vec<Mapping>, AttachError> {
        let text = self.checked("reading /proc/PID/maps", std::fs::read(self.proc("maps")))?;
        let malformed =
            |line: &str| AttachError::MalformedMaps { pid: self.pid, line: line.into() };
        String::from_utf8_lossy(&text)
            .lines()
            .map(|line| Mapping::parse(line).ok_or_else(|| malformed(line)))
            .collect()
    }

    /// Opens the file behind a mapping, also if it has no name any more. Needs `CAP_SYS_ADMIN` or
    /// `CAP_CHECKPOINT_RESTORE`.
    pub fn open_mapping(&self, mapping: &Mapping) -> Result<File, AttachError> {
        let std::ops::Range { start, end } = mapping.range;
        let path = self.proc(&format!("map_files/{start:x}-{end:x}"));
        let file = OpenOptions::new().read(true).write(true).open(path);
        self.checked("opening /proc/PID/map_files", file)
    }

    /// Opens its page map, for scans.
    pub fn pagemap(&self) -> Result<File, AttachError> {
        self.checked("opening /proc/PID/pagemap", File::open(self.proc("pagemap")))
    }

    /// Opens its memory for reading.
    pub(super) fn memory(&self) -> Result<File, AttachError> {
        self.checked("opening /proc/PID/mem", File::open(self.proc("mem")))
    }

    /// Which process traces it; 0 for none.
    pub fn tracer(&self) -> Result<libc::pid_t, AttachError> {
        let status = std::fs::read_to_string(self.proc("status"));
        let status = self.checked("reading /proc/PID/status", status)?;
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        Ok(tracer.and_then(|pid| pid.trim().parse().ok()).unwrap_or(0))
    }

    /// `error` of `call`, told apart by what it means for this process.
    pub(super) fn host(&self, call: &'static str, source: io::Error) -> AttachError {
        let pid = self.pid;
        match source.raw_os_error() {
            Some(libc::ESRCH) => AttachError::Gone { pid },
            Some(libc::EPERM | libc::EACCES) => AttachError::Denied { pid, call, source },
            _ => AttachError::Host { pid, call, source },
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    /// Lets a result through only if the process is still the one that was opened.
    fn checked<T>(&self, call: &'static str, result: io::Result<T>) -> Result<T, AttachError> {
        if !self.is_alive() {
            return Err(AttachError::Gone { pid: self.pid });
        }
        result.map_err(|error| self.host(call, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::ids::RegionIndex;
    use crate::region::Region;

    #[test]
    fn memory_is_found_and_opened_three_ways() {
        let process = Process::open(std::process::id() as libc::pid_t).unwrap();
        assert!(process.is_alive());
        let backing = Backing::memfd("process-test", 1 << 20, None).unwrap();
        let identity = backing.identity().unwrap();
        let region = Region::open(RegionIndex(0), backing).unwrap();

        let maps = process.maps().unwrap();
        let mapping = maps.iter().find(|mapping| mapping.is_of(identity)).unwrap();
        assert_eq!(mapping.range.start, region.base().addr() as u64);
        assert!(mapping.name.starts_with("/memfd:process-test"));
        let by_mapping = Backing::from_file(process.open_mapping(mapping).unwrap()).unwrap();
        assert_eq!(by_mapping.identity().unwrap(), identity);

        let fds = process.fds().unwrap();
        let (fd, _) =
            fds.iter().find(|(_, name)| name.starts_with("/memfd:process-test (deleted)")).unwrap();
        let by_fd = Backing::from_fd(process.take_fd(*fd).unwrap()).unwrap();
        assert_eq!(by_fd.identity().unwrap(), identity);
    }

    #[test]
    fn a_process_that_is_gone_is_said_to_be() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id() as libc::pid_t).unwrap();
        assert_eq!(process.tracer().unwrap(), 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        assert!(matches!(process.maps(), Err(AttachError::Gone { .. })));
        assert!(matches!(
            Process::open(child.id() as libc::pid_t),
            Err(AttachError::NoSuchProcess { .. })
        ));
    }
}
