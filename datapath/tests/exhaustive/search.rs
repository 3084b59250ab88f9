//! Through all states, depth first; a state that was seen before is not gone into again.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};

use crate::rules::{End, Violation};
use crate::world::{Setting, Step, World};

/// What a search has seen.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) states: usize,
    steps: usize,
    /// Steps of the longest way.
    depth: usize,
    took: Duration,
    /// Nothing was left out.
    pub(crate) complete: bool,
    /// Ends of each kind.
    pub(crate) migrated: usize,
    pub(crate) at_source: usize,
    pub(crate) recoverable: usize,
    pub(crate) gone: usize,
    pub(crate) violation: Option<(Violation, Vec<String>)>,
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} states, {} steps, at most {} deep, {:.1} s, {}; ends: {} at the target, {} at the \
             source, {} paused and recoverable, {} gone with their host",
            self.states,
            self.steps,
            self.depth,
            self.took.as_secs_f64(),
            if self.complete { "complete" } else { "not complete" },
            self.migrated,
            self.at_source,
            self.recoverable,
            self.gone,
        )
    }
}

/// The fingerprints are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only whole numbers")
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

/// A state on the way to the one that is looked at, with what of it was not gone into yet.
struct Fork {
    world: World,
    steps: Vec<Step>,
    taken: Option<Step>,
}

impl Fork {
    fn at(world: World) -> Self {
        let steps = world.steps();
        Self { world, steps, taken: None }
    }
}

pub(crate) fn search(setting: Setting, states_max: usize) -> Found {
    let began = Instant::now();
    let mut found = Found::default();
    let mut seen: HashSet<u64, BuildHasherDefault<AsItIs>> = HashSet::default();
    let first = World::new(setting);
    seen.insert(first.fingerprint());
    let mut way = vec![Fork::at(first)];
    found.complete = true;
    while let Some(fork) = way.last_mut() {
        let Some(step) = fork.steps.pop() else {
            way.pop();
            continue;
        };
        fork.taken = Some(step);
        let mut world = fork.world.clone();
        world.take(step);
        found.steps += 1;
        if world.violation.is_none() && !seen.insert(world.fingerprint()) {
            continue;
        }
        let mut next = Fork::at(world);
        if next.steps.iter().all(|step| matches!(step, Step::Fault(_))) {
            let count = match next.world.check_end() {
                End::Migrated => &mut found.migrated,
                End::AtSource => &mut found.at_source,
                End::Recoverable => &mut found.recoverable,
                End::Gone => &mut found.gone,
            };
            *count += 1;
        }
        if let Some(violation) = next.world.violation.take() {
            let told = way.iter().filter_map(|fork| fork.taken).map(|step| format!("{step:?}"));
            found.violation = Some((violation, told.collect()));
            found.complete = false;
            break;
        }
        way.push(next);
        found.depth = found.depth.max(way.len() - 1);
        if seen.len() >= states_max {
            found.complete = false;
            break;
        }
    }
    found.states = seen.len();
    found.took = began.elapsed();
    found
}
