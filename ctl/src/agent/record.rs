//! What each side writes down about a session, so that a crash leaves no doubt.
//!
//! One small JSON file per session and role, replaced as a whole: written beside, synced, renamed,
//! directory synced. The source's `handed-over` stands before the commit message leaves.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pageferry_datapath::ids::SessionId;
use serde::{Deserialize, Serialize};

/// Where records are kept unless told otherwise.
pub const STATE_DIR: &str = "/var/lib/pageferry";

/// Which side a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Where the guest came from.
    Source,
    /// Where it goes.
    Target,
}

/// How far a session had come, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Begun: the guest is the source's.
    Attempting,
    /// Source: the guest is the target's from here on. Written before the commit leaves.
    HandedOver,
    /// Target: the commit came.
    Committed,
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
    /// The monitor's QMP socket on this side.
    pub qmp: PathBuf,
    /// The monitor's pid on this side.
    pub pid: i32,
    /// Seconds since 1970 when this was written.
    pub written_at: u64,
}

/// A record could not be made durable.
#[derive(Debug, thiserror::Error)]
#[error("the session's record {} could not be {step}", path.display())]
pub struct RecordError {
    /// The file.
    pub path: PathBuf,
    /// What failed: `created`, `written`, `made durable`.
    pub step: &'static str,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// Keeps one session's record.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
    record: Record,
}

impl Records {
    /// Begins a record as [`Decision::Attempting`]; creates the folder if it is not there.
    pub fn begin(dir: &Path, record: Record) -> Result<Self, RecordError> {
        let at = |source| RecordError { path: dir.to_owned(), step: "created", source };
        fs::create_dir_all(dir).map_err(at)?;
        let mut records = Self { dir: dir.to_owned(), record };
        records.write(Decision::Attempting)?;
        Ok(records)
    }

    /// Replaces the record's decision; durable when this returns.
    pub fn write(&mut self, decision: Decision) -> Result<(), RecordError> {
        self.record.decision = decision;
        self.record.written_at =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let path = self.path();
        let beside = path.with_extension("new");
        let step = |step| {
            let path = path.clone();
            move |source| RecordError { path, step, source }
        };
        let bytes = serde_json::to_vec_pretty(&self.record).expect("a record is plain data");
        let mut file = File::create(&beside).map_err(step("created"))?;
        file.write_all(&bytes).map_err(step("written"))?;
        file.sync_all().map_err(step("made durable"))?;
        fs::rename(&beside, &path).map_err(step("written"))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(step("made durable"))
    }

    /// Where this record is.
    pub fn path(&self) -> PathBuf {
        let role = match self.record.role {
            Role::Source => "source",
            Role::Target => "target",
        };
        self.dir.join(format!("{}.{role}.json", self.record.session))
    }

    /// Removes a record that no longer says anything: the session ended and both sides know how.
    pub fn forget(self) {
        let _a_leftover_is_harmless = fs::remove_file(self.path());
    }
}

/// Reads one record.
pub fn read(path: &Path) -> std::io::Result<Record> {
    serde_json::from_slice(&fs::read(path)?).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_replaced_as_a_whole_and_forgotten() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let record = Record {
            session: SessionId(7),
            role: Role::Source,
            decision: Decision::Attempting,
            peer: "10.0.0.2:4444".into(),
            qmp: "/run/qmp".into(),
            pid: 1,
            written_at: 0,
        };
        let mut records = Records::begin(dir.path(), record).expect("begun");
        records.write(Decision::HandedOver).expect("written");
        let path = records.path();
        assert_eq!(read(&path).expect("readable").decision, Decision::HandedOver);
        records.forget();
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 0);
    }
}
