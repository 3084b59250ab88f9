//! The private folder of one experiment, and the journal that lets a later process clean up.
//!
//! Guards undo what they did when they are dropped. A process that is killed drops nothing, so
//! each thing that outlives a process is written down in the folder *before* it is made; the next
//! laboratory of this machine replays, backwards, the journals of processes that are gone. Every
//! entry can be undone twice without harm.
//!
//! ```text
//! TMP/pageferry-lab-PID-N/owner      "PID START_TIME"
//! TMP/pageferry-lab-PID-N/journal    one Undo a line
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::{LabError, io};
use super::{command, hugepages};
use crate::host::start_time;

const PREFIX: &str = "pageferry-lab-";
const OWNER: &str = "owner";
const JOURNAL: &str = "journal";

/// A private folder; everything in it, and everything in its journal, goes when it is dropped.
/// Each guard of the laboratory holds one, so that it goes last.
#[derive(Debug)]
pub struct Workplace {
    folder: PathBuf,
    serial: u32,
    journal: Mutex<File>,
}

/// One thing to take back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Undo {
    /// A process, told from a later one of the same number by its start time.
    Kill { pid: u32, start_time: u64 },
    /// A network namespace by name, and the devices in it.
    Namespace { name: String },
    /// A mount.
    Unmount { path: PathBuf },
    /// Huge pages of 2 MiB to give back.
    HugePages { count: u64 },
    /// An empty folder, such as a control group.
    Folder { path: PathBuf },
    /// A file outside the private folder.
    File { path: PathBuf },
}

impl Workplace {
    /// Makes a folder for this experiment, after cleaning up behind processes that are gone.
    pub fn new() -> Result<Arc<Self>, LabError> {
        static SWEPT: Once = Once::new();
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        SWEPT.call_once(clean_up_behind_the_dead);
        let serial = SERIAL.fetch_add(1, Relaxed);
        let pid = std::process::id();
        let folder = std::env::temp_dir().join(format!("{PREFIX}{pid}-{serial}"));
        fs::create_dir(&folder).map_err(io("create", &folder))?;
        let owner = folder.join(OWNER);
        fs::write(&owner, format!("{pid} {}", start_time(pid).unwrap_or(0)))
            .map_err(io("write", &owner))?;
        let path = folder.join(JOURNAL);
        let journal = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .map_err(io("create", &path))?;
        Ok(Arc::new(Self { folder, serial, journal: Mutex::new(journal) }))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A short word that no other living laboratory on this machine uses: it fits in the name of
    /// a network device with three letters to spare.
    pub fn unique_word(&self) -> String {
        format!("pf{}n{}", std::process::id(), self.serial)
    }

    /// Writes down what is about to be made.
    pub(crate) fn promise(&self, undo: &Undo) -> Result<(), LabError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(journal, "{}", undo.to_line()).map_err(io("write", &self.folder.join(JOURNAL)))
    }

    /// Takes a promise back. Huge pages are counted and not named, so undoing them twice would take
    /// someone else's; for everything else a promise may stay.
    pub(crate) fn strike_out(&self, undo: &Undo) {
        let _journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.folder.join(JOURNAL);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let line = undo.to_line();
        let mut lines: Vec<&str> = text.lines().collect();
        if let Some(at) = lines.iter().position(|kept| *kept == line) {
            lines.remove(at);
            // The journal is open for appending, so the next promise lands after what is written.
            let _ = fs::write(&path, lines.iter().map(|l| format!("{l}\n")).collect::<String>());
        }
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        // Guards may have been forgotten or dropped in an odd order; the journal knows them all.
        undo_journal(&self.folder);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Undo {
    fn to_line(&self) -> String {
        match self {
            Self::Kill { pid, start_time } => format!("kill {pid} {start_time}"),
            Self::Namespace { name } => format!("namespace {name}"),
            Self::Unmount { path } => format!("unmount {}", path.display()),
            Self::HugePages { count } => format!("hugepages {count}"),
            Self::Folder { path } => format!("folder {}", path.display()),
            Self::File { path } => format!("file {}", path.display()),
        }
    }

    fn from_line(line: &str) -> Option<Self> {
        let (kind, rest) = line.split_once(' ')?;
        Some(match kind {
            "kill" => {
                let (pid, start_time) = rest.split_once(' ')?;
                Self::Kill { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? }
            }
            "namespace" => Self::Namespace { name: rest.to_owned() },
            "unmount" => Self::Unmount { path: rest.into() },
            "hugepages" => Self::HugePages { count: rest.parse().ok()? },
            "folder" => Self::Folder { path: rest.into() },
            "file" => Self::File { path: rest.into() },
            _ => return None,
        })
    }

    /// Takes it back, if it is still there. Failing is not an error: it may be gone already.
    pub(crate) fn undo(&self) {
        match self {
            Self::Kill { pid, start_time: then } => {
                if start_time(*pid) == Some(*then) {
                    let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
                    for _ in 0..100 {
                        if start_time(*pid) != Some(*then) {
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            }
            Self::Namespace { name } => {
                if Path::new("/run/netns").join(name).exists() {
                    let _ = command::run(&format!("ip netns delete {name}"));
                }
            }
            Self::Unmount { path } => {
                let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
            }
            Self::HugePages { count } => hugepages::give_back(*count),
            Self::Folder { path } => {
                let _ = fs::remove_dir(path);
            }
            Self::File { path } => {
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn undo_journal(folder: &Path) {
    let text = fs::read_to_string(folder.join(JOURNAL)).unwrap_or_default();
    for line in text.lines().rev() {
        if let Some(undo) = Undo::from_line(line) {
            undo.undo();
        }
    }
}

fn clean_up_behind_the_dead() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let folder = entry.path();
        let owner = fs::read_to_string(folder.join(OWNER)).unwrap_or_default();
        let dead = owner.split_once(' ').is_some_and(|(pid, then)| {
            let now = pid.parse().ok().and_then(start_time).map(|now| now.to_string());
            now.as_deref() != Some(then)
        });
        if dead {
            undo_journal(&folder);
            let _ = fs::remove_dir_all(&folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_survives_the_journal() {
        let entries = [
            Undo::Kill { pid: 12, start_time: 345 },
            Undo::Namespace { name: "pf1n0a".into() },
            Undo::Unmount { path: "/tmp/a b".into() },
            Undo::HugePages { count: 7 },
            Undo::Folder { path: "/sys/x".into() },
            Undo::File { path: "/dev/shm/x".into() },
        ];
        for undo in entries {
            assert_eq!(Undo::from_line(&undo.to_line()), Some(undo));
        }
    }

    #[test]
    fn a_dropped_workplace_undoes_its_journal() {
        let workplace = Workplace::new().expect("a workplace");
        let outside = tempfile::NamedTempFile::new().expect("a file").keep().expect("kept").1;
        workplace.promise(&Undo::File { path: outside.clone() }).expect("promised");
        let folder = workplace.path().to_owned();
        drop(workplace);
        assert!(!outside.exists() && !folder.exists());
    }
}
