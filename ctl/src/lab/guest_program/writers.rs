//! Threads that rewrite the hot pages, and the walk that checks the cold ones.
//!
//! A writer walks its part of the hot set in a fixed order. Which sequence a page must hold
//! follows from the writer's own position alone, so a page that fell back to an older, valid
//! version is found as surely as a torn one.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::console::GuestConsole;
use super::counters::Counters;
use super::pages::{PAGE_BYTES, PageFault, PageStore};
use crate::lab::guest_params::GuestParams;

/// Pages rewritten between two looks at the clock and at the gate.
const BURST_PAGES: usize = 16;
/// The walk through the cold pages checks this many, then rests: about 5 % of one vCPU.
const COLD_BURST_PAGES: usize = 32;
const COLD_REST: Duration = Duration::from_millis(5);
/// Bad pages are described up to here, so that a broken guest does not drown its console.
const DESCRIBED_FAULTS: u64 = 20;

/// The guest's memory under load.
pub(super) struct MemoryLoad {
    store: PageStore,
    hot_page_count: usize,
    sweeps: Vec<Mutex<Sweep>>,
    pages_per_second: AtomicU64,
    gate: Gate,
    console: Arc<GuestConsole>,
    counters: Arc<Counters>,
}

/// One writer's part of the hot set and how far it has come.
struct Sweep {
    first_page: usize,
    page_count: usize,
    /// Positions are scattered over the part by this step, which shares no factor with its size.
    step: usize,
    pass: u64,
    cursor: usize,
}

impl Sweep {
    fn page_at(&self, position: usize) -> usize {
        self.first_page + position * self.step % self.page_count
    }

    /// The sequence that the page at `position` holds now.
    fn sequence_at(&self, position: usize) -> u64 {
        self.pass + u64::from(position < self.cursor)
    }

    fn advance(&mut self) {
        self.cursor += 1;
        if self.cursor == self.page_count {
            self.cursor = 0;
            self.pass += 1;
        }
    }
}

/// Keeps the writers out while everything is verified.
#[derive(Default)]
struct Gate {
    shut: AtomicBool,
    lock: Mutex<()>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        if self.shut.load(Relaxed) {
            let mut guard = lock(&self.lock);
            while self.shut.load(Relaxed) {
                guard = self.opened.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn set(&self, shut: bool) {
        let _guard = lock(&self.lock);
        self.shut.store(shut, Relaxed);
        self.opened.notify_all();
    }
}

impl MemoryLoad {
    pub(super) fn new(
        params: &GuestParams,
        store: PageStore,
        console: Arc<GuestConsole>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let wanted = (params.hot_mib << 20) as usize / PAGE_BYTES;
        let writers = params.writers as usize;
        let hot_page_count = if writers == 0 { 0 } else { wanted.min(store.page_count()) };
        let sweeps = (0..writers.min(hot_page_count))
            .map(|writer| {
                let first_page = hot_page_count * writer / writers;
                let page_count = hot_page_count * (writer + 1) / writers - first_page;
                let step = if params.scattered { scatter_step(page_count) } else { 1 };
                Mutex::new(Sweep { first_page, page_count, step, pass: 0, cursor: 0 })
            })
            .collect();
        Arc::new(Self {
            store,
            hot_page_count,
            sweeps,
            pages_per_second: AtomicU64::new(params.pages_per_second),
            gate: Gate::default(),
            console,
            counters,
        })
    }

    pub(super) fn page_count(&self) -> usize {
        self.store.page_count()
    }

    pub(super) fn hot_page_count(&self) -> usize {
        self.hot_page_count
    }

    pub(super) fn set_rate(&self, pages_per_second: u64) {
        self.pages_per_second.store(pages_per_second, Relaxed);
    }

    pub(super) fn start_writers(self: &Arc<Self>) {
        for writer in 0..self.sweeps.len() {
            let load = Arc::clone(self);
            std::thread::spawn(move || load.write_for_ever(writer));
        }
        if self.hot_page_count < self.store.page_count() {
            let load = Arc::clone(self);
            std::thread::spawn(move || load.walk_cold_pages_for_ever());
        }
    }

    /// Stops the writers, checks every page in full, lets them go on. Returns the bad pages.
    pub(super) fn verify_everything(&self) -> usize {
        self.gate.set(true);
        let cold = self.hot_page_count..self.store.page_count();
        let middle = cold.start + cold.len() / 2;
        let bad = std::thread::scope(|scope| {
            let halves = [cold.start..middle, middle..cold.end]
                .map(|half| scope.spawn(|| self.verify_cold(half)));
            let hot: usize = self.sweeps.iter().map(|sweep| self.verify_sweep(&lock(sweep))).sum();
            // A panic of PID 1's thread ends the guest anyway; count it as one more bad page.
            hot + halves.into_iter().map(|half| half.join().unwrap_or(1)).sum::<usize>()
        });
        self.gate.set(false);
        bad
    }

    fn write_for_ever(&self, writer: usize) {
        let mut pace = Pace::new();
        loop {
            self.gate.pass();
            let mut sweep = lock(&self.sweeps[writer]);
            for _ in 0..BURST_PAGES {
                let (page, pass) = (sweep.page_at(sweep.cursor), sweep.pass);
                self.note(self.store.verify_rewritten(page, pass));
                self.store.rewrite(page, pass + 1);
                sweep.advance();
            }
            drop(sweep);
            self.counters.writes.fetch_add(BURST_PAGES as u64, Relaxed);
            pace.rest(self.pages_per_second.load(Relaxed), self.sweeps.len() as u64);
        }
    }

    fn walk_cold_pages_for_ever(&self) {
        loop {
            for page in self.hot_page_count..self.store.page_count() {
                self.note(self.store.verify_whole(page, 0));
                if page % COLD_BURST_PAGES == 0 {
                    std::thread::sleep(COLD_REST);
                }
            }
            self.counters.cold_passes.fetch_add(1, Relaxed);
            std::thread::sleep(COLD_REST);
        }
    }

    fn verify_cold(&self, pages: Range<usize>) -> usize {
        pages.filter(|&page| self.note(self.store.verify_whole(page, 0))).count()
    }

    fn verify_sweep(&self, sweep: &Sweep) -> usize {
        (0..sweep.page_count)
            .filter(|&position| {
                let (page, sequence) = (sweep.page_at(position), sweep.sequence_at(position));
                self.note(self.store.verify_whole(page, sequence))
            })
            .count()
    }

    /// Counts and describes a bad page; true if it was one.
    fn note(&self, checked: Result<(), PageFault>) -> bool {
        let Err(PageFault { page, word, expected, found }) = checked else { return false };
        if self.counters.bad.fetch_add(1, Relaxed) < DESCRIBED_FAULTS {
            self.console.say(&format!(
                "bad page={page} word={word} expected={expected:#x} found={found:#x}"
            ));
        }
        true
    }
}

/// Holds a writer to its share of the page rate.
struct Pace {
    since: Instant,
    done_pages: u64,
    pages_per_second: u64,
}

impl Pace {
    /// A writer that fell behind does not catch up on more than this.
    const BACKLOG: Duration = Duration::from_millis(50);

    fn new() -> Self {
        Self { since: Instant::now(), done_pages: 0, pages_per_second: 0 }
    }

    fn rest(&mut self, pages_per_second: u64, writers: u64) {
        if pages_per_second == 0 {
            return;
        }
        if pages_per_second != self.pages_per_second {
            *self = Self { since: Instant::now(), done_pages: 0, pages_per_second };
        }
        self.done_pages += BURST_PAGES as u64 * writers;
        let due = Duration::from_secs_f64(self.done_pages as f64 / pages_per_second as f64);
        let spent = self.since.elapsed();
        if spent > due + Self::BACKLOG {
            *self = Self { since: Instant::now(), done_pages: 0, pages_per_second };
        }
        std::thread::sleep(due.saturating_sub(spent));
    }
}

/// A step near the golden section of `count` that shares no factor with it.
fn scatter_step(count: usize) -> usize {
    let mut step = (count as f64 * 0.618_034) as usize | 1;
    while gcd(step, count) != 1 {
        step += 2;
    }
    step
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scattered_sweep_meets_every_page_once() {
        for page_count in [1, 2, 7, 4096, 4097, 65536, 65537] {
            let step = scatter_step(page_count);
            let sweep = Sweep { first_page: 10, page_count, step, pass: 0, cursor: 0 };
            let mut met = vec![false; page_count];
            for position in 0..page_count {
                assert!(!std::mem::replace(&mut met[sweep.page_at(position) - 10], true));
            }
        }
    }

    #[test]
    fn the_sequence_follows_from_the_position() {
        let mut sweep = Sweep { first_page: 0, page_count: 3, step: 1, pass: 4, cursor: 0 };
        sweep.advance();
        assert_eq!([5, 4, 4], [0, 1, 2].map(|position| sweep.sequence_at(position)));
        sweep.advance();
        sweep.advance();
        assert_eq!([5, 5, 5], [0, 1, 2].map(|position| sweep.sequence_at(position)));
    }
}
