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

/// Pause between tries while the listener's backlog is full, or while it does not listen yet.
pub const QMP_CONNECT_RETRY: Duration = Duration::from_millis(20);

/// How long a bound socket on which nobody listens may be that of a QEMU just starting; after that
/// it is one left behind.
pub const QMP_LISTEN_TIMEOUT: Duration = Duration::from_millis(500);

/// How long QEMU may take to wind up a migration that failed or was cancelled: its thread may be
/// asleep for the 100 ms of its rate limit, or flushing disks.
pub const QEMU_SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two looks at a state for which QEMU sends no event.
pub const QEMU_POLL: Duration = Duration::from_millis(2);

/// Longest piece of device state in one read: a few writes of QEMU's, which come in 32 to 128 KiB.
pub const DEVICE_STATE_CHUNK_BYTES: usize = 256 << 10;

/// Device state that QEMU's end of the channel holds before QEMU waits for us: a whole state
/// without VGA fits, so that saving it never waits for the network.
pub const DEVICE_STATE_SOCKET_BYTES: usize = 4 << 20;

/// How often a migration's status is asked for while waiting for its events: they come by
/// themselves, so this is for the case that one does not.
pub const MIGRATION_LOOK: Duration = Duration::from_millis(200);

/// Device state on its way between two QEMUs, with the guest paused: seconds for the largest, and
/// past this the guest is better off where it was.
pub const STATE_TIMEOUT: Duration = Duration::from_secs(25);

/// Saving, carrying and loading the device state plus resuming, before any of it was measured: the
/// median of small guests on the reference machine.
pub const SWITCHOVER_GUESS: Duration = Duration::from_millis(8);
