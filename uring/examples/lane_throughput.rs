//! Lanes from memory to memory over loopback, beside the ceiling of bare `send` and `recv`.
//!
//! Method: both memories are hugepages, touched before; every variant moves all of the source's
//! memory once per run; the variants take turns, so that what else the machine does hits all of
//! them alike; the first turn is dropped. A lane's run is one round, headers and barrier included.
//! Throughput and CPU seconds per GiB (both ends, user and system) are medians over the turns,
//! and so is each turn's ratio to the best ceiling of the same turn.

use std::error::Error;
use std::fs::File;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{UsageWho, getrusage};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Reply, Ticket};
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::work::RoundWork;
use pageferry_uring::ceiling::Ceiling;
use pageferry_uring::greet;
use pageferry_uring::plan::{
    ConnectPlan, LanePlan, PathWish, SocketTuning, TargetLaneConfig, ZeroCopyWish,
};
use pageferry_uring::source::LanePool;
use pageferry_uring::target::TargetLane;

#[derive(Debug, Parser)]
struct Options {
    /// MiB of guest memory.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// Measured turns; one more is dropped.
    #[arg(long, default_value_t = 7)]
    turns: usize,
    /// 4 KiB pages instead of huge ones.
    #[arg(long)]
    small_pages: bool,
    /// Lengths of the extents in KiB; shorter ones than a batch make many iovecs.
    #[arg(long, default_value_t = 1 << 20)]
    extent_kib: u64,
    /// Socket buffers to try, in KiB.
    #[arg(long, value_delimiter = ',', default_values_t = [256])]
    buffer_kib: Vec<usize>,
    /// Variants to run: those whose name contains all parts of one of these.
    #[arg(long, value_delimiter = ',', default_value = "Together+x2,zero-copy")]
    only: Vec<String>,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

enum Kind {
    Ceiling { chunk_bytes: u64 },
    Lanes { source: PathWish, target: PathWish, zero_copy: ZeroCopyWish },
}

/// Where the two ends of lane i run, on two cores.
#[derive(Clone, Copy, Debug)]
enum Placed {
    /// Both on core i.
    Together,
    /// One on each core.
    Apart,
    /// Where the scheduler puts them.
    Free,
}

impl Placed {
    fn source(self, lane: usize) -> Option<usize> {
        match self {
            Self::Together | Self::Apart => Some(lane % 2),
            Self::Free => None,
        }
    }

    fn target(self, lane: usize) -> Option<usize> {
        match self {
            Self::Together => Some(lane % 2),
            Self::Apart => Some((lane + 1) % 2),
            Self::Free => None,
        }
    }
}

struct Variant {
    name: String,
    kind: Kind,
    lanes: usize,
    placed: Placed,
    tuning: SocketTuning,
}

struct Sample {
    gib_per_s: f64,
    cpu_s_per_gib: f64,
    syscalls: u64,
    switches: i64,
    path: String,
}

fn main() -> Outcome<()> {
    let options = Options::parse();
    let pages = if options.small_pages { 0 } else { options.mib }; // 2 memories of 2 MiB pages
    let _huge = HugePages::add(pages)?;
    let (from, to) = (memory(&options)?, memory(&options)?);
    for memory in [&from, &to] {
        let region = &memory.regions()[0];
        let lease = region.lease(0, region.len())?;
        for offset in (0..region.len()).step_by(4096) {
            lease.copy_in(offset, &offset.to_le_bytes())?;
        }
    }
    let variants = variants(&options);
    let mut samples: Vec<Vec<Sample>> = variants.iter().map(|_| Vec::new()).collect();
    for turn in 0..=options.turns {
        for (variant, samples) in variants.iter().zip(&mut samples) {
            let sample = run(variant, &options, &from, &to)?;
            if turn > 0 {
                samples.push(sample);
            }
        }
    }
    print(&variants, &samples);
    Ok(())
}

fn variants(options: &Options) -> Vec<Variant> {
    let mut all = Vec::new();
    let tunings = options.buffer_kib.iter().flat_map(|&kib| [(kib, true), (kib, false)]);
    for (buffer_kib, unpaced) in tunings {
        let tuning = SocketTuning { buffer_bytes: Some(buffer_kib << 10), unpaced };
        let tail = format!("{buffer_kib}k{}", if unpaced { "" } else { " system's" });
        for lanes in [1, 2, 4] {
            for placed in [Placed::Together, Placed::Apart, Placed::Free] {
                let kind = Kind::Ceiling { chunk_bytes: 1 << 20 };
                let name = format!("ceiling x{lanes} {placed:?} {tail}");
                all.push(Variant { name, kind, lanes, placed, tuning });
                let paths = [PathWish::Plain, PathWish::Uring];
                for (source, target) in paths.into_iter().flat_map(|s| paths.map(|t| (s, t))) {
                    let kind =
                        Kind::Lanes { source, target, zero_copy: ZeroCopyWish::Not("left out") };
                    let name = format!("{source:?} to {target:?} x{lanes} {placed:?} {tail}");
                    all.push(Variant { name, kind, lanes, placed, tuning });
                }
            }
        }
        let kind = Kind::Lanes {
            source: PathWish::Uring,
            target: PathWish::Uring,
            zero_copy: ZeroCopyWish::Try,
        };
        let name = format!("Uring, zero-copy asked for x2 Together {tail}");
        all.push(Variant { name, kind, lanes: 2, placed: Placed::Together, tuning });
    }
    let chosen = |name: &str| {
        options.only.iter().any(|only| only.split('+').all(|part| name.contains(part)))
    };
    all.retain(|variant| chosen(&variant.name));
    all
}

fn run(
    variant: &Variant,
    options: &Options,
    from: &GuestMemory,
    to: &GuestMemory,
) -> Outcome<Sample> {
    let gib = options.mib as f64 / 1024.0;
    let before = switches()?;
    let (took, cpu_s, stats) = match variant.kind {
        Kind::Ceiling { chunk_bytes } => {
            let cpus = (0..variant.lanes)
                .map(|lane| (variant.placed.source(lane), variant.placed.target(lane)))
                .collect();
            let ceiling = Ceiling { cpus, chunk_bytes, tuning: variant.tuning };
            let before = cpu_seconds()?;
            let took = ceiling.run(from, to)?;
            (took, cpu_seconds()? - before, Vec::new())
        }
        Kind::Lanes { source, target, zero_copy } => {
            move_once(variant, options, from, to, source, target, zero_copy)?
        }
    };
    let path = stats.first().map_or(String::new(), |s| format!("{:?} {:?}", s.path, s.zero_copy));
    Ok(Sample {
        gib_per_s: gib / took.as_secs_f64(),
        cpu_s_per_gib: cpu_s / gib,
        syscalls: stats.iter().map(|s| s.syscalls).sum(),
        switches: switches()? - before,
        path,
    })
}

fn move_once(
    variant: &Variant,
    options: &Options,
    from: &GuestMemory,
    to: &GuestMemory,
    source: PathWish,
    target: PathWish,
    zero_copy: ZeroCopyWish,
) -> Outcome<(Duration, f64, Vec<LaneStats>)> {
    let placed = variant.placed;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (session, ticket) = (SessionId(1), Ticket([1; 32]));
    let lanes = (0..variant.lanes).map(|lane| LanePlan {
        lane: LaneId(lane as u16),
        ticket,
        cpu: placed.source(lane),
        from: Vec::new(),
        route: None,
    });
    let mut plan = ConnectPlan::new(listener.local_addr()?, session, lanes.collect());
    (plan.path, plan.zero_copy, plan.tuning) = (source, zero_copy, variant.tuning);
    let (events, inbox) = crossbeam_channel::unbounded();
    let (target_events, _target_inbox) = crossbeam_channel::unbounded();
    let (mut pool, targets) = std::thread::scope(|scope| -> Outcome<_> {
        let memory = from.clone();
        let opening = scope.spawn(move || LanePool::connect(&plan, memory, events));
        let mut targets = Vec::new();
        for _ in 0..variant.lanes {
            let (stream, _) = listener.accept()?;
            let deadline = Instant::now() + Duration::from_secs(5);
            let hello = greet::read_hello(&stream, deadline)?;
            greet::send_reply(&stream, Reply::Accepted, deadline)?;
            let config = TargetLaneConfig {
                cpu: placed.target(usize::from(hello.lane.0)),
                path: target,
                tuning: variant.tuning,
                ..TargetLaneConfig::default()
            };
            let events = target_events.clone();
            targets.push(TargetLane::start(stream, hello.lane, to.clone(), &config, events)?);
        }
        Ok((opening.join().map_err(|_| "connect panicked")??, targets))
    })?;
    let extent_bytes = options.extent_kib << 10;
    let bytes = options.mib << 20;
    let extents = (0..bytes).step_by(extent_bytes as usize).map(|offset| Extent {
        region: RegionIndex(0),
        offset,
        len: extent_bytes.min(bytes - offset),
    });
    let work = Arc::new(RoundWork::new(RoundIndex(0), extents));
    let before = cpu_seconds()?;
    let start = Instant::now();
    pool.move_round(work);
    for _ in 0..variant.lanes {
        match inbox.recv_timeout(Duration::from_secs(60))? {
            LaneEvent::Placed { .. } => {}
            other => return Err(format!("{other:?}").into()),
        }
    }
    let took = start.elapsed();
    let cpu_s = cpu_seconds()? - before;
    let mut stats = Box::new(pool).close(false);
    stats.extend(targets.into_iter().map(TargetLane::finish));
    Ok((took, cpu_s, stats))
}

fn print(variants: &[Variant], samples: &[Vec<Sample>]) {
    let turns = samples.first().map_or(0, Vec::len);
    let ceilings: Vec<usize> =
        (0..variants.len()).filter(|&v| matches!(variants[v].kind, Kind::Ceiling { .. })).collect();
    let best =
        |turn: usize| ceilings.iter().map(|&v| samples[v][turn].gib_per_s).fold(f64::NAN, f64::max);
    let leanest = |turn: usize| {
        ceilings.iter().map(|&v| samples[v][turn].cpu_s_per_gib).fold(f64::NAN, f64::min)
    };
    println!(
        "{:40} {:>7} {:>7} {:>8} {:>8} {:>9} {:>9}  path",
        "variant", "GiB/s", "ratio", "CPU s/G", "ratio", "syscalls", "switches"
    );
    for (variant, samples) in variants.iter().zip(samples) {
        let column = |f: &dyn Fn(usize) -> f64| median((0..turns).map(f).collect());
        println!(
            "{:40} {:7.2} {:7.3} {:8.3} {:8.3} {:9} {:9}  {}",
            variant.name,
            column(&|t| samples[t].gib_per_s),
            column(&|t| samples[t].gib_per_s / best(t)),
            column(&|t| samples[t].cpu_s_per_gib),
            column(&|t| samples[t].cpu_s_per_gib / leanest(t)),
            samples.last().map_or(0, |s| s.syscalls),
            samples.last().map_or(0, |s| s.switches),
            samples.last().map_or("", |s| &s.path),
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn cpu_seconds() -> Outcome<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 * 1e-6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Context switches of this process so far, both kinds.
fn switches() -> Outcome<i64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok(usage.voluntary_context_switches() + usage.involuntary_context_switches())
}

fn memory(options: &Options) -> Outcome<GuestMemory> {
    let (flags, page_bytes) = if options.small_pages {
        (MFdFlags::empty(), 4096)
    } else {
        (MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, 2 << 20)
    };
    let file = File::from(memfd_create("lane-throughput", flags)?);
    file.set_len(options.mib << 20)?;
    let region = Region::map(RegionIndex(0), file, options.mib << 20, page_bytes)?;
    Ok(GuestMemory::new(vec![region]))
}

/// Huge pages added to the machine's pool for this run.
struct HugePages(u64);

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn add(count: u64) -> Outcome<Self> {
        let before = Self::count()?;
        std::fs::write(POOL, (before + count).to_string())?;
        let added = Self(Self::count()?.saturating_sub(before));
        if added.0 < count {
            return Err(format!("{} of {count} huge pages to be had", added.0).into());
        }
        Ok(added)
    }

    fn count() -> Outcome<u64> {
        Ok(std::fs::read_to_string(POOL)?.trim().parse()?)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let (Ok(now), true) = (Self::count(), self.0 > 0) {
            let _ = std::fs::write(POOL, now.saturating_sub(self.0).to_string());
        }
    }
}
