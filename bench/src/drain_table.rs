//! `drain-table`: hosts with few and many guests, emptied over one and over several shaped links.
//!
//! So many guests are booted at one of two hosts and drained to the other and back, over each set of
//! links in turn: each drain's targets are the next one's sources. What `pageferry drain` says of its
//! guests is the measurement; how much of the links was used is what all of them sent, over the time
//! from the first guest's begin to the last one's end.

use std::cell::RefCell;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_ctl::lab::{GuestAssets, Host, Qemu, QemuSpec, TwoHosts, Workplace, program};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::OutputArgs;
use crate::error::BenchError;
use crate::output;
use crate::rails::networks;
use crate::recorder::Recorded;
use crate::results::Results;
use crate::series::{Kind, Series};
use crate::shaped::payload_bytes_per_s;
use crate::stats::Stats;
use crate::turns::{self, Entrant, Setting, Taken};

const NAME: &str = "drain-table";
/// All guests of a host boot at once.
const BOOT_MAX: Duration = Duration::from_secs(900);
/// Ports of target agents are counted up from here: no drain meets a socket of the one before.
const FIRST_PORT: u16 = 4777;

/// Arguments of `drain-table`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct DrainTableArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Guests on the host.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,10,20")]
    guests: Vec<usize>,
    /// Memory of each, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory_mib: u64,
    /// What each has filled, with pages that no codec makes anything of, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    fill_mib: u64,
    /// Pages that each rewrites in a second.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pages_per_second: u64,
    /// Links, as 2x1000: two of 1000 Mbit/s each, up to four. Default: those of 1, 10, twice and four
    /// times 10 Gbit/s at a fifth of their speeds.
    #[arg(
        long,
        value_name = "LINKS,...",
        value_delimiter = ',',
        default_value = "1x200,1x2000,2x2000,4x2000"
    )]
    links: Vec<Links>,
    /// Guests on their way at a time.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "4")]
    parallel: Vec<usize>,
    /// Times each drain is made.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Further options of `pageferry migrate`, for each guest.
    #[arg(long, value_name = "WORDS", default_value = "--compress off")]
    migrate_args: String,
}

/// So many links of one speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Links {
    count: u8,
    mbit: u64,
}

/// More than there are addresses made for is of no use here.
const LINKS_MAX: u8 = 4;

impl FromStr for Links {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wanted = "links are COUNTxMBIT, with a count from 1 to 4";
        let (count, mbit) = text.split_once('x').ok_or(wanted)?;
        let (count, mbit) = (count.parse().map_err(|_| wanted)?, mbit.parse().map_err(|_| wanted)?);
        let is_sound = (1..=LINKS_MAX).contains(&count) && mbit > 0;
        is_sound.then_some(Self { count, mbit }).ok_or(wanted)
    }
}

/// One who takes part: links, and guests on their way at a time.
#[derive(Clone, Copy, Debug)]
struct Way {
    links: Links,
    parallel: usize,
}

/// Runs the subcommand.
pub(crate) fn run(args: &DrainTableArgs) -> Result<(), BenchError> {
    let mut results = Results::of_hosts(NAME, json!(args));
    for &guests in &args.guests {
        output::progress(&format!("{guests} guests: booting"));
        let crew = RefCell::new(Crew::boot(args, guests)?);
        let mut settings = [setting(args, guests)];
        turns::take(args.turns, &mut settings, |&way| crew.borrow_mut().empty(way).map(Some))?;
        crew.into_inner().verify()?;
        results.series.extend(turns::series(settings.into()));
    }
    results.finish(&args.output)
}

fn setting(args: &DrainTableArgs, guests: usize) -> Setting<Way> {
    let noun = if guests == 1 { "guest" } else { "guests" };
    let group = format!("{guests} {noun} of {} MiB", args.memory_mib);
    let parallel = args.parallel.iter().copied().filter(|&it| guests > 1 || it == args.parallel[0]);
    let way = |parallel| args.links.iter().map(move |&links| Way { links, parallel });
    let entrant = |who: Way| {
        let Links { count, mbit } = who.links;
        let parameters = json!({ "guests": guests, "links": who.links, "parallel": who.parallel });
        let by = format!("{count} x {mbit} Mbit/s, {} at a time", who.parallel.min(guests));
        Entrant { who, series: Series::new(&group, &by, Kind::Drain, parameters) }
    };
    parallel.flat_map(way).map(entrant).collect()
}

/// The guests of one host, and the two hosts.
struct Crew<'a> {
    // Drop order: guests before their namespaces.
    running: Vec<Qemu>,
    hosts: TwoHosts,
    spec: QemuSpec,
    args: &'a DrainTableArgs,
    workplace: Arc<Workplace>,
    /// How often all of them were started somewhere.
    generation: u16,
}

impl<'a> Crew<'a> {
    fn boot(args: &'a DrainTableArgs, count: usize) -> Result<Self, BenchError> {
        let workplace = Workplace::new()?;
        let hosts = TwoHosts::new(&workplace)?;
        for number in 1..args.links.iter().map(|links| links.count).max().unwrap_or(1) {
            hosts.add_rail(number)?;
        }
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        spec.smp = 1;
        spec.memory_mib = args.memory_mib;
        spec.params.fill_mib = args.fill_mib;
        spec.params.hot_mib = (args.fill_mib / 8).max(1);
        spec.params.writers = 1;
        spec.params.pages_per_second = args.pages_per_second;
        let running = Vec::new();
        let mut crew = Self { running, hosts, spec, args, workplace, generation: 0 };
        crew.running = crew.launch(&crew.spec, count)?;
        for guest in &mut crew.running {
            guest.wait_ready(BOOT_MAX)?;
        }
        Ok(crew)
    }

    /// Where this generation of them is, and where it goes.
    fn ways(&self) -> (&Host, &Host) {
        match self.generation % 2 {
            0 => (&self.hosts.source, &self.hosts.target),
            _ => (&self.hosts.target, &self.hosts.source),
        }
    }

    /// QEMUs of this generation.
    fn launch(&self, spec: &QemuSpec, count: usize) -> Result<Vec<Qemu>, BenchError> {
        let mut spec = spec.clone();
        spec.namespace = Some(self.ways().0.namespace.name().into());
        let one = |index| {
            let name = format!("vm-{index:02}");
            spec.extra = vec!["-name".into(), name.clone()];
            Ok(Qemu::launch(&self.workplace, &format!("{}-{name}", self.prefix()), &spec)?)
        };
        (0..count).map(one).collect()
    }

    /// What files of this generation begin with.
    fn prefix(&self) -> String {
        format!("g{:03}", self.generation)
    }

    /// Has all of them moved to the other host.
    fn empty(&mut self, way: Way) -> Result<Taken, BenchError> {
        for number in 0..way.links.count {
            self.hosts.shape_rail(number, way.links.mbit)?;
        }
        let from = self.prefix();
        self.generation += 1;
        let waiting = self.launch(&self.spec.to_target(), self.running.len())?;
        let agent = self.target()?;
        let busy = crate::cpu::machine_busy_s()?;
        let summary = self.drain(way, &from)?;
        let machine_cpu_s = crate::cpu::machine_busy_s()? - busy;
        drop(agent);
        self.running = waiting;
        Ok(taken(way.links, summary, machine_cpu_s))
    }

    /// Has every guest check its memory.
    fn verify(&self) -> Result<(), BenchError> {
        for guest in &self.running {
            let verified = guest.console().verify(BOOT_MAX)?;
            if verified.bad > 0 {
                let (bad, pages) = (verified.bad, verified.pages);
                return Err(BenchError::MemoryLost { by: "pageferry drain".into(), bad, pages });
            }
        }
        Ok(())
    }

    fn port(&self) -> u16 {
        FIRST_PORT + self.generation
    }

    /// The target's agent, for guests of this generation.
    fn target(&self) -> Result<Target, BenchError> {
        let host = self.ways().0;
        let mut command = host.namespace.command(program()?);
        command.args(["target", "--json", "--insecure", "--sessions-max", "32", "--listen"]);
        // At every address: the other links have others.
        command.arg(format!("0.0.0.0:{}", self.port())).arg("--allow");
        let sockets = self.workplace.file(&format!("{}-*.qmp", self.prefix()));
        command.arg(format!("qmp={}", sockets.display()));
        command.arg("--state-dir").arg(self.workplace.file(&format!("{}.in", self.prefix())));
        Target::start(command)
    }

    /// The last line of a drain that moved every guest here.
    fn drain(&self, way: Way, from: &str) -> Result<Value, BenchError> {
        let (here, there) = self.ways();
        let file = |name: &str| self.workplace.file(name);
        let mut command = there.namespace.command(program()?);
        command.args(["drain", "--json", "--insecure", "--to"]);
        command.arg(format!("{}:{}", here.address, self.port()));
        command.args(["--parallel", &way.parallel.to_string(), "--qmp"]);
        command.arg(file(&format!("{from}-vm-??.qmp"))).arg("--target-qmp");
        command.arg(file(&format!("{}-{{name}}.qmp", self.prefix())));
        command.arg("--state-dir").arg(file(&format!("{from}.out")));
        command.arg("--runtime-dir").arg(file(&format!("{from}.run"))).arg("--");
        // Emulated guests on few cores stand still for longer than the default allows for.
        command.args(["--downtime-ms", "1000", "--not-converging", "switch-over"]);
        command.args(self.args.migrate_args.split_ascii_whitespace());
        command.args(networks(0..way.links.count).split_ascii_whitespace());
        let ended = command.output().map_err(BenchError::io("run", "pageferry drain"))?;
        let said = String::from_utf8_lossy(&ended.stdout);
        let summary = said.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok());
        match summary {
            Some(summary) if ended.status.success() => Ok(summary),
            _ => Err(BenchError::Program {
                program: "pageferry drain".into(),
                status: ended.status,
                said: crate::ours::tail(&String::from_utf8_lossy(&ended.stderr)),
            }),
        }
    }
}

/// The target's agent; dropped, it ends.
struct Target(Child);

impl Target {
    fn start(mut command: std::process::Command) -> Result<Self, BenchError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(BenchError::io("start", "pageferry target"))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            let mut out = BufReader::new(out);
            out.read_line(&mut line).map_err(BenchError::io("read", "pageferry target"))?;
            // What it says later would fill the pipe.
            std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        }
        match line.contains("listening") {
            true => Ok(Self(child)),
            false => Err(BenchError::Unexpected { program: "pageferry target".into(), said: line }),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _it_may_have_ended = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT);
        let _reaped = self.0.wait();
    }
}

/// What a drain's summary says of its guests, and of the links.
fn taken(links: Links, summary: Value, machine_cpu_s: f64) -> Taken {
    let total_s = summary["total_ms"].as_f64().unwrap_or(f64::NAN) / 1e3;
    let of_guests = |key: &str| {
        let rows = summary["guests"].as_array()?;
        Stats::of(rows.iter().filter_map(|row| row[key].as_f64()))
    };
    let sum = |key: &str| of_guests(key).map_or(0.0, |stats| stats.samples.iter().sum::<f64>());
    // Of what the links could have carried in that time, begin to end.
    let could = payload_bytes_per_s(u64::from(links.count) * links.mbit) * total_s;
    let (brownout, blackout) = (of_guests("brownout_ms"), of_guests("blackout_ms"));
    let median = |stats: &Option<Stats>| stats.as_ref().map(|stats| stats.median);
    let max = |stats: &Option<Stats>| stats.as_ref().map(|stats| stats.max);
    let said = json!({
        "total_s": total_s,
        "moved_mib": sum("moved_bytes") / f64::from(1 << 20),
        "link_percent": sum("wire_bytes") / could * 100.0,
        "brownout_ms": median(&brownout),
        "brownout_ms_max": max(&brownout),
        "blackout_ms": median(&blackout),
        "blackout_ms_max": max(&blackout),
        "machine_cpu_s": machine_cpu_s,
        "summary": summary,
    });
    let bytes = sum("moved_bytes") as u64;
    Taken { recorded: Recorded { bytes, seconds: total_s, ..Recorded::default() }, said }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_a_count_and_a_speed() {
        assert_eq!("2x2000".parse(), Ok(Links { count: 2, mbit: 2000 }));
        for wrong in ["", "2", "0x10", "5x10", "1x0", "ax1"] {
            assert!(wrong.parse::<Links>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_share_is_of_all_links() {
        let summary = json!({ "total_ms": 1000.0, "guests": [
            { "wire_bytes": 119_550_000, "moved_bytes": 119_000_000, "brownout_ms": 900.0 },
            { "wire_bytes": 0, "moved_bytes": 0, "brownout_ms": 700.0 },
        ]});
        let said = taken(Links { count: 2, mbit: 1000 }, summary, 0.0).said;
        assert!((said["link_percent"].as_f64().unwrap_or(0.0) - 50.0).abs() < 0.1, "{said}");
        assert_eq!((&said["brownout_ms"], &said["blackout_ms"]), (&json!(800.0), &Value::Null));
    }
}
