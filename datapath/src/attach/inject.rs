//! System calls made by another process's own thread, from outside.
//!
//! ```text
//!   SEIZE ▶ INTERRUPT ▶ stopped in ppoll ▶ save registers
//!             for each call: rip = ppoll's own `syscall` instruction, orig_rax = -1 ▶ SYSCALL, twice ▶ rax
//!           ◀ DETACH ◀ restore registers, orig_rax with them ▶ send again what signals came
//! ```
//!
//! * `orig_rax = -1` keeps the kernel from restarting the interrupted call when it runs ours;
//!   putting the old one back makes it restart that call when it resumes. (`epoll_wait` and
//!   `sigtimedwait` are not restartable: they return `EINTR`, as after any handled signal.)
//! * Signals that come meanwhile are kept from it, so that no handler runs on our registers, and sent
//!   again afterwards. They are not blocked: a mask would stay if this process were killed.
//! * The whole session runs on a thread of its own that then ends: whatever goes wrong, the kernel
//!   detaches what an exiting tracer leaves behind.
//!
//! This process may be killed between the first and the last change of registers; on a busy machine
//! that is a window of milliseconds. The thread then goes on with ours. So they are changed where that
//! does no harm: in `ppoll` or `poll`, whose place our call takes, as if it had returned what ours
//! does: some descriptors are said to be ready that are not, as they may be after any `poll`. A thread that is elsewhere is let go on
//! and tried again. Only one that never polls is used where it is, with any `syscall` instruction:
//! it would crash. A monitor's main thread polls.

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::sys::{self, Registers, Waited};
use super::{Access, AttachError, Process, TakenUffd, UffdPrivilege};
use crate::limits;

const UFFD_USER_MODE_ONLY: u64 = 1;

/// The selector of 64-bit user code.
const USER_CS: u64 = 0x33;

/// The `syscall` instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

pub(super) fn take_userfaultfd(process: &Process) -> Result<TakenUffd, AttachError> {
    let ((fd, privilege), stopped) = on_own_thread(process, create_and_take)?;
    Ok(TakenUffd { fd, privilege, stopped })
}

/// Closes those of `fds` in `process` that still are what `of` says: how many it closed.
pub(super) fn close(
    process: &Process,
    fds: &[RawFd],
    of: impl Fn(RawFd) -> bool + Sync,
) -> Result<usize, AttachError> {
    let close_all = |thread: &mut StoppedThread<'_>| {
        let mut closed = 0;
        // The process may have closed one and opened another in its place before it was stopped.
        for &fd in fds.iter().filter(|&&fd| of(fd)) {
            thread.call("close", libc::SYS_close, [fd as u64, 0, 0])?;
            closed += 1;
        }
        Ok(closed)
    };
    on_own_thread(process, close_all).map(|(closed, _)| closed)
}

/// Has `body` make its calls in `process`, from a thread that ends with it.
fn on_own_thread<T: Send>(
    process: &Process,
    body: impl FnOnce(&mut StoppedThread<'_>) -> Result<T, AttachError> + Send,
) -> Result<(T, Duration), AttachError> {
    std::thread::scope(|scope| {
        let session = || with_stopped(process, body);
        let thread = std::thread::Builder::new().name("inject".into()).spawn_scoped(scope, session);
        let thread = thread.map_err(|error| process.host("starting a thread", error))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn create_and_take(
    thread: &mut StoppedThread<'_>,
) -> Result<(OwnedFd, UffdPrivilege), AttachError> {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let created = match thread.call("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0]) {
        Err(AttachError::Injected { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
            let flags = flags | UFFD_USER_MODE_ONLY;
            let fd = thread.call("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0])?;
            (fd, UffdPrivilege::UserModeOnly)
        }
        other => (other?, UffdPrivilege::Full),
    };
    let (remote, privilege) = created;
    let taken = thread.process.take_fd(remote as i32);
    // Whether or not it was taken, nothing stays behind.
    if let Err(error) = thread.call("close", libc::SYS_close, [remote, 0, 0]) {
        let (pid, fd) = (thread.process.pid(), remote as i32);
        return Err(match error {
            gone @ AttachError::Gone { .. } => gone,
            error => AttachError::LeftOpen { pid, fd, source: Box::new(error) },
        });
    }
    Ok((taken?, privilege))
}

/// The address of a `syscall` instruction: the vdso has one on every kernel; else any other.
fn find_syscall(process: &Process) -> Result<u64, AttachError> {
    let memory = process.memory()?;
    let mut maps = process.maps()?;
    maps.retain(|mapping| mapping.access.contains(Access::EXECUTE) && mapping.name != "[vsyscall]");
    maps.sort_by_key(|mapping| mapping.name != "[vdso]");
    for mapping in maps {
        let mut code = vec![0; mapping.len().min(limits::CODE_SEARCH_BYTES) as usize];
        // Code that can't be read is no use; there are other places.
        if memory.read_exact_at(&mut code, mapping.range.start).is_err() {
            continue;
        }
        if let Some(offset) = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL) {
            return Ok(mapping.range.start + offset as u64);
        }
    }
    Err(AttachError::NoSyscallInstruction { pid: process.pid() })
}

/// Stops the main thread of `process` (a monitor's sits in `ppoll`, which restarts), runs `body`,
/// and lets it go on. The body's result, and for how long the thread was stopped at most.
fn with_stopped<T>(
    process: &Process,
    body: impl FnOnce(&mut StoppedThread<'_>) -> Result<T, AttachError>,
) -> Result<(T, Duration), AttachError> {
    let tid = process.pid();
    if let Err(error) = sys::seize(tid) {
        let tracer = process.tracer()?;
        let traced = error.raw_os_error() == Some(libc::EPERM) && tracer != 0;
        let pid = process.pid();
        return Err(match traced {
            true => AttachError::Traced { pid, tracer },
            false => process.host("PTRACE_SEIZE", error),
        });
    }
    let (mut thread, started) = stop_while_polling(process)?;
    let result = body(&mut thread);
    let restored = thread.restore();
    let stopped = started.elapsed();
    // That it was not restored is worse than anything else.
    restored?;
    Ok((result?, stopped))
}

/// Stops a seized thread where it polls, with some tries; else wherever it is. Since when it stands
/// still.
fn stop_while_polling(process: &Process) -> Result<(StoppedThread<'_>, Instant), AttachError> {
    let memory = process.memory()?;
    for _ in 0..limits::INJECT_TRIES {
        let started = Instant::now();
        let mut thread = StoppedThread::stop(process)?;
        if let Some(at) = thread.polls_at(&memory) {
            thread.syscall_at = at;
            return Ok((thread, started));
        }
        thread.let_go_on()?;
        std::thread::sleep(limits::INJECT_AGAIN_PAUSE);
    }
    tracing::debug!(pid = process.pid(), "the main thread does not poll");
    let anywhere = find_syscall(process)?;
    let started = Instant::now();
    let mut thread = StoppedThread::stop(process)?;
    thread.syscall_at = anywhere;
    Ok((thread, started))
}

/// A thread of another process, stopped, with its registers saved. Dropping it restores them and lets
/// the thread go on.
struct StoppedThread<'a> {
    process: &'a Process,
    syscall_at: u64,
    registers: Registers,
    /// Signals that came meanwhile.
    signals: Vec<libc::c_int>,
    restored: bool,
}

impl<'a> StoppedThread<'a> {
    /// Stops a seized thread. On failure it is let go, here or at this thread's end.
    fn stop(process: &'a Process) -> Result<Self, AttachError> {
        let (pid, tid) = (process.pid(), process.pid());
        let deadline = Instant::now() + limits::INJECT_WAIT_MAX;
        sys::interrupt(tid).map_err(|error| process.host("PTRACE_INTERRUPT", error))?;
        loop {
            match wait(process, deadline)? {
                Waited::Interrupted => break,
                // On its way to a handler or a default action: that comes first.
                Waited::Signal(signal) => {
                    sys::resume(tid, signal).map_err(|error| process.host("PTRACE_CONT", error))?;
                }
                _ => {
                    let _ = sys::detach(tid);
                    return Err(AttachError::Stopped { pid });
                }
            }
        }
        let refused = match sys::registers(tid) {
            Ok(registers) if registers.cs == USER_CS => {
                let (signals, syscall_at) = (Vec::new(), 0);
                return Ok(Self { process, syscall_at, registers, signals, restored: false });
            }
            Ok(_) => AttachError::Architecture { pid },
            Err(error) => process.host("PTRACE_GETREGS", error),
        };
        let _ = sys::detach(tid);
        Err(refused)
    }

    /// Has the thread make one system call: what it returned.
    fn call(
        &mut self,
        call: &'static str,
        number: libc::c_long,
        args: [u64; 3],
    ) -> Result<u64, AttachError> {
        let (process, tid) = (self.process, self.process.pid());
        let mut registers = self.registers;
        registers.rip = self.syscall_at;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = args;
        sys::set_registers(tid, &registers)
            .map_err(|error| process.host("PTRACE_SETREGS", error))?;
        let deadline = Instant::now() + limits::INJECT_WAIT_MAX;
        let mut begun = false;
        loop {
            sys::run_to_system_call(tid).map_err(|error| process.host("PTRACE_SYSCALL", error))?;
            match wait(process, deadline)? {
                Waited::SystemCall if begun => break,
                Waited::SystemCall => begun = true,
                Waited::Signal(signal) => self.signals.push(signal),
                _ => {}
            }
            if Instant::now() > deadline {
                return Err(AttachError::NoReturn { pid: process.pid() });
            }
        }
        let now = sys::registers(tid).map_err(|error| process.host("PTRACE_GETREGS", error))?;
        if now.rip != self.syscall_at + SYSCALL.len() as u64 {
            return Err(AttachError::NoReturn { pid: process.pid() });
        }
        returned(now.rax).map_err(|source| AttachError::Injected {
            pid: process.pid(),
            call,
            source,
        })
    }

    /// Where its `syscall` instruction is, if it is in the midst of a poll.
    fn polls_at(&self, memory: &File) -> Option<u64> {
        let polls = [libc::SYS_ppoll, libc::SYS_poll].map(|number| number as u64);
        let at = self.registers.rip.checked_sub(SYSCALL.len() as u64)?;
        let mut code = [0; SYSCALL.len()];
        memory.read_exact_at(&mut code, at).ok()?;
        (polls.contains(&self.registers.orig_rax) && code == SYSCALL).then_some(at)
    }

    /// Lets it go on, to be stopped again.
    fn let_go_on(mut self) -> Result<(), AttachError> {
        self.restored = true;
        let (process, tid) = (self.process, self.process.pid());
        sys::resume(tid, 0).map_err(|error| process.host("PTRACE_CONT", error))
    }

    fn restore(&mut self) -> Result<(), AttachError> {
        let (process, tid) = (self.process, self.process.pid());
        if std::mem::replace(&mut self.restored, true) {
            return Ok(());
        }
        let failed = |call| {
            move |source: io::Error| match source.raw_os_error() {
                // A killed process needs no registers.
                Some(libc::ESRCH) if !process.is_alive() => AttachError::Gone { pid: tid },
                _ => AttachError::NotRestored { pid: tid, call, source },
            }
        };
        // Each is tried, whatever became of the one before.
        let registers = sys::set_registers(tid, &self.registers).map_err(failed("PTRACE_SETREGS"));
        let detached = sys::detach(tid).map_err(failed("PTRACE_DETACH"));
        for signal in self.signals.drain(..) {
            let _ = sys::send_signal(tid, tid, signal);
        }
        registers.and(detached)
    }
}

impl Drop for StoppedThread<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            tracing::error!(%error, "after a failed injection");
        }
    }
}

/// Waits until the traced thread stops. First without sleeping: it takes some ten microseconds,
/// and each of them the thread stands still.
fn wait(process: &Process, deadline: Instant) -> Result<Waited, AttachError> {
    let tid = process.pid();
    let started = Instant::now();
    loop {
        match sys::look(tid) {
            Ok(Waited::Running) => {}
            Ok(Waited::Gone) => return Err(AttachError::Gone { pid: tid }),
            Ok(stop) => return Ok(stop),
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                return Err(AttachError::Gone { pid: tid });
            }
            Err(error) => return Err(process.host("waitid", error)),
        }
        let now = Instant::now();
        if now > deadline {
            let waited_ms = (now - started).as_millis() as u64;
            return Err(AttachError::NoStop { pid: tid, waited_ms });
        }
        if now - started < limits::INJECT_SPIN_MAX {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// A system call's result as the kernel leaves it in a register.
fn returned(rax: u64) -> io::Result<u64> {
    match rax as i64 {
        errno @ -4095..0 => Err(io::Error::from_raw_os_error(-errno as i32)),
        _ => Ok(rax),
    }
}
