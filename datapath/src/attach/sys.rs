//! The kernel's side of attaching: pidfds and ptrace, as thin safe wrappers.
//!
//! Nothing is decided here. The wrappers are safe because none of these calls can touch this
//! process's own memory except through the structures passed in; what they do to the *other*
//! process is for [`super::inject`] to get right. See `ptrace(2)`, `pidfd_open(2)` and
//! `pidfd_getfd(2)`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_int, c_long, c_uint, c_void, pid_t};

/// General registers of a stopped thread.
#[cfg(target_arch = "x86_64")]
pub(super) type Registers = libc::user_regs_struct;

/// What a traced thread did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// Nothing new.
    Running,
    /// Stopped for a signal that is about to be delivered.
    Signal(c_int),
    /// Stopped before or after a system call that it was let run to.
    SystemCall,
    /// Stopped because of `PTRACE_INTERRUPT`.
    Interrupted,
    /// Stopped together with its whole process by a stopping signal.
    GroupStop,
    /// Exited or killed. Not reaped: its parent may want to know.
    Gone,
}

/// How a stop at a system call is told from a trap.
const SYSTEM_CALL_STOP: c_int = libc::SIGTRAP | 0x80;

/// A handle on a process that can't come to mean another one.
pub(super) fn pidfd_open(pid: pid_t) -> io::Result<OwnedFd> {
    // SAFETY: takes a number and flags only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0 as c_uint) })
}

/// A duplicate of descriptor `fd` of the process behind `pidfd`.
pub(super) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers and flags only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0 as c_uint) })
}

/// Begins tracing a thread without stopping it. Its stops at system calls can be told from traps: one
/// that nobody saw before this process was killed is no signal to it. The option that would kill it
/// when this process exits is not set.
pub(super) fn seize(tid: pid_t) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, tid, 0, libc::PTRACE_O_TRACESYSGOOD as usize as *mut c_void)
}

/// Asks a traced thread to stop.
pub(super) fn interrupt(tid: pid_t) -> io::Result<()> {
    ptrace(libc::PTRACE_INTERRUPT, tid, 0, ptr::null_mut())
}

/// Lets a stopped thread run on, delivering `signal` unless it is 0.
pub(super) fn resume(tid: pid_t, signal: c_int) -> io::Result<()> {
    ptrace(libc::PTRACE_CONT, tid, 0, signal as usize as *mut c_void)
}

/// Lets a stopped thread run to the next beginning or end of a system call, delivering no signal.
pub(super) fn run_to_system_call(tid: pid_t) -> io::Result<()> {
    ptrace(libc::PTRACE_SYSCALL, tid, 0, ptr::null_mut())
}

/// Ends tracing of a stopped thread, which runs on.
pub(super) fn detach(tid: pid_t) -> io::Result<()> {
    ptrace(libc::PTRACE_DETACH, tid, 0, ptr::null_mut())
}

/// The registers of a stopped thread.
#[cfg(target_arch = "x86_64")]
pub(super) fn registers(tid: pid_t) -> io::Result<Registers> {
    // SAFETY: all bytes zero is a valid value of this structure of integers.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, tid, 0, (&raw mut registers).cast())?;
    Ok(registers)
}

/// Sets the registers of a stopped thread.
#[cfg(target_arch = "x86_64")]
pub(super) fn set_registers(tid: pid_t, registers: &Registers) -> io::Result<()> {
    ptrace(libc::PTRACE_SETREGS, tid, 0, (&raw const *registers).cast_mut().cast())
}

/// Sends `signal` to one thread.
pub(super) fn send_signal(pid: pid_t, tid: pid_t, signal: c_int) -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Looks, without waiting, for a change of a traced thread's state.
pub(super) fn look(tid: pid_t) -> io::Result<Waited> {
    // An exit is only looked at: reaping it is its parent's right, and that may be this process.
    let peek = libc::WEXITED | libc::WSTOPPED | libc::__WALL | libc::WNOHANG | libc::WNOWAIT;
    let Some((code, _)) = waitid(tid, peek)? else { return Ok(Waited::Running) };
    if code != libc::CLD_TRAPPED {
        return Ok(Waited::Gone);
    }
    let take = libc::WSTOPPED | libc::__WALL | libc::WNOHANG;
    // Only a kill can have come in between.
    let Some((_, status)) = waitid(tid, take)? else { return Ok(Waited::Gone) };
    Ok(match (status >> 8, status & 0xff) {
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => Waited::Interrupted,
        (libc::PTRACE_EVENT_STOP, _) => Waited::GroupStop,
        (_, SYSTEM_CALL_STOP) => Waited::SystemCall,
        (_, signal) => Waited::Signal(signal),
    })
}

/// `si_code` and `si_status` of a change of state, if there was one.
fn waitid(tid: pid_t, flags: c_int) -> io::Result<Option<(c_int, c_int)>> {
    // SAFETY: all bytes zero is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` outlives the call, which writes no more than that.
    if unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, &mut info, flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `waitid` filled in these fields, or left them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((pid != 0).then_some((info.si_code, status)))
}

/// # Safety of the callers
/// `data` points to the structure that `request` reads or writes, or is null or a number for a
/// request that takes none.
fn ptrace(request: c_uint, tid: pid_t, addr: usize, data: *mut c_void) -> io::Result<()> {
    // SAFETY:
    // - none of the requests used in this file (it is private) reads or writes memory of this
    //   process but through `data`, and each caller above passes the structure that belongs to it.
    let result: c_long = unsafe { libc::ptrace(request, tid, addr as *mut c_void, data) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel just returned is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
