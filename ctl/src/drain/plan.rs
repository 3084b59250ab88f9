//! In which order guests go, where to, and how long that will take. Decided before the first is
//! moved, and shown.

use std::collections::HashMap;
use std::time::Duration;

use pageferry_datapath::source::Failure;

use super::agent;
use super::args::{DrainArgs, Order, Spread};
use super::ask::{self, No};
use super::error::DrainError;
use super::guest::Guest;
use super::survey::{Facts, Surveyed};
use super::table::{Fate, Row};
use crate::agent::source::SourceOptions;
use crate::migrate;

/// One guest that is to go.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// The guest; where to is filled in.
    pub(super) guest: Guest,
    /// Its target.
    pub(super) to: String,
    /// What is known of it.
    pub(super) facts: Facts,
    /// How long it will take; `None` where nobody knows how fast it goes, or it writes faster.
    pub(super) estimate: Option<Duration>,
    /// What its agent will be told.
    options: SourceOptions,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Plan {
    /// Guests that are to go, in this order.
    pub(super) steps: Vec<Step>,
    /// Guests that are not, with their rows.
    pub(super) rows: Vec<(Guest, Row)>,
    /// Guests on their way at the same time.
    pub(super) parallel: usize,
}

impl Plan {
    /// Orders guests and spreads them over targets. `rate` is how fast guests went before.
    pub(super) fn make(
        args: &DrainArgs,
        surveyed: Vec<Surveyed>,
        rate: Option<u64>,
    ) -> Result<Self, DrainError> {
        let (mut here, mut rows) = (Vec::new(), Vec::new());
        for (guest, found) in surveyed {
            match found {
                Ok(facts) => here.push((guest, facts)),
                Err(row) => rows.push((guest, *row)),
            }
        }
        sort(&mut here, args.order);
        let parallel = (args.parallel as usize).min(here.len()).max(1);
        let each = match args.max_bandwidth {
            Some(budget) => Some(budget.bytes_per_second / parallel as u64),
            None => rate,
        };
        let mut targets = Targets::new(args);
        let mut steps = Vec::new();
        for (mut guest, facts) in here {
            let to = targets.choose(&guest, facts.guest_bytes())?;
            guest.target_qmp = Some(guest.target_qmp(args.target_qmp.as_deref()));
            guest.to = Some(to.clone());
            let options = migrate::options(&agent::parsed(args, &guest)?);
            let estimate = each.and_then(|rate| estimate(&facts, rate));
            steps.push(Step { guest, to, facts, estimate, options });
        }
        Ok(Self { steps, rows, parallel })
    }

    /// Asks each target whether it would take its guests in; those that it would not are refused.
    pub(super) fn ask_targets(&mut self) {
        let mut unreachable: HashMap<String, Failure> = HashMap::new();
        for step in std::mem::take(&mut self.steps) {
            let answer = match unreachable.get(&step.to) {
                Some(failure) => Err(failure.clone()),
                None => match ask::would_take(&step.options, &step.facts.offered) {
                    Ok(()) => Ok(()),
                    Err(No::Refused(failure)) => Err(failure),
                    Err(No::Unreachable(failure)) => {
                        unreachable.insert(step.to.clone(), failure.clone());
                        Err(failure)
                    }
                },
            };
            match answer {
                Ok(()) => self.steps.push(step),
                Err(failure) => {
                    let row = Row::without(&step.guest.name, Fate::Refused, Some(step.to));
                    let row = Row { guest_bytes: step.facts.guest_bytes(), ..row };
                    self.rows.push((step.guest, row.because(failure.text, failure.hint)));
                }
            }
        }
    }

    /// Whether a guest that should go can't.
    pub(super) fn has_refused(&self) -> bool {
        self.rows.iter().any(|(_, row)| !row.is_there())
    }

    /// Every guest, and whether it is at its target already.
    pub(super) fn guests(&self) -> impl Iterator<Item = (Guest, bool)> {
        let rows = self.rows.iter().map(|(guest, row)| (guest.clone(), row.is_there()));
        rows.chain(self.steps.iter().map(|step| (step.guest.clone(), false)))
    }

    /// How long all of it will take, if that can be told.
    pub(super) fn estimate(&self) -> Option<Duration> {
        let all: Option<Duration> = self.steps.iter().map(|step| step.estimate).sum();
        Some(all? / self.parallel as u32)
    }

    /// Rows of a plan that is not carried out.
    pub(super) fn into_rows(self) -> Vec<Row> {
        let rows = self.rows.into_iter().map(|(_, row)| row);
        rows.chain(self.steps.into_iter().map(Step::left)).collect()
    }
}

impl Step {
    /// The row of a guest whose turn does not come.
    pub(super) fn left(self) -> Row {
        let guest_bytes = self.facts.guest_bytes();
        Row { guest_bytes, ..Row::without(&self.guest.name, Fate::Left, Some(self.to)) }
    }
}

/// Stable: of equals the one that was listed first goes first.
fn sort(guests: &mut [(Guest, Facts)], order: Order) {
    match order {
        Order::AsListed => {}
        Order::SmallestFirst => guests.sort_by_key(|(_, facts)| facts.populated_bytes()),
        // Of whom nobody knows, they come last.
        Order::LeastDirtyFirst => guests.sort_by_key(|(_, facts)| {
            (facts.dirty_bytes_per_second.unwrap_or(u64::MAX), facts.populated_bytes())
        }),
    }
}

/// One pass over what there is, and what the guest writes meanwhile.
fn estimate(facts: &Facts, bytes_per_second: u64) -> Option<Duration> {
    let dirty = facts.dirty_bytes_per_second.unwrap_or(0);
    let left = bytes_per_second.checked_sub(dirty).filter(|left| *left > 0)?;
    Some(Duration::from_secs_f64(facts.populated_bytes() as f64 / left as f64))
}

/// Targets for guests that name none.
struct Targets {
    spread: Spread,
    /// Each with the guest memory that it was given.
    given: Vec<(String, u64)>,
    next: usize,
}

impl Targets {
    fn new(args: &DrainArgs) -> Self {
        let given = args.to.iter().map(|to| (to.clone(), 0)).collect();
        Self { spread: args.spread, given, next: 0 }
    }

    fn choose(&mut self, guest: &Guest, bytes: u64) -> Result<String, DrainError> {
        let index = match (&guest.to, self.spread) {
            (Some(to), _) => {
                let known = self.given.iter().position(|(given, _)| given == to);
                let Some(index) = known else { return Ok(to.clone()) };
                index
            }
            (None, _) if self.given.is_empty() => {
                return Err(DrainError::NoTarget { name: guest.name.clone() });
            }
            (None, Spread::LeastLoaded) => {
                let loads = self.given.iter().enumerate();
                loads.min_by_key(|(_, (_, load))| *load).map_or(0, |(index, _)| index)
            }
            (None, Spread::RoundRobin) => {
                self.next += 1;
                (self.next - 1) % self.given.len()
            }
        };
        self.given[index].1 += bytes;
        Ok(self.given[index].0.clone())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;
    use pageferry_datapath::control::RegionOffer;

    use super::*;
    use crate::agent::monitor::GuestFacts;
    use crate::cli::{Cli, Command};

    fn args(words: &[&str]) -> DrainArgs {
        let words = [&["pageferry", "drain", "--qmp-dir", "/none", "--insecure"], words].concat();
        match Cli::parse_from(words).command {
            Command::Drain(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn guest(name: &str, mib: u64, dirty_mib: Option<u64>) -> Surveyed {
        let region = RegionOffer {
            name: "ram".into(),
            bytes: mib << 20,
            page_bytes: 4096,
            backing: String::new(),
            populated_bytes: mib << 20,
        };
        let offered = GuestFacts { regions: vec![region], ..GuestFacts::default() };
        let dirty_bytes_per_second = dirty_mib.map(|mib| mib << 20);
        let facts = Facts { offered, dirty_bytes_per_second };
        (Guest::at(format!("/run/{name}.qmp").into(), None), Ok(facts))
    }

    /// Two guests of 100 MiB, side by side to one target.
    pub(in crate::drain) fn plan() -> Plan {
        let words = ["--to", "x:1", "--parallel", "2", "--max-bandwidth", "104857600B"];
        let guests = vec![guest("a", 100, None), guest("b", 100, None)];
        Plan::make(&args(&words), guests, None).unwrap()
    }

    fn planned(words: &[&str], guests: &[Surveyed]) -> Vec<(String, String)> {
        let plan = Plan::make(&args(words), guests.to_vec(), None).unwrap();
        plan.steps.into_iter().map(|step| (step.guest.name, step.to)).collect()
    }

    fn pairs(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
        wanted.iter().map(|(name, to)| ((*name).into(), (*to).into())).collect()
    }

    #[test]
    fn guests_go_in_order_and_are_spread_by_memory_or_in_turn() {
        let guests = [guest("a", 400, Some(9)), guest("b", 100, None), guest("c", 200, Some(1))];
        let to = ["--to", "x:1", "--to", "y:1"];
        let with = |more: &[&'static str]| planned(&[&to[..], more].concat(), &guests);
        assert_eq!(with(&[]), pairs(&[("a", "x:1"), ("b", "y:1"), ("c", "y:1")]));
        let smallest = pairs(&[("b", "x:1"), ("c", "y:1"), ("a", "x:1")]);
        assert_eq!(with(&["--order", "smallest-first"]), smallest);
        let dirty = with(&["--order", "least-dirty-first", "--spread", "round-robin"]);
        assert_eq!(dirty, pairs(&[("c", "x:1"), ("a", "y:1"), ("b", "x:1")]));
        let mut own = guests.clone();
        own[0].0.to = Some("z:1".into());
        assert_eq!(planned(&to, &own), pairs(&[("a", "z:1"), ("b", "x:1"), ("c", "y:1")]));
        let nowhere = Plan::make(&args(&[]), guests.to_vec(), None);
        assert!(matches!(nowhere, Err(DrainError::NoTarget { name }) if name == "a"));
    }

    #[test]
    fn an_estimate_counts_what_is_written_meanwhile() {
        let guests = [guest("a", 100, Some(50)), guest("b", 100, None), guest("c", 100, Some(200))];
        let words = ["--to", "x:1", "--max-bandwidth", "209715200B"];
        let plan = |more: &[&'static str], guests: &[Surveyed]| {
            Plan::make(&args(&[&words[..], more].concat()), guests.to_vec(), None).unwrap()
        };
        let of = |plan: &Plan| -> Vec<Option<u128>> {
            plan.steps.iter().map(|step| step.estimate.map(|it| it.as_millis())).collect()
        };
        let serial = plan(&[], &guests);
        assert_eq!(of(&serial), [Some(666), Some(500), None]);
        assert_eq!(serial.estimate(), None);
        let parallel = plan(&["--parallel", "2"], &guests[..2]);
        assert_eq!(of(&parallel), [Some(2000), Some(1000)]);
        assert_eq!(parallel.estimate(), Some(Duration::from_millis(1500)));
    }

    #[test]
    fn options_of_migrate_are_checked_before_anything_is_done() {
        let guests = [guest("a", 100, None)];
        let make = |more: &[&str]| {
            Plan::make(&args(&[&["--to", "x:1", "--"][..], more].concat()), guests.to_vec(), None)
        };
        assert!(make(&["--verify", "--downtime-ms", "100"]).is_ok());
        for bad in [&["--downtime"][..], &["--qmp", "/other"], &["--downtime-ms", "soon"]] {
            assert!(matches!(make(bad), Err(DrainError::Options { .. })), "{bad:?}");
        }
    }
}
