//! `pageferry demo`: two hosts on this machine, a guest on one of them, moved live to the other.
//!
//! The hosts are network namespaces joined by a veth pair (loopback without root), the guests run
//! under QEMU's TCG, and the agents are this very binary, started as an operator would start it.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cli::DemoArgs;
use crate::lab::console::{longest_gap, ticks_across};
use crate::lab::{
    GUEST_ADDRESS, GUEST_PREFIX, GuestAssets, LabError, Qemu, QemuSpec, TAP, TwoHosts, Workplace,
    certificates, is_root,
};
use crate::report::exit::Exit;

/// Emulated guests boot in seconds; a busy machine takes several times as long.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// The whole migration of a small guest.
const MOVE_MAX: Duration = Duration::from_secs(120);
/// How long the guest is watched before and after the move.
const WATCH: Duration = Duration::from_millis(1500);

/// Runs the subcommand.
pub fn run(args: &DemoArgs, cancel: &Receiver<()>) -> Exit {
    match Demo::set_up(args).and_then(|mut demo| demo.show(args, cancel)) {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("error: {}", crate::agent::failure::chain("demo", &error));
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            Exit::Refused
        }
    }
}

/// Fields go in this order when dropped: QEMUs before the hosts that they run in.
struct Demo {
    source: Qemu,
    target: Qemu,
    hosts: Option<TwoHosts>,
    workplace: std::sync::Arc<Workplace>,
}

impl Demo {
    fn set_up(args: &DemoArgs) -> Result<Self, LabError> {
        let said = Said { json: args.json };
        said.say("preparing a kernel and an initramfs for the guest");
        let workplace = Workplace::new()?;
        let assets = GuestAssets::prepare()?;
        let hosts = if is_root() { Some(TwoHosts::new(&workplace)?) } else { None };
        let mut spec = QemuSpec::new(assets)?;
        spec.memory_mib = args.memory_mib;
        spec.params.fill_mib = args.fill_mib;
        spec.params.hot_mib = (args.fill_mib / 8).max(1);
        spec.params.pages_per_second = args.write_rate;
        if let Some(hosts) = &hosts {
            spec = spec.with_network(TAP, GUEST_ADDRESS, GUEST_PREFIX);
            spec.namespace = Some(hosts.source.namespace.name().into());
        }
        let source = Qemu::launch(&workplace, "source", &spec)?;
        spec.namespace = hosts.as_ref().map(|hosts| hosts.target.namespace.name().into());
        let target = Qemu::launch(&workplace, "target", &spec.to_target())?;
        said.say(&format!(
            "two hosts: {}; {} on each; one runs a guest with {} MiB, of which {} MiB are filled \
             and {} pages a second rewritten",
            match hosts {
                Some(_) => "network namespaces joined by a veth pair",
                None => "loopback, for want of root",
            },
            format_args!("QEMU {}", spec.binary.version),
            args.memory_mib,
            args.fill_mib,
            args.write_rate,
        ));
        Ok(Self { source, target, hosts, workplace })
    }

    fn show(&mut self, args: &DemoArgs, cancel: &Receiver<()>) -> Result<Exit, LabError> {
        let said = Said { json: args.json };
        let booted = self.source.wait_ready(BOOT_MAX)?;
        said.say(&format!("the guest has booted in {:.1} s; its console:", booted.as_secs_f64()));
        thread::sleep(WATCH);
        said.console("source", &self.source);
        let mut target = self.start_target()?;
        let moved = self.migrate(args, cancel)?;
        let taken = wait(&mut target, Duration::from_secs(20));
        if moved != 0 || taken != Some(0) {
            said.say("the guest did not move; its console at the source:");
            said.console("source", &self.source);
            return Ok(if moved == 0 { Exit::HandoverUncertain } else { Exit::RunningAtSource });
        }
        thread::sleep(WATCH);
        said.say("the guest's console at the target:");
        said.console("target", &self.target);
        let verified = self.target.console().verify(BOOT_MAX)?;
        let ticks = ticks_across(self.source.console(), self.target.console());
        said.say(&format!(
            "the guest checked all its pages after the move: {} of {} bad; its longest silence, \
             as seen on its console (a tick each 100 ms), was {} ms",
            verified.bad,
            verified.pages,
            longest_gap(&ticks).as_millis()
        ));
        Ok(if verified.bad == 0 { Exit::Done } else { Exit::HandoverUncertain })
    }

    fn start_target(&self) -> Result<Child, LabError> {
        let mut command = self.agent(|hosts| &hosts.target)?;
        command.arg("target").arg("--listen").arg(self.address());
        command.arg("--once").arg("--qmp").arg(self.target.qmp());
        self.certificates(&mut command, |hosts| &hosts.target)?;
        command.arg("--state-dir").arg(self.workplace.file("target-state"));
        let child = command.stdout(Stdio::null()).spawn().map_err(not_started)?;
        // It says on which address it listens; on a busy machine that takes a moment.
        thread::sleep(Duration::from_millis(300));
        Ok(child)
    }

    fn migrate(&self, args: &DemoArgs, cancel: &Receiver<()>) -> Result<i32, LabError> {
        let mut command = self.agent(|hosts| &hosts.source)?;
        command.arg("migrate").arg("--qmp").arg(self.source.qmp());
        command.arg("--to").arg(self.address()).arg("--verify");
        command.arg("--state-dir").arg(self.workplace.file("source-state"));
        self.certificates(&mut command, |hosts| &hosts.source)?;
        if args.json {
            command.arg("--json");
        }
        let mut child = command.spawn().map_err(not_started)?;
        let deadline = Instant::now() + MOVE_MAX;
        loop {
            if let Some(code) = wait(&mut child, Duration::from_millis(50)) {
                return Ok(code);
            }
            if cancel.try_recv().is_ok() || Instant::now() > deadline {
                // The terminal's Ctrl-C reached it too; a time-out must be told.
                let _it_may_be_gone = kill(Pid::from_raw(child.id() as i32), Signal::SIGINT);
            }
        }
    }

    fn address(&self) -> String {
        match &self.hosts {
            Some(hosts) => format!("{}:4777", hosts.target.address),
            None => "127.0.0.1:4777".into(),
        }
    }

    /// Between hosts the agents make sure of each other; on loopback there is nobody in between.
    fn certificates(
        &self,
        command: &mut Command,
        which: impl Fn(&TwoHosts) -> &crate::lab::Host,
    ) -> Result<(), LabError> {
        if let Some(hosts) = &self.hosts {
            let address = which(hosts).address.to_string();
            command.arg("--tls-dir").arg(certificates(&self.workplace, &address)?);
        }
        Ok(())
    }

    /// This binary, on one of the hosts.
    fn agent(&self, which: impl Fn(&TwoHosts) -> &crate::lab::Host) -> Result<Command, LabError> {
        let program = crate::lab::program()?;
        Ok(match &self.hosts {
            Some(hosts) => which(hosts).namespace.command(program),
            None => Command::new(program),
        })
    }
}

fn not_started(source: std::io::Error) -> LabError {
    LabError::Io { action: "start", path: "pageferry".into(), source }
}

/// The exit code of a child that ends within `within`; 128 and the signal for one that was killed.
fn wait(child: &mut Child, within: Duration) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let deadline = Instant::now() + within;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// What the demo says, unless only events are wanted.
struct Said {
    json: bool,
}

impl Said {
    fn say(&self, text: &str) {
        if !self.json {
            println!("demo: {text}");
        }
    }

    fn console(&self, host: &str, qemu: &Qemu) {
        if self.json {
            return;
        }
        let ticks = qemu.console().ticks();
        for tick in &ticks[ticks.len().saturating_sub(5)..] {
            println!(
                "  {host}: tick {} uptime {} ms, {} pages written, {} bad",
                tick.n, tick.uptime_ms, tick.writes, tick.bad
            );
        }
    }
}
