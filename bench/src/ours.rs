//! Our own migration: the real binary, started at both ends as a user would.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{Qemu, program};
use pageferry_ctl::report::events::{MigrationOutcome, Summary};
use serde_json::Value;

use crate::args::Common;
use crate::error::BenchError;
use crate::moved::{CpuMeter, Moved};
use crate::net::{End, Net};
use crate::pause::{self, Monitored, PauseWatch};
use crate::qemu::MOVE_MAX;

/// An agent that has nothing more to do ends within this.
const END_MAX: Duration = Duration::from_secs(20);
/// Bytes of what an agent said that an error carries.
const SAID_BYTES_MAX: usize = 600;

/// Moves the guest of `source` to `target`. `folder` is for records and what agents say.
pub(crate) fn migrate(
    common: &Common,
    source: &Qemu,
    target: &Qemu,
    net: &Net,
    folder: &Path,
) -> Result<Moved, BenchError> {
    let program = program()?;
    let address = net.target_address();
    let (listen, address) = (net.listen_at(address), address.to_string());
    let state = |word: &str| folder.join(format!("state-{word}"));
    let mut receive = net.command(End::Target, &program);
    receive.args(["target", "--once", "--json", "--insecure", "--listen", &listen, "--qmp"]);
    receive.arg(target.qmp()).arg("--state-dir").arg(state("target"));
    receive.args(common.target_args.split_ascii_whitespace());
    let mut migrate = net.command(End::Source, &program);
    migrate.args(["migrate", "--json", "--insecure", "--to", &address, "--qmp"]);
    migrate.arg(source.qmp()).arg("--state-dir").arg(state("source"));
    migrate.args(common.migrate_args.split_ascii_whitespace());
    run_agents(source, target, &mut receive, &mut migrate, folder)
}

/// The same with both agents' commands whole.
pub(crate) fn run_agents(
    source: &dyn Monitored,
    target: &dyn Monitored,
    receive: &mut Command,
    migrate: &mut Command,
    folder: &Path,
) -> Result<Moved, BenchError> {
    let watch = PauseWatch::begin(source, target)?;
    let meter = CpuMeter::begin((source.pid(), target.pid()))?;
    let mut receiver = Agent::start("pageferry target", receive, folder)?;
    receiver.wait_line("\"listening\"")?;
    let started = pause::now();
    let mut sender = Agent::start("pageferry migrate", migrate, folder)?;
    let sent = sender.finish(MOVE_MAX)?;
    let summary = summary_of(&sent)?;
    if summary.outcome != MigrationOutcome::Migrated {
        let reason = summary.reason.unwrap_or_else(|| sent.said());
        return Err(BenchError::NotMoved { by: "pageferry".into(), reason });
    }
    receiver.finish(END_MAX)?;
    let cpu = meter.finish()?;
    let pause = watch.finish(Instant::now() + END_MAX)?;
    let seconds = |since: Duration| pause.resume.as_secs_f64() - since.as_secs_f64();
    Ok(Moved {
        wall_s: seconds(started),
        span_s: seconds(pause.stop) + summary.brownout_ms.unwrap_or(f64::NAN) / 1e3,
        moving_bytes_per_s: summary.bytes_per_second as f64,
        pause,
        pause_ms: pause.ms(),
        cpu,
        account: account_of(&sent),
    })
}

fn summary_of(ended: &Ended) -> Result<Summary, BenchError> {
    let value = ended.event("summary").cloned().unwrap_or_default();
    serde_json::from_value(value)
        .map_err(|_| BenchError::Unexpected { program: ended.name.into(), said: ended.said() })
}

/// The summary, with the events of its rounds.
fn account_of(ended: &Ended) -> Value {
    let mut account = ended.event("summary").cloned().unwrap_or_default();
    if let Value::Object(fields) = &mut account {
        let rounds = ended.events.iter().filter(|event| event["event"] == "round").cloned();
        fields.insert("round_events".into(), rounds.collect());
    }
    account
}

/// One agent; dropped, it is killed.
struct Agent {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    seen: Vec<String>,
    stderr: PathBuf,
}

/// What an agent left.
struct Ended {
    name: &'static str,
    events: Vec<Value>,
    stderr: String,
}

impl Agent {
    fn start(name: &'static str, command: &mut Command, folder: &Path) -> Result<Self, BenchError> {
        let stderr = folder.join(name.replace(' ', "-") + ".stderr");
        let errors = File::create(&stderr).map_err(BenchError::io("create", stderr.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().map_err(BenchError::io("run", name))?;
        let (to_lines, lines) = channel();
        let out = child.stdout.take();
        let reader = std::thread::spawn(move || {
            for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()).flatten() {
                // Nobody listens any more once the agent is given up.
                let _ = to_lines.send(line);
            }
        });
        Ok(Self { name, child, lines, reader: Some(reader), seen: Vec::new(), stderr })
    }

    /// Waits for a line that holds `word`.
    fn wait_line(&mut self, word: &str) -> Result<(), BenchError> {
        while let Ok(line) = self.lines.recv_timeout(END_MAX) {
            let found = line.contains(word);
            self.seen.push(line);
            if found {
                return Ok(());
            }
        }
        Err(match self.child.try_wait() {
            Ok(Some(status)) => self.ended_badly(status),
            _ => BenchError::Timeout {
                what: format!("{} to say {word}", self.name),
                waited_s: END_MAX.as_secs(),
            },
        })
    }

    /// Waits for its end. An exit code other than 0 is no error here if it told a summary.
    fn finish(&mut self, longest: Duration) -> Result<Ended, BenchError> {
        let started = Instant::now();
        let status = loop {
            match self.child.try_wait().map_err(BenchError::io("wait for", self.name))? {
                Some(status) => break status,
                None if started.elapsed() > longest => {
                    let what = format!("{} to end", self.name);
                    return Err(BenchError::Timeout { what, waited_s: longest.as_secs() });
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if let Some(reader) = self.reader.take() {
            // It has no reason to panic, and what it read is checked below.
            let _ = reader.join();
        }
        self.seen.extend(self.lines.try_iter());
        let parsed = |line: &String| serde_json::from_str(line).ok();
        let ended = Ended {
            name: self.name,
            events: self.seen.iter().filter_map(parsed).collect(),
            stderr: std::fs::read_to_string(&self.stderr).unwrap_or_default(),
        };
        if !status.success() && ended.event("summary").is_none() {
            return Err(self.ended_badly(status));
        }
        Ok(ended)
    }

    fn ended_badly(&self, status: ExitStatus) -> BenchError {
        let stderr = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        BenchError::Program { program: self.name.into(), status, said: tail(&stderr) }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    fn event(&self, name: &str) -> Option<&Value> {
        self.events.iter().rev().find(|event| event["event"] == name)
    }

    fn said(&self) -> String {
        tail(&self.stderr)
    }
}

/// The end of a text.
pub(crate) fn tail(text: &str) -> String {
    let text = text.trim();
    let from = text.char_indices().rev().nth(SAID_BYTES_MAX).map_or(0, |(index, _)| index);
    text[from..].to_owned()
}
