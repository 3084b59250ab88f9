//! Which guests of a drain are at their target already, on disk: so that it can be run again.
//!
//! ```text
//!   STATE_DIR/drain.state   JSON, replaced as a whole (written beside, made durable, renamed)
//!   STATE_DIR/drain.lock    locked for as long as a drain lives
//! ```
//!
//! It decides nothing about who owns a guest: that is in the sessions' records. A guest whose QEMU
//! runs it here is here, whatever this says; one whose QEMU stands paused after a migration, or is
//! gone, is at its target if this says that it was moved.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::DrainError;
use super::guest::Guest;
use super::plan::Plan;
use super::table::Row;
use crate::agent::record;

/// How far a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Standing {
    /// It is to go.
    Waiting,
    /// A migration was begun.
    UnderWay,
    /// It runs there.
    AtTarget,
}

/// What is known of one guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// The guest; where it goes to is filled in once that was decided.
    pub(super) guest: Guest,
    /// How far it is.
    pub(super) standing: Standing,
    /// Of which run it was.
    run: u64,
    /// How its last migration went.
    pub(super) row: Option<Row>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Book {
    run: u64,
    entries: Vec<Entry>,
}

/// The ledger of a state directory.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    book: Book,
    /// `None` for one that only looks.
    lock: Option<File>,
}

impl Ledger {
    /// Opens the ledger in `dir`; to look only, or as the one drain that writes there.
    pub(super) fn open(dir: &Path, only_look: bool) -> Result<Self, DrainError> {
        let path = dir.join("drain.state");
        let failed = |source| DrainError::Ledger { path: path.clone(), source };
        let lock = match only_look {
            true => None,
            false => {
                record::create_dir(dir).map_err(failed)?;
                let file = File::create(dir.join("drain.lock")).map_err(failed)?;
                match file.try_lock() {
                    Ok(()) => Some(file),
                    Err(fs::TryLockError::WouldBlock) => return Err(DrainError::Busy { path }),
                    Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
                }
            }
        };
        let book = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Book::default(),
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { path, book, lock })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The guests of the run before.
    pub(super) fn guests(&self) -> Vec<Guest> {
        let of_it = self.book.entries.iter().filter(|entry| entry.run == self.book.run);
        of_it.map(|entry| entry.guest.clone()).collect()
    }

    /// What is known of the guest behind a socket.
    pub(super) fn entry(&self, qmp: &Path) -> Option<&Entry> {
        self.book.entries.iter().find(|entry| entry.guest.qmp == qmp)
    }

    /// How fast guests were moved before, on average.
    pub(super) fn rate(&self) -> Option<u64> {
        let rates = self.book.entries.iter().filter_map(|entry| entry.row.as_ref());
        let rates: Vec<u64> =
            rates.map(|row| row.bytes_per_second).filter(|rate| *rate > 0).collect();
        (!rates.is_empty()).then(|| rates.iter().sum::<u64>() / rates.len() as u64)
    }

    /// A run begins: its guests wait, but those at their target.
    pub(super) fn begin(&mut self, plan: &Plan) -> Result<(), DrainError> {
        self.book.run += 1;
        for (guest, at_target) in plan.guests() {
            let standing = if at_target { Standing::AtTarget } else { Standing::Waiting };
            self.put(guest, standing, None);
        }
        let run = self.book.run;
        // Of runs before it counts what may still stand paused here.
        self.book.entries.retain(|entry| {
            let there = entry.standing == Standing::AtTarget && entry.guest.qmp.exists();
            entry.run == run || there
        });
        self.write()
    }

    /// Notes how far a guest is.
    pub(super) fn note(
        &mut self,
        guest: &Guest,
        standing: Standing,
        row: Option<Row>,
    ) -> Result<(), DrainError> {
        self.put(guest.clone(), standing, row);
        self.write()
    }

    fn put(&mut self, guest: Guest, standing: Standing, row: Option<Row>) {
        let run = self.book.run;
        match self.book.entries.iter_mut().find(|entry| entry.guest.qmp == guest.qmp) {
            Some(entry) => {
                let row = row.or(entry.row.take());
                *entry = Entry { guest, standing, run, row };
            }
            None => self.book.entries.push(Entry { guest, standing, run, row }),
        }
    }

    fn write(&self) -> Result<(), DrainError> {
        if self.lock.is_none() {
            return Ok(());
        }
        let beside = self.path.with_extension("state.new");
        let text = serde_json::to_vec_pretty(&self.book).expect("a ledger is plain data");
        let written = File::create(&beside).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&beside, &self.path)
        });
        written.map_err(|source| DrainError::Ledger { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_there_for_the_next_run_and_one_drain_at_a_time_notes() {
        let dir = tempfile::tempdir().unwrap();
        let guest = |name: &str| Guest::at(format!("/run/{name}.qmp").into(), None);
        let mut ledger = Ledger::open(dir.path(), false).unwrap();
        ledger.book.run = 1;
        ledger.note(&guest("a"), Standing::UnderWay, None).unwrap();
        ledger.note(&guest("b"), Standing::Waiting, None).unwrap();
        ledger.note(&guest("a"), Standing::AtTarget, None).unwrap();
        assert!(matches!(Ledger::open(dir.path(), false), Err(DrainError::Busy { .. })));
        let looked = Ledger::open(dir.path(), true).unwrap();
        assert_eq!(looked.guests(), [guest("a"), guest("b")]);
        drop(ledger);
        let again = Ledger::open(dir.path(), false).unwrap();
        let standing = |name: &str| again.entry(&guest(name).qmp).map(|entry| entry.standing);
        assert_eq!(standing("a"), Some(Standing::AtTarget));
        assert_eq!((standing("b"), standing("c")), (Some(Standing::Waiting), None));
    }
}
