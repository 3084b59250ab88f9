//! Outcomes of many faults, as tables for people and for scripts.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::fault::Fault;
use super::judge::Outcome;
use super::moment::Moment;
use super::trial::{Trial, When};

/// Outcomes so far.
#[derive(Debug, Default)]
pub struct Tally {
    cells: HashMap<(Fault, Moment), Vec<Outcome>>,
    outcomes: HashMap<Fault, BTreeMap<Outcome, u32>>,
    injected: u32,
    not_injected: u32,
    losses: Vec<String>,
    broken: Vec<String>,
}

impl Tally {
    /// Counts one more.
    pub fn count(&mut self, trial: &Trial) {
        let what = || match trial.when {
            When::In { moment, .. } => format!("{}, {}", trial.fault.text(), moment.text()),
            When::After(delay) => format!("{}, {} ms", trial.fault.text(), delay.as_millis()),
        };
        let said = |text: &String| format!("{}: {text}", what());
        self.losses.extend(trial.verdict.losses.iter().map(said));
        self.broken.extend(trial.verdict.broken.iter().map(said));
        if !trial.injected {
            self.not_injected += 1;
            return;
        }
        self.injected += 1;
        let outcome = trial.verdict.outcome;
        *self.outcomes.entry(trial.fault).or_default().entry(outcome).or_default() += 1;
        if let When::In { moment, .. } = trial.when {
            self.cells.entry((trial.fault, moment)).or_default().push(outcome);
        }
    }

    /// Faults that were made.
    pub fn injected(&self) -> u32 {
        self.injected
    }

    /// Guests lost, run twice, or with wrong memory.
    pub fn losses(&self) -> &[String] {
        &self.losses
    }

    /// Promises broken that did not cost a guest.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    /// Faults by phases, in Markdown.
    pub fn matrix(&self) -> String {
        let mut text = String::from("| fault |");
        Moment::ALL.iter().for_each(|moment| _ = write!(text, " {} |", moment.text()));
        text += "\n|---|";
        Moment::ALL.iter().for_each(|_| text += "---|");
        for fault in Fault::ALL {
            let _infallible = write!(text, "\n| {} |", fault.text());
            for moment in Moment::ALL {
                let seen = self.cells.get(&(fault, moment));
                let mut letters: Vec<_> =
                    seen.into_iter().flatten().map(|outcome| outcome.letters()).collect();
                letters.dedup();
                let cell = if letters.is_empty() { "–".into() } else { letters.join(" ") };
                let _infallible = write!(text, " {cell} |");
            }
        }
        text += "\n\n";
        for outcome in Outcome::ALL {
            let _infallible = writeln!(text, "- `{}`: {}", outcome.letters(), outcome.text());
        }
        text
    }

    /// Faults by outcomes, in Markdown, and the sums.
    pub fn totals(&self) -> String {
        let mut text = String::from("| fault | injected |");
        Outcome::ALL.iter().for_each(|outcome| _ = write!(text, " {} |", outcome.letters()));
        text += "\n|---|---|";
        Outcome::ALL.iter().for_each(|_| text += "---|");
        for fault in Fault::ALL {
            let Some(seen) = self.outcomes.get(&fault) else { continue };
            self.row(&mut text, fault.text(), |outcome| seen.get(&outcome).copied().unwrap_or(0));
        }
        self.row(&mut text, "all", |outcome| {
            self.outcomes.values().filter_map(|seen| seen.get(&outcome)).sum()
        });
        let _infallible = writeln!(
            text,
            "\n\nfaults injected: {}; too late for the migration: {}; losses: {}; other promises \
             broken: {}",
            self.injected,
            self.not_injected,
            self.losses.len(),
            self.broken.len()
        );
        text
    }

    fn row(&self, text: &mut String, name: &str, count: impl Fn(Outcome) -> u32) {
        let sum: u32 = Outcome::ALL.into_iter().map(&count).sum();
        let _infallible = write!(text, "\n| {name} | {sum} |");
        for outcome in Outcome::ALL {
            let _infallible = match count(outcome) {
                0 => write!(text, " |"),
                some => write!(text, " {some} |"),
            };
        }
    }

    /// The sums, for scripts.
    pub fn summary(&self) -> serde_json::Value {
        serde_json::json!({
            "event": "summary",
            "injected": self.injected,
            "not_injected": self.not_injected,
            "losses": self.losses,
            "broken": self.broken,
            "outcomes": self.outcomes,
        })
    }
}
