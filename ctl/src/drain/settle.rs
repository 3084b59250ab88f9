//! Brings what an earlier run left to its end, before anything else is begun: sessions of these
//! guests whose agents still live are waited for, those whose agents are gone are recovered.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use pageferry_datapath::recover::End;

use super::args::DrainArgs;
use super::error::DrainError;
use super::guest::Guest;
use super::ledger::{Ledger, Standing};
use super::table::{Fate, Row};
use super::view::View;
use crate::agent::failure;
use crate::agent::record::{self, Record, Role};
use crate::agent::recovery::{self, LOOK, RecoveryError, Side};

/// Every session of one of `guests` that this host has a record of. Returned are the rows of those
/// that can't be moved now.
pub(super) fn all(
    args: &DrainArgs,
    guests: &[Guest],
    ledger: &mut Ledger,
    cancel: &Receiver<()>,
    view: &mut View,
) -> Result<Vec<Row>, DrainError> {
    let mut rows = Vec::new();
    for guest in guests {
        for (path, record) in of(&args.state_dir, &guest.qmp) {
            let name = &guest.name;
            if args.dry_run {
                view.note(&format!("{name}: session {} would be ended first", record.session));
                continue;
            }
            if record::is_in_use(&path) {
                view.note(&format!("{name}: waiting for agent {}", record.agent));
            }
            match one(&path, args, cancel)? {
                None => {}
                Some(Ok(Fate::Moved)) => {
                    view.note(&format!("{name} is at its target: session {}", record.session));
                    let mut there = guest.clone();
                    there.to = Some(record.peer.clone());
                    ledger.note(&there, Standing::AtTarget, None)?;
                }
                Some(Ok(Fate::Stays)) => {
                    view.note(&format!("{name} runs here: session {} ended", record.session));
                }
                Some(Ok(fate)) => rows.push(unsettled(guest, &record, fate, None)),
                Some(Err(error)) => {
                    let fate = match &error {
                        RecoveryError::Run { .. } => Fate::Paused,
                        RecoveryError::Record(_)
                        | RecoveryError::Undecided { .. }
                        | RecoveryError::Silent { .. } => Fate::Uncertain,
                    };
                    rows.push(unsettled(guest, &record, fate, Some(error)));
                }
            }
        }
    }
    Ok(rows)
}

/// Records of the source's side for the QEMU behind a socket.
fn of(state_dir: &Path, qmp: &Path) -> Vec<(PathBuf, Record)> {
    let leads_to = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut records = record::list(state_dir);
    records.retain(|(_, record)| {
        record.role == Role::Source && leads_to(&record.qmp) == leads_to(qmp)
    });
    records
}

/// Waits for the agent, if it lives; then finds out what became of the session. `None` if it left no
/// doubt.
fn one(
    path: &Path,
    args: &DrainArgs,
    cancel: &Receiver<()>,
) -> Result<Option<Result<Fate, RecoveryError>>, DrainError> {
    while record::is_in_use(path) {
        if cancel.try_recv().is_ok() {
            return Err(DrainError::Interrupted);
        }
        thread::sleep(LOOK);
    }
    if !path.exists() {
        return Ok(None);
    }
    let until = Instant::now() + Duration::from_secs(args.wait);
    let end = Side::open(path).and_then(|mut side| side.recover_source(false, until));
    Ok(Some(end.map(|end| match end {
        End::RunsHere => Fate::Stays,
        End::TheOthers => Fate::Moved,
        End::Unknown | End::RunsTwice => Fate::Uncertain,
        End::Gone => Fate::Gone,
    })))
}

/// What became of a guest whose agent of this run ended without a word: its guard may still be at
/// it.
pub(super) fn after_a_crash(args: &DrainArgs, qmp: &Path) -> Option<Fate> {
    let (path, _) = of(&args.state_dir, qmp).pop()?;
    let never = crossbeam_channel::never();
    match one(&path, args, &never) {
        Ok(Some(Ok(fate))) => Some(fate),
        Ok(None) => None,
        Ok(Some(Err(_))) | Err(_) => Some(Fate::Uncertain),
    }
}

fn unsettled(guest: &Guest, record: &Record, fate: Fate, error: Option<RecoveryError>) -> Row {
    let session = record.session;
    let reason = match (error, fate) {
        (Some(error), _) => failure::chain("", &error),
        (None, Fate::Gone) => recovery::in_words(End::Gone, Role::Source).into(),
        (None, _) => recovery::in_words(End::Unknown, Role::Source).into(),
    };
    let hint = format!("pageferry recover {session} here and at {}", record.peer);
    let row = Row::without(&guest.name, fate, Some(record.peer.clone()));
    Row { session: Some(session.to_string()), ..row }.because(reason, Some(hint))
}
