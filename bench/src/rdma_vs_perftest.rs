//! `rdma-vs-perftest`: our WRITEs beside `ib_write_bw` and `ib_write_lat`, in turns.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::args::{RdmaEnds, RdmaVsPerftestArgs};
use crate::error::BenchError;
use crate::goals::Goal;
use crate::perftest::PerftestWay;
use crate::rdma_wire::Verb;
use crate::recorder::{Pace, Recorded};
use crate::results::Results;
use crate::series::{Kind, Reading, Series, SeriesRun, ratio};
use crate::serve::Peer;
use crate::{cpu, interrupt, lanes_wire, output, rdma_wire};

/// perftest's own depth.
const DEPTH: u32 = 128;

/// One who takes part at one setting.
enum Contender {
    Perftest(PerftestWay),
    Wire(rdma_wire::Way),
    Lanes(lanes_wire::Way),
}

/// One setting with those who are compared at it, and their series.
struct Setting {
    contenders: Vec<(Contender, Series)>,
    latency: bool,
}

/// The benchmark.
pub(crate) fn run(args: &RdmaVsPerftestArgs) -> Result<(), BenchError> {
    let ends = args.ends.resolve()?;
    let mut results = Results::begin("rdma-vs-perftest", json!({ "ends": ends, "args": args }));
    let mut settings = Vec::new();
    for &bytes in &args.sizes {
        settings.extend(args.queue_pairs.iter().map(|&count| streaming(args, bytes, count)));
    }
    settings.extend(args.latency_sizes.iter().map(|&bytes| ping_pong(bytes, args.huge)));
    for turn in 0..args.turns {
        for setting in &mut settings {
            // Each turn begins with the next one: none always follows the same one.
            let count = setting.contenders.len();
            for index in 0..count {
                let (contender, series) = &mut setting.contenders[(index + turn as usize) % count];
                interrupt::check()?;
                one_run(args, &ends, contender, setting.latency, turn, series);
            }
        }
    }
    for setting in settings {
        let all: Vec<Series> = setting.contenders.into_iter().map(|(_, series)| series).collect();
        let (theirs, ours) = all.split_first().expect("perftest comes first");
        for ours in ours.iter().filter(|series| !series.by.starts_with("ib_")) {
            if setting.latency {
                for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
                    let goal = Some(Goal::AtMost(1.03));
                    let reading = Reading::Quantile(quantile);
                    results.ratios.push(ratio(name, ours, theirs, reading, goal));
                }
            } else {
                let goal = Some(Goal::AtLeast(0.98));
                let what = "throughput";
                results.ratios.push(ratio(what, ours, theirs, Reading::BytesPerS, goal));
                results.ratios.push(ratio(what, ours, theirs, Reading::CpuPerGib, None));
                results.ratios.last_mut().expect("just pushed").what =
                    format!("{}: CPU per GiB", ours.group);
            }
        }
        results.series.extend(all);
    }
    results.finish(&args.output)
}

fn streaming(args: &RdmaVsPerftestArgs, bytes: u32, queue_pairs: u32) -> Setting {
    let group = format!("WRITE {} KiB, {queue_pairs} QP", bytes / 1024);
    let wire = rdma_wire::Way {
        verb: Verb::Write,
        bytes,
        depth: DEPTH,
        signal_every: 1,
        chain: 1,
        queue_pairs,
        huge: args.huge,
    };
    let perftest = PerftestWay {
        verb: Verb::Write,
        streams: true,
        bytes,
        queue_pairs,
        depth: Some(DEPTH),
        signal_every: Some(1),
        chain: None,
    };
    let lanes = lanes_wire::Way {
        lanes: queue_pairs as u16,
        memory_bytes: u64::from(bytes),
        extent_bytes: u64::from(bytes),
        huge: args.huge,
    };
    let series =
        |by: &str, parameters: Value| Series::new(&group, by, Kind::Throughput, parameters);
    let contenders = vec![
        (Contender::Perftest(perftest.clone()), series(&perftest.name(), json!(perftest))),
        (Contender::Wire(wire), series("pageferry's queue pair", json!(wire))),
        (Contender::Lanes(lanes), series("pageferry's lanes", json!(lanes))),
    ];
    let mut setting = Setting { contenders, latency: false };
    if let Some(mib) = args.memory_mib {
        let lanes = lanes_wire::Way { memory_bytes: mib << 20, ..lanes };
        let by = format!("pageferry's lanes, {mib} MiB of memory");
        setting.contenders.push((Contender::Lanes(lanes), series(&by, json!(lanes))));
    }
    setting
}

fn ping_pong(bytes: u32, huge: bool) -> Setting {
    let group = match bytes {
        0..1024 => format!("WRITE {bytes} B"),
        _ => format!("WRITE {} KiB", bytes / 1024),
    };
    let wire = rdma_wire::Way {
        verb: Verb::Write,
        bytes,
        depth: DEPTH,
        signal_every: 1,
        chain: 1,
        queue_pairs: 1,
        huge,
    };
    let perftest = PerftestWay {
        verb: Verb::Write,
        streams: false,
        bytes,
        queue_pairs: 1,
        depth: None,
        signal_every: None,
        chain: None,
    };
    let series = |by: &str, parameters| Series::new(&group, by, Kind::Latency, parameters);
    let contenders = vec![
        (Contender::Perftest(perftest.clone()), series(&perftest.name(), json!(perftest))),
        (Contender::Wire(wire), series("pageferry's queue pair", json!(wire))),
    ];
    Setting { contenders, latency: true }
}

/// A run that fails is kept as such: the others go on.
fn one_run(
    args: &RdmaVsPerftestArgs,
    ends: &RdmaEnds,
    contender: &Contender,
    latency: bool,
    turn: u32,
    series: &mut Series,
) {
    let busy = cpu::machine_busy_s().unwrap_or(f64::NAN);
    match measure(args, ends, contender, latency) {
        Ok(recorded) => {
            let machine_cpu_s = cpu::machine_busy_s().unwrap_or(f64::NAN) - busy;
            let value = match latency {
                true => format!("p50 {:.1} us", recorded.distribution.at(0.5) as f64 / 1e3),
                false => format!("{:.1} MiB/s", recorded.bytes_per_s() / f64::from(1 << 20)),
            };
            output::progress(&format!("turn {turn}: {}: {}: {value}", series.group, series.by));
            series.runs.push(SeriesRun { turn, recorded, machine_cpu_s, said: Value::Null });
        }
        Err(error) => {
            let failure = format!("turn {turn}: {}", error.chain());
            output::progress(&format!("{}: {}: {failure}", series.group, series.by));
            series.failures.push(failure);
        }
    }
}

fn measure(
    args: &RdmaVsPerftestArgs,
    ends: &RdmaEnds,
    contender: &Contender,
    latency: bool,
) -> Result<Recorded, BenchError> {
    let pace = Pace {
        warm_up: args.warm_up,
        operations: args.operations,
        rate: None,
        interval_ms: 100,
        half: true,
    };
    let per_queue_pair =
        |bytes: u32, count: u32| ((args.mib << 20) / u64::from(bytes) / u64::from(count)).max(8);
    let (from, to): (IpAddr, IpAddr) = (ends.local, ends.peer);
    let cores = if args.no_pin { None } else { cpu::two_cores() };
    let (here, there) = (cores.map(|(_, client)| client), cores.map(|(server, _)| server));
    // A thread of its own: only it is to be kept on one core.
    let on_core = |work: &mut (dyn FnMut() -> Result<Recorded, BenchError> + Send)| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                here.map_or(Ok(()), cpu::pin_to)?;
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    };
    match contender {
        Contender::Perftest(way) if latency => way.ping_pong(&ends.device, to, cores, pace),
        Contender::Perftest(way) => {
            way.stream(&ends.device, to, cores, per_queue_pair(way.bytes, way.queue_pairs))
        }
        Contender::Wire(way) => {
            let mut peer = Peer::start(to, there)?;
            on_core(&mut || match latency {
                true => rdma_wire::ping_pong(&mut peer, from, way, pace),
                false => {
                    let each = per_queue_pair(way.bytes, way.queue_pairs);
                    rdma_wire::stream(&mut peer, from, way, u64::from(DEPTH / 2), each)
                }
            })
        }
        Contender::Lanes(way) => {
            // Its workers choose their cores as in a migration.
            let mut peer = Peer::start(to, None)?;
            let warm_up = u64::from(DEPTH / 2) * way.extent_bytes * u64::from(way.lanes);
            lanes_wire::stream(&mut peer, from, way, warm_up.min(16 << 20), args.mib << 20)
        }
    }
}
