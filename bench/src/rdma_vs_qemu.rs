//! `rdma-vs-qemu`: whole migrations over RDMA, by us and by QEMU, of a guest that does nothing.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use pageferry_ctl::lab::{Workplace, program};
use serde_json::json;

use crate::args::{RdmaEnds, RdmaVsQemuArgs};
use crate::error::BenchError;
use crate::goals::{Goal, Ratio};
use crate::halted::Halted;
use crate::moved::Moved;
use crate::qemu::{Pinned, QemuWay};
use crate::recorder::Recorded;
use crate::results::Results;
use crate::series::{Kind, Reading, Series, SeriesRun, ratio};
use crate::serve::Peer;
use crate::turns::Taken;
use crate::{cpu, interrupt, lanes_wire, ours, output, qemu};

/// Ports are counted up from here: one that was used is not free again at once.
const FIRST_PORT: u16 = 6400;

/// One who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Ours {
        transport: &'static str,
    },
    Qemu(QemuWay),
    /// No guest: what our lanes do with as much memory.
    Lanes,
}

impl Contender {
    fn name(self) -> String {
        match self {
            Self::Ours { transport } => format!("pageferry {transport}"),
            Self::Qemu(QemuWay { rdma: None, .. }) => "qemu tcp".into(),
            Self::Qemu(way) => way.name(),
            Self::Lanes => "pageferry's lanes, no guest".into(),
        }
    }
}

/// The guest, and where it is moved.
struct Rig<'a> {
    args: &'a RdmaVsQemuArgs,
    ends: RdmaEnds,
    workplace: Arc<Workplace>,
    guest: Option<Halted>,
    moves: u16,
}

/// The benchmark.
pub(crate) fn run(args: &RdmaVsQemuArgs) -> Result<(), BenchError> {
    let ends = args.ends.resolve().map_err(|what| BenchError::Usage { what })?;
    let mut results = Results::begin("rdma-vs-qemu", json!({ "ends": ends, "args": args }));
    let rdma = |pinned| {
        let rdma = Some(pinned);
        Contender::Qemu(QemuWay { rdma, ..QemuWay::default() })
    };
    let mut everyone = vec![
        Contender::Ours { transport: "rdma" },
        rdma(Pinned::AsNeeded),
        rdma(Pinned::All),
        Contender::Ours { transport: "tcp" },
        Contender::Qemu(QemuWay::default()),
        Contender::Lanes,
    ];
    let only = |name: &str| args.only.is_empty() || args.only.iter().any(|w| name.contains(w));
    everyone.retain(|contender| only(&contender.name()));
    let mut rig = Rig { args, ends, workplace: Workplace::new()?, guest: None, moves: 0 };
    let mut cases: Vec<(bool, Vec<Series>)> = Vec::new();
    for &dirty in args.cases.dirty() {
        let group = match dirty {
            false => format!("idle guest, {} MiB", args.mib),
            true => format!(
                "{} MiB, {} MiB/s written to {} MiB",
                args.mib, args.dirty_mib_per_s, args.hot_mib
            ),
        };
        let series = |contender: &Contender| {
            let kind = match contender {
                Contender::Lanes => Kind::Throughput,
                _ => Kind::Migration,
            };
            Series::new(&group, &contender.name(), kind, json!(contender.name()))
        };
        cases.push((dirty, everyone.iter().map(series).collect()));
    }
    for turn in 0..args.turns {
        for (dirty, case) in &mut cases {
            for index in 0..everyone.len() {
                let index = (index + turn as usize) % everyone.len();
                interrupt::check()?;
                let contender = everyone[index];
                if *dirty && contender == Contender::Lanes {
                    continue;
                }
                rig.one_run(contender, *dirty, turn, &mut case[index]);
            }
        }
    }
    for (dirty, case) in cases {
        results.ratios.extend(ratios(&case, dirty));
        results
            .series
            .extend(case.into_iter().filter(|s| !s.runs.is_empty() || !s.failures.is_empty()));
    }
    results.finish(&args.output)
}

impl Rig<'_> {
    fn one_run(&mut self, contender: Contender, dirty: bool, turn: u32, series: &mut Series) {
        match self.measure(contender, dirty, turn) {
            Ok(run) => {
                let mib_per_s = run.recorded.bytes_per_s() / f64::from(1 << 20);
                let pause = run.said["pause_ms"].as_f64().unwrap_or(f64::NAN);
                let (group, by) = (&series.group, &series.by);
                output::progress(&format!(
                    "turn {turn}: {group}: {by}: {mib_per_s:.1} MiB/s, pause {pause:.1} ms"
                ));
                series.runs.push(run);
            }
            Err(error) => {
                // What became of the guest is not known: the next one is new.
                self.guest = None;
                let failure = format!("turn {turn}: {}", error.chain());
                output::progress(&format!("{}: {}: {failure}", series.group, series.by));
                series.failures.push(failure);
            }
        }
    }

    fn measure(
        &mut self,
        contender: Contender,
        dirty: bool,
        turn: u32,
    ) -> Result<SeriesRun, BenchError> {
        if contender == Contender::Lanes {
            let busy = cpu::machine_busy_s()?;
            let way = lanes_wire::Way {
                over: lanes_wire::Over::Rdma,
                lanes: self.args.lanes,
                memory_bytes: self.args.mib << 20,
                extent_bytes: 1 << 20,
                scattered: false,
                huge: false,
                same_host: false,
            };
            let here = |program: &Path| Command::new(program);
            let mut peer = Peer::start(here, self.ends.peer, None)?;
            let (from, bytes) = (Some(self.ends.local), self.args.mib << 20);
            let Taken { recorded, said } =
                lanes_wire::stream(&mut peer, from, &way, 1 << 20, bytes)?;
            let machine_cpu_s = cpu::machine_busy_s()? - busy;
            return Ok(SeriesRun { turn, recorded, machine_cpu_s, said });
        }
        let source = match self.guest.take() {
            Some(guest) => guest,
            None => {
                let guest = Halted::start(&self.workplace, "first", self.args.mib, false)?;
                guest.fill()?;
                guest
            }
        };
        self.moves += 1;
        let name = format!("guest-{}", self.moves);
        let target = Halted::start(&self.workplace, &name, self.args.mib, true)?;
        let moved = match dirty {
            false => self.move_guest(contender, &source, &target)?,
            true => {
                let (hot, rate) = (self.args.hot_mib, self.args.dirty_mib_per_s);
                source
                    .written_during(hot, rate, || self.move_guest(contender, &source, &target))?
                    .0?
            }
        };
        self.guest = Some(target);
        // The guest's memory over the time from the first page until it runs at the target.
        let bytes = self.args.mib << 20;
        let recorded = Recorded { bytes, seconds: moved.span_s, ..Recorded::default() };
        let machine_cpu_s = moved.cpu.machine_s;
        Ok(SeriesRun { turn, recorded, machine_cpu_s, said: json!(moved) })
    }

    fn move_guest(
        &self,
        contender: Contender,
        source: &Halted,
        target: &Halted,
    ) -> Result<Moved, BenchError> {
        let port = FIRST_PORT + self.moves;
        let address = std::net::SocketAddr::new(self.ends.peer, port);
        match contender {
            Contender::Qemu(way) => {
                let protocol = if way.rdma.is_some() { "rdma" } else { "tcp" };
                qemu::move_by(way, &format!("{protocol}:{address}"), source, target)
            }
            Contender::Ours { transport } => {
                self.ours(transport, &address.to_string(), source, target)
            }
            Contender::Lanes => unreachable!("has no guest"),
        }
    }

    fn ours(
        &self,
        transport: &str,
        address: &str,
        source: &Halted,
        target: &Halted,
    ) -> Result<Moved, BenchError> {
        use crate::pause::Monitored as _;
        let program = program()?;
        let folder: &Path = self.workplace.path();
        let state = |word: &str| folder.join(format!("state-{word}"));
        let mut receive = Command::new(&program);
        receive.args(["target", "--once", "--json", "--insecure", "--listen", address, "--qmp"]);
        receive.arg(target.qmp()).arg("--state-dir").arg(state("target"));
        receive.args(self.args.target_args.split_ascii_whitespace());
        let mut migrate = Command::new(&program);
        migrate.args([
            "migrate",
            "--json",
            "--insecure",
            "--to",
            address,
            "--transport",
            transport,
            "--qmp",
        ]);
        migrate.arg(source.qmp()).arg("--state-dir").arg(state("source"));
        migrate.args(["--lanes", &self.args.lanes.to_string()]);
        migrate.args(self.args.migrate_args.split_ascii_whitespace());
        ours::run_agents(source, target, &mut receive, &mut migrate, folder)
    }
}

/// What is read off one series by name.
fn find<'a>(case: &'a [Series], by: &str) -> Option<&'a Series> {
    case.iter().find(|series| series.by == by && !series.runs.is_empty())
}

fn ratios(case: &[Series], dirty: bool) -> Vec<Ratio> {
    let mut all = Vec::new();
    let Some(ours) = find(case, "pageferry rdma") else { return all };
    let rates = |series: &Series, field: &str| -> Vec<f64> {
        let of = |run: &SeriesRun| Some(run.recorded.bytes as f64 / run.said[field].as_f64()?);
        series.runs.iter().filter_map(of).collect()
    };
    let of = |what: &str, theirs: &Series, (a, b): (Vec<f64>, Vec<f64>), goal| {
        let estimate = crate::confidence::ratio_of_medians(&a, &b);
        Ratio {
            what: format!("{}: {what}", ours.group),
            against: format!("{} to {}", ours.by, theirs.by),
            ratio: estimate.map(|estimate| estimate.ratio),
            interval: estimate.map(|estimate| (estimate.low, estimate.high)),
            goal,
        }
    };
    for theirs in ["qemu rdma", "qemu rdma-pin-all"].iter().filter_map(|by| find(case, by)) {
        // `rdma-pin-all` registers all memory before the first page: only the whole is fair to us,
        // and only the rest to it, as our program starts in the whole.
        for (what, field, goal) in [
            ("rate from the command on", "wall_s", Some(Goal::AtLeast(1.0))),
            ("rate from the first page on", "span_s", None),
        ] {
            all.push(of(what, theirs, (rates(ours, field), rates(theirs, field)), goal));
        }
        let both = (pauses_ms(ours), pauses_ms(theirs));
        all.push(of("pause", theirs, both, Some(Goal::AtMost(0.5))));
    }
    if let Some(tcp) = find(case, "pageferry tcp") {
        let mut cpu = ratio("CPU per GiB", ours, tcp, Reading::CpuPerGib, None);
        cpu.what = format!("{}: CPU per GiB", ours.group);
        all.push(cpu);
        all.push(ratio("first page to running", ours, tcp, Reading::BytesPerS, None));
    }
    if let Some(lanes) = find(case, "pageferry's lanes, no guest").filter(|_| !dirty) {
        let goal = Some(Goal::AtLeast(0.95));
        let what = "moving, of our own streaming rate";
        let mut moving = ours.clone();
        for run in &mut moving.runs {
            let rate = run.said["moving_bytes_per_s"].as_f64().unwrap_or(f64::NAN);
            run.recorded.seconds = run.recorded.bytes as f64 / rate;
        }
        all.push(ratio(what, &moving, lanes, Reading::BytesPerS, goal));
        let what = "first page to running, of our own streaming rate";
        all.push(ratio(what, ours, lanes, Reading::BytesPerS, None));
    }
    all
}

fn pauses_ms(series: &Series) -> Vec<f64> {
    series.runs.iter().filter_map(|run| run.said["pause_ms"].as_f64()).collect()
}
