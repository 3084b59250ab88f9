//! `register`: what an RDMA device takes to register memory and to let go of it, for each GiB, by
//! the size of pages, of slices, and by whether the memory was ever touched.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use pageferry_ctl::lab::Workplace;
use pageferry_datapath::region::Region;
use pageferry_rdma::bare::{BareDevice, BareMemory};
use pageferry_rdma::error::RdmaError;
use serde_json::json;

use crate::args::RegisterArgs;
use crate::ends::Ends;
use crate::error::BenchError;
use crate::recorder::Recorded;
use crate::results::Results;
use crate::scan::Memory;
use crate::series::{Kind, Series};
use crate::turns::{Entrant, Setting, Taken};
use crate::{svg, turns};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Memory that is there.
    Register,
    /// Holes: it has to be made, too.
    RegisterFresh,
    Deregister,
}

/// One who takes part.
struct Contender {
    what: What,
    memory: Arc<Memory>,
    slice_bytes: u64,
    threads: usize,
}

/// The benchmark.
pub(crate) fn run(args: &RegisterArgs) -> Result<(), BenchError> {
    let mut results = Results::begin("register", json!(args));
    let (ends, workplace) = (Ends::new(&args.wire)?, Workplace::new()?);
    let device = BareDevice::at(SocketAddr::new(ends.rdma()?.local, 0))?;
    let mut settings: Vec<Setting<Contender>> = Vec::new();
    for &size in &args.page_sizes {
        let memory = match Memory::new(size, args.mib, &workplace) {
            Ok(memory) => Arc::new(memory),
            Err(error) => {
                println!("SKIP pages of {}: {}", size.name(), error.chain());
                continue;
            }
        };
        for (&slice_mib, &threads) in
            args.slices_mib.iter().flat_map(|slice| args.threads.iter().map(move |t| (slice, t)))
        {
            let whole = memory.region.len();
            let slice_bytes = match slice_mib << 20 {
                0 => whole,
                bytes => bytes.next_multiple_of(size.bytes()).min(whole),
            };
            let is_known = |setting: &Setting<Contender>| {
                let of = &setting[0].who;
                of.memory.size == size && of.slice_bytes == slice_bytes && of.threads == threads
            };
            // A small memory is one slice whatever was asked for.
            if settings.iter().any(is_known) {
                continue;
            }
            let mut group = format!("{} pages, slices of {}", size.name(), svg::size(slice_bytes));
            if threads > 1 {
                group.push_str(&format!(", {threads} threads"));
            }
            let entrant = |by: &str, what| {
                let parameters = json!({
                    "page": size, "memory_mib": args.mib, "slice_bytes": slice_bytes,
                    "threads": threads,
                });
                let who = Contender { what, memory: Arc::clone(&memory), slice_bytes, threads };
                Entrant { who, series: Series::new(&group, by, Kind::Cost, parameters) }
            };
            settings.push(vec![
                entrant("register", What::Register),
                entrant("register memory never touched", What::RegisterFresh),
                entrant("deregister", What::Deregister),
            ]);
        }
    }
    turns::take(args.turns, &mut settings, |who| measure(&device, who).map(Some))?;
    results.series = turns::series(settings);
    results.finish(&args.output)
}

fn measure(device: &BareDevice, who: &Contender) -> Result<Taken, BenchError> {
    let region = &who.memory.region;
    match who.what {
        What::RegisterFresh => region.punch(0, region.len())?,
        // The turn before may have left holes.
        _ => who.memory.touch()?,
    }
    let began = Instant::now();
    let registered = register(device, region, who.slice_bytes, who.threads)?;
    let mut took = began.elapsed();
    let slices = registered.len();
    let began = Instant::now();
    drop(registered);
    if who.what == What::Deregister {
        took = began.elapsed();
    }
    let recorded = Recorded::of_costs(&[took], region.len());
    let us_each = took.as_secs_f64() * 1e6 / slices as f64;
    Ok(Taken { recorded, said: json!({ "slices": slices, "us_per_slice": us_each }) })
}

/// In slices, dealt to the threads in turns.
fn register(
    device: &BareDevice,
    region: &Arc<Region>,
    slice_bytes: u64,
    threads: usize,
) -> Result<Vec<BareMemory>, BenchError> {
    let slices: Vec<u64> = (0..region.len()).step_by(slice_bytes as usize).collect();
    let threads = threads.max(1);
    let part = |thread: usize| -> Result<Vec<BareMemory>, RdmaError> {
        let of_it = slices.iter().skip(thread).step_by(threads);
        of_it.map(|&at| device.register(region, at, slice_bytes.min(region.len() - at))).collect()
    };
    let part = &part;
    let parts: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || part(thread))).collect();
        let joined = running.into_iter().map(|thread| thread.join());
        joined.map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut all = Vec::new();
    for part in parts {
        all.extend(part?);
    }
    Ok(all)
}
