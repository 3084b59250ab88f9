//! The rules, and what has to be remembered to judge by them: after every step, and at the end.

use std::collections::HashMap;

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::Message;
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::source::Input as SourceInput;
use pageferry_datapath::target::Input as TargetInput;

use crate::disk::Decision;
use crate::flaws::Flaw;
use crate::pages::{GARBAGE, PAGES, SHAPE, holds, pages_of};
use crate::scenario::Peer;
use crate::world::World;

/// What a run may never break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A page is read only while writes to it are tracked; what is written later moves again.
    Protected,
    /// An older copy never overwrites a newer one.
    LaterWins,
    /// A round is called placed when its bytes are in the target's memory.
    Placed,
    /// What the target does not call stale is as new as the last round announced.
    Stale,
    /// What is loaded is what the guest had when it was paused.
    Same,
    /// The decision is on disk before the commit leaves.
    RecordFirst,
    /// The guest never runs on both sides, and the records say whose it is.
    OneOwner,
    /// Nothing is written into the target's memory once it was given up or handed to the guest.
    Fenced,
    /// A failed attempt leaves the source as it was.
    LeftAsItWas,
    /// What is said about the end is what happened.
    Told,
    /// Every run ends.
    Ends,
    /// No input makes a machine panic.
    NoPanic,
}

#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) rule: Rule,
    pub(crate) text: String,
}

pub(crate) struct Check {
    /// Tracking is armed, and the attempt goes on.
    pub(crate) watching: bool,
    /// The guest was paused, or tracking touched it.
    pub(crate) touched: bool,
    pub(crate) commit_left: bool,
    pub(crate) preparing_switchover: bool,
    /// Reported, in no round yet.
    pub(crate) owed: Vec<bool>,
    /// In the round on its way, not yet read.
    pub(crate) moving: Vec<bool>,
    /// Content when it was last read.
    pub(crate) read: Vec<u64>,
    /// For a world that reads too early: what it read.
    pub(crate) cached: Vec<Option<u64>>,
    /// By round: its pages as they were when it was announced.
    pub(crate) announced: HashMap<u32, Vec<(usize, u64)>>,
    /// Of each page, the oldest content that the target may have where it is not stale.
    floors: Option<Vec<u64>>,
}

impl Default for Check {
    fn default() -> Self {
        Self {
            watching: false,
            touched: false,
            commit_left: false,
            preparing_switchover: false,
            owed: vec![false; PAGES],
            moving: vec![false; PAGES],
            read: vec![0; PAGES],
            cached: vec![None; PAGES],
            announced: HashMap::new(),
            floors: None,
        }
    }
}

impl World {
    pub(crate) fn is_hostile(&self) -> bool {
        self.scenario.peer != Peer::Honest
    }

    /// After every step.
    pub(crate) fn check_step(&mut self) {
        if self.is_hostile() {
            return;
        }
        if self.guest.running && self.waiting.running {
            self.break_rule(Rule::OneOwner, "the guest runs on both sides");
        }
        if self.check.watching && self.guest.alive {
            self.check_nothing_is_lost();
        }
        let stale = self.target.machine.as_ref().and_then(|machine| machine.stale());
        if let Some(text) = stale.and_then(|stale| self.wrongly_fresh(stale)) {
            self.break_rule(Rule::Stale, text);
        }
    }

    /// Every page is as it was last read, or known to have to move again.
    fn check_nothing_is_lost(&mut self) {
        let (guest, check) = (&self.guest, &self.check);
        let lost = (0..PAGES).find(|page| {
            let page = *page;
            let known = guest.written[page] || guest.unseen[page];
            let coming = check.owed[page] || check.moving[page];
            guest.pages[page] != check.read[page] && !known && !coming
        });
        if let Some(page) = lost {
            self.break_rule(Rule::Protected, format!("a write to page {page} will never move"));
        }
    }

    fn wrongly_fresh(&self, stale: &DirtySet) -> Option<String> {
        let fresh = |page: &usize| !holds(stale, *page);
        let page = (0..PAGES).filter(fresh).find(|page| {
            let there = self.waiting.pages[*page];
            let floor = self.check.floors.as_ref().map(|floors| floors[*page]);
            there & GARBAGE != 0 || floor.is_none_or(|floor| there < floor)
        })?;
        Some(format!("page {page} is not called stale and is older than announced"))
    }

    pub(crate) fn check_round_begins(&mut self, round: RoundIndex, pages: &DirtySet) {
        for page in pages_of(pages) {
            self.check.owed[page] = false;
            self.check.moving[page] = true;
        }
        let owing = (0..PAGES).find(|page| self.check.owed[*page]);
        if let (Some(page), true) = (owing, self.source_is_last_moving()) {
            let text = format!("page {page} was reported and is not in the last round, {round}");
            self.break_rule(Rule::Protected, text);
        }
    }

    fn source_is_last_moving(&self) -> bool {
        !self.guest.running && self.check.preparing_switchover
    }

    pub(crate) fn check_source_input(&mut self, input: &SourceInput) {
        if let SourceInput::Placed { round, .. } = input {
            self.check_placed(*round);
        }
    }

    /// Rules about what the source says.
    pub(crate) fn check_source_sends(&mut self, message: &Message) {
        match message {
            Message::Prepare => self.check.preparing_switchover = true,
            Message::RoundStart(start) => {
                let pages = DirtySet::decode(&start.bitmap, SHAPE).expect("what it encoded");
                let floors = (0..PAGES).filter(|page| holds(&pages, *page));
                let floors = floors.map(|page| (page, self.guest.pages[page])).collect();
                self.check.announced.insert(start.round.0, floors);
            }
            Message::Commit => {
                self.check.commit_left = true;
                if self.disks[0].durable != Some(Decision::HandedOver) {
                    self.break_rule(Rule::RecordFirst, "the commit left before its record");
                }
            }
            _ => {}
        }
    }

    pub(crate) fn check_target_input(&mut self, input: &TargetInput) {
        match input {
            TargetInput::Placed(round) => self.check_placed(*round),
            TargetInput::Message(Message::RoundStart(start)) if !self.is_hostile() => {
                let announced = self.check.announced.get(&start.round.0).cloned();
                let floors = self.check.floors.get_or_insert_with(|| vec![0; PAGES]);
                for (page, stamp) in announced.unwrap_or_default() {
                    floors[page] = stamp;
                }
            }
            _ => {}
        }
    }

    /// A round that is called placed is in the target's memory.
    fn check_placed(&mut self, round: RoundIndex) {
        if self.is_hostile() {
            return;
        }
        let pages = self.check.announced.get(&round.0);
        let missing = pages.into_iter().flatten().find(|(page, stamp)| {
            let there = self.waiting.pages[*page];
            there & GARBAGE != 0 || there < *stamp
        });
        if let Some((page, _)) = missing.copied() {
            self.break_rule(Rule::Placed, format!("page {page} of round {round} is not there"));
        }
    }

    pub(crate) fn check_placement(&mut self, page: usize, stamp: u64) {
        let there = self.waiting.pages[page];
        if there & GARBAGE == 0 && there > stamp {
            self.break_rule(Rule::LaterWins, format!("page {page}: {stamp} over {there}"));
        }
        if self.lanes.fenced || self.waiting.ran || self.waiting.loaded {
            self.break_rule(Rule::Fenced, format!("page {page} was written after the end"));
        }
    }

    pub(crate) fn check_source_may_run(&mut self) {
        let disk = &self.disks[0];
        let handed_over =
            disk.seen == Some(Decision::HandedOver) || disk.durable == Some(Decision::HandedOver);
        if handed_over && !self.has(Flaw::AnswersBeforeRecording) {
            self.break_rule(Rule::OneOwner, "runs at the source with a record that gave it away");
        }
        if self.waiting.ran && !self.is_hostile() {
            self.break_rule(Rule::OneOwner, "runs at the source after it ran at the target");
        }
    }

    pub(crate) fn check_target_may_run(&mut self) {
        if self.is_hostile() {
            return;
        }
        if !self.check.commit_left {
            self.break_rule(Rule::OneOwner, "runs at the target without a commit");
        }
        if self.guest.running {
            self.break_rule(Rule::OneOwner, "runs at the target while it runs at the source");
        }
        if !self.waiting.loaded {
            self.break_rule(Rule::Same, "runs at the target and was not loaded");
        }
        if self.waiting.pages != self.guest.pages {
            self.break_rule(Rule::Same, "runs at the target with other memory");
        }
    }
}
