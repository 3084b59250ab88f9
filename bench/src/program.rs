//! Other people's programs: started on a core, waited for, never outliving a run.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::error::BenchError;
use crate::net::{End, Net};
use crate::ours::tail;

/// A run that takes longer hangs.
const RUN_MAX: Duration = Duration::from_secs(120);
/// A server listens by then, also where its machine is emulated.
const LISTEN_MAX: Duration = Duration::from_secs(30);

/// A command for a program, on a core if told; `make` decides where it runs.
pub(crate) fn on_core(
    make: impl Fn(&'static str) -> Command,
    program: &'static str,
    core: Option<usize>,
) -> Command {
    match core {
        None => make(program),
        Some(core) => {
            let mut command = make("taskset");
            command.args(["-c", &core.to_string(), program]);
            command
        }
    }
}

/// Server and client of a program at the two ends, each with its core and arguments; what the
/// client has said. The server ends with this.
pub(crate) fn serve_and_ask(
    net: &Net,
    program: &'static str,
    listens: SocketAddr,
    server: (Option<usize>, Vec<String>),
    client: (Option<usize>, Vec<String>),
) -> Result<String, BenchError> {
    let at = |end| move |name: &'static str| net.command(end, Path::new(name));
    let run = || BenchError::io("run", program);
    let mut command = on_core(at(End::Target), program, server.0);
    command.args(server.1).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Ended(command.spawn().map_err(run())?);
    wait_listening(server.0.id(), listens.port())?;
    let mut command = on_core(at(End::Source), program, client.0);
    command.args(client.1).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = output_within(command.spawn().map_err(run())?, program)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(said),
        false => {
            let said = tail(&(said + &String::from_utf8_lossy(&output.stderr)));
            Err(BenchError::Program { program: program.into(), status: output.status, said })
        }
    }
}

/// Waits for a TCP listener on a port, by looking at the kernel's table where a process is: nobody
/// is disturbed.
fn wait_listening(pid: u32, port: u16) -> Result<(), BenchError> {
    let started = Instant::now();
    let wanted = format!(":{port:04X}");
    while started.elapsed() < LISTEN_MAX {
        for table in ["tcp", "tcp6"] {
            let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}"));
            let listens = text.unwrap_or_default().lines().any(|line| {
                let mut words = line.split_ascii_whitespace().skip(1);
                let at = words.next().unwrap_or_default();
                // proc_net(5): state 0A is LISTEN.
                at.ends_with(&wanted) && words.nth(1) == Some("0A")
            });
            if listens {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let (what, waited_s) = (format!("a listener on port {port}"), LISTEN_MAX.as_secs());
    Err(BenchError::Timeout { what, waited_s })
}

/// What a program has said by its end.
pub(crate) fn output_within(mut child: Child, program: &str) -> Result<Output, BenchError> {
    use std::io::Read;
    let mut out = child.stdout.take();
    let mut err = child.stderr.take();
    // Two threads: a full pipe must not hold it up.
    let read = |from: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut from) = from {
                let _what_there_was = from.read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let out = read(out.take().map(|out| Box::new(out) as _));
    let err = read(err.take().map(|err| Box::new(err) as _));
    let started = Instant::now();
    let mut child = Ended(child);
    let status = loop {
        match child.0.try_wait().map_err(BenchError::io("wait for", program))? {
            Some(status) => break status,
            None if started.elapsed() > RUN_MAX => {
                let (what, waited_s) = (format!("{program} to end"), RUN_MAX.as_secs());
                return Err(BenchError::Timeout { what, waited_s });
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let said = |thread: std::thread::JoinHandle<Vec<u8>>| thread.join().unwrap_or_default();
    Ok(Output { status, stdout: said(out), stderr: said(err) })
}

/// A child that does not outlive this.
#[derive(Debug)]
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a program can be run here.
pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| Path::new(&folder).join(program).exists())
}
