//! Both state machines in an imagined world, under seeded faults.
//!
//! Everything that a run does follows from its seed. A broken rule prints the seed and the one
//! command that repeats the run, step by step. `PAGEFERRY_SIM_RUNS` sets how many runs each test
//! makes.

mod check;
mod coverage;
mod desk;
mod disk;
mod flaws;
mod guest;
mod lanes;
mod messages;
mod pages;
mod random;
mod scenario;
mod source;
mod target;
mod tracking;
mod verdict;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use check::{Rule, Violation};
use coverage::Coverage;
use flaws::Flaw;
use world::{Ran, World};

/// Of each kind, in one test run: a few seconds.
const RUNS: u64 = 60_000;

/// Runs in which a flaw may hide.
const FLAW_RUNS: u64 = 100_000;

/// Transitions that no run takes, and why.
const OUT_OF_REACH: &[(&str, &str)] = &[
    ("source Attaching -Placed-> Unwinding", "there is no lane yet that could say so"),
    (
        "source Committed -Placed-> Done",
        "no round is on its way, and the clock ends the wait first",
    ),
    ("source Committed -Cancelled-> Done", "the clock ends the wait first"),
];

const TEST: &str = "no_rule_is_broken_and_every_transition_is_taken";

fn run_one(seed: u64, hostile: bool, flaw: Option<Flaw>, trace: bool) -> Ran {
    let ran = catch_unwind(AssertUnwindSafe(|| World::new(seed, hostile, flaw, trace).run()));
    ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let violation = Violation { rule: Rule::NoPanic, text: text.unwrap_or_default() };
        Ran { violation: Some(violation), coverage: Coverage::default() }
    })
}

/// As many seeds as that on all cores; the first that breaks a rule ends it.
fn run_all(runs: u64, hostile: bool) -> Coverage {
    let threads = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let all_of = |thread: u64| {
        let mut coverage = Coverage::default();
        for seed in (thread..runs).step_by(threads as usize) {
            let ran = run_one(seed, hostile, None, false);
            if let Some(Violation { rule, text }) = ran.violation {
                return Err((seed, rule, text));
            }
            coverage.add(&ran.coverage);
        }
        Ok(coverage)
    };
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|it| scope.spawn(move || all_of(it))).collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught")).collect()
    });
    let mut coverage = Coverage::default();
    for result in results {
        match result {
            Ok(part) => coverage.add(&part),
            Err((seed, rule, text)) => {
                let seed = if hostile { format!("hostile-{seed}") } else { seed.to_string() };
                panic!(
                    "seed {seed} broke {rule:?}: {text}\nrepeat it with: PAGEFERRY_SEED={seed} \
                     cargo test -p pageferry-datapath --test simulation -- {TEST} --nocapture"
                )
            }
        }
    }
    coverage
}

/// One run, step by step.
fn repeat(seed: &str) {
    let (hostile, number) = match seed.strip_prefix("hostile-") {
        Some(number) => (true, number),
        None => (false, seed),
    };
    let ran = run_one(number.parse().expect("a seed"), hostile, None, true);
    assert!(ran.violation.is_none(), "seed {seed}: {:?}", ran.violation);
}

#[test]
fn no_rule_is_broken_and_every_transition_is_taken() {
    if let Ok(seed) = std::env::var("PAGEFERRY_SEED") {
        return repeat(&seed);
    }
    let runs = std::env::var("PAGEFERRY_SIM_RUNS").ok();
    let runs = runs.map_or(RUNS, |text| text.parse().expect("a number of runs"));
    let mut coverage = run_all(runs, false);
    // What only a liar brings about is a transition too.
    coverage.add(&run_all(runs, true));
    let (count, missing) = coverage.missing();
    println!("{} of {count} transitions taken; not taken: {missing:#?}", count - missing.len());
    let known = |step: &String| OUT_OF_REACH.iter().any(|(known, _)| known == step);
    let mistaken: Vec<_> =
        OUT_OF_REACH.iter().filter(|(it, _)| !missing.iter().any(|m| m == it)).collect();
    assert!(mistaken.is_empty(), "taken after all: {mistaken:?}");
    let unexplained: Vec<_> = missing.iter().filter(|step| !known(step)).collect();
    assert!(runs < RUNS || unexplained.is_empty(), "never taken: {unexplained:#?}");
}

#[test]
fn every_flaw_is_found() {
    for (flaw, rules) in Flaw::ALL {
        let found = (0..FLAW_RUNS).find_map(|seed| {
            let violation = run_one(seed, false, Some(*flaw), false).violation?;
            Some((seed, violation))
        });
        let (seed, violation) = found.unwrap_or_else(|| panic!("{flaw:?} was not found"));
        println!("{flaw:?}: seed {seed}, {:?}: {}", violation.rule, violation.text);
        assert!(rules.contains(&violation.rule), "{flaw:?}: {violation:?}");
    }
}
