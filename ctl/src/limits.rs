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

/// Longer than any host is up: for what has to be waited for.
pub const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

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

/// A peer that is there says so this often.
pub const HEARD_SAID_EVERY: Duration = Duration::from_millis(500);

/// How often it is looked whether the peer is still heard: a tenth of the shortest patience.
pub const HEART_LOOKS_EVERY: Duration = Duration::from_millis(100);

/// After so much silence a connection counts as cut, and a new one is tried: eight words missed,
/// longer than TCP needs to get over the loss of a few packets, or a busy host to run an agent.
pub const SILENCE_MAX: Duration = Duration::from_secs(4);

/// Messages after which the peer is told at once that they were heard, so that it need not keep
/// them: 16 MiB of device state.
pub const HEARD_EVERY: u64 = 64;

/// Bytes of messages kept during a cut before who sends more has to wait: two seconds of device
/// state, and every message that is not device state.
pub const CONTROL_KEPT_BYTES_MAX: usize = 8 << 20;

/// Messages received and not handled after which a control connection is not read from: more than
/// the protocol ever has on its way, but for device state.
pub const BACKLOG_MESSAGES_MAX: usize = 128;

/// The same in bytes: the device state of all guests but those with much video memory. Past it the
/// source's monitor waits for the target's.
pub const BACKLOG_BYTES_MAX: usize = 16 << 20;

/// How long a peer that takes nothing may keep its agent from saying why it gives up: the guest may
/// stand still meanwhile.
pub const LAST_WORD_WAIT_MAX: Duration = Duration::from_secs(1);

/// Between two looks whether it takes something.
pub const LAST_WORD_LOOK: Duration = Duration::from_millis(5);

/// Pauses between two tries to come back after a cut: the first, doubled up to the last.
pub const REJOIN_PAUSE_MIN: Duration = Duration::from_millis(50);
/// The last of them: a link that is back is noticed this soon.
pub const REJOIN_PAUSE_MAX: Duration = Duration::from_millis(500);

/// One try to come back: a packet lost in it is sent again after one second.
pub const REJOIN_TRY_MAX: Duration = Duration::from_secs(3);

/// Tries that a host answered with "nobody listens here" before its agent counts as gone: about a
/// second, in which one that is just being restarted can't know the session anyway.
pub const REJOIN_REFUSALS_MAX: u32 = 4;

/// How long a connection may be cut before the attempt ends, unless told otherwise.
pub const RECONNECT_TIMEOUT_S: u64 = 30;

/// The same while the guest stands still: longer than TCP needs to send a lost packet again, and no
/// longer than users bear.
pub const BLACKOUT_TIMEOUT_MS: u64 = 2000;

/// How long a new session waits for one that was cut off to make room: unwinding takes milliseconds,
/// and a source waits for its greeting no longer than ten seconds.
pub const SUPERSEDING_WAIT_MAX: Duration = Duration::from_secs(8);

/// How often that is looked at.
pub const SUPERSEDING_LOOKS_EVERY: Duration = Duration::from_millis(500);

/// Pause before the target is asked for lanes once more, after those it gave tickets for could not
/// be opened.
pub const LANES_AGAIN_PAUSE: Duration = Duration::from_millis(300);

/// Between two tries to tell the peer what was heard, while somebody else writes.
pub const TELL_AGAIN_PAUSE: Duration = Duration::from_millis(2);

/// Rails of one migration; hosts with more NICs for migrations are rare, and lanes are few.
pub const RAILS_MAX: usize = 8;

/// Addresses that a target offers: what is told to a source stays short.
pub const RAIL_ADDRESSES_MAX: usize = 64;

/// Pairs of NICs that are tried, all at once, each on a thread.
pub const RAIL_PAIRS_MAX: usize = 32;

/// A rail answers within this or is not used: hosts that migrate are near each other, and lanes that
/// have to be opened again in the middle of a round wait for it.
pub const RAIL_ANSWERS_WITHIN: Duration = Duration::from_millis(500);

/// Between two looks whether a rail that is away answers again.
pub const RAIL_LOOKS_EVERY: Duration = Duration::from_secs(1);

/// A lane without progress for this long has failed where there are other rails: TCP sends a lost
/// packet again after 0.2, 0.6, 1.4 and 3 s, so that a rail which loses one now and then is not
/// thought dead.
pub const RAIL_PROGRESS_WAIT_MAX: Duration = Duration::from_secs(2);

/// A rail without RDMA that has less than one in so many of RDMA's speed carries no lanes beside it:
/// it would hardly add to it, and the end of each round, the guest's pause too, would wait for it.
pub const RAIL_BESIDE_RDMA_MIN: u64 = 10;

/// A rail of RDMA lanes that are silent for that long is asked by other means, and has this long to
/// answer: one question lost and sent again after a second is no sign of death. So a lane that only
/// waits for its turn, on a slow link or a busy machine, is left in peace.
pub const RAIL_STILL_ANSWERS_WITHIN: Duration = Duration::from_millis(1500);

/// How long a rail whose lanes failed is left alone; each time twice as long as before.
pub const RAIL_PAUSE_MIN: Duration = Duration::from_secs(1);

/// The same at most.
pub const RAIL_PAUSE_MAX: Duration = Duration::from_secs(60);

/// How long an answer to the question after a session may take: the target may have to let its guest
/// run, or to end a session, first.
pub const RECOVER_ANSWER_MAX: Duration = Duration::from_secs(10);

/// The shortest of these waits.
pub const RECOVER_TRY_MIN: Duration = Duration::from_secs(1);

/// How long a QEMU that was killed may take to give its memory back before it counts as one that
/// lives: some 100 GB.
pub const RECOVER_EXIT_MAX: Duration = Duration::from_secs(10);

/// Pause between two questions.
pub const RECOVER_PAUSE: Duration = Duration::from_millis(500);

/// How long a monitor that no longer answers may take to be gone, before it counts as paused: that is
/// only what is said of it.
pub const MONITOR_ENDS_MAX: Duration = Duration::from_millis(300);

/// How long a side that has said the end of a session waits for the other to have acted on it: that
/// takes a write to its disk, and letting a guest go on. After that its record stays.
pub const SETTLE_MAX: Duration = Duration::from_secs(5);

/// How long it is tried to tell the other side what it need not know at once.
pub const RECOVER_TELL_MAX: Duration = Duration::from_secs(2);
/// How long one who asks an agent may take to say what, and to listen: a local process does it at
/// once, and nobody else can connect.
pub const ADMIN_WAIT: Duration = Duration::from_secs(2);

/// A socket at which nobody listens is left of a killed agent after this: between making and listening
/// are microseconds.
pub const ADMIN_SOCKET_LEFT_AFTER: Duration = Duration::from_secs(60);

/// A line of the admin socket: a status is well below 1 KiB.
pub const ADMIN_LINE_BYTES_MAX: u64 = 64 << 10;

/// How often a member of a shared budget looks for the others: a look opens a file of each.
pub const SHARE_LOOK_EVERY: Duration = Duration::from_millis(250);

/// For how long QEMU samples how fast a guest writes: the shortest that it takes.
pub const DIRTY_SAMPLE_S: u64 = 1;

/// How much longer than that a sample may take on a busy host, before the guest counts as unknown.
pub const DIRTY_SAMPLE_LATE: Duration = Duration::from_secs(4);

/// How long a target may take to say whether it would take a guest in.
pub const CHECK_ANSWER_MAX: Duration = Duration::from_secs(10);

/// How often a drain draws how far it is, and looks at its budget.
pub const DRAIN_TICK: Duration = Duration::from_millis(200);

/// Migrations of one drain at the same time, at most: what a target takes by default.
pub const DRAIN_PARALLEL_MAX: u32 = 16;

/// Source ports that a lane tries, to land on its queue: others may have the first few; one that
/// finds none of so many free is better opened from any.
pub const RSS_PORTS_MAX: usize = 16;
