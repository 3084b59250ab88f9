//! The two state machines that ship, in a small world, searched through: every order of events, with
//! every place for a given number of faults.
//!
//! The world is as small as it can be for the rules to be broken in it: two pages of which one is a
//! hole, two writes of the guest, one lane, one migration. Within it nothing is left to chance:
//! whatever can happen next is tried, until no state is new. Time is not counted: a wait ends early
//! only as a fault ("delay"), and by itself when nothing else can happen.
//!
//! `PAGEFERRY_MODEL_FAULTS=3 PAGEFERRY_MODEL_WRITES=0 cargo test ... one_search_as_asked_for` asks for
//! that many faults in one migration and writes of the guest; SPECIFICATION.md has the figures.

mod agent;
mod faults;
mod flaws;
mod messages;
mod recovery;
mod rules;
mod search;
mod source;
mod target;
mod world;

use flaws::Flaw;
use rules::Rule;
use search::{Found, search};
use world::Setting;

/// States at which a search stops and says that it did not come to its end: 4 GiB of them.
const STATES_MAX: usize = 200_000_000;

/// A whole search, which has to find nothing.
fn find_nothing(setting: Setting) -> Found {
    let found = search(setting, STATES_MAX);
    println!("{setting:?}: {found}");
    if let Some((violation, path)) = &found.violation {
        panic!("{violation:?}\n{}", path.join("\n"));
    }
    assert!(found.complete, "stopped at the limit of states");
    found
}

#[test]
fn no_order_of_events_and_no_fault_breaks_a_rule() {
    find_nothing(Setting { faults: 1, ..Setting::default() });
}

#[test]
fn nor_do_two_faults_while_the_guest_is_idle() {
    find_nothing(Setting { faults: 2, writes: 0, ..Setting::default() });
}

#[test]
fn nor_with_another_round_drain_points_and_digests() {
    find_nothing(Setting { faults: 1, writes: 1, rounds: true, ..Setting::default() });
    find_nothing(Setting { faults: 1, writes: 1, drain: true, ..Setting::default() });
    find_nothing(Setting { faults: 1, writes: 1, verify: true, ..Setting::default() });
}

#[test]
fn one_search_as_asked_for() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let Some(faults) = number("PAGEFERRY_MODEL_FAULTS") else { return };
    let writes = number("PAGEFERRY_MODEL_WRITES").unwrap_or(2);
    let recovers = number("PAGEFERRY_MODEL_RECOVERS").unwrap_or(0);
    find_nothing(Setting { faults, writes, recovers, ..Setting::default() });
}

#[test]
fn nor_does_recover_on_either_side_after_two_faults() {
    find_nothing(Setting { faults: 2, writes: 0, recovers: 1, ..Setting::default() });
}

#[test]
fn a_false_word_that_the_other_side_is_dead_runs_the_guest_twice() {
    let honest = Setting { faults: 1, writes: 0, recovers: 1, ..Setting::default() };
    let found = search(Setting { false_word: true, ..honest }, STATES_MAX);
    let (violation, path) = found.violation.expect("as SECURITY.md says");
    assert_eq!(violation.rule, Rule::OneOwner, "{violation:?}\n{}", path.join("\n"));
    assert!(path.iter().any(|step| step.contains("true")), "{}", path.join("\n"));
}

#[test]
fn what_goes_well_is_reached() {
    let found = find_nothing(Setting { faults: 0, ..Setting::default() });
    assert!(found.migrated > 0 && found.recoverable == 0, "{found}");
    let found = find_nothing(Setting { faults: 1, writes: 0, ..Setting::default() });
    assert!(found.at_source > 0 && found.recoverable > 0, "{found}");
}

#[test]
fn every_flaw_is_found() {
    for (flaw, faults, rules) in Flaw::ALL {
        // What it takes two faults to find has to do with owners, not with what is written.
        let recovers = flaw.recovers();
        let writes = if *faults < 2 && recovers == 0 { 2 } else { 0 };
        let (faults, flaw) = (*faults, Some(*flaw));
        let setting = Setting { faults, writes, recovers, flaw, ..Setting::default() };
        let found = search(setting, STATES_MAX);
        let (violation, path) = found.violation.unwrap_or_else(|| panic!("{flaw:?} was not found"));
        println!("{flaw:?}: {violation:?} after {} steps, {} states", path.len(), found.states);
        assert!(rules.contains(&violation.rule), "{flaw:?}: {violation:?}\n{}", path.join("\n"));
    }
}
