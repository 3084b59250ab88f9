//! What each side writes down about a session, so that a crash leaves no doubt.
//!
//! One small file per session and role: [`SLOTS`] places of [`SLOT_BYTES`], each JSON, a line with its
//! digest and then zeros, of which the newest whole one counts. The file has its size from the start, so that a
//! decision inside the pause costs one write to blocks that are there already, and one
//! `fdatasync`. The source's `handed-over` stands before the commit message leaves.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageferry_datapath::control::Word;
use pageferry_datapath::ids::SessionId;
use serde::{Deserialize, Serialize};

use super::tls::Identity;
use crate::host;
use crate::qemu::capabilities::Settings;

mod unreadable;

pub use self::unreadable::{Unreadable, unreadable};

/// Where records are kept unless told otherwise.
pub const STATE_DIR: &str = "/var/lib/pageferry";

/// Bytes of one place: a block, and larger than any record whose paths the kernel takes as sockets.
pub const SLOT_BYTES: usize = 4096;
/// Places: a torn write spoils one, and the one before still stands.
pub const SLOTS: usize = 4;

/// How long an agent that has ended may take to let go of its record.
const INHERIT_WAIT: Duration = Duration::from_secs(10);

/// Which side a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Where the guest came from.
    Source,
    /// Where it goes.
    Target,
}

impl Role {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// How far a session had come, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Begun: the guest is the source's.
    Attempting,
    /// Source: the guest is the target's from here on. Written before the commit leaves.
    HandedOver,
    /// Target: the guest is loaded, and runs as soon as the source says so.
    Ready,
    /// The target's guest runs.
    Running,
    /// Given up: the guest is the source's.
    Aborted,
}

/// One session's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The session.
    pub session: SessionId,
    /// This side's role.
    pub role: Role,
    /// What was decided.
    pub decision: Decision,
    /// The other side's address.
    pub peer: String,
    /// Target: who the source is by its certificate; `None` without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_identity: Option<Identity>,
    /// The monitor's QMP socket on this side.
    pub qmp: PathBuf,
    /// The monitor's pid on this side.
    pub pid: i32,
    /// When that process was started, in the kernel's ticks: another may get its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_started: Option<u64>,
    /// The boot of this host that they belong to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// The agent's own pid.
    #[serde(default)]
    pub agent: u32,
    /// When the agent was started, as with the monitor's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_started: Option<u64>,
    /// Target: the socket by which its agent is told to end this session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Target: where it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// How the other side is spoken to.
    #[serde(default)]
    pub security: RecordedSecurity,
    /// The migration settings of the QEMU here before the attempt, for whoever recovers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// Which write of this session this is; the highest counts.
    pub sequence: u64,
    /// Seconds since 1970 when this was written.
    pub written_at: u64,
}

impl Record {
    /// A session that begins now.
    pub fn attempting(
        session: SessionId,
        role: Role,
        peer: String,
        qmp: PathBuf,
        pid: i32,
    ) -> Self {
        Self {
            session,
            role,
            decision: Decision::Attempting,
            peer,
            peer_identity: None,
            qmp,
            pid,
            pid_started: started(pid),
            boot: Some(host::boot_id()),
            agent: std::process::id(),
            agent_started: host::start_time(std::process::id()),
            socket: None,
            listen: None,
            security: RecordedSecurity::default(),
            settings: None,
            sequence: 0,
            written_at: 0,
        }
    }

    /// Whether the monitor's process is still there.
    pub fn monitor_lives(&self) -> bool {
        let now = started(self.pid);
        let same_boot = self.boot.as_ref().is_none_or(|boot| *boot == host::boot_id());
        now.is_some() && same_boot && (self.pid_started.is_none() || self.pid_started == now)
    }

    /// Whether the agent's process is still there: this very one, not another that got its number.
    pub fn agent_lives(&self) -> bool {
        self.agent_started.is_some() && host::start_time(self.agent) == self.agent_started
    }

    /// What it says, as sides tell each other.
    pub fn word(&self) -> Word {
        match self.decision {
            Decision::Attempting => Word::Attempting,
            Decision::HandedOver => Word::HandedOver,
            Decision::Ready => Word::Ready,
            Decision::Running => Word::Running,
            Decision::Aborted => Word::Aborted,
        }
    }
}

fn started(pid: i32) -> Option<u64> {
    u32::try_from(pid).ok().and_then(host::start_time)
}

/// How the other side is spoken to, so that it can be asked again after a crash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedSecurity {
    /// Certificates, if named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// Whom the peer's certificate names, if told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Without TLS.
    #[serde(default)]
    pub insecure: bool,
}

/// A record could not be made durable.
#[derive(Debug, thiserror::Error)]
#[error("the session's record {} could not be {step}", path.display())]
pub struct RecordError {
    /// The file.
    pub path: PathBuf,
    /// What failed: `created`, `written`, `made durable`, `removed`.
    pub step: &'static str,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// Keeps one session's record.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    file: File,
    record: Record,
    /// What the cheapest durable write has cost so far.
    write_cost: Duration,
}

impl Records {
    /// Begins a record as [`Decision::Attempting`]; creates the folder if it is not there. Where that
    /// fails, on a full disk say, no file stays that nobody can read.
    pub fn begin(dir: &Path, record: Record) -> Result<Self, RecordError> {
        let path = path_of(dir, record.session, record.role);
        let failed = |source| RecordError { path: path.clone(), step: "created", source };
        create_dir(dir).map_err(failed)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(failed)?;
        Self::fill(dir, path.clone(), file, record).inspect_err(|_| {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(%error, "{} stays, and holds nothing", path.display());
            }
        })
    }

    fn fill(dir: &Path, path: PathBuf, file: File, record: Record) -> Result<Self, RecordError> {
        let failed = |step: &'static str| {
            let path = path.clone();
            move |source| RecordError { path, step, source }
        };
        // For as long as this agent lives: whoever can lock it later knows that it does not. Who only
        // looks whether it is in use lets go at once.
        lock_soon(&file).map_err(failed("locked"))?;
        if file.metadata().map_err(failed("created"))?.nlink() == 0 {
            // Somebody took it for one that was left behind.
            return Err(failed("created")(ErrorKind::NotFound.into()));
        }
        file.write_all_at(&[0; SLOTS * SLOT_BYTES], 0).map_err(failed("written"))?;
        file.sync_all().map_err(failed("made durable"))?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("made durable"))?;
        let mut records = Self { path, file, record, write_cost: Duration::MAX };
        // Twice: the first write may still have to find its blocks.
        records.write(Decision::Attempting)?;
        records.write(Decision::Attempting)?;
        Ok(records)
    }

    /// Takes over the record of an agent that is known to have ended: a process lets go of its
    /// files one after the other, so its lock may be seen for a moment yet.
    pub fn inherit(path: &Path) -> Result<Self, RecordError> {
        let until = Instant::now() + INHERIT_WAIT;
        loop {
            match Self::open(path) {
                Err(RecordError { source, .. })
                    if source.kind() == ErrorKind::WouldBlock && Instant::now() < until =>
                {
                    thread::sleep(Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }

    /// Takes over a record whose agent is gone; `WouldBlock` while it is not.
    pub fn open(path: &Path) -> Result<Self, RecordError> {
        let failed =
            |step: &'static str| move |source| RecordError { path: path.to_owned(), step, source };
        let file =
            OpenOptions::new().read(true).write(true).open(path).map_err(failed("opened"))?;
        file.try_lock().map_err(|error| failed("locked")(error.into()))?;
        let record = read(path).map_err(failed("read"))?;
        // What was read may be on its way to the disk yet, and is acted upon from here on.
        file.sync_all().map_err(failed("made durable"))?;
        Ok(Self { path: path.to_owned(), file, record, write_cost: Duration::MAX })
    }

    /// What it says.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Writes down another decision; durable when this returns.
    pub fn write(&mut self, decision: Decision) -> Result<(), RecordError> {
        let began = Instant::now();
        let mut record = self.record.clone();
        record.decision = decision;
        record.sequence += 1;
        record.written_at =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let bytes = place_of(&record);
        let slot = record.sequence as usize % SLOTS;
        let failed = |step: &'static str| {
            let path = self.path.clone();
            move |source| RecordError { path, step, source }
        };
        self.file.write_all_at(&bytes, (slot * SLOT_BYTES) as u64).map_err(failed("written"))?;
        self.file.sync_data().map_err(failed("made durable"))?;
        self.record = record;
        self.write_cost = self.write_cost.min(began.elapsed());
        Ok(())
    }

    /// What one durable write costs here, at its best so far.
    pub fn write_cost(&self) -> Duration {
        self.write_cost
    }

    /// Where this record is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes a record that no longer says anything: the session ended and both sides know how.
    pub fn forget(self) {
        let _a_leftover_is_harmless = fs::remove_file(self.path);
    }

    /// Removes a record that could not be corrected; durable when this returns.
    pub fn remove(self) -> Result<(), RecordError> {
        let path = self.path;
        let removed = remove_durably(&path);
        removed.map_err(|source| RecordError { path, step: "removed", source })
    }
}

/// Makes the folder of records, and those above it, if it is not there: nobody else's to read, for
/// whoever knows a session's number may ask about it. One that is there stays as its owner has it.
pub fn create_dir(dir: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn remove_durably(path: &Path) -> std::io::Result<()> {
    fs::remove_file(path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

fn lock_soon(file: &File) -> std::io::Result<()> {
    let until = Instant::now() + INHERIT_WAIT;
    loop {
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(1));
            }
            locked => return locked.map_err(Into::into),
        }
    }
}

/// Where the record of a session is kept.
pub fn path_of(dir: &Path, session: SessionId, role: Role) -> PathBuf {
    dir.join(format!("{session}.{}.json", role.name()))
}

/// Every record in a folder that can be read, the oldest first; [`unreadable`] has the others.
pub fn list(dir: &Path) -> Vec<(PathBuf, Record)> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let records = files.filter(|path| path.extension().is_some_and(|it| it == "json"));
    let mut records: Vec<_> =
        records.filter_map(|path| read(&path).ok().map(|record| (path, record))).collect();
    records.sort_by_key(|(_, record)| record.written_at);
    records
}

/// Whether the agent that keeps this record lives.
pub fn is_in_use(path: &Path) -> bool {
    let locked = File::open(path).map(|file| file.try_lock_shared());
    matches!(locked, Ok(Err(fs::TryLockError::WouldBlock)))
}

/// Reads one record: the newest whole one of its places.
pub fn read(path: &Path) -> std::io::Result<Record> {
    let bytes = fs::read(path)?;
    let whole = bytes.chunks(SLOT_BYTES).filter_map(record_in);
    whole
        .max_by_key(|record| record.sequence)
        .ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, "no place holds a whole record"))
}

/// What one place holds for `record`.
fn place_of(record: &Record) -> Vec<u8> {
    let json = serde_json::to_string(record).expect("a record is plain data");
    let mut bytes = format!("{json}\n{}\n", digest(json.as_bytes())).into_bytes();
    assert!(bytes.len() < SLOT_BYTES, "a record fits its place");
    bytes.resize(SLOT_BYTES, 0);
    bytes
}

/// The record that one place holds; none if a write to it was torn: half of one decision and half of
/// another may well be JSON.
fn record_in(place: &[u8]) -> Option<Record> {
    let end = place.iter().position(|byte| *byte == 0)?;
    let (json, said) = std::str::from_utf8(&place[..end]).ok()?.trim_end().split_once('\n')?;
    serde_json::from_str(json).ok().filter(|_| digest(json.as_bytes()) == said)
}

fn digest(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::lab::{SmallDisk, Workplace, is_root, skip};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("it is there").permissions().mode() & 0o7777
    }

    #[test]
    fn half_of_one_write_and_half_of_another_are_no_record() {
        let begin = |qmp: &str| {
            let (peer, qmp) = ("10.0.0.2:4444".into(), qmp.into());
            Record::attempting(SessionId(7), Role::Source, peer, qmp, 1)
        };
        let (before, after) = (place_of(&begin("/run/a")), place_of(&begin("/run/b")));
        assert_eq!(record_in(&before), Some(begin("/run/a")));
        let end = before.iter().position(|byte| *byte == 0).expect("it is not full");
        let torn = (0..=end).map(|at| [&after[..at], &before[at..]].concat());
        let read: Vec<_> = torn.filter_map(|torn| record_in(&torn)).map(|it| it.qmp).collect();
        // As long as the first differing byte is not written, and when the last is.
        assert!(
            read.iter()
                .all(|qmp| [Path::new("/run/a"), Path::new("/run/b")].contains(&qmp.as_path()))
        );
        assert!(read.len() < end, "a torn write was read");
    }

    #[test]
    fn records_are_nobody_else_s_to_read() {
        let place = tempfile::tempdir().expect("a temporary folder");
        let begin = |dir: &Path| {
            let (peer, qmp) = ("10.0.0.2:4444".into(), "/run/qmp".into());
            let record = Record::attempting(SessionId(7), Role::Target, peer, qmp, 1);
            Records::begin(dir, record).expect("begun")
        };
        let dir = place.path().join("lib/pageferry");
        let records = begin(&dir);
        assert_eq!((mode(&dir), mode(records.path())), (0o700, 0o600));
        // What others made or wrote before goes on.
        records.forget();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("changed");
        let path = begin(&dir).path().to_owned();
        assert_eq!((mode(&dir), mode(&path)), (0o755, 0o600));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("changed");
        Records::open(&path).expect("its agent is gone").write(Decision::Ready).expect("written");
    }

    #[test]
    fn a_record_from_before_peers_were_known_is_read() {
        let (peer, qmp) = ("10.0.0.2:4444".into(), "/run/qmp".into());
        let mut record = Record::attempting(SessionId(7), Role::Target, peer, qmp, 1);
        let old = serde_json::to_value(&record).expect("plain data");
        assert!(old.get("peer_identity").is_none(), "{old}");
        assert_eq!(serde_json::from_value::<Record>(old).expect("a record"), record);
        let names = vec!["host-a".into()];
        let security =
            crate::agent::tls::Security::Tls { suite: String::new(), peer: "host-a".into(), names };
        record.peer_identity = security.identity();
        let new = serde_json::to_string(&record).expect("plain data");
        assert_eq!(serde_json::from_str::<Record>(&new).expect("a record"), record);
    }

    #[test]
    fn the_newest_whole_write_counts() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let qmp = "/run/qmp".into();
        let record = Record::attempting(SessionId(7), Role::Source, "10.0.0.2:4444".into(), qmp, 1);
        let mut records = Records::begin(dir.path(), record).expect("begun");
        records.write(Decision::HandedOver).expect("written");
        let path = records.path().to_owned();
        assert_eq!(read(&path).expect("readable").decision, Decision::HandedOver);
        let torn = SLOT_BYTES as u64 * 3 + 40;
        records.file.write_all_at(&[0xff; 100], torn).expect("written");
        assert_eq!(read(&path).expect("readable").decision, Decision::Attempting);
        assert!(is_in_use(&path));
        assert_eq!(Records::open(&path).expect_err("it is in use").step, "locked");
        drop(records);
        assert!(!is_in_use(&path));
        let records = Records::open(&path).expect("its agent is gone");
        assert_eq!(list(dir.path()), [(path, records.record().clone())]);
        records.forget();
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn a_record_that_does_not_fit_on_the_disk_leaves_no_file_behind() {
        let name = "a_record_that_does_not_fit_on_the_disk_leaves_no_file_behind";
        if !is_root() {
            return skip(name, "needs root to mount");
        }
        let workplace = Workplace::new().expect("a workplace");
        let disk = SmallDisk::tmpfs(&workplace, "records", 1 << 16).expect("mounted");
        let begin = || {
            let peer = "10.0.0.2:4444".into();
            let record = Record::attempting(SessionId(7), Role::Target, peer, "/qmp".into(), 1);
            Records::begin(disk.path(), record)
        };
        disk.fill().expect("filled");
        let failed = begin().expect_err("there is no room");
        assert_eq!((failed.step, failed.source.kind()), ("written", ErrorKind::StorageFull));
        assert!(!failed.path.exists(), "nobody could read it");
        disk.empty();
        begin().expect("there is room");
    }
}
