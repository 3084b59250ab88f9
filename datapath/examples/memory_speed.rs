//! How fast the memory side is on this machine: tracking, digests, populating, attaching.
//!
//! `cargo run --release -p pageferry-datapath --example memory_speed [-- MIB [HUGE_PAGE_BYTES]]`
//!
//! Each figure is the minimum and the median of several tries, in one process, one after the other;
//! memory is touched before, but for the populating that is called cold. Huge pages have to be
//! there already (`/proc/sys/vm/nr_hugepages`, twice the memory). The writer is another process
//! (this program again), so the scans are of foreign page tables, as a migration's are.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pageferry_datapath::attach::{Process, take_userfaultfd, tracked_ranges};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::holes::{data_within, guest_data_extents};
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::populate::Populate;
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::tracker::{DirtyTracker, ScanPhases, UffdTracker};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

const TRIES: usize = 9;

fn main() -> Outcome {
    if std::env::var_os("WRITER").is_some() {
        return writer();
    }
    let mut args = std::env::args().skip(1);
    let mib: u64 = args.next().map_or(Ok(1024), |mib| mib.parse())?;
    let huge: Option<u64> = args.next().map(|bytes| bytes.parse()).transpose()?;
    let bytes = mib << 20;
    println!("{mib} MiB in pages of {} bytes", huge.unwrap_or(4096));
    populating(bytes, huge)?;
    let memory = memory(bytes, huge)?;
    zero_pages(&memory)?;
    let writer = Writer::start(&memory)?;
    attaching(&writer)?;
    for phases in [ScanPhases::One, ScanPhases::Two] {
        tracking(&memory, &writer, phases)?;
    }
    writer.ask("fill")?;
    digesting(&memory)
}

fn memory(bytes: u64, huge: Option<u64>) -> Outcome<GuestMemory> {
    let backing = Backing::memfd("memory-speed", bytes, huge)?;
    Ok(GuestMemory::new(vec![Region::open(RegionIndex(0), backing)?]))
}

fn all(memory: &GuestMemory) -> Extent {
    Extent { region: RegionIndex(0), offset: 0, len: memory.regions()[0].len() }
}

fn populating(bytes: u64, huge: Option<u64>) -> Outcome {
    // The first memory that a machine hands out may be slower than any after it.
    for what in ["cold", "again"] {
        for threads in [1, 2] {
            let memory = memory(bytes, huge)?;
            let report = Populate::start(&memory, &[all(&memory)], threads)?.join()?;
            let rate = gib(report.bytes) / report.elapsed.as_secs_f64();
            println!("populate, {what}, {threads} threads: {rate:.2} GiB/s");
        }
    }
    Ok(())
}

fn zero_pages(memory: &GuestMemory) -> Outcome {
    let all = all(memory);
    let lease = memory.lease(all)?;
    for at in (0..all.len).step_by(4096) {
        lease.clear(at, 4096)?;
    }
    for (name, len) in [("all of memory", all.len), ("1 MiB again and again", 1 << 20)] {
        let mut took = Vec::new();
        for _ in 0..TRIES {
            let began = Instant::now();
            for at in (0..all.len).step_by(4096) {
                assert!(lease.is_zero(at % len, 4096)?);
            }
            took.push(began.elapsed());
        }
        show(&format!("zero pages found, {name}"), &mut took, 1.0 / gib(all.len));
    }
    Ok(())
}

fn attaching(writer: &Writer) -> Outcome {
    let process = writer.process()?;
    let mut stops = Vec::new();
    for _ in 0..300 {
        stops.push(take_userfaultfd(&process)?.stopped);
    }
    stops.sort();
    let (median, max) = (stops[stops.len() / 2], stops[stops.len() - 1]);
    println!("attach, thread stopped: {:?} min, {median:?} median, {max:?} max", stops[0]);
    Ok(())
}

fn tracking(memory: &GuestMemory, writer: &Writer, phases: ScanPhases) -> Outcome {
    let process = writer.process()?;
    let per_gib = 1.0 / gib(all(memory).len);
    let mut starts = Vec::new();
    let mut holes = Vec::new();
    let start = || -> Outcome<(UffdTracker, Duration, Duration)> {
        let uffd = take_userfaultfd(&process)?.fd;
        let ranges = tracked_ranges(&process, memory)?;
        let began = Instant::now();
        let populated = guest_data_extents(memory)?;
        let looked = began.elapsed();
        let began = Instant::now();
        let pagemap = process.pagemap()?;
        let tracker =
            UffdTracker::start(uffd, pagemap, memory.regions(), ranges, &populated, phases)?;
        Ok((tracker, looked, began.elapsed()))
    };
    for _ in 0..3 {
        let (tracker, looked, took) = start()?;
        holes.push(looked);
        starts.push(took);
        Box::new(tracker).stop()?;
    }
    show(&format!("{phases:?}-phase, find data"), &mut holes, per_gib);
    show(&format!("{phases:?}-phase, register and protect"), &mut starts, per_gib);
    let (mut tracker, ..) = start()?;
    for (name, command) in [("clean", "rest"), ("1 % written", "some"), ("all written", "all")] {
        let (mut took, mut looked, mut pages) = (Vec::new(), Vec::new(), 0);
        for _ in 0..TRIES {
            writer.ask(command)?;
            let mut dirty = DirtySet::for_memory(memory);
            took.push(tracker.scan(&mut dirty)?.elapsed);
            pages = dirty.count();
            let began = Instant::now();
            data_within(memory, &dirty)?;
            looked.push(began.elapsed());
        }
        show(&format!("{phases:?}-phase scan, {name} ({pages} pages)"), &mut took, per_gib);
        show("    holes among them", &mut looked, per_gib);
    }
    Box::new(tracker).stop()?;
    Ok(())
}

fn digesting(memory: &GuestMemory) -> Outcome {
    for threads in [1, 2] {
        let mut took = Vec::new();
        for _ in 0..TRIES {
            let began = Instant::now();
            MemoryDigest::of_memory(memory, threads, &AtomicBool::new(false))?;
            took.push(began.elapsed());
        }
        took.sort();
        let rate = |took: Duration| gib(all(memory).len) / took.as_secs_f64();
        let (best, median) = (rate(took[0]), rate(took[TRIES / 2]));
        println!("digest, {threads} threads: {best:.2} GiB/s best, {median:.2} median");
    }
    Ok(())
}

fn show(name: &str, took: &mut [Duration], per_gib: f64) {
    took.sort();
    let ms = |took: Duration| took.as_secs_f64() * 1e3 * per_gib;
    let (min, median) = (ms(took[0]), ms(took[took.len() / 2]));
    println!("{name}: {min:.3} ms/GiB min, {median:.3} median");
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// The other process.
struct Writer {
    child: Child,
    stdin: ChildStdin,
    stdout: std::cell::RefCell<BufReader<ChildStdout>>,
}

impl Writer {
    fn start(memory: &GuestMemory) -> Outcome<Self> {
        let file = memory.regions()[0].file().try_clone_to_owned()?;
        let mut child = Command::new(std::env::current_exe()?)
            .env("WRITER", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()?;
        let stdin = child.stdin.take().ok_or("no stdin")?;
        let stdout = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        let writer = Self { child, stdin, stdout: stdout.into() };
        writer.ask("all")?;
        Ok(writer)
    }

    fn ask(&self, command: &str) -> Outcome {
        writeln!(&self.stdin, "{command}")?;
        let mut line = String::new();
        self.stdout.borrow_mut().read_line(&mut line)?;
        if line.trim() == "done" { Ok(()) } else { Err("the writer failed".into()) }
    }

    fn process(&self) -> Outcome<Process> {
        Ok(Process::open(self.child.id() as libc::pid_t)?)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Maps the file it has as its standard error, and writes as it is told.
fn writer() -> Outcome {
    let file = std::io::stderr().as_fd().try_clone_to_owned()?;
    let region = Region::open(RegionIndex(0), Backing::from_fd(file)?)?;
    let pages = region.len() / 4096;
    let memory = region.lease(0, region.len())?;
    let mut random = 88172645463325252u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "all" => (0..pages).try_for_each(|page| memory.touch(page * 4096))?,
            "some" => (0..pages / 100).try_for_each(|_| memory.touch(next() % pages * 4096))?,
            "fill" => {
                let mut page = [0; 4096];
                for at in 0..pages {
                    page.as_chunks_mut::<8>().0.fill_with(|| next().to_le_bytes());
                    memory.copy_in(at * 4096, &page)?;
                }
            }
            _ => {}
        }
        println!("done");
    }
    Ok(())
}
