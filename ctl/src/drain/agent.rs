//! One guest's migration: `pageferry migrate --json --progress`, a process of its own.
//!
//! It is in a process group of its own, so that Ctrl-C at the drain's terminal reaches it once, by
//! the drain. Two threads read what it says, until it ends.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::thread;

use clap::Parser;
use crossbeam_channel::Sender;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::args::DrainArgs;
use super::budget;
use super::error::DrainError;
use super::guest::Guest;
use crate::cli::{self, Cli, MigrateArgs};

/// What an agent's threads bring.
#[derive(Debug)]
pub(super) enum Said {
    /// A line of its standard output: an event, or something that is none.
    Line(String),
    /// A line of its standard error.
    Error(String),
    /// It says nothing more: it has ended, or is about to.
    Closed,
}

/// A running agent.
#[derive(Debug)]
pub(super) struct Agent {
    process: Child,
}

impl Agent {
    /// Starts one for `guest`, whose target is known; what it says goes to `said` as that of
    /// `number`.
    pub(super) fn start(
        args: &DrainArgs,
        guest: &Guest,
        number: usize,
        said: &Sender<(usize, Said)>,
    ) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(words(args, guest)).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn()?;
        let (out, err) = (process.stdout.take(), process.stderr.take());
        let (to_out, to_err) = (said.clone(), said.clone());
        read("pf-said", out, move |line| drop(to_out.send((number, line))), Said::Line, true);
        read("pf-errors", err, move |line| drop(to_err.send((number, line))), Said::Error, false);
        Ok(Self { process })
    }

    /// Ends its migration; the guest goes on here, unless the hand-over was decided.
    pub(super) fn cancel(&self) {
        let pid = Pid::from_raw(self.process.id() as i32);
        // It was not waited for yet, so the number is still its own.
        let _it_may_have_ended = kill(pid, Signal::SIGINT);
    }

    /// Its exit code; 128 and the signal's number if it was killed.
    pub(super) fn wait(mut self) -> i32 {
        match self.process.wait() {
            Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            Err(_) => -1,
        }
    }
}

/// Reads lines until there are no more. A line that is no text is passed on as far as it is.
fn read(
    name: &str,
    from: Option<impl Read + Send + 'static>,
    tell: impl Fn(Said) + Send + 'static,
    said: fn(String) -> Said,
    closes: bool,
) {
    let Some(from) = from else { return };
    let work = move || {
        let (mut from, mut line) = (BufReader::new(from), Vec::new());
        while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            tell(said(String::from_utf8_lossy(&line).trim_end().to_owned()));
            line.clear();
        }
        if closes {
            tell(Said::Closed);
        }
    };
    thread::Builder::new().name(name.into()).spawn(work).expect("the process can start threads");
}

/// The arguments of the agent of `guest`.
fn words(args: &DrainArgs, guest: &Guest) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |more: &[&dyn AsRef<std::ffi::OsStr>]| {
        words.extend(more.iter().map(|word| word.as_ref().to_owned()));
    };
    let to = guest.to.as_deref().unwrap_or_default();
    add(&[&"migrate", &"--json", &"--progress", &"--qmp", &guest.qmp, &"--to", &to]);
    if let Some(qmp) = &guest.target_qmp {
        add(&[&"--target-qmp", qmp]);
    }
    add(&[&"--state-dir", &args.state_dir]);
    if let Some(dir) = &args.runtime_dir {
        add(&[&"--runtime-dir", dir]);
    }
    let weight = guest.weight.to_string();
    add(&[&"--bandwidth-group", &budget::group(args), &"--bandwidth-weight", &weight]);
    if let Some(dir) = &args.tls.tls_dir {
        add(&[&"--tls-dir", dir]);
    }
    if args.tls.insecure {
        add(&[&"--insecure"]);
    }
    words.extend(args.migrate.iter().map(OsString::from));
    words
}

/// The same, as the agent will understand them.
pub(super) fn parsed(args: &DrainArgs, guest: &Guest) -> Result<MigrateArgs, DrainError> {
    let words = words(args, guest);
    let parsed = Cli::try_parse_from([OsString::from("pageferry")].into_iter().chain(words));
    match parsed.map(|cli| cli.command) {
        Ok(cli::Command::Migrate(args)) => Ok(*args),
        Ok(_) => Err(DrainError::Options { text: "they are another subcommand's".into() }),
        Err(error) => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            let text = line.strip_prefix("error: ").unwrap_or(line).to_owned();
            Err(DrainError::Options { text })
        }
    }
}
