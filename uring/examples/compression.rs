//! Lanes that compress beside lanes that don't, over a link of a given speed.
//!
//! Method: two network namespaces joined by veth, shaped by `tc tbf` in both directions; two lanes,
//! sockets as between two machines. Memory is of two kinds: every page a third of noise and two
//! thirds of one byte (LZ4 makes 2.9 to 1 of it), or noise throughout. Each variant moves all of the
//! memory in one round, headers and barrier included; variants take turns, the first turn is
//! dropped (it touches the target's memory first). Medians; the ratio is that of each turn's times.
//! Needs root. `--json` has every sample.

use std::error::Error;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sched::{CloneFlags, setns};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{UsageWho, getrusage};
use pageferry_datapath::codec::{Codec, CodecName};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Reply, Ticket};
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::work::RoundWork;
use pageferry_uring::greet;
use pageferry_uring::plan::{ConnectPlan, LanePlan, PackingWish, TargetLaneConfig};
use pageferry_uring::source::LanePool;
use pageferry_uring::target::TargetLane;

#[derive(Debug, Parser)]
struct Options {
    /// MiB of guest memory.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// Measured turns; one more is dropped.
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Speeds of the link in Mbit/s; 0 is not shaped.
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 0])]
    link_mbit: Vec<u64>,
    /// Every sample as JSON.
    #[arg(long)]
    json: bool,
}

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

struct Sample {
    seconds: f64,
    cpu_seconds: f64,
    wire_mib: f64,
    said: String,
}

const LANES: u16 = 2;

fn variants() -> Vec<(&'static str, PackingWish)> {
    let zstd = Codec::Zstd { level: 1 };
    vec![
        ("off", PackingWish::Not("left out".into())),
        ("auto", PackingWish::Auto(vec![Codec::Lz4, zstd])),
        ("lz4", PackingWish::Always(Codec::Lz4)),
        ("zstd:1", PackingWish::Always(zstd)),
    ]
}

fn main() -> Outcome<()> {
    let options = Options::parse();
    let hosts = Hosts::new()?;
    let (from, to) = (memory(&options)?, memory(&options)?);
    println!(
        "{:>9} {:>6} {:8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>7}  said",
        "Mbit/s", "memory", "compress", "s", "min", "max", "x off", "wire MiB", "CPU s"
    );
    for &mbit in &options.link_mbit {
        hosts.shape(mbit)?;
        for (kind, noise) in [("3:1", 3), ("noise", 1)] {
            fill(&from, noise)?;
            let variants = variants();
            let mut samples: Vec<Vec<Sample>> = variants.iter().map(|_| Vec::new()).collect();
            for turn in 0..=options.turns {
                for ((_, packing), samples) in variants.iter().zip(&mut samples) {
                    let sample = move_once(&hosts, packing, &options, &from, &to)?;
                    if turn > 0 {
                        samples.push(sample);
                    }
                }
            }
            print(mbit, kind, &variants, &samples, options.json);
        }
    }
    Ok(())
}

fn print(
    mbit: u64,
    kind: &str,
    variants: &[(&str, PackingWish)],
    samples: &[Vec<Sample>],
    json: bool,
) {
    for ((name, _), of) in variants.iter().zip(samples) {
        let column = |f: &dyn Fn(&Sample) -> f64| median(of.iter().map(f).collect());
        let gains = samples[0].iter().zip(of).map(|(off, it)| off.seconds / it.seconds).collect();
        let times = || of.iter().map(|sample| sample.seconds);
        println!(
            "{mbit:9} {kind:>6} {name:8} {:8.3} {:8.3} {:8.3} {:8.3} {:9.0} {:7.2}  {}",
            column(&|s| s.seconds),
            times().fold(f64::INFINITY, f64::min),
            times().fold(0.0, f64::max),
            median(gains),
            column(&|s| s.wire_mib),
            column(&|s| s.cpu_seconds),
            of.last().map_or("", |s| &s.said),
        );
        if json {
            let seconds: Vec<String> = times().map(|time| format!("{time:.4}")).collect();
            let seconds = seconds.join(",");
            println!(
                "{{\"mbit\":{mbit},\"memory\":\"{kind}\",\"compress\":\"{name}\",\
                 \"seconds\":[{seconds}]}}"
            );
        }
    }
}

fn move_once(
    hosts: &Hosts,
    packing: &PackingWish,
    options: &Options,
    from: &GuestMemory,
    to: &GuestMemory,
) -> Outcome<Sample> {
    let listener = hosts.target.run(|| TcpListener::bind(SocketAddr::from((TARGET, 0))))??;
    let (events, inbox) = crossbeam_channel::unbounded();
    let (target_events, _target_inbox) = crossbeam_channel::unbounded();
    let address = SocketAddr::from((TARGET, listener.local_addr()?.port()));
    let lanes = (0..LANES).map(|lane| LanePlan {
        lane: LaneId(lane),
        ticket: Ticket([1; 32]),
        cpu: None,
        from: Vec::new(),
        route: None,
    });
    let plan = ConnectPlan {
        packing: packing.clone(),
        ..ConnectPlan::new(address, SessionId(1), lanes.collect())
    };
    let (mut pool, targets) = std::thread::scope(|scope| -> Outcome<_> {
        let memory = from.clone();
        let opening = scope.spawn(|| hosts.source.run(|| LanePool::connect(&plan, memory, events)));
        let mut targets = Vec::new();
        for _ in 0..LANES {
            let (stream, _) = listener.accept()?;
            let deadline = Instant::now() + Duration::from_secs(5);
            let hello = greet::read_hello(&stream, deadline)?;
            greet::send_reply(&stream, Reply::Accepted, deadline)?;
            let codecs = CodecName::ALL.to_vec();
            let config = TargetLaneConfig { codecs, ..TargetLaneConfig::default() };
            let events = target_events.clone();
            targets.push(TargetLane::start(stream, hello.lane, to.clone(), &config, events)?);
        }
        Ok((opening.join().map_err(|_| "connect panicked")???, targets))
    })?;
    let whole = Extent { region: RegionIndex(0), offset: 0, len: options.mib << 20 };
    let before = cpu_seconds()?;
    let start = Instant::now();
    pool.move_round(Arc::new(RoundWork::new(RoundIndex(0), [whole])));
    for _ in 0..LANES {
        match inbox.recv_timeout(Duration::from_secs(120))? {
            LaneEvent::Placed { .. } => {}
            other => return Err(format!("{other:?}").into()),
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = cpu_seconds()? - before;
    let stats = Box::new(pool).close(false);
    targets.into_iter().for_each(|lane| drop(lane.finish()));
    let wire = stats.iter().map(|lane: &LaneStats| lane.wire_bytes).sum::<u64>();
    let last = stats.last().map(|lane| lane.packing.clone()).unwrap_or_default();
    let codec = last.codec.map_or("off".into(), |codec| codec.to_string());
    let said = format!("{codec}: {}", last.reason);
    Ok(Sample { seconds, cpu_seconds, wire_mib: wire as f64 / f64::from(1 << 20), said })
}

fn memory(options: &Options) -> Outcome<GuestMemory> {
    let file = File::from(memfd_create("compression", MFdFlags::empty())?);
    file.set_len(options.mib << 20)?;
    let region = Region::map(RegionIndex(0), file, options.mib << 20, 4096)?;
    Ok(GuestMemory::new(vec![region]))
}

/// One part in `parts` of each page is noise.
fn fill(memory: &GuestMemory, parts: usize) -> Outcome<()> {
    let region = &memory.regions()[0];
    let lease = region.lease(0, region.len())?;
    let (mut page, mut state) = ([0u8; 4096], 0x9e37_79b9_7f4a_7c15u64);
    for at in (0..region.len()).step_by(4096) {
        page.fill((at >> 12) as u8 | 1);
        for word in page[..4096 / parts / 8 * 8].chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
        }
        lease.copy_in(at, &page)?;
    }
    Ok(())
}

const SOURCE: [u8; 4] = [10, 203, 0, 1];
const TARGET: [u8; 4] = [10, 203, 0, 2];

/// A network namespace; deleted when dropped.
struct Namespace(String);

struct Hosts {
    source: Namespace,
    target: Namespace,
}

impl Hosts {
    fn new() -> Outcome<Self> {
        let name = |end| format!("pfc{}{end}", std::process::id());
        let (source, target) = (Namespace::new(name("s"))?, Namespace::new(name("t"))?);
        let (s, t) = (&source.0, &target.0);
        sh(&format!("ip -n {s} link add link0 type veth peer name link0 netns {t}"))?;
        for (name, [a, b, c, d]) in [(s, SOURCE), (t, TARGET)] {
            sh(&format!("ip -n {name} address add {a}.{b}.{c}.{d}/24 dev link0"))?;
            sh(&format!("ip -n {name} link set link0 up"))?;
        }
        Ok(Self { source, target })
    }

    fn shape(&self, mbit: u64) -> Outcome<()> {
        for name in [&self.source.0, &self.target.0] {
            // What fails is to remove what was never there.
            let _none = sh(&format!("tc -n {name} qdisc del dev link0 root"));
            if mbit > 0 {
                // What passes in a tick of 4 ms, and no less than the longest packet.
                let burst = (mbit * 1_000_000 / 8 / 250).max(96 << 10);
                let shape = format!("tbf rate {mbit}mbit burst {burst} latency 50ms");
                sh(&format!("tc -n {name} qdisc add dev link0 root {shape}"))?;
            }
        }
        Ok(())
    }
}

impl Namespace {
    fn new(name: String) -> Outcome<Self> {
        sh(&format!("ip netns add {name}"))?;
        Ok(Self(name))
    }

    /// Runs `work` on a thread in it: sockets made there stay there.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Outcome<T> {
        let namespace = File::open(format!("/run/netns/{}", self.0))?;
        std::thread::scope(|scope| {
            let there = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            there.join().map_err(|_| "a thread in a namespace panicked")?
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _it_may_be_gone = sh(&format!("ip netns del {}", self.0));
    }
}

fn sh(line: &str) -> Outcome<()> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    let output = command.args(words).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr)).into()),
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
