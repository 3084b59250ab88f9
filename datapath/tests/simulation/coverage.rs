//! Which transitions of both tables the runs have taken.

use std::collections::BTreeMap;

use pageferry_datapath::{source, target};

type SourceStep = (source::Phase, source::InputKind, source::Phase);
type TargetStep = (target::Phase, target::InputKind, target::Phase);

#[derive(Default)]
pub(crate) struct Coverage {
    /// By the numbers of phases and kind: how often.
    taken: BTreeMap<(bool, u8, u8, u8), u64>,
}

impl Coverage {
    pub(crate) fn source(
        &mut self,
        from: source::Phase,
        kind: source::InputKind,
        to: source::Phase,
    ) {
        *self.taken.entry((true, from as u8, kind as u8, to as u8)).or_default() += 1;
    }

    pub(crate) fn target(
        &mut self,
        from: target::Phase,
        kind: target::InputKind,
        to: target::Phase,
    ) {
        *self.taken.entry((false, from as u8, kind as u8, to as u8)).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (step, times) in &other.taken {
            *self.taken.entry(*step).or_default() += times;
        }
    }

    fn source_took(&self, (from, kind, to): SourceStep) -> bool {
        self.taken.contains_key(&(true, from as u8, kind as u8, to as u8))
    }

    fn target_took(&self, (from, kind, to): TargetStep) -> bool {
        self.taken.contains_key(&(false, from as u8, kind as u8, to as u8))
    }

    /// The transitions of both tables, and of them those not taken.
    pub(crate) fn missing(&self) -> (usize, Vec<String>) {
        let mut count = 0;
        let mut missing = Vec::new();
        for step in source_steps() {
            count += 1;
            if !self.source_took(step) {
                missing.push(format!("source {:?} -{:?}-> {:?}", step.0, step.1, step.2));
            }
        }
        for step in target_steps() {
            count += 1;
            if !self.target_took(step) {
                missing.push(format!("target {:?} -{:?}-> {:?}", step.0, step.1, step.2));
            }
        }
        (count, missing)
    }
}

/// What leads elsewhere, and of what does not, what moves a migration forward.
fn source_steps() -> impl Iterator<Item = SourceStep> {
    let every = source::Phase::ALL.iter().flat_map(|from| {
        source::InputKind::ALL
            .iter()
            .flat_map(move |kind| source::Phase::ALL.iter().map(move |to| (*from, *kind, *to)))
    });
    every.filter(|step| {
        let (from, kind, to) = *step;
        source::table::FORWARD.contains(step)
            || (from != to && source::table::allowed(from, kind, to))
    })
}

fn target_steps() -> impl Iterator<Item = TargetStep> {
    let every = target::Phase::ALL.iter().flat_map(|from| {
        target::InputKind::ALL
            .iter()
            .flat_map(move |kind| target::Phase::ALL.iter().map(move |to| (*from, *kind, *to)))
    });
    every.filter(|step| {
        let (from, kind, to) = *step;
        target::table::FORWARD.contains(step)
            || (from != to && target::table::allowed(from, kind, to))
    })
}
