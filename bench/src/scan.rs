//! `scan`: what dirty tracking costs for each GiB of memory, by page size and by how much of it is
//! written between two scans: the scan, the writer's faults, and starting and stopping.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{HugePages, Workplace};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::tracker::{DirtyTracker, ScanPhases, ScanStats, UffdTracker};
use serde_json::{Value, json};

use crate::args::{PageSize, Pattern, ScanArgs};
use crate::error::BenchError;
use crate::places::Order;
use crate::recorder::Recorded;
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::turns;
use crate::turns::{Entrant, Setting, Taken};

/// What is timed.
#[derive(Clone, Copy, Debug)]
enum What {
    /// Scans.
    Scan(ScanPhases),
    /// The first byte of each page that is written, after a scan or without any tracking.
    Write {
        tracked: bool,
    },
    /// Making a tracker, and taking its protection off again.
    Start,
    Stop,
}

/// One who takes part.
struct Contender {
    what: What,
    memory: Arc<Memory>,
    /// Pages written between two scans, and how they lie.
    pages: u64,
    pattern: Pattern,
}

/// The benchmark.
pub(crate) fn run(args: &ScanArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("scan", json!(args));
    let workplace = Workplace::new()?;
    let mut settings = Vec::new();
    for &size in &args.page_sizes {
        match Memory::new(size, args.mib, &workplace) {
            Ok(memory) => settings.extend(settings_of(args, &Arc::new(memory))),
            // One size that is not to be had is no reason not to measure the others.
            Err(error) => println!("SKIP pages of {}: {}", size.name(), error.chain()),
        }
    }
    turns::take(args.turns, &mut settings, |who| measure(who, args.scans).map(Some))?;
    results.series = turns::series(settings);
    results.finish(&args.output)
}

fn settings_of(args: &ScanArgs, memory: &Arc<Memory>) -> Vec<Setting<Contender>> {
    let size = memory.size.name();
    let entrant = |group: &str, by: &str, what, pages, pattern| {
        let parameters = json!({
            "page": memory.size, "memory_mib": args.mib, "pages_written": pages,
            "pattern": pattern, "scans": args.scans,
        });
        let who = Contender { what, memory: Arc::clone(memory), pages, pattern };
        Entrant { who, series: Series::new(group, by, Kind::Cost, parameters) }
    };
    let group = format!("{size} pages: tracking starts and stops");
    let started = |by, what| entrant(&group, by, what, 0, Pattern::Together);
    let mut settings = vec![vec![started("start", What::Start), started("stop", What::Stop)]];
    for &pattern in &args.patterns {
        for &percent in &args.written_percent {
            let pages = (memory.pages() as f64 * percent.clamp(0.0, 100.0) / 100.0) as u64;
            let lie = if pattern == Pattern::Scattered { "scattered" } else { "together" };
            let group = format!("{size} pages, {percent} % written, {lie}");
            let of = |by, what| entrant(&group, by, what, pages, pattern);
            settings.push(vec![
                of("scan in one phase", What::Scan(ScanPhases::One)),
                of("scan in two phases", What::Scan(ScanPhases::Two)),
            ]);
            if pages > 0 {
                let group = format!("{group}: the writer");
                let of = |by, tracked| entrant(&group, by, What::Write { tracked }, pages, pattern);
                settings.push(vec![of("tracked", true), of("not tracked", false)]);
            }
        }
    }
    settings
}

fn measure(who: &Contender, scans: u32) -> Result<Taken, BenchError> {
    let memory = &who.memory;
    let mut took = Vec::new();
    let timed = |took: &mut Vec<Duration>, began: Instant| took.push(began.elapsed());
    let mut last = ScanStats::default();
    match who.what {
        What::Start | What::Stop => {
            for _ in 0..scans {
                let began = Instant::now();
                let tracker = memory.track(ScanPhases::One)?;
                if matches!(who.what, What::Start) {
                    timed(&mut took, began);
                }
                let began = Instant::now();
                Box::new(tracker).stop()?;
                if matches!(who.what, What::Stop) {
                    timed(&mut took, began);
                }
            }
        }
        What::Write { tracked: false } => {
            for _ in 0..scans {
                let began = Instant::now();
                memory.write(who)?;
                timed(&mut took, began);
            }
        }
        What::Scan(_) | What::Write { tracked: true } => {
            let phases = if let What::Scan(phases) = who.what { phases } else { ScanPhases::One };
            let mut tracker = memory.track(phases)?;
            let shape = GuestMemory::new(vec![Arc::clone(&memory.region)]);
            let mut found = DirtySet::for_memory(&shape);
            for _ in 0..scans {
                found.clear();
                let began = Instant::now();
                memory.write(who)?;
                let written = Instant::now();
                last = tracker.scan(&mut found)?;
                match who.what {
                    What::Scan(_) => timed(&mut took, written),
                    _ => took.push(written - began),
                }
                // A scan that misses what was written has no cost worth telling.
                let pages = last.reported_bytes / memory.size.bytes();
                if pages != who.pages {
                    return Err(BenchError::Unexpected {
                        program: "a scan".into(),
                        said: format!("{pages} pages of {} written", who.pages),
                    });
                }
            }
            Box::new(tracker).stop()?;
        }
    }
    let bytes = match who.what {
        What::Write { .. } => who.pages * memory.size.bytes(),
        _ => memory.region.len(),
    };
    let said = json!({
        "reported_bytes": last.reported_bytes, "runs": last.runs, "system_calls": last.calls,
        "ns_per_page_written": per_page_ns(&took, who.pages),
    });
    Ok(Taken { recorded: Recorded::of_costs(&took, bytes), said })
}

fn per_page_ns(took: &[Duration], pages: u64) -> Value {
    let pages = pages * took.len() as u64;
    match pages {
        0 => Value::Null,
        pages => json!(took.iter().sum::<Duration>().as_nanos() as f64 / pages as f64),
    }
}

/// Memory of this process, all of it there.
pub(crate) struct Memory {
    pub(crate) size: PageSize,
    pub(crate) region: Arc<Region>,
    // Given back after the mapping is gone.
    _huge: Option<HugePages>,
}

impl Memory {
    pub(crate) fn new(
        size: PageSize,
        mib: u64,
        workplace: &Arc<Workplace>,
    ) -> Result<Self, BenchError> {
        let bytes = (mib << 20).next_multiple_of(size.bytes());
        let huge = (size == PageSize::Huge).then_some(size.bytes());
        let reserved = huge.map(|_| HugePages::reserve(workplace, bytes)).transpose()?;
        let backing = Backing::memfd("benchmark", bytes, huge)?;
        let this = Self { size, region: Region::open(RegionIndex(0), backing)?, _huge: reserved };
        this.touch()?;
        Ok(this)
    }

    /// Has every page be there.
    pub(crate) fn touch(&self) -> Result<(), BenchError> {
        let lease = self.region.lease(0, self.region.len())?;
        for at in (0..self.region.len()).step_by(self.size.bytes() as usize) {
            lease.touch(at)?;
        }
        Ok(())
    }

    pub(crate) fn pages(&self) -> u64 {
        self.region.len() / self.size.bytes()
    }

    fn track(&self, phases: ScanPhases) -> Result<UffdTracker, BenchError> {
        let all = Extent { region: RegionIndex(0), offset: 0, len: self.region.len() };
        Ok(UffdTracker::of_own(&[Arc::clone(&self.region)], &[all], phases)?)
    }

    /// A few bytes of each page that is to be written.
    fn write(&self, who: &Contender) -> Result<(), BenchError> {
        let order = Order::new((who.pattern == Pattern::Scattered).then(|| self.pages()));
        let lease = self.region.lease(0, self.region.len())?;
        for index in 0..who.pages {
            lease.copy_in(order.place(index) * self.size.bytes(), &index.to_le_bytes())?;
        }
        Ok(())
    }
}

impl PageSize {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Small => "4 KiB",
            Self::Huge => "2 MiB",
        }
    }
}
