//! Benchmarks that are parts of another one: each is this program again, in a process of its own.
//!
//! What a part says is read from the JSON that it writes. Those over RDMA run in the virtual machine,
//! once with each device. A part that fails, or hangs, is named as such: the others go on.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;

use crate::error::BenchError;
use crate::results::Results;
use crate::{files, interrupt, output};

/// A part that takes longer hangs: the longest takes a third of it.
const PART_SECONDS_MAX: u32 = 600;
/// The virtual machine ends its part by itself before that.
const MACHINE_SECONDS_MAX: u32 = PART_SECONDS_MAX - 30;
/// Whoever does not end after an interrupt is killed.
const END_SECONDS_MAX: u32 = 60;
/// Where parts in the virtual machine run.
const DEVICES: [&str; 2] = ["rxe", "siw"];

/// One of them.
pub(crate) struct Part {
    pub(crate) title: &'static str,
    /// In the virtual machine: further arguments for it.
    pub(crate) machine: Option<&'static str>,
    /// The benchmark, and options with a value each.
    pub(crate) arguments: &'static str,
    /// Options that have other values where only a look is wanted.
    pub(crate) quick: &'static str,
}

/// How all of them are run.
pub(crate) struct Parts<'a> {
    /// Where each has a folder.
    pub(crate) out: &'a Path,
    pub(crate) turns: u32,
    pub(crate) quick: bool,
}

impl Part {
    /// The command line, without the program.
    pub(crate) fn words(&self, quick: bool) -> Vec<&'static str> {
        let mut words: Vec<&str> = self.arguments.split_ascii_whitespace().collect();
        let quick: Vec<&str> =
            if quick { self.quick.split_ascii_whitespace().collect() } else { Vec::new() };
        for option in quick.chunks(2) {
            match words.iter().position(|word| *word == option[0]) {
                Some(at) => words[at + 1] = option[1],
                None => words.extend(option),
            }
        }
        words
    }

    /// Once for each place that it runs at, with its title there.
    pub(crate) fn places(&self) -> Vec<(Option<&'static str>, String)> {
        match self.machine {
            None => vec![(None, self.title.to_owned())],
            Some(_) => DEVICES.map(|name| (Some(name), format!("{}: {name}", self.title))).into(),
        }
    }
}

impl Parts<'_> {
    /// Runs one wherever it runs, and adds what it gave to `results`. Only an interruption is a
    /// failure.
    pub(crate) fn run(&self, part: &Part, results: &mut Results) -> Result<(), BenchError> {
        for (device, title) in part.places() {
            self.run_at(part, device, &title, results)?;
        }
        Ok(())
    }

    /// The same at one place.
    pub(crate) fn run_at(
        &self,
        part: &Part,
        device: Option<&str>,
        title: &str,
        results: &mut Results,
    ) -> Result<(), BenchError> {
        interrupt::check()?;
        output::progress(&format!("== {title}"));
        let began = Instant::now();
        let ran = self.process(part, device, title, &mut results.not_run);
        let seconds = began.elapsed().as_secs_f64();
        output::progress(&format!("== {title}: {seconds:.0} s"));
        let interrupted = interrupt::check();
        match ran {
            Ok(mut of_part) => {
                of_part.title = Some(title.to_owned());
                of_part.parameters["seconds"] = json!(seconds);
                results.parts.push(of_part);
            }
            // The others are no worse for it.
            Err(error) => results.not_run.push(format!("{title}: {}", error.chain())),
        }
        interrupted
    }

    /// Its process; what it left out is added to `not_run`.
    fn process(
        &self,
        part: &Part,
        device: Option<&str>,
        title: &str,
        not_run: &mut Vec<String>,
    ) -> Result<Results, BenchError> {
        let folder = self.out.join(files::plain(title));
        std::fs::create_dir_all(&folder).map_err(BenchError::io("make", folder.display()))?;
        // The machine's file system is this one's, under the same names.
        let folder =
            std::fs::canonicalize(&folder).map_err(BenchError::io("find", folder.display()))?;
        let written = folder.join("results.json");
        // What is read afterwards is this run's, or nothing.
        let _there_may_be_none = std::fs::remove_file(&written);
        let program = std::env::current_exe().map_err(BenchError::io("find", "this program"))?;
        // Interrupted, a benchmark takes its namespaces and guests away. In the foreground, so that
        // whoever interrupts this one interrupts that one too.
        let mut command = Command::new("timeout");
        command.args(["--foreground", "--signal=INT"]);
        command.arg(format!("--kill-after={END_SECONDS_MAX}"));
        command.arg(PART_SECONDS_MAX.to_string()).arg(program);
        if let (Some(device), Some(more)) = (device, part.machine) {
            let seconds = MACHINE_SECONDS_MAX.to_string();
            command.args(["rdma-vm", "--driver", device, "--timeout", &seconds, "--writable"]);
            command.arg(&folder).args(more.split_ascii_whitespace()).arg("--");
        }
        command.args(part.words(self.quick)).args(["--turns", &self.turns.to_string()]);
        command.arg("--out").arg(&folder);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(BenchError::io("run", title))?;
        let out = child.stdout.take().expect("piped");
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            println!("{line}");
            if let Some(skipped) = line.strip_prefix("SKIP ") {
                not_run.push(format!("{title}: {skipped}"));
            }
        }
        let status = child.wait().map_err(BenchError::io("wait for", title))?;
        let results = Results::read(&written);
        match status.success() {
            true => results,
            false => {
                let (program, said) = (title.to_owned(), "see above".into());
                Err(BenchError::Program { program, status, said })
            }
        }
    }
}
