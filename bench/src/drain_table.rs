//! `drain-table`: hosts with few and many guests, emptied over links of several speeds.
//!
//! Each cell is an experiment of its own: two hosts, a shaped link, so many guests that were booted
//! there, and one `pageferry drain`. What it says of its guests is the measurement; how much of the
//! link was used is what all of them sent, over the time from the first guest's begin to the last
//! one's end.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_ctl::lab::{GuestAssets, Qemu, QemuSpec, TwoHosts, Workplace, program};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::BenchError;
use crate::machine::Machine;
use crate::method;
use crate::output;
use crate::stats::Stats;
use crate::table::{Table, cell};

const NAME: &str = "drain-table";
/// All guests of a host boot at once.
const BOOT_MAX: Duration = Duration::from_secs(900);
/// Of a bit on an Ethernet link with 1500-byte packets and TCP's time stamps, what carries data.
const PAYLOAD_SHARE: f64 = 1448.0 / 1538.0;
/// Port of the target agent.
const PORT: u16 = 4777;

/// Arguments of `drain-table`.
#[derive(Debug, Args, Serialize)]
pub(crate) struct DrainTableArgs {
    /// Guests on the host.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,10,20")]
    guests: Vec<usize>,
    /// Memory of each, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory_mib: u64,
    /// What each has filled, with pages that no codec makes anything of, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    fill_mib: u64,
    /// Pages that each rewrites in a second.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pages_per_second: u64,
    /// Speeds of the link, in Mbit/s.
    #[arg(long, value_name = "MBIT,...", value_delimiter = ',', default_value = "1000,10000")]
    mbit: Vec<u64>,
    /// Guests on their way at a time.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4")]
    parallel: Vec<usize>,
    /// Further options of `pageferry migrate`, for each guest.
    #[arg(long, value_name = "WORDS", default_value = "--compress off")]
    migrate_args: String,
    /// Everything measured, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One experiment.
struct Emptied {
    mbit: u64,
    guests: usize,
    parallel: usize,
    summary: Value,
}

/// Runs the subcommand.
pub(crate) fn run(args: &DrainTableArgs) -> Result<(), BenchError> {
    let machine = Machine::here();
    println!("{NAME}\n\nMethod\n{}\n\nHost\n{}\n", method::of(NAME), machine.text());
    let mut cells = Vec::new();
    for &mbit in &args.mbit {
        for &guests in &args.guests {
            for &parallel in args.parallel.iter().filter(|it| guests > 1 || **it == 1) {
                crate::interrupt::check()?;
                cells.push(empty(args, mbit, guests, parallel)?);
            }
        }
    }
    println!("{}", table(&cells));
    let Some(path) = &args.json else { return Ok(()) };
    let runs: Vec<Value> = cells.iter().map(Emptied::json).collect();
    let report = json!({
        "benchmark": NAME,
        "method": method::of(NAME),
        "host": machine,
        "setup": args,
        "runs": runs,
    });
    std::fs::write(path, format!("{report:#}\n"))
        .map_err(|source| BenchError::Report { path: path.clone(), source })
}

/// Boots the guests, and has them moved.
fn empty(
    args: &DrainTableArgs,
    mbit: u64,
    guests: usize,
    parallel: usize,
) -> Result<Emptied, BenchError> {
    output::progress(&format!("{guests} guests over {mbit} Mbit/s, {parallel} at a time: booting"));
    let workplace = Workplace::new()?;
    let hosts = TwoHosts::new(&workplace)?;
    // Last to be made, first to go.
    let running = Running::boot(args, guests, &workplace, &hosts)?;
    hosts.shape(mbit)?;
    let target = Target::start(&workplace, &hosts)?;
    let summary = drain(args, parallel, &workplace, &hosts)?;
    drop(target);
    for qemu in &running.waiting {
        let verified = qemu.console().verify(BOOT_MAX)?;
        if verified.bad > 0 {
            let (bad, pages) = (verified.bad, verified.pages);
            return Err(BenchError::MemoryLost { by: "pageferry drain".into(), bad, pages });
        }
    }
    let emptied = Emptied { mbit, guests, parallel, summary };
    output::progress(&format!("  {:.2} s", emptied.total_s()));
    Ok(emptied)
}

/// QEMUs of one experiment; dropped, they end.
struct Running {
    _guests: Vec<Qemu>,
    waiting: Vec<Qemu>,
}

impl Running {
    fn boot(
        args: &DrainTableArgs,
        count: usize,
        workplace: &Arc<Workplace>,
        hosts: &TwoHosts,
    ) -> Result<Self, BenchError> {
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        spec.smp = 1;
        spec.memory_mib = args.memory_mib;
        spec.params.fill_mib = args.fill_mib;
        spec.params.hot_mib = (args.fill_mib / 8).max(1);
        spec.params.writers = 1;
        spec.params.pages_per_second = args.pages_per_second;
        let (mut guests, mut waiting) = (Vec::new(), Vec::new());
        for index in 0..count {
            let name = format!("vm-{index:02}");
            spec.extra = vec!["-name".into(), name.clone()];
            spec.namespace = Some(hosts.source.namespace.name().into());
            guests.push(Qemu::launch(workplace, &name, &spec)?);
            let mut target = spec.to_target();
            target.namespace = Some(hosts.target.namespace.name().into());
            waiting.push(Qemu::launch(workplace, &format!("in-{name}"), &target)?);
        }
        for guest in &mut guests {
            guest.wait_ready(BOOT_MAX)?;
        }
        Ok(Self { _guests: guests, waiting })
    }
}

/// The target's agent; dropped, it ends.
struct Target(Child);

impl Target {
    fn start(workplace: &Workplace, hosts: &TwoHosts) -> Result<Self, BenchError> {
        let mut command = hosts.target.namespace.command(program()?);
        command.args(["target", "--json", "--insecure", "--sessions-max", "32", "--listen"]);
        command.arg(format!("{}:{PORT}", hosts.target.address)).arg("--allow");
        command.arg(format!("qmp={}", workplace.file("in-*.qmp").display()));
        command.arg("--state-dir").arg(workplace.file("target.state"));
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

/// The last line of a drain that moved every guest.
fn drain(
    args: &DrainTableArgs,
    parallel: usize,
    workplace: &Workplace,
    hosts: &TwoHosts,
) -> Result<Value, BenchError> {
    let mut command = hosts.source.namespace.command(program()?);
    command.args(["drain", "--json", "--insecure", "--parallel", &parallel.to_string(), "--to"]);
    command.arg(format!("{}:{PORT}", hosts.target.address));
    command.arg("--qmp").arg(workplace.file("vm-??.qmp"));
    command.arg("--target-qmp").arg(workplace.file("in-{name}.qmp"));
    command.arg("--state-dir").arg(workplace.file("source.state"));
    command.arg("--runtime-dir").arg(workplace.file("run")).arg("--");
    // Emulated guests on few cores stand still for longer than the default allows for.
    command.args(["--downtime-ms", "1000", "--not-converging", "switch-over"]);
    command.args(args.migrate_args.split_ascii_whitespace());
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

impl Emptied {
    fn total_s(&self) -> f64 {
        self.summary["total_ms"].as_f64().unwrap_or(f64::NAN) / 1e3
    }

    fn of_guests(&self, key: &str) -> Option<Stats> {
        let rows = self.summary["guests"].as_array()?;
        Stats::of(rows.iter().filter_map(|row| row[key].as_f64()))
    }

    fn sum(&self, key: &str) -> f64 {
        self.of_guests(key).map_or(0.0, |stats| stats.samples.iter().sum())
    }

    /// Of what the link could have carried in that time, begin to end.
    fn link_percent(&self) -> f64 {
        let could = self.mbit as f64 * 1e6 / 8.0 * PAYLOAD_SHARE * self.total_s();
        self.sum("wire_bytes") / could * 100.0
    }

    fn json(&self) -> Value {
        json!({
            "mbit": self.mbit,
            "guests": self.guests,
            "parallel": self.parallel,
            "total_s": self.total_s(),
            "link_percent": self.link_percent(),
            "brownout_ms": self.of_guests("brownout_ms"),
            "blackout_ms": self.of_guests("blackout_ms"),
            "summary": self.summary,
        })
    }
}

fn table(cells: &[Emptied]) -> String {
    let columns = [
        "link Mbit/s",
        "guests",
        "at a time",
        "total s",
        "moved MiB",
        "% of link",
        "brownout ms",
        "max",
        "blackout ms",
        "max",
    ];
    let mut table = Table::new(&columns);
    for emptied in cells {
        let (brownout, blackout) =
            (emptied.of_guests("brownout_ms"), emptied.of_guests("blackout_ms"));
        let median = |stats: &Option<Stats>| stats.as_ref().map(|stats| stats.median);
        let max = |stats: &Option<Stats>| stats.as_ref().map(|stats| stats.max);
        table.row(vec![
            emptied.mbit.to_string(),
            emptied.guests.to_string(),
            emptied.parallel.to_string(),
            cell(Some(emptied.total_s()), 2),
            cell(Some(emptied.sum("moved_bytes") / f64::from(1 << 20)), 0),
            cell(Some(emptied.link_percent()), 1),
            cell(median(&brownout), 0),
            cell(max(&brownout), 0),
            cell(median(&blackout), 1),
            cell(max(&blackout), 1),
        ]);
    }
    table.text()
}
