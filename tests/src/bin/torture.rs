//! `make torture`: faults on real guests, until a given time is over or every one of the matrix was
//! tried. Ends with a table, and with exit code 1 if a guest was lost or another promise broken.
//!
//! Everything made is taken back, also after Ctrl-C; the fault at hand is finished first.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use pageferry_ctl::lab::{LabError, is_root};
use pageferry_tests::torture::{Backing, Chance, Fault, Moment, Rig, Tally, Trial, When, draw};

/// A migration of this guest until the first one is measured.
const TYPICAL: Duration = Duration::from_millis(1500);
/// Every so many faults the guest is taken for another, of the other kind of memory.
const FAULTS_PER_GUEST: u64 = 60;

/// Times that the laboratory itself may fail in one run.
const FAILURES_MAX: u32 = 5;

/// Injects faults into live migrations of real guests, and looks what becomes of the guests.
#[derive(Debug, Parser)]
#[command(name = "torture")]
struct Args {
    /// Every fault in every phase, once.
    #[arg(long, conflicts_with_all = ["duration", "seed"])]
    matrix: bool,
    /// Random faults at random times, for so long: 90s, 10m, 2h.
    #[arg(long, value_parser = duration, default_value = "10m")]
    duration: Duration,
    /// Random faults: which. Default: from the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// Random faults: the number of the first.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Random faults: how many at most.
    #[arg(long, default_value_t = u64::MAX)]
    count: u64,
    /// Only these faults.
    #[arg(long, value_enum, value_delimiter = ',')]
    fault: Vec<Fault>,
    /// Matrix: only these phases.
    #[arg(long, value_enum, value_delimiter = ',')]
    phase: Vec<Moment>,
    /// One JSON object a line: each fault, then the sums.
    #[arg(long)]
    json: bool,
    /// Say what the agents complained of (with PAGEFERRY_LOG=debug, more).
    #[arg(long)]
    verbose: bool,
    /// Write the table to this file, as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

static ASKED_TO_STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let args = Args::parse();
    if !is_root() {
        eprintln!("error: network namespaces need root");
        return ExitCode::from(2);
    }
    if let Err(error) = ctrlc::set_handler(|| ASKED_TO_STOP.store(true, Ordering::Relaxed)) {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let mut run = Run { args, tally: Tally::default(), began: Instant::now(), boots: 0 };
    let ended = if run.args.matrix { run.matrix() } else { run.random() };
    if let Err(error) = ended {
        eprintln!("error: {error}");
        if let Some(hint) = error.hint() {
            eprintln!("hint: {hint}");
        }
        run.report();
        return ExitCode::from(2);
    }
    run.report();
    ExitCode::from(u8::from(!run.tally.losses().is_empty() || !run.tally.broken().is_empty()))
}

struct Run {
    args: Args,
    tally: Tally,
    began: Instant,
    boots: u32,
}

impl Run {
    fn matrix(&mut self) -> Result<(), LabError> {
        for backing in [Backing::Tmpfs, Backing::HugePages] {
            let mine = |fault: &Fault| fault.needs_hugepages() == (backing == Backing::HugePages);
            let faults: Vec<_> =
                Fault::ALL.into_iter().filter(mine).filter(|it| self.wanted(*it)).collect();
            if faults.is_empty() {
                continue;
            }
            let mut rig = Rig::new(backing)?;
            for fault in faults {
                for moment in Moment::ALL.into_iter().filter(|moment| fault.applies(*moment)) {
                    let asked = self.args.phase.is_empty() || self.args.phase.contains(&moment);
                    if asked && !stop() {
                        self.trial(&mut rig, fault, When::at(moment), None)?;
                    }
                }
            }
            self.boots += rig.boots;
        }
        Ok(())
    }

    fn random(&mut self) -> Result<(), LabError> {
        let clock = || std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let seed = self.args.seed.unwrap_or_else(clock);
        eprintln!("seed {seed}");
        let (mut typical, mut failures) = (TYPICAL, 0);
        let mut rig: Option<Rig> = None;
        let last = self.args.first.saturating_add(self.args.count);
        for number in self.args.first..last {
            if stop() || self.began.elapsed() > self.args.duration {
                break;
            }
            let backing = match (number / FAULTS_PER_GUEST) % 3 {
                2 => Backing::HugePages,
                _ => Backing::Tmpfs,
            };
            if rig.as_ref().is_some_and(|rig| rig.backing() != backing) {
                self.boots += rig.take().map_or(0, |rig| rig.boots);
            }
            let stage = match &mut rig {
                Some(rig) => rig,
                none => none.insert(Rig::new(backing)?),
            };
            let (fault, when) = draw(&mut Chance::of(seed, number), backing, typical);
            if !self.wanted(fault) {
                continue;
            }
            match self.trial(stage, fault, when, Some(number)) {
                Ok(Some(trial)) if !trial.injected => {
                    typical = (typical * 3 + trial.migration) / 4;
                }
                Ok(_) => {}
                // A machine that does other work may be too slow for it; not time after time.
                Err(error) if failures < FAILURES_MAX => {
                    failures += 1;
                    eprintln!("error: the laboratory: {error}");
                    self.boots += rig.take().map_or(0, |rig| rig.boots);
                }
                Err(error) => return Err(error),
            }
        }
        self.boots += rig.map_or(0, |rig| rig.boots);
        Ok(())
    }

    fn wanted(&self, fault: Fault) -> bool {
        self.args.fault.is_empty() || self.args.fault.contains(&fault)
    }

    /// `None` if it was disturbed by who stopped the run: a Ctrl-C reaches the guests too.
    fn trial(
        &mut self,
        rig: &mut Rig,
        fault: Fault,
        when: When,
        number: Option<u64>,
    ) -> Result<Option<Trial>, LabError> {
        let trial = rig.trial(fault, when);
        if stop() {
            return Ok(None);
        }
        let trial = trial?;
        self.tally.count(&trial);
        self.say(&trial, number);
        Ok(Some(trial))
    }

    fn say(&self, trial: &Trial, number: Option<u64>) {
        if self.args.json {
            let mut line = serde_json::to_value(trial).expect("a trial is plain data");
            line["event"] = "fault".into();
            line["number"] = number.into();
            println!("{line}");
            return;
        }
        let when = match trial.when {
            When::In { moment, delay, .. } => {
                format!("{} + {} ms", moment.text(), delay.as_millis())
            }
            When::After(delay) => format!("{} ms", delay.as_millis()),
        };
        println!(
            "{}{}, {when}: {}{} (source {}, target {}; {:.1} s) {}",
            number.map_or(String::new(), |number| format!("{number}: ")),
            trial.fault.text(),
            if trial.injected { "" } else { "too late; " },
            trial.verdict.outcome.text(),
            trial.source_code,
            trial.target_code,
            trial.took.as_secs_f64(),
            trial.verdict.notes.join("; "),
        );
        for text in trial.verdict.losses.iter().chain(&trial.verdict.broken) {
            println!("    BROKEN: {text}");
        }
        if self.args.verbose {
            println!("source:\n{}\ntarget:\n{}", trial.complaints[0], trial.complaints[1]);
        }
    }

    fn report(&self) {
        let table = match self.args.matrix {
            true => format!("{}\n{}", self.tally.matrix(), self.tally.totals()),
            false => self.tally.totals(),
        };
        let seconds = self.began.elapsed().as_secs();
        let text = format!("{table}guests booted: {}; time: {seconds} s\n", self.boots);
        if let Some(path) = &self.args.markdown
            && let Err(error) = std::fs::write(path, &text)
        {
            eprintln!("error: {}: {error}", path.display());
        }
        match self.args.json {
            true => println!("{}", self.tally.summary()),
            false => println!("\n{text}"),
        }
        for text in self.tally.losses() {
            eprintln!("LOSS: {text}");
        }
        for text in self.tally.broken() {
            eprintln!("broken: {text}");
        }
    }
}

fn stop() -> bool {
    ASKED_TO_STOP.load(Ordering::Relaxed)
}

fn duration(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3600)];
    units
        .into_iter()
        .find_map(|(unit, seconds)| {
            let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
            Some(Duration::from_secs(number * seconds))
        })
        .ok_or_else(|| format!("{text:?} is no duration, as 90s, 10m or 2h are"))
}
