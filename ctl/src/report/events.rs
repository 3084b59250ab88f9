//! The events of a migration, one JSON object a line with `--json`.
//!
//! Brown-out, blackout and summary are what Hyper-V's log has as #22508, #22509 and #22507. The
//! keys are a contract: they are added to, never renamed. Times are in milliseconds with
//! fractions, from the monotonic clock; `at_ms` counts from the start of the attempt. Built by the
//! migration's driver, read by programs and by [`Summary`]'s printed form.

use std::net::{IpAddr, SocketAddr};

use std::io;

use pageferry_datapath::control::{CoreUse, LanePlaced};
use pageferry_datapath::lane::{LanePath, ZeroCopy};
use serde::{Deserialize, Serialize};

use super::compression::Compression;
use super::narrowing::NarrowingDetail;

/// One line of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Both sides agreed on how; memory starts to move.
    Start(Start),
    /// A round ended: every byte of it is in the target's memory.
    Round(Round),
    /// The guest was paused for a moment so that device writes in flight are not missed.
    Drain(Drain),
    /// The time from the first page moved until the guest was paused.
    Brownout(Brownout),
    /// The time the guest stood still.
    Blackout(Blackout),
    /// How far it is; only where it was asked for.
    Progress(Going),
    /// How it ended; always the last line, also of a failure.
    Summary(Box<Summary>),
}

impl Event {
    /// Writes it as one line of JSON and flushes, so that a reader sees it when it happens.
    pub fn write_line(&self, out: &mut dyn io::Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        out.write_all(&line)?;
        out.flush()
    }
}

/// Both sides agreed; what was chosen and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Since the attempt began.
    pub at_ms: f64,
    /// The attempt's random name, as both agents log it.
    pub session: String,
    /// The transport chosen.
    pub transport: LanePath,
    /// Why this transport.
    pub transport_reason: String,
    /// The tracker chosen, as `TrackerKind` names it.
    pub tracker: String,
    /// Why this tracker.
    pub tracker_reason: String,
    /// Lanes open.
    pub lanes: usize,
    /// Size of all guest memory.
    pub guest_bytes: u64,
    /// What of it is not holes.
    pub populated_bytes: u64,
}

/// One pass over what was dirty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Since the attempt began.
    pub at_ms: f64,
    /// Which round; the first pass is 0.
    pub round: u32,
    /// Guest memory brought up to date in it.
    pub bytes: u64,
    /// Of that, pages that were zero and did not travel.
    pub zero_bytes: u64,
    /// Pages moved in it, of whatever size the tracker reports.
    pub pages: u64,
    /// From its start until the target had acknowledged every lane's barrier.
    pub took_ms: f64,
    /// What travelled of `bytes`, over `took_ms`.
    pub bytes_per_second: u64,
    /// How fast the guest was writing when it was last scanned; null before the first scan.
    pub dirty_bytes_per_second: Option<u64>,
    /// What the scan after it found; null for the round inside the pause.
    pub left_bytes: Option<u64>,
    /// The pause to expect if the guest were paused now.
    pub blackout_predicted_ms: Option<f64>,
    /// It ran while the guest was paused.
    pub in_blackout: bool,
}

/// A short pause before the rounds' end, so that no device write in flight escapes tracking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Since the attempt began.
    pub at_ms: f64,
    /// How long the guest stood still for it.
    pub pause_ms: f64,
    /// Why it was needed, naming the disk.
    pub reason: String,
}

/// The time from the first page moved until the guest was paused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Brownout {
    /// Since the attempt began, at its end.
    pub at_ms: f64,
    /// How long it was.
    pub brownout_ms: f64,
    /// Rounds in it, the first pass included.
    pub rounds: u32,
    /// Guest memory moved in it.
    pub moved_bytes: u64,
    /// The same with headers.
    pub wire_bytes: u64,
    /// `moved_bytes` over `brownout_ms`.
    pub bytes_per_second: u64,
    /// Pages reported dirty by its scans, all together.
    pub dirty_pages: u64,
    /// Scans made.
    pub scans: u32,
    /// How long the guest stood still at a drain point inside it; 0 without one.
    pub drain_pause_ms: f64,
}

/// The time the guest stood still.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Blackout {
    /// Since the attempt began, at its end.
    pub at_ms: f64,
    /// From asking the source to pause until the guest runs at the target, by the target's word
    /// and with that word's way.
    pub blackout_ms: f64,
    /// What was predicted when the switchover was decided.
    pub blackout_predicted_ms: Option<f64>,
    /// Where the time went; their sum is `blackout_ms` up to what lies between them.
    pub parts_ms: BlackoutParts,
    /// Pages the last scan found.
    pub dirty_pages: u64,
    /// Guest memory moved inside the pause.
    pub moved_bytes: u64,
    /// Size of the device state.
    pub device_state_bytes: u64,
}

/// How far it is, five times a second with `--progress`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Going {
    /// Since the attempt began.
    pub at_ms: f64,
    /// What the source is doing, for people.
    pub doing: String,
    /// Which round is moving; the first pass is 0.
    pub round: u32,
    /// Bytes of that round.
    pub round_bytes: u64,
    /// And how many of them are on their way or there.
    pub round_done_bytes: u64,
    /// Guest memory moved so far, all rounds together.
    pub moved_bytes: u64,
    /// How fast the guest writes; null before the first scan.
    pub dirty_bytes_per_second: Option<u64>,
    /// The pause to expect if the guest were paused now.
    pub blackout_predicted_ms: Option<f64>,
}

/// The parts of a blackout in the order they happen, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlackoutParts {
    /// Pausing the guest.
    pub pause: f64,
    /// Finding what it wrote last.
    pub last_scan: f64,
    /// Moving that.
    pub last_extents: f64,
    /// Waiting until the target has all of it in place.
    pub barrier: f64,
    /// Comparing digests of all memory, when asked for; else 0.
    pub verify: f64,
    /// The source's monitor writing its device state.
    pub device_state_save: f64,
    /// The rest of the device state on its way, after the last byte was written.
    pub transfer: f64,
    /// The target's monitor loading it.
    pub load: f64,
    /// Writing the decision down and telling the target.
    pub commit: f64,
    /// The target's guest starting to run.
    pub resume: f64,
}

impl BlackoutParts {
    /// Names as people read them, with the milliseconds, in the order they happen.
    pub fn named(&self) -> [(&'static str, f64); 10] {
        [
            ("pause", self.pause),
            ("last scan", self.last_scan),
            ("last extents", self.last_extents),
            ("barrier", self.barrier),
            ("verify", self.verify),
            ("device state save", self.device_state_save),
            ("transfer", self.transfer),
            ("load", self.load),
            ("commit", self.commit),
            ("resume", self.resume),
        ]
    }

    /// All parts together.
    pub fn total(&self) -> f64 {
        self.named().iter().map(|(_, ms)| ms).sum()
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationOutcome {
    /// The guest runs on the target.
    Migrated,
    /// It does not, or nobody can say.
    Failed,
}

/// Where the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunningOn {
    /// At the source.
    Source,
    /// At the target.
    Target,
    /// On neither: whole at the source, but it did not resume.
    None,
    /// On neither: its QEMU ended before it was loaded elsewhere.
    Gone,
    /// The hand-over was decided and not confirmed: paused at the source, perhaps running at the
    /// target.
    Uncertain,
}

/// How it ended; always the last event. What an attempt never came to know is null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Whether the guest moved.
    pub outcome: MigrationOutcome,
    /// Where it runs now.
    pub guest_running_on: RunningOn,
    /// The attempt's random name.
    pub session: String,
    /// The transport; null when it ended before one was chosen.
    pub transport: Option<LanePath>,
    /// Why this transport.
    pub transport_reason: Option<String>,
    /// Whom the two sides made sure of, and how; null when nobody was reached.
    #[serde(default)]
    pub security: Option<Secured>,
    /// The tracker, as `TrackerKind` names it; null when it ended before one was chosen.
    pub tracker: Option<String>,
    /// Why this tracker.
    pub tracker_reason: Option<String>,
    /// Lanes.
    pub lanes: usize,
    /// Rounds, the first pass and the one inside the pause included.
    pub rounds: u32,
    /// Size of all guest memory.
    pub guest_bytes: u64,
    /// What of it was not holes when the first pass began.
    pub populated_bytes: u64,
    /// Guest memory moved, pages moved twice counted twice, zero pages not.
    pub moved_bytes: u64,
    /// Guest memory that was zero and did not travel.
    pub zero_bytes: u64,
    /// Of it, what the guest had given back, and what is a hole at the target too.
    #[serde(default)]
    pub hole_bytes: u64,
    /// What moved, with headers.
    pub wire_bytes: u64,
    /// Whether the kernel sent from guest memory without copying.
    pub zero_copy: ZeroCopy,
    /// Why: what was asked for, or what the kernel refused or reported.
    pub zero_copy_reason: Option<String>,
    /// What lanes were spread over; empty where they went where the control connection goes.
    #[serde(default)]
    pub rails: Vec<RailDetail>,
    /// Whether each lane got a receive queue of the target's NIC for itself; null without lanes over
    /// TCP.
    #[serde(default)]
    pub rss: Option<RssDetail>,
    /// How busy each core of the source was while lanes were open, with everybody's work.
    #[serde(default)]
    pub cores_source: Vec<CoreUse>,
    /// The same of the target, until the last round before the pause.
    #[serde(default)]
    pub cores_target: Vec<CoreUse>,
    /// For how many milliseconds the target was cut off, each time that it came back.
    #[serde(default)]
    pub cuts_ms: Vec<f64>,
    /// How often lanes were lost and others opened.
    #[serde(default)]
    pub lanes_renewed: u32,
    /// What was compressed; null when it ended before lanes were open.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// What was left out of huge pages; null when it ended before lanes were open.
    #[serde(default)]
    pub narrowing: Option<NarrowingDetail>,
    /// From the first page moved until the guest was paused.
    pub brownout_ms: Option<f64>,
    /// The time the guest stood still.
    pub blackout_ms: Option<f64>,
    /// What was predicted.
    pub blackout_predicted_ms: Option<f64>,
    /// Where the blackout went.
    pub blackout_parts_ms: Option<BlackoutParts>,
    /// How long the guest stood still at a drain point; null without one.
    pub drain_pause_ms: Option<f64>,
    /// The whole attempt, attaching and letting go included.
    pub total_ms: f64,
    /// `moved_bytes` over the time in which rounds were moving.
    pub bytes_per_second: u64,
    /// Processor time of the source agent.
    pub cpu_seconds_source: f64,
    /// Processor time of the target agent; null when it could not say.
    pub cpu_seconds_target: Option<f64>,
    /// Digests of all memory were compared inside the pause and were equal.
    pub verified: bool,
    /// What each lane did.
    pub lane_details: Vec<LaneDetail>,
    /// Latencies, one entry a histogram.
    pub latencies: Vec<Latency>,
    /// The exit code.
    pub exit_code: u8,
    /// A failure's reason, `a: b: c`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hint: Option<String>,
}

/// How a migration was secured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Secured {
    /// The control connection: `tls-1.3` or `plain`.
    pub control: String,
    /// TLS's cipher suite.
    pub cipher_suite: Option<String>,
    /// Whom the target's certificate names.
    pub peer: Option<String>,
    /// The lanes: `clear`, `tls-kernel` or `tls-process`, by who encrypts.
    pub lanes: String,
    /// With which cipher, and why there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub lanes_reason: Option<String>,
    /// What encrypting cost the source's processors, all lanes together, with the copy that it
    /// takes; null where the kernel does it, which counts it to the lanes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sealing_seconds: Option<f64>,
    /// Why it is not secure although it left this host.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub warning: Option<String>,
}

/// One rail: a pair of NICs, and what lanes moved over it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RailDetail {
    /// The source's NIC.
    pub device: String,
    /// Its address.
    pub from: IpAddr,
    /// The target's NIC.
    pub target_device: String,
    /// Its address and port.
    pub to: SocketAddr,
    /// Lanes that ran over it, those opened again counted again.
    pub lanes: u32,
    /// Guest memory moved over it, zero pages not counted.
    pub moved_bytes: u64,
}

/// Lanes on receive queues of the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RssDetail {
    /// Lanes that arrived at the queue that their port was picked for, as the target's sockets say.
    pub placed: usize,
    /// Of so many.
    pub lanes: usize,
    /// Why not all; null if all.
    pub reason: Option<String>,
    /// What the target said of each; empty if it said nothing.
    pub queues: Vec<LanePlaced>,
}

/// What one lane did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaneDetail {
    /// Which lane.
    pub lane: u16,
    /// The path it took.
    pub path: LanePath,
    /// Why this path.
    pub path_reason: String,
    /// The core its worker was pinned to.
    pub cpu: Option<usize>,
    /// Zero-copy at its end.
    pub zero_copy: ZeroCopy,
    /// Guest memory it moved, zero pages not counted.
    pub moved_bytes: u64,
    /// Guest memory that was zero and did not travel.
    pub zero_bytes: u64,
    /// Of it, what the guest had given back, and what is a hole at the target too.
    #[serde(default)]
    pub hole_bytes: u64,
    /// What moved, with headers.
    pub wire_bytes: u64,
    /// System calls of its loop.
    pub syscalls: u64,
    /// Processor time of its worker, without what the kernel does for it in interrupts.
    pub cpu_seconds: f64,
}

/// One histogram in a line, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// What was measured: `batches`, `barriers` or `scans`.
    pub of: String,
    /// How often.
    pub count: u64,
    /// Half were no longer than this.
    pub p50_us: f64,
    /// 90 %.
    pub p90_us: f64,
    /// 99 %.
    pub p99_us: f64,
    /// 99.9 %.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

#[cfg(test)]
mod tests;
