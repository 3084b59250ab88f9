//! Moves the guests of a plan, so many at a time, until all have had their turn or somebody cancels.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, select, unbounded};
use serde::Deserialize;
use serde_json::Value;

use super::agent::{Agent, Said};
use super::args::DrainArgs;
use super::budget::Budget;
use super::ledger::{Ledger, Standing};
use super::plan::{Plan, Step};
use super::settle;
use super::table::{Fate, Row, Table};
use super::view::{Totals, View};
use crate::limits::DRAIN_TICK;
use crate::qemu::runstate::RunState;
use crate::qmp::Qmp;
use crate::report::events::{Event, Going, Summary};

/// Everything one drain holds while guests are on their way.
pub(super) struct Crew<'a> {
    args: &'a DrainArgs,
    view: &'a mut View,
    budget: Budget,
    ledger: Ledger,
    parallel: usize,
    waiting: VecDeque<(usize, Step)>,
    under_way: BTreeMap<usize, UnderWay>,
    /// Rows of guests that are done with, by their place in the plan.
    rows: BTreeMap<usize, Row>,
    /// Agents that ended without a word, with their exit codes.
    silent: Vec<(usize, Step, i32)>,
    totals: Totals,
    said: Receiver<(usize, Said)>,
    to_said: Sender<(usize, Said)>,
}

/// One guest on its way.
struct UnderWay {
    step: Step,
    agent: Agent,
    going: Option<Going>,
    summary: Option<Summary>,
}

impl<'a> Crew<'a> {
    /// Takes a plan over.
    pub(super) fn new(
        args: &'a DrainArgs,
        plan: Plan,
        budget: Budget,
        ledger: Ledger,
        view: &'a mut View,
    ) -> Self {
        let (to_said, said) = unbounded();
        let before = plan.rows.len();
        let rows = plan.rows.into_iter().map(|(_, row)| row).enumerate().collect();
        let steps = plan.steps.into_iter().enumerate();
        let waiting: VecDeque<_> = steps.map(|(place, step)| (before + place, step)).collect();
        let bytes = waiting.iter().map(|(_, step)| step.facts.populated_bytes()).sum();
        Self {
            args,
            view,
            budget,
            ledger,
            parallel: plan.parallel,
            totals: Totals::of(waiting.len(), bytes),
            waiting,
            under_way: BTreeMap::new(),
            rows,
            silent: Vec::new(),
            said,
            to_said,
        }
    }

    /// Until nobody is on the way and nobody waits.
    pub(super) fn run(mut self, cancel: &Receiver<()>) -> Table {
        let began = Instant::now();
        loop {
            while self.under_way.len() < self.parallel
                && let Some((place, step)) = self.waiting.pop_front()
            {
                self.begin(place, step);
            }
            if self.under_way.is_empty() {
                break;
            }
            select! {
                recv(self.said) -> said => {
                    let (place, said) = said.expect("the crew holds a sender");
                    self.heard(place, said);
                }
                recv(cancel) -> _ => self.cancel(),
                recv(after(DRAIN_TICK)) -> _ => self.budget.follow(),
            }
            self.tick(began.elapsed());
        }
        for (place, step, code) in std::mem::take(&mut self.silent) {
            let row = self.find_out(&step, code);
            self.done(place, &step, row);
        }
        Table::after(self.rows.into_values().collect(), began.elapsed())
    }

    fn begin(&mut self, place: usize, step: Step) {
        self.note(&step, Standing::UnderWay, None);
        match Agent::start(self.args, &step.guest, place, &self.to_said) {
            Ok(agent) => {
                self.view.begun(place, &step);
                let under_way = UnderWay { step, agent, going: None, summary: None };
                self.under_way.insert(place, under_way);
            }
            Err(error) => {
                let row = Row::without(&step.guest.name, Fate::Refused, Some(step.to.clone()))
                    .because(format!("its agent could not be started: {error}"), None);
                self.done(place, &step, row);
            }
        }
    }

    fn heard(&mut self, place: usize, said: Said) {
        let Some(under_way) = self.under_way.get_mut(&place) else { return };
        let name = under_way.step.guest.name.as_str();
        match said {
            Said::Error(line) => self.view.error_line(name, &line),
            Said::Line(line) => match serde_json::from_str::<Value>(&line) {
                Ok(value) => {
                    // Events of a newer kind are passed on, too.
                    let event = Event::deserialize(&value).ok();
                    self.view.said(place, name, value, event.as_ref());
                    match event {
                        Some(Event::Progress(going)) => under_way.going = Some(going),
                        Some(Event::Summary(summary)) => under_way.summary = Some(*summary),
                        _ => {}
                    }
                }
                Err(_) => self.view.error_line(name, &line),
            },
            Said::Closed => {
                let Some(UnderWay { step, agent, summary, .. }) = self.under_way.remove(&place)
                else {
                    return;
                };
                let code = agent.wait();
                match summary {
                    Some(summary) => {
                        let row = Row::of(&step.guest.name, &step.to, &summary);
                        self.done(place, &step, row);
                    }
                    None => self.silent.push((place, step, code)),
                }
            }
        }
    }

    /// Those under way go on here; the others don't begin.
    fn cancel(&mut self) {
        self.view.note("interrupted: guests on their way go on here, the others are left");
        for under_way in self.under_way.values() {
            under_way.agent.cancel();
        }
        for (place, step) in self.waiting.drain(..) {
            self.rows.insert(place, step.left());
        }
    }

    fn done(&mut self, place: usize, step: &Step, row: Row) {
        let standing = match row.outcome {
            Fate::Moved => Standing::AtTarget,
            // Whose it is, the next run finds out.
            Fate::Uncertain => Standing::UnderWay,
            _ => Standing::Waiting,
        };
        self.note(step, standing, Some(row.clone()));
        self.totals.done(step.facts.populated_bytes(), &row);
        self.view.ended(place, &row);
        self.rows.insert(place, row);
    }

    /// That the guest's row is not on disk is no reason to stop the others.
    fn note(&mut self, step: &Step, standing: Standing, row: Option<Row>) {
        if let Err(error) = self.ledger.note(&step.guest, standing, row) {
            let text = crate::agent::failure::chain("", &error);
            self.view.complain(&text, error.hint().as_deref());
        }
    }

    /// An agent that ended without its summary was killed, or has a bug. Its record tells, and the
    /// guest.
    fn find_out(&mut self, step: &Step, code: i32) -> Row {
        let fate = settle::after_a_crash(self.args, &step.guest.qmp).unwrap_or_else(|| {
            let state = Qmp::connect(&step.guest.qmp).and_then(|qmp| RunState::query(&qmp));
            match state {
                Ok(state) if state.running => Fate::Stays,
                Ok(state) if state.status == "postmigrate" => Fate::Moved,
                Ok(_) => Fate::Paused,
                Err(_) => Fate::Gone,
            }
        });
        let row = Row::without(&step.guest.name, fate, Some(step.to.clone()));
        let guest_bytes = step.facts.guest_bytes();
        let reason = format!("its agent ended unexpectedly, with code {code}");
        Row { guest_bytes, exit_code: Some(code), ..row }.because(reason, None)
    }

    fn tick(&mut self, at: Duration) {
        self.totals.at = at;
        self.totals.under_way = self.under_way.len();
        self.totals.waiting = self.waiting.len();
        let (mut done, mut moved) = (0, 0);
        for UnderWay { step, going, .. } in self.under_way.values() {
            let Some(going) = going else { continue };
            done += there(going, step.facts.populated_bytes());
            moved += going.moved_bytes;
        }
        self.totals.under_way_bytes = (done, moved);
        self.view.tick(&self.totals);
    }
}

/// Of a guest's memory, what is at its target: the first pass brings it all, and what is written
/// meanwhile can't be known before.
fn there(going: &Going, populated: u64) -> u64 {
    match going.round {
        0 if going.round_bytes > 0 => {
            let share = going.round_done_bytes as f64 / going.round_bytes as f64;
            (populated as f64 * share.min(1.0)) as u64
        }
        0 => 0,
        _ => populated,
    }
}
