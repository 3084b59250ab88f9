//! `pageferry drain`: many guests to one or several targets, in one command.
//!
//! ```text
//!   list ── settle ── survey ── plan ── crew ── table
//!   which   what an   what they who     N `pageferry migrate` at a time, each a
//!   guests  earlier   are, what when,   process of its own
//!           run left  is unfit  where to
//! ```
//!
//! A guest that fails stays where it was and stops no other. Each migration is a process of its own:
//! what goes wrong in one (a panic, a kill) is its own guard's affair, its rights are its own to
//! drop, and if the drain itself is killed those under way come to their end. They share one budget
//! (`agent::shares`), and say how far they are on their standard output.

mod agent;
mod args;
mod ask;
mod budget;
mod crew;
mod dirty;
mod error;
mod guest;
mod ledger;
mod libvirt;
mod list;
mod plan;
mod settle;
mod survey;
mod table;
mod view;

use crossbeam_channel::Receiver;

pub use self::args::{DrainArgs, Order, Spread};
use self::budget::Budget;
use self::crew::Crew;
pub use self::error::DrainError;
pub use self::guest::Guest;
use self::ledger::Ledger;
use self::plan::Plan;
use self::table::Table;
pub use self::table::{Fate, Row};
use self::view::View;
use crate::report::exit::Exit;

/// Runs the subcommand.
pub fn run(args: &DrainArgs, cancel: &Receiver<()>) -> Exit {
    let mut view = View::new(args.json);
    match drain(args, cancel, &mut view) {
        Ok(exit) => exit,
        Err(error) => {
            view.complain(&crate::agent::failure::chain("drain", &error), error.hint().as_deref());
            error.exit()
        }
    }
}

/// The whole of it. Until the crew begins nothing is touched, but what an earlier run left undone.
fn drain(args: &DrainArgs, cancel: &Receiver<()>, view: &mut View) -> Result<Exit, DrainError> {
    let guests = list::guests(args, &Ledger::open(&args.state_dir, true)?, view)?;
    let mut ledger = Ledger::open(&args.state_dir, args.dry_run)?;
    let unsettled = settle::all(args, &guests, &mut ledger, cancel, view)?;
    let surveyed = survey::all(args, guests, unsettled, &ledger, view)?;
    let mut plan = Plan::make(args, surveyed, ledger.rate())?;
    plan.ask_targets();
    view.plan(&plan);
    if args.dry_run || args.all_or_nothing && plan.has_refused() {
        return Ok(Table::new(plan.into_rows()).exit_of_plan());
    }
    let budget = Budget::keep(args)?;
    ledger.begin(&plan)?;
    let table = Crew::new(args, plan, budget, ledger, view).run(cancel);
    view.table(&table);
    if let Some(path) = &args.csv {
        table.write_csv(path)?;
    }
    Ok(table.exit())
}
