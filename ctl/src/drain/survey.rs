//! Looks at each guest before the first is moved: is it here, can it be moved, how much is it.
//!
//! Asks and reads, changes nothing.

use pageferry_datapath::source::Failure;

use super::args::{DrainArgs, Order};
use super::dirty;
use super::error::DrainError;
use super::guest::Guest;
use super::ledger::{Entry, Ledger, Standing};
use super::table::{Fate, Row};
use super::view::View;
use crate::agent::monitor::{GuestFacts, SourceMonitor};
use crate::cli::Scan;
use crate::qemu::runstate::RunState;
use crate::qemu::source::QemuSource;
use crate::qmp::{Qmp, QmpError};

/// What is known of a guest that can be moved, as far as this host can tell.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// What its agent will offer.
    pub(super) offered: GuestFacts,
    /// How fast it writes; `None` where nobody knows.
    pub(super) dirty_bytes_per_second: Option<u64>,
}

impl Facts {
    /// All of its memory.
    pub(super) fn guest_bytes(&self) -> u64 {
        self.offered.regions.iter().map(|region| region.bytes).sum()
    }

    /// What of it is not holes.
    pub(super) fn populated_bytes(&self) -> u64 {
        self.offered.regions.iter().map(|region| region.populated_bytes).sum()
    }
}

/// A guest, and what is known of it: facts, or its row in the table already.
pub(super) type Surveyed = (Guest, Result<Facts, Box<Row>>);

/// Looks at all of them.
pub(super) fn all(
    args: &DrainArgs,
    guests: Vec<Guest>,
    unsettled: Vec<Row>,
    ledger: &Ledger,
    view: &mut View,
) -> Result<Vec<Surveyed>, DrainError> {
    let look = |guest: Guest| match unsettled.iter().find(|row| row.guest == guest.name) {
        Some(row) => (guest, Err(Box::new(row.clone()))),
        None => {
            let found = look(&guest, ledger.entry(&guest.qmp));
            (guest, found)
        }
    };
    let mut surveyed: Vec<Surveyed> = guests.into_iter().map(look).collect();
    if args.dry_run || args.order == Order::LeastDirtyFirst {
        view.note("sampling how fast guests write");
        dirty::sample(&mut surveyed);
    }
    Ok(surveyed)
}

fn look(guest: &Guest, known: Option<&Entry>) -> Result<Facts, Box<Row>> {
    if let Some(entry) = known
        && is_away(guest, entry)
    {
        let before = Row::without(&guest.name, Fate::MovedBefore, entry.guest.to.clone());
        let row = entry.row.clone().filter(Row::is_there).unwrap_or(before);
        return Err(Box::new(Row { guest: guest.name.clone(), outcome: Fate::MovedBefore, ..row }));
    }
    match QemuSource::inspect(&guest.qmp, Scan::Auto) {
        Ok(monitor) => Ok(Facts { offered: monitor.facts().clone(), dirty_bytes_per_second: None }),
        Err(Failure { text, hint, .. }) => {
            let row = Row::without(&guest.name, Fate::Refused, guest.to.clone());
            Err(Box::new(row.because(text, hint)))
        }
    }
}

/// Whether a guest that a run before moved, or was moving when it was killed, is not here any more.
/// Sessions are settled by now: one that left no record left no doubt.
fn is_away(guest: &Guest, entry: &Entry) -> bool {
    match Qmp::connect(&guest.qmp) {
        Ok(qmp) => {
            let state = RunState::query(&qmp);
            entry.standing != Standing::Waiting
                && state.is_ok_and(|state| !state.running && state.status == "postmigrate")
        }
        // Its QEMU here has been ended.
        Err(QmpError::Connect { .. }) => entry.standing == Standing::AtTarget,
        Err(_) => false,
    }
}
