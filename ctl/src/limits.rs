//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// A line from QMP: the largest real answers (`query-qmp-schema`) are below 1 MiB.
pub const QMP_LINE_BYTES_MAX: usize = 16 << 20;

/// Events kept until someone asks for them: a guest that resets its clock or fails its I/O in a
/// loop sends many, and none of those matter to us.
pub const QMP_EVENTS_MAX: usize = 4096;

/// How long QEMU may take to greet. Its main loop answers in microseconds; a host under pressure
/// may keep it from running for a second or two.
pub const QMP_GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one command may take. `stop` flushes the guest's disks, which may take seconds.
pub const QMP_COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between tries while the listener's backlog is full.
pub const QMP_CONNECT_RETRY: Duration = Duration::from_millis(20);
