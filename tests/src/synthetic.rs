//! A guest without a monitor: shared memory of a process, rewritten by threads.
//!
//! ```text
//!   page = generation | number | words that follow from both
//! ```
//!
//! Each thread writes pages of its own and checks what it finds there before. The device state of
//! such a guest is the list of generations: whoever has loaded it knows what every page must hold,
//! so one page that is old, torn or lost is found. Writers go through a mapping that is tracked by
//! userfaultfd, the agents through another one, as with a real monitor.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry_ctl::agent::failure;
use pageferry_ctl::agent::monitor::{
    Attached, GuestFacts, SourceMonitor, StateStream, TargetMonitor,
};
use pageferry_ctl::qemu::capabilities::Settings;
use pageferry_datapath::backing::Backing;
use pageferry_datapath::control::{Offer, RegionOffer};
use pageferry_datapath::holes;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::source::Failure;
use pageferry_datapath::tracker::{ScanPhases, UffdTracker};

/// What a page of such a guest is, whatever the size of those behind it.
pub const PAGE: usize = 4096;
/// Pages a writer writes before it looks whether it may go on.
const BURST: u64 = 8;

/// What such a guest is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// All of it, holes too.
    pub bytes: u64,
    /// Pages written at the start, from the first on; what follows are holes.
    pub filled_pages: u64,
    /// Huge pages of this size, else pages of tmpfs.
    pub huge: Option<u64>,
    /// Threads that write.
    pub writers: u64,
    /// Pages that all of them together write each second.
    pub pages_per_second: u64,
    /// It has a device to give memory back by.
    pub gives_back: bool,
}

impl Shape {
    /// Memory as it says, all holes.
    fn backing(&self) -> Result<Backing, Failure> {
        Backing::memfd("synthetic-guest", self.bytes, self.huge)
            .map_err(|error| failure::host("memory", &error, None))
    }
}

/// The guest: its memory, its writers, and what each page should hold.
#[derive(Debug)]
pub struct Guest {
    inner: Arc<Inner>,
    writers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    shape: Shape,
    region: Arc<Region>,
    generations: Vec<AtomicU32>,
    bad: AtomicU64,
    /// What was there of its file when it arrived.
    arrived_bytes: AtomicU64,
    written: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    ended: bool,
    /// Writers that stand still.
    still: u64,
}

impl Guest {
    /// Fills memory and lets the writers run.
    pub fn start(shape: Shape) -> Result<Self, Failure> {
        let region = open(shape.backing()?)?;
        let generations = vec![0; (shape.bytes / PAGE as u64) as usize];
        let guest = Self::over(shape, region, &generations);
        for page in 0..guest.inner.shape.filled_pages {
            guest.inner.write(page);
        }
        guest.run();
        Ok(guest)
    }

    /// One whose memory holds what `generations` say, standing still.
    fn over(shape: Shape, region: Arc<Region>, generations: &[u32]) -> Self {
        let inner = Arc::new(Inner {
            region,
            generations: generations.iter().map(|it| AtomicU32::new(*it)).collect(),
            bad: AtomicU64::new(0),
            arrived_bytes: AtomicU64::new(0),
            written: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
            shape,
        });
        let writers = (0..inner.shape.writers).map(|writer| {
            let inner = Arc::clone(&inner);
            thread::spawn(move || inner.rewrite(writer))
        });
        Self { writers: writers.collect(), inner }
    }

    /// Lets the writers go on.
    pub fn run(&self) {
        self.inner.run();
    }

    /// Stands still when this returns: no page is half written.
    pub fn pause(&self) {
        self.inner.pause();
    }

    /// To give memory back by, from wherever.
    pub fn giver(&self) -> Giver {
        Giver(Arc::clone(&self.inner))
    }

    /// What is there of its file.
    pub fn allocated_bytes(&self) -> u64 {
        self.inner.allocated_bytes()
    }

    /// What was there of it when it had arrived, before it ran.
    pub fn arrived_bytes(&self) -> u64 {
        self.inner.arrived_bytes.load(Ordering::Relaxed)
    }

    /// Pages written since the start.
    pub fn written(&self) -> u64 {
        self.inner.written.load(Ordering::Relaxed)
    }

    /// Pages that were found to hold what they should not.
    pub fn bad(&self) -> u64 {
        self.inner.bad.load(Ordering::Relaxed)
    }

    /// Looks at every page; how many are wrong. For a guest that stands still.
    pub fn verify(&self) -> u64 {
        let pages = 0..self.inner.generations.len() as u64;
        pages.filter(|page| !self.inner.is_right(*page)).count() as u64
    }

    fn state(&self) -> Vec<u8> {
        let generations = self.inner.generations.iter();
        generations.flat_map(|it| it.load(Ordering::Relaxed).to_le_bytes()).collect()
    }
}

/// Gives memory of a guest back, as the monitor of a balloon does.
#[derive(Clone, Debug)]
pub struct Giver(Arc<Inner>);

impl Giver {
    /// The guest uses these bytes no more, and their pages are punched out of the file. Reads as zeros,
    /// if it is read at all.
    pub fn give_back(&self, bytes: Range<u64>) {
        self.0.pause();
        let pages = bytes.start / PAGE as u64..bytes.end / PAGE as u64;
        for generation in &self.0.generations[pages.start as usize..pages.end as usize] {
            generation.store(0, Ordering::Relaxed);
        }
        self.0.region.punch(bytes.start, bytes.end - bytes.start).expect("whole pages");
        self.0.run();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.inner.lock().ended = true;
        self.inner.changed.notify_all();
        for writer in self.writers.drain(..) {
            let _its_panic_was_printed = writer.join();
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        self.lock().running = true;
        self.changed.notify_all();
    }

    fn pause(&self) {
        let mut state = self.lock();
        state.running = false;
        while state.still < self.shape.writers {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn allocated_bytes(&self) -> u64 {
        let file = self.region.file().try_clone_to_owned().map(File::from);
        file.and_then(|file| file.metadata()).expect("an open file").blocks() * 512
    }

    /// A writer's thread: every so many-th of the filled pages is its own, but those given back.
    fn rewrite(&self, writer: u64) {
        let Shape { filled_pages, writers, pages_per_second, .. } = self.shape;
        let spacing = Duration::from_secs(1).mul_f64((BURST * writers) as f64)
            / pages_per_second.max(1) as u32;
        let mut random = writer + 1;
        loop {
            let mut state = self.lock();
            if !state.running {
                state.still += 1;
                self.changed.notify_all();
                while !state.running && !state.ended {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.still -= 1;
            }
            if state.ended {
                return;
            }
            drop(state);
            let begun = Instant::now();
            for _ in 0..BURST {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let page = (random >> 33) % (filled_pages / writers) * writers + writer;
                if self.generations[page as usize].load(Ordering::Relaxed) == 0 {
                    continue;
                }
                if !self.is_right(page) {
                    self.bad.fetch_add(1, Ordering::Relaxed);
                }
                self.write(page);
                self.written.fetch_add(1, Ordering::Relaxed);
            }
            thread::sleep(spacing.saturating_sub(begun.elapsed()));
        }
    }

    fn write(&self, page: u64) {
        let generation = self.generations[page as usize].fetch_add(1, Ordering::Relaxed) + 1;
        let lease = self.region.lease(page * PAGE as u64, PAGE as u64);
        lease.and_then(|it| it.copy_in(0, &content(page, generation))).expect("inside");
    }

    fn is_right(&self, page: u64) -> bool {
        let generation = self.generations[page as usize].load(Ordering::Relaxed);
        let mut found = [0; PAGE];
        let lease = self.region.lease(page * PAGE as u64, PAGE as u64);
        lease.and_then(|it| it.copy_out(0, &mut found)).expect("inside");
        found == content(page, generation)
    }
}

/// What a page holds; never written, it is zero. Every eleventh page is zero too, and with every
/// generation it is another one: zero pages are moved, and turn into others and back.
fn content(page: u64, generation: u32) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if generation == 0 || (page + u64::from(generation)).is_multiple_of(11) {
        return bytes;
    }
    let mut word = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(generation);
    for place in bytes.chunks_exact_mut(8) {
        word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn open(backing: Backing) -> Result<Arc<Region>, Failure> {
    Region::open(RegionIndex(0), backing).map_err(|error| failure::host("memory", &error, None))
}

/// The same file, mapped once more: what an agent gets.
fn mapped_again(region: &Region) -> Result<GuestMemory, Failure> {
    let fd = region.file().try_clone_to_owned();
    let fd = fd.map_err(|error| failure::host("memory", &error, None))?;
    let backing = Backing::from_fd(fd).map_err(|error| failure::host("memory", &error, None))?;
    Ok(GuestMemory::new(vec![open(backing)?]))
}

/// Bytes that are written by one side and read by the other.
#[derive(Debug, Default)]
struct Bytes(Mutex<(Vec<u8>, usize)>);

impl Bytes {
    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, usize)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The source's state on its way out.
#[derive(Debug, Default)]
struct Outgoing(Bytes);

impl StateStream for Outgoing {
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let (state, at) = &mut *self.0.lock();
        let count = bytes.len().min(state.len() - *at);
        bytes[..count].copy_from_slice(&state[*at..*at + count]);
        *at += count;
        Ok(count)
    }

    fn write_all(&self, _answer: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The target's, on its way in.
#[derive(Debug, Default)]
struct Incoming(Bytes);

impl StateStream for Incoming {
    fn read(&self, _answer: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().0.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The source's side of it.
#[derive(Debug)]
pub struct SyntheticSource {
    guest: Guest,
    facts: GuestFacts,
}

impl SyntheticSource {
    /// Of a guest that runs here.
    pub fn new(guest: Guest) -> Self {
        let shape = &guest.inner.shape;
        let page_bytes = shape.huge.unwrap_or(PAGE as u64);
        let facts = GuestFacts {
            monitor: "none (synthetic guest)".into(),
            machine: "synthetic".into(),
            pid: std::process::id() as i32,
            regions: vec![RegionOffer {
                name: "memory".into(),
                bytes: shape.bytes,
                page_bytes,
                backing: if shape.huge.is_some() { "hugetlbfs" } else { "tmpfs" }.into(),
                populated_bytes: shape.filled_pages * PAGE as u64,
            }],
            gives_memory_back: shape.gives_back.then(|| "the test".to_owned()),
            tracker: ("uffd-one-phase".into(), "no KVM shadows this memory".into()),
            ..GuestFacts::default()
        };
        Self { guest, facts }
    }

    /// The guest.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }
}

impl SourceMonitor for SyntheticSource {
    fn facts(&self) -> &GuestFacts {
        &self.facts
    }

    fn is_alive(&self) -> bool {
        true
    }

    fn settings(&self) -> Option<Settings> {
        None
    }

    fn guard(&mut self, _record: &Path) -> Result<(), Failure> {
        Ok(())
    }

    fn map_memory(&mut self) -> Result<GuestMemory, Failure> {
        mapped_again(&self.guest.inner.region)
    }

    fn attach(&mut self, memory: &GuestMemory) -> Result<Attached, Failure> {
        let populated = holes::guest_data_extents(memory)
            .map_err(|error| failure::host("looking for data", &error, None))?;
        let regions = [Arc::clone(&self.guest.inner.region)];
        let tracker = UffdTracker::of_own(&regions, &populated, ScanPhases::One)
            .map_err(|error| failure::host("tracking", &error, None))?;
        Ok(Attached { tracker: Box::new(tracker), stopped: Duration::ZERO })
    }

    fn fixed_cost(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn prepare_switchover(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        self.guest.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Failure> {
        self.guest.run();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Arc<dyn StateStream>, Failure> {
        let stream = Outgoing::default();
        stream.0.lock().0 = self.guest.state();
        Ok(Arc::new(stream))
    }

    fn state_saved(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn release(&mut self) {}

    fn unwind(&mut self) -> bool {
        self.guest.run();
        true
    }
}

/// Where the guest is left when it has arrived.
pub type Arrived = Arc<Mutex<Option<Guest>>>;

/// The target's side of it.
#[derive(Debug)]
pub struct SyntheticTarget {
    shape: Shape,
    region: Option<Arc<Region>>,
    state: Arc<Incoming>,
    arrived: Arrived,
}

impl SyntheticTarget {
    /// Waits for a guest of this shape.
    pub fn new(shape: Shape, arrived: &Arrived) -> Self {
        let arrived = Arc::clone(arrived);
        Self { shape, region: None, state: Arc::default(), arrived }
    }

    fn arrived(&self) -> MutexGuard<'_, Option<Guest>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TargetMonitor for SyntheticTarget {
    fn pid(&self) -> i32 {
        std::process::id() as i32
    }

    fn settings(&self) -> Option<Settings> {
        None
    }

    fn is_alive(&self) -> bool {
        true
    }

    fn inspect(&mut self, offer: &Offer) -> Result<GuestMemory, Failure> {
        assert_eq!(offer.regions[0].bytes, self.shape.bytes, "the test's two ends differ");
        let region = open(self.shape.backing()?)?;
        self.region = Some(Arc::clone(&region));
        mapped_again(&region)
    }

    fn prepare_incoming(&mut self) -> Result<Arc<dyn StateStream>, Failure> {
        Ok(Arc::clone(&self.state) as Arc<dyn StateStream>)
    }

    fn state_loaded(&mut self) -> Result<(), Failure> {
        let generations: Vec<u32> = {
            let state = self.state.0.lock();
            let (words, _) = state.0.as_chunks::<4>();
            words.iter().map(|word| u32::from_le_bytes(*word)).collect()
        };
        let region = self.region.clone().expect("inspected before");
        *self.arrived() = Some(Guest::over(self.shape.clone(), region, &generations));
        Ok(())
    }

    fn resume(&mut self) -> Result<Duration, Failure> {
        let guest = self.arrived();
        let guest = guest.as_ref().expect("loaded before");
        // Before it writes anything: what was moved, and nothing else.
        guest.inner.arrived_bytes.store(guest.allocated_bytes(), Ordering::Relaxed);
        guest.inner.bad.fetch_add(guest.verify(), Ordering::Relaxed);
        guest.run();
        Ok(Duration::from_micros(1))
    }

    fn unwind(&mut self) {
        *self.arrived() = None;
    }
}
