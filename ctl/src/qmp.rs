//! A QMP client: blocking JSON lines over QEMU's monitor socket, a deadline on every wait.
//!
//! ```text
//!   execute(cmd) ──► {"execute": …, "id": 7} ──► QEMU
//!                ◄── {"return"|"error": …, "id": 7}      matched by id: late replies are dropped
//!   wait_event() ◄── {"event": …, "timestamp": …}        queued meanwhile, in order
//! ```
//!
//! Owned by the agent of one guest. It has no thread: whoever calls reads the socket, and events
//! that arrive in between are queued with QEMU's own timestamps; calls from several threads take
//! turns. Replies stay [`Value`]s, so that enum values, members and events of newer QEMUs pass.
//! (The crate `qapi` decodes into closed enums generated for one QEMU version, so an unknown event
//! fails the command it arrives in; it has no deadlines, no bound on a line, and can't pass
//! descriptors.) It knows no command: what is said to QEMU stands in the module `qemu`.

mod connection;
mod error;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::connection::{Connection, Message};
pub use self::error::QmpError;
use crate::limits::{QMP_COMMAND_TIMEOUT, QMP_GREETING_TIMEOUT};

/// QEMU's version, from its greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// As in 7.2.22: 7.
    pub major: u32,
    /// As in 7.2.22: 2.
    pub minor: u32,
    /// As in 7.2.22: 22.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something QEMU reported by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// As `STOP` or `MIGRATION`.
    pub name: String,
    /// Its arguments, `Null` when it has none.
    pub data: Value,
    /// When QEMU emitted it, by QEMU's clock since the Unix epoch (microseconds).
    pub at: Duration,
}

/// A command that was sent and whose answer nobody has taken yet. Dropped, the answer is too.
#[derive(Debug)]
pub struct Posted {
    command: String,
    id: u64,
}

/// One client of one monitor. QEMU serves one client per socket at a time.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    version: Version,
    connection: Mutex<Connection>,
}

impl Qmp {
    /// Connects, reads the greeting and enters command mode, within
    /// [`QMP_GREETING_TIMEOUT`].
    ///
    /// # Errors
    /// [`QmpError::Connect`] if nothing listens there, [`QmpError::Busy`] if another client holds
    /// the monitor, [`QmpError::NotQmp`] if what answers is no QMP monitor.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, QmpError> {
        Self::connect_by(path, Instant::now() + QMP_GREETING_TIMEOUT)
    }

    /// As [`Qmp::connect`], until `deadline`.
    pub fn connect_by(path: impl AsRef<Path>, deadline: Instant) -> Result<Self, QmpError> {
        let path = path.as_ref();
        Self::greet(Connection::open(path, deadline)?, path, deadline)
    }

    /// As [`Qmp::connect_by`], over a socket that is connected already; `path` is what errors call
    /// it.
    pub fn over(stream: UnixStream, path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        Self::greet(Connection::over(stream)?, path, deadline)
    }

    fn greet(mut connection: Connection, path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let greeting = match connection.read(deadline) {
            Ok(Message::Greeting(greeting)) => greeting,
            Ok(_) | Err(QmpError::Malformed { .. } | QmpError::LineTooLong { .. }) => {
                return Err(QmpError::NotQmp { path: path.into() });
            }
            Err(QmpError::Timeout { .. }) => return Err(QmpError::Busy { path: path.into() }),
            Err(other) => return Err(other),
        };
        let number = |name: &str| {
            let part = greeting["version"]["qemu"][name].as_u64();
            part.and_then(|part| u32::try_from(part).ok())
        };
        let (Some(major), Some(minor), Some(micro)) =
            (number("major"), number("minor"), number("micro"))
        else {
            return Err(QmpError::NotQmp { path: path.into() });
        };
        let version = Version { major, minor, micro };
        let qmp = Self { path: path.into(), version, connection: Mutex::new(connection) };
        qmp.execute_by("qmp_capabilities", json!({}), deadline)?;
        tracing::debug!(path = %path.display(), %version, "qmp: connected");
        Ok(qmp)
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Runs a command and returns what QEMU answers, within [`QMP_COMMAND_TIMEOUT`]. `args` is an
    /// object, empty (`json!({})`) for none.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if QEMU says no; all others mean that the connection is unusable or
    /// that it is unknown whether the command was run.
    pub fn execute(&self, command: &str, args: Value) -> Result<Value, QmpError> {
        self.execute_by(command, args, Instant::now() + QMP_COMMAND_TIMEOUT)
    }

    /// As [`Qmp::execute`], until `deadline`.
    pub fn execute_by(
        &self,
        command: &str,
        args: Value,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        self.lock().execute(command, &args, None, deadline)
    }

    /// As [`Qmp::execute`], and passes `fd` along (SCM_RIGHTS), for `getfd` and `add-fd`.
    pub fn execute_with_fd(
        &self,
        command: &str,
        args: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + QMP_COMMAND_TIMEOUT;
        self.lock().execute(command, &args, Some(fd), deadline)
    }

    /// Sends a command without waiting for its answer: what follows runs beside it. Take the answer
    /// with [`Qmp::answer`].
    pub fn post(&self, command: &str, args: Value) -> Result<Posted, QmpError> {
        let deadline = Instant::now() + QMP_COMMAND_TIMEOUT;
        let id = self.lock().post(command, &args, None, deadline, true)?;
        Ok(Posted { command: command.into(), id })
    }

    /// Waits for the answer to a posted command, until `deadline`.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub fn answer(&self, posted: Posted, deadline: Instant) -> Result<Value, QmpError> {
        self.lock().answer(&posted.command, posted.id, deadline)
    }

    /// Runs a command and returns as soon as QEMU has reported the event `name` that it causes, or
    /// has answered without one (`None`), until `deadline`. For commands whose answer waits for more
    /// than matters.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub fn execute_until_event(
        &self,
        command: &str,
        args: Value,
        name: &str,
        deadline: Instant,
    ) -> Result<Option<Event>, QmpError> {
        self.lock().execute_until_event(command, &args, name, deadline)
    }

    /// Runs a command of the human monitor and returns its text.
    ///
    /// # Errors
    /// As for [`Qmp::execute`]; a human command that fails returns its complaint as text.
    pub fn human(&self, command_line: &str) -> Result<String, QmpError> {
        let args = json!({ "command-line": command_line });
        let text = self.execute("human-monitor-command", args)?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for the next event called `name` that was not yet taken, and takes it out of the
    /// queue. Other events stay queued.
    ///
    /// # Errors
    /// [`QmpError::Timeout`] at the deadline: the queue is as it was and the wait may be repeated.
    pub fn wait_event(&self, name: &str, deadline: Instant) -> Result<Event, QmpError> {
        self.wait_event_where(name, deadline, |_| true)
    }

    /// As [`Qmp::wait_event`], for the first event called `name` that `wanted` accepts. Events of
    /// that name which it does not accept stay queued.
    pub fn wait_event_where(
        &self,
        name: &str,
        deadline: Instant,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        self.lock().wait_event(name, deadline, wanted)
    }

    /// Takes all events that have arrived, without waiting.
    pub fn drain_events(&self) -> Result<Vec<Event>, QmpError> {
        self.lock().drain_events()
    }

    /// Drops the events called `name` that have arrived, so that a later wait sees only newer ones.
    pub fn forget_events(&self, name: &str) -> Result<(), QmpError> {
        self.lock().forget_events(name)
    }

    /// The process that opened the listening socket: (pid, uid) of SO_PEERCRED. Not QEMU's if the
    /// socket was passed to it, as libvirt does.
    pub fn listener_credentials(&self) -> Result<(i32, u32), QmpError> {
        self.lock().listener_credentials()
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic inside leaves at worst a half-read line behind, which the next read completes.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
