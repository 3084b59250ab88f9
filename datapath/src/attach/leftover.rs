//! What an agent that was killed while it attached has left in the monitor, and its removal.
//!
//! Killed between the two calls that [`super::take_userfaultfd`] makes there, it leaves the
//! userfaultfd open that the first one created. That descriptor does nothing, but it is the
//! monitor's no more than it is anybody's. It can be told from one of the monitor's own: nobody has
//! agreed on its features, which its owner does in the next call after creating it. The kernel
//! answers any other operation on such a one with `EINVAL`, and once they are agreed on with
//! `EFAULT` where there is no argument (`fs/userfaultfd.c`), so that asking changes nothing.

use std::os::fd::RawFd;
use std::path::Path;

use super::{AttachError, Process};
use crate::tracker::sys::Uffd;

/// What the kernel calls a userfaultfd in `/proc/PID/fd`.
const NAME: &str = "anon_inode:[userfaultfd]";

/// Descriptors in `process` that are userfaultfds without an owner.
fn find(process: &Process) -> Result<Vec<RawFd>, AttachError> {
    let fds = process.fds()?.into_iter();
    let named = fds.filter(|(_, name)| name == Path::new(NAME)).map(|(fd, _)| fd);
    Ok(named.filter(|&fd| is_leftover(process, fd)).collect())
}

/// Whether `fd` is a userfaultfd that was never put to use.
fn is_leftover(process: &Process, fd: RawFd) -> bool {
    process.take_fd(fd).is_ok_and(|fd| Uffd::new(fd).is_unused())
}

/// Closes in `process` what attaches that were cut short have left open: how many there were. A
/// process where nothing was left is not touched.
pub fn close_leftovers(process: &Process) -> Result<usize, AttachError> {
    let fds = find(process)?;
    if fds.is_empty() {
        return Ok(0);
    }
    #[cfg(target_arch = "x86_64")]
    return super::inject::close(process, &fds, |fd| is_leftover(process, fd));
    #[cfg(not(target_arch = "x86_64"))]
    return Err(AttachError::Architecture { pid: process.pid() });
}
