//! The real binary as source and as target agent, on the laboratory's hosts.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_ctl::lab::{Host, LabError, Qemu, Workplace, certificates, program};
use serde_json::Value;

/// Port of the target agent; each has a namespace of its own.
pub const PORT: u16 = 4777;
/// Sources that are killed are not waited for any longer than this.
const RECONNECT_TIMEOUT_S: &str = "3";
/// An emulated processor for both agents, both QEMUs and the guest: each may have to wait so long for
/// its turn, or for another's digest, that it looks lost.
const EMULATED_TIMEOUT_S: &str = "60";
const EMULATED_TIMEOUT_MS: &str = "60000";
/// A whole migration of a small guest on a busy machine.
pub const MIGRATION_MAX: Duration = Duration::from_secs(240);

/// One agent's process. Killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// How an agent is started, beside its arguments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner<'a> {
    /// Held in a phase: `PHASE:MILLISECONDS`, with `:FILE` until there is such a file.
    pub hold: &'a str,
    /// Words that start another program, by which it is started: `setpriv ...`.
    pub under: &'a [&'a str],
    /// A variable in its environment, and in that of what it starts.
    pub mark: Option<(&'a str, &'a str)>,
}

/// What an agent left when it ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; 128 and the signal's number if it was killed.
    pub code: i32,
    /// The JSON lines of its standard output.
    pub events: Vec<Value>,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// The last event of this name.
    pub fn event(&self, name: &str) -> Option<&Value> {
        self.events.iter().rev().find(|event| event["event"] == name)
    }

    /// The summary; every source agent ends with one.
    pub fn summary(&self) -> &Value {
        self.event("summary").unwrap_or(&Value::Null)
    }
}

impl Agent {
    /// Starts `pageferry ARGS` on `host`, or beside us.
    pub fn start(
        workplace: &Arc<Workplace>,
        host: Option<&Host>,
        name: &str,
        args: &[&str],
    ) -> Result<Self, LabError> {
        Self::start_in(workplace, host, name, args, Manner::default())
    }

    /// The same, in a manner of its own.
    pub fn start_in(
        workplace: &Arc<Workplace>,
        host: Option<&Host>,
        name: &str,
        args: &[&str],
        manner: Manner<'_>,
    ) -> Result<Self, LabError> {
        let program = program()?;
        let mut words = manner.under.iter().map(Path::new).chain([program.as_path()]);
        let first = words.next().expect("the program at least");
        let mut command = match host {
            Some(host) => host.namespace.command(first),
            None => Command::new(first),
        };
        let (out, err) =
            (workplace.file(&format!("{name}.out")), workplace.file(&format!("{name}.err")));
        let file = |path: &Path| {
            std::fs::File::create(path).map_err(|source| LabError::Io {
                action: "create",
                path: path.into(),
                source,
            })
        };
        let child = command
            .args(words)
            .args(args)
            .env("PAGEFERRY_HOLD", manner.hold)
            .envs(manner.mark)
            .stdin(Stdio::null())
            .stdout(file(&out)?)
            .stderr(file(&err)?)
            .spawn()
            .map_err(|source| LabError::Io { action: "start", path: "pageferry".into(), source })?;
        Ok(Self { child, out, err })
    }

    /// Starts a target agent for `qemu` and waits until it listens.
    pub fn target(
        workplace: &Arc<Workplace>,
        host: Option<&Host>,
        name: &str,
        qemu: &Qemu,
        more: &[&str],
    ) -> Result<Self, LabError> {
        Self::target_in(workplace, host, name, qemu, more, Manner::default())
    }

    /// The same, in a manner of its own.
    pub fn target_in(
        workplace: &Arc<Workplace>,
        host: Option<&Host>,
        name: &str,
        qemu: &Qemu,
        more: &[&str],
        manner: Manner<'_>,
    ) -> Result<Self, LabError> {
        let listen = address(host);
        let qmp = qemu.qmp().display().to_string();
        let mut args = vec!["target", "--qmp", &qmp, "--once", "--json"];
        if !more.contains(&"--listen") {
            args.extend(["--listen", &listen]);
        }
        if !more.contains(&"--reconnect-timeout") {
            let seconds = if is_kvm() { EMULATED_TIMEOUT_S } else { RECONNECT_TIMEOUT_S };
            args.extend(["--reconnect-timeout", seconds]);
        }
        let all = on_this_host(workplace, host, name, &args, more)?;
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let agent = Self::start_in(workplace, host, name, &all, manner)?;
        agent.wait_text("listening", Duration::from_secs(30))?;
        Ok(agent)
    }

    /// Starts a source agent that moves the guest of `qemu` to the target agent on `to`.
    pub fn source(
        workplace: &Arc<Workplace>,
        host: Option<&Host>,
        name: &str,
        qemu: &Qemu,
        to: Option<&Host>,
        more: &[&str],
    ) -> Result<Self, LabError> {
        Self::source_in(workplace, host, name, qemu, to, more, Manner::default())
    }

    /// The same, in a manner of its own.
    pub fn source_in(
        workplace: &Arc<Workplace>,
        host: Option<&Host>,
        name: &str,
        qemu: &Qemu,
        to: Option<&Host>,
        more: &[&str],
        manner: Manner<'_>,
    ) -> Result<Self, LabError> {
        let to = address(to);
        let qmp = qemu.qmp().display().to_string();
        let mut args = vec!["migrate", "--qmp", &qmp, "--to", &to, "--json"];
        if is_kvm() {
            args.extend(["--reconnect-timeout", EMULATED_TIMEOUT_S]);
            args.extend(["--blackout-timeout-ms", EMULATED_TIMEOUT_MS]);
        }
        let all = on_this_host(workplace, host, name, &args, more)?;
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        Self::start_in(workplace, host, name, &all, manner)
    }

    /// The agent's own process: `ip netns exec` replaces itself by it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let _it_may_be_gone = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// What it has said so far on standard output.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// What stands in its standard error so far, from it or from a process of its own.
    pub fn complained(&self) -> String {
        std::fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has said `text`.
    pub fn wait_text(&self, text: &str, within: Duration) -> Result<(), LabError> {
        self.wait_said(&self.out, text, within)
    }

    /// Waits until `text` stands in its standard error, from it or from a process of its own.
    pub fn wait_error(&self, text: &str, within: Duration) -> Result<(), LabError> {
        self.wait_said(&self.err, text, within)
    }

    fn wait_said(&self, file: &Path, text: &str, within: Duration) -> Result<(), LabError> {
        let deadline = Instant::now() + within;
        while !std::fs::read_to_string(file).unwrap_or_default().contains(text) {
            if Instant::now() > deadline {
                return Err(LabError::Timeout {
                    what: format!("an agent to say {text:?}"),
                    waited_ms: within.as_millis() as u64,
                    last_seen: self.said()
                        + &std::fs::read_to_string(&self.err).unwrap_or_default(),
                });
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Waits until it ends.
    pub fn wait(mut self, within: Duration) -> Result<Ended, LabError> {
        use std::os::unix::process::ExitStatusExt;
        let deadline = Instant::now() + within;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                _ => {
                    return Err(LabError::Timeout {
                        what: "an agent to end".into(),
                        waited_ms: within.as_millis() as u64,
                        last_seen: self.said()
                            + &std::fs::read_to_string(&self.err).unwrap_or_default(),
                    });
                }
            }
        };
        let events = self.said().lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        Ok(Ended {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            events,
            stderr: std::fs::read_to_string(&self.err).unwrap_or_default(),
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _it_may_have_ended: io::Result<()> = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// An agent's arguments with those for its records and its certificates, unless `more` has them.
fn on_this_host(
    workplace: &Workplace,
    host: Option<&Host>,
    name: &str,
    args: &[&str],
    more: &[&str],
) -> Result<Vec<String>, LabError> {
    let mut all: Vec<String> = args.iter().map(|&arg| arg.into()).collect();
    if !more.contains(&"--state-dir") {
        let state = workplace.file(&format!("{name}.state"));
        all.extend(["--state-dir".into(), state.display().to_string()]);
    }
    all.extend(tls(workplace, host, more)?);
    all.extend(more.iter().map(|&arg| arg.into()));
    Ok(all)
}

/// Certificates for an agent on a host, unless `more` says what it does about them.
fn tls(workplace: &Workplace, host: Option<&Host>, more: &[&str]) -> Result<Vec<String>, LabError> {
    let told = more.iter().any(|arg| ["--tls-dir", "--insecure"].contains(arg));
    let Some(host) = host.filter(|_| !told) else { return Ok(Vec::new()) };
    let dir = certificates(workplace, &host.address.to_string())?;
    Ok(vec!["--tls-dir".into(), dir.display().to_string()])
}

fn address(host: Option<&Host>) -> String {
    match host {
        Some(host) => format!("{}:{PORT}", host.address),
        None => format!("127.0.0.1:{PORT}"),
    }
}

/// Whether guests are under KVM, which is emulated where these tests run: `tests/rdma-vm/kvm`.
pub fn is_kvm() -> bool {
    std::env::var("PAGEFERRY_LAB_KVM").is_ok_and(|value| value == "1")
}
