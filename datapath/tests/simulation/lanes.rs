//! The lanes: ordered streams of pages and barriers beside the control connection, each at its own
//! pace.
//!
//! A lane takes pages from the round's work, reads them from the running guest a little later, and
//! sends them; at the target a page arrives, and is placed a little later. When no work is left a
//! barrier follows, and is acknowledged when everything before it is placed.

use std::collections::VecDeque;
use std::time::Duration;

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::ids::RoundIndex;

use crate::check::Rule;
use crate::desk::Mail;
use crate::flaws::Flaw;
use crate::pages::pages_of;
use crate::scenario::Side;
use crate::world::{Event, World};

#[derive(Clone, Copy)]
enum Item {
    Page { page: usize, stamp: u64 },
    Barrier(RoundIndex),
}

#[derive(Default)]
pub(crate) struct Lane {
    up: bool,
    /// Taken from the work, not yet read.
    reading: Vec<usize>,
    barrier_sent: bool,
    on_its_way: VecDeque<Item>,
    last_arrival: Duration,
    unplaced: VecDeque<Item>,
}

pub(crate) struct Lanes {
    list: Vec<Lane>,
    work: VecDeque<usize>,
    /// The round moved last.
    pub(crate) round: RoundIndex,
    /// The source has them open.
    pub(crate) open: bool,
    /// The target takes nothing in any more.
    pub(crate) fenced: bool,
}

impl Lanes {
    pub(crate) fn new(count: usize) -> Self {
        Self {
            list: (0..count).map(|_| Lane::default()).collect(),
            work: VecDeque::new(),
            round: RoundIndex(0),
            open: false,
            fenced: false,
        }
    }

    pub(crate) fn open_all(&mut self) {
        self.open = true;
        self.list.iter_mut().for_each(|lane| lane.up = true);
    }

    pub(crate) fn up(&self) -> usize {
        self.list.iter().filter(|lane| lane.up).count()
    }
}

impl World {
    pub(crate) fn move_round(&mut self, round: RoundIndex, pages: &DirtySet) {
        self.lanes.round = round;
        self.lanes.work = pages_of(pages).into();
        for lane in 0..self.lanes.list.len() {
            self.lanes.list[lane].barrier_sent = false;
            let wait = self.about(self.scenario.lane_time);
            self.after(wait, Event::Pull(lane));
        }
    }

    pub(crate) fn pull(&mut self, index: usize) {
        if !self.lanes.open || !self.lanes.list[index].up {
            return;
        }
        let batch = 1 + self.random.below(8);
        let taken = batch.min(self.lanes.work.len());
        let next: Vec<usize> = self.lanes.work.drain(..taken).collect();
        let read = std::mem::replace(&mut self.lanes.list[index].reading, next);
        for page in read {
            let stamp = self.read(page);
            self.put(index, Item::Page { page, stamp });
        }
        let lane = &mut self.lanes.list[index];
        if lane.reading.is_empty() {
            if !std::mem::replace(&mut lane.barrier_sent, true) {
                let round = self.lanes.round;
                self.put(index, Item::Barrier(round));
            }
            return;
        }
        let pace = self.about(self.scenario.lane_time);
        self.after(pace, Event::Pull(index));
    }

    /// Reads one page of the running guest.
    fn read(&mut self, page: usize) -> u64 {
        if !self.guest.armed[page] {
            self.break_rule(Rule::Protected, format!("page {page} was read untracked"));
        }
        let cached = self.check.cached[page].take().filter(|_| self.has(Flaw::ReadsFirst));
        let stamp = cached.unwrap_or(self.guest.pages[page]);
        self.guest.unseen[page] = false;
        self.check.moving[page] = false;
        self.check.read[page] = stamp;
        stamp
    }

    fn put(&mut self, index: usize, item: Item) {
        let delay = self.about(self.scenario.lane_time * 4);
        let lane = &mut self.lanes.list[index];
        let arrival = (self.now + delay).max(lane.last_arrival);
        lane.last_arrival = arrival;
        lane.on_its_way.push_back(item);
        self.schedule(arrival, Event::Arrive(index));
    }

    pub(crate) fn arrive(&mut self, index: usize) {
        if self.partitioned() {
            return self.schedule(self.partition_until, Event::Arrive(index));
        }
        let Some(item) = self.lanes.list[index].on_its_way.pop_front() else { return };
        if self.lanes.fenced {
            return;
        }
        if let (Item::Barrier(round), true) = (item, self.has(Flaw::AcksEarly)) {
            return self.barrier(index, round);
        }
        self.lanes.list[index].unplaced.push_back(item);
        let wait = self.about(self.scenario.lane_time);
        self.after(wait, Event::Place(index));
    }

    /// Places the oldest of what arrived: of two events, the earlier one.
    pub(crate) fn place(&mut self, index: usize) {
        let Some(item) = self.lanes.list[index].unplaced.pop_front() else { return };
        if self.lanes.fenced && !self.has(Flaw::FencesNothing) {
            return;
        }
        match item {
            Item::Barrier(round) => self.barrier(index, round),
            Item::Page { page, stamp } => {
                self.check_placement(page, stamp);
                self.waiting.pages[page] = stamp;
            }
        }
    }

    fn barrier(&mut self, index: usize, round: RoundIndex) {
        self.target.desk.post(Mail::Lane(round));
        self.pump_target();
        let delay = self.about(self.scenario.lane_time * 2);
        self.after(delay, Event::Ack(index, round));
    }

    pub(crate) fn ack(&mut self, index: usize, round: RoundIndex) {
        if self.partitioned() {
            return self.schedule(self.partition_until, Event::Ack(index, round));
        }
        if self.lanes.open && self.lanes.list[index].up {
            self.source.desk.post(Mail::Lane(round));
            self.pump_source();
        }
    }

    /// One lane breaks: what is on its way arrives in part, and each side hears of it in its time.
    pub(crate) fn lane_fails(&mut self, index: usize) {
        let Some(lane) = self.lanes.list.get_mut(index).filter(|lane| lane.up) else { return };
        lane.up = false;
        let kept = self.random.below(lane.on_its_way.len() + 1);
        lane.on_its_way.truncate(kept);
        for side in [Side::Source, Side::Target] {
            let noticed = self.random.up_to(self.scenario.lane_time * 8);
            self.after(noticed, Event::LaneGone(side));
        }
    }

    /// One side closes all of its lanes; the other takes that for a failure, or for what it is.
    pub(crate) fn close_lanes(&mut self, by: Side, noticed_after: Duration) {
        let were_open = self.lanes.up() > 0;
        self.lanes.list.iter_mut().for_each(|lane| lane.up = false);
        match by {
            Side::Source => self.lanes.open = false,
            Side::Target => self.lanes.fenced = true,
        }
        if were_open && self.random.chance(70) {
            let noticed = noticed_after + self.about(self.scenario.lane_time * 4);
            self.after(noticed, Event::LaneGone(by.other()));
        }
    }
}
