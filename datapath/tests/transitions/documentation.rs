//! The drawings and `docs/state-machines.md` against the tables.

use std::fmt::{Debug, Write};

use pageferry_datapath::{limits, source, target};

use crate::snapshot;

const HEAD: &str = "# The two state machines

Made from the tables in `datapath/src/source/table.rs` and `datapath/src/target/table.rs`, and kept
up to date by a test (`PAGEFERRY_BLESS=1 cargo test -p pageferry-datapath --test transitions`). What
each does with every input in every situation is in `datapath/tests/transitions/*.snapshot`.
";

/// A machine's table, in the terms of this file.
struct Machine<P: 'static, K: 'static> {
    name: &'static str,
    phases: &'static [P],
    kinds: &'static [K],
    forward: &'static [(P, K, P)],
    allowed: fn(P, K, P) -> bool,
    deadline: fn(P) -> Option<std::time::Duration>,
}

const SOURCE: Machine<source::Phase, source::InputKind> = Machine {
    name: "source",
    phases: source::Phase::ALL,
    kinds: source::InputKind::ALL,
    forward: source::table::FORWARD,
    allowed: source::table::allowed,
    deadline: limits::source_phase_max,
};

const TARGET: Machine<target::Phase, target::InputKind> = Machine {
    name: "target",
    phases: target::Phase::ALL,
    kinds: target::InputKind::ALL,
    forward: target::table::FORWARD,
    allowed: target::table::allowed,
    deadline: limits::target_phase_max,
};

impl<P: Copy + Debug + PartialEq, K: Copy + Debug + PartialEq> Machine<P, K> {
    fn drawing(&self) -> String {
        let mut text = String::from("```mermaid\nstateDiagram-v2\n");
        writeln!(text, "    [*] --> {:?}", self.phases[0]).expect("a string");
        for (from, _, to) in self.edges() {
            let inputs: Vec<_> = self
                .forward
                .iter()
                .filter(|(f, _, t)| (*f, *t) == (from, to))
                .map(|(_, input, _)| format!("{input:?}"))
                .collect();
            writeln!(text, "    {from:?} --> {to:?}: {}", inputs.join(" or ")).expect("a string");
        }
        text + "```\n"
    }

    /// One of the forward transitions for each pair of phases, in the table's order.
    fn edges(&self) -> Vec<(P, K, P)> {
        let mut edges: Vec<(P, K, P)> = Vec::new();
        for edge in self.forward {
            if !edges.iter().any(|(from, _, to)| (*from, *to) == (edge.0, edge.2)) {
                edges.push(*edge);
            }
        }
        edges
    }

    /// Phase by phase: where each input that is no progress leads.
    fn endings(&self) -> String {
        let mut text = String::from("| in | waits at most | and then |\n|---|---|---|\n");
        for from in self.phases {
            let mut cells = Vec::new();
            for to in self.phases.iter().filter(|to| *to != from) {
                let inputs: Vec<_> = self
                    .kinds
                    .iter()
                    .filter(|kind| (self.allowed)(*from, **kind, *to))
                    .filter(|kind| !self.forward.contains(&(*from, **kind, *to)))
                    .map(|kind| format!("{kind:?}"))
                    .collect();
                if !inputs.is_empty() {
                    cells.push(format!("{}: {to:?}", inputs.join(", ")));
                }
            }
            let waits = (self.deadline)(*from).map_or("".into(), |max| format!("{max:?}"));
            writeln!(text, "| {from:?} | {waits} | {} |", cells.join("; ")).expect("a string");
        }
        text
    }

    fn page(&self) -> String {
        format!(
            "\n## The {}\n\nForward:\n\n{}\nWhat ends an attempt, or takes it elsewhere:\n\n{}",
            self.name,
            self.drawing(),
            self.endings()
        )
    }

    /// Every phase of the table is in the drawing at the top of the module, and each name there
    /// that could be a phase is one.
    fn assert_drawn(&self, module: &str) {
        let drawing = module.split("//! ```").nth(1).expect("a drawing");
        let drawn: Vec<&str> = drawing
            .split(|c: char| !c.is_ascii_alphabetic())
            .filter(|word| word.len() > 1 && word.starts_with(|c: char| c.is_ascii_uppercase()))
            .collect();
        let phases: Vec<_> = self.phases.iter().map(|phase| format!("{phase:?}")).collect();
        for phase in &phases {
            assert!(drawn.contains(&phase.as_str()), "{phase} of the {} is not drawn", self.name);
        }
        for word in drawn {
            assert!(phases.iter().any(|phase| phase == word), "{word} is drawn and no phase");
        }
    }
}

#[test]
fn the_page_of_both_machines_is_up_to_date() {
    let text = format!("{HEAD}{}{}", SOURCE.page(), TARGET.page());
    snapshot::assert_is("../docs/state-machines.md", &text);
}

#[test]
fn the_drawings_show_the_phases_of_the_tables() {
    SOURCE.assert_drawn(include_str!("../../src/source/mod.rs"));
    TARGET.assert_drawn(include_str!("../../src/target/mod.rs"));
}

#[test]
fn every_phase_is_reached_and_left_by_the_tables() {
    fn check<P: Copy + Debug + PartialEq, K: Copy + Debug + PartialEq>(machine: &Machine<P, K>) {
        let moves = |from: P, to: P| {
            from != to && machine.kinds.iter().any(|kind| (machine.allowed)(from, *kind, to))
        };
        let (first, last) = (machine.phases[0], machine.phases[machine.phases.len() - 1]);
        for phase in machine.phases {
            let reached = machine.phases.iter().any(|from| moves(*from, *phase));
            let left = machine.phases.iter().any(|to| moves(*phase, *to));
            assert_eq!(reached, *phase != first, "{phase:?}");
            assert_eq!(left, *phase != last, "{phase:?}");
        }
    }
    check(&SOURCE);
    check(&TARGET);
}
