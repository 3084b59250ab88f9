//! Record files that can't be read: nobody learns from them whose a guest is.
//!
//! An agent that was killed between making its record and writing to it leaves one that never held a
//! decision; it had not touched its guest. What a disk spoiled may have held one, and where the guest
//! is has to be seen by hand. Neither goes but by the operator's word.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use pageferry_datapath::ids::SessionId;

use super::{RecordError, Role, is_in_use, read};

/// A file with a record's name and no record in it.
#[derive(Debug)]
pub struct Unreadable {
    /// The file.
    pub path: PathBuf,
    /// The session, by the file's name.
    pub session: SessionId,
    /// This side's role, by the file's name.
    pub role: Role,
    /// An agent has it: one that has just made it, say.
    pub live: bool,
    /// Nothing was ever written to it, so it can't have held a decision.
    pub never_written: bool,
    /// Why it can't be read.
    pub why: io::Error,
}

impl Unreadable {
    fn of(path: PathBuf) -> Option<Self> {
        let (session, role) = named(&path)?;
        let live = is_in_use(&path);
        let why = read(&path).err()?;
        // One that has just gone was forgotten.
        if why.kind() == ErrorKind::NotFound {
            return None;
        }
        let never_written = is_blank(&path);
        Some(Self { path, session, role, live, never_written, why })
    }

    /// What is wrong with it, for people.
    pub fn in_words(&self) -> String {
        match self.never_written {
            true => "never written: its agent ended before it touched its guest".into(),
            false => format!("can't be read: {}", self.why),
        }
    }

    /// Removes it by the operator's word, unless it can be read by now or an agent has it; durable
    /// when this returns.
    pub fn remove(self) -> Result<(), RecordError> {
        let Self { path, .. } = self;
        let failed = |step: &'static str| {
            let path = path.clone();
            move |source| RecordError { path, step, source }
        };
        // Who made it takes this lock before anything is written, and looks then whether it is there.
        let file = File::open(&path).map_err(failed("opened"))?;
        file.try_lock().map_err(|error| failed("locked")(error.into()))?;
        if read(&path).is_ok() {
            let source = io::Error::other("it can be read now");
            return Err(failed("removed")(source));
        }
        super::remove_durably(&path).map_err(failed("removed"))
    }
}

/// Every record in a folder that can't be read; those that can are in [`list`](super::list).
///
/// # Errors
/// If there is such a folder and what is in it can't be seen.
pub fn unreadable(dir: &Path) -> io::Result<Vec<Unreadable>> {
    let files = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        files => files?,
    };
    let mut found: Vec<_> =
        files.flatten().filter_map(|entry| Unreadable::of(entry.path())).collect();
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Session and role that the name of a record's file says.
fn named(path: &Path) -> Option<(SessionId, Role)> {
    let name = path.file_name()?.to_str()?.strip_suffix(".json")?;
    let (session, role) = name.split_once('.')?;
    let role = match role {
        "source" => Role::Source,
        "target" => Role::Target,
        _ => return None,
    };
    Some((session.parse().ok()?, role))
}

fn is_blank(path: &Path) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::super::{SLOT_BYTES, SLOTS, list, path_of};
    use super::*;

    #[test]
    fn what_can_t_be_read_is_found_and_goes_by_the_operator_s_word() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let empty = path_of(dir.path(), SessionId(1), Role::Source);
        let zeros = path_of(dir.path(), SessionId(2), Role::Target);
        let spoiled = path_of(dir.path(), SessionId(3), Role::Target);
        fs::write(&empty, []).expect("written");
        fs::write(&zeros, [0; SLOTS * SLOT_BYTES]).expect("written");
        fs::write(&spoiled, [0xff; SLOTS * SLOT_BYTES]).expect("written");
        fs::write(dir.path().join("notes.json"), "{}").expect("written");
        assert!(list(dir.path()).is_empty());
        let found = unreadable(dir.path()).expect("a folder");
        let said = |it: &Unreadable| (it.session.0, it.role, it.never_written, it.live);
        let all: Vec<_> = found.iter().map(said).collect();
        let expected = [
            (1, Role::Source, true, false),
            (2, Role::Target, true, false),
            (3, Role::Target, false, false),
        ];
        assert_eq!(all, expected);
        // As long as an agent has it, it is that agent's to write.
        let agent = File::open(&empty).expect("there");
        agent.try_lock().expect("nobody else's");
        let mut found = found.into_iter();
        let refused = found.next().expect("the first").remove().expect_err("it is in use");
        assert_eq!(refused.step, "locked");
        assert!(unreadable(dir.path()).expect("a folder")[0].live);
        drop(agent);
        for left in unreadable(dir.path()).expect("a folder") {
            left.remove().expect("removed");
        }
        assert!(unreadable(dir.path()).expect("a folder").is_empty());
        assert!(unreadable(&dir.path().join("none")).expect("no folder, no records").is_empty());
    }
}
