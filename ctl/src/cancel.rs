//! `pageferry cancel`: ends one session that is on its way, at the end that this host is.
//!
//! A source's agent has one session, and ends it by SIGINT. A target's may have many: each has a socket,
//! which its record names. Nobody is signalled but the very process that the record names.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::agent::admin::{self, Request};
use crate::agent::failure;
use crate::agent::record::{self, Record, Role};
use crate::agent::recovery::LOOK;
use crate::cli::CancelArgs;
use crate::report::exit::Exit;
use crate::status::Keeper;

/// How long a cancelled session may take to put everything back.
const WAIT: Duration = Duration::from_secs(30);

/// Why a session could not be told to end.
#[derive(Debug, thiserror::Error)]
enum CancelError {
    #[error("no record of it in {}", dir.display())]
    Unknown { dir: PathBuf },
    #[error("{} can't be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("it is not on its way: its agent is gone")]
    NotOnItsWay,
    #[error("its agent is gone, and a guard or `pageferry recover` is bringing it to its end")]
    Ending,
    #[error("agent {agent} has no socket to be told by")]
    NoSocket { agent: u32 },
    #[error("its agent can't be told")]
    Socket(#[from] admin::AdminError),
    #[error("agent {agent} can't be signalled")]
    Signal {
        agent: u32,
        #[source]
        source: std::io::Error,
    },
}

/// Runs the subcommand; waits until everything is put back.
pub fn run(args: &CancelArgs) -> Exit {
    match tell(args) {
        Ok(path) => wait_until_ended(&path, args),
        Err(error) => {
            eprintln!("error: {}: {}", args.session, failure::chain("", &error));
            eprintln!("hint: {}", hint(args, &error));
            Exit::Refused
        }
    }
}

/// Tells the session to end; where its record is.
fn tell(args: &CancelArgs) -> Result<PathBuf, CancelError> {
    let dir = &args.state_dir;
    let of = |role| record::path_of(dir, args.session, role);
    let path = [of(Role::Source), of(Role::Target)].into_iter().find(|path| path.exists());
    let path = path.ok_or_else(|| CancelError::Unknown { dir: dir.clone() })?;
    let record = record::read(&path)
        .map_err(|source| CancelError::Unreadable { path: path.clone(), source })?;
    match (Keeper::of(&path, &record), record.role, &record.socket) {
        (Keeper::Nobody, ..) => return Err(CancelError::NotOnItsWay),
        (Keeper::Another, ..) => return Err(CancelError::Ending),
        (Keeper::Agent, Role::Source, _) => interrupt(&record)?,
        (Keeper::Agent, Role::Target, Some(socket)) => {
            admin::tell(socket, &Request::Cancel)?;
        }
        (Keeper::Agent, Role::Target, None) => {
            return Err(CancelError::NoSocket { agent: record.agent });
        }
    }
    Ok(path)
}

/// As Ctrl-C at its terminal.
fn interrupt(record: &Record) -> Result<(), CancelError> {
    let agent = record.agent;
    let failed = |source: rustix::io::Errno| CancelError::Signal { agent, source: source.into() };
    let pid = i32::try_from(agent).ok().and_then(Pid::from_raw).ok_or(CancelError::Ending)?;
    // Held before it is looked at, so that the number can't come to mean another process.
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    if !record.agent_lives() {
        return Err(CancelError::Ending);
    }
    pidfd_send_signal(process, Signal::INT).map_err(failed)
}

fn hint(args: &CancelArgs, error: &CancelError) -> String {
    let session = args.session;
    match error {
        CancelError::Unknown { .. } => "`pageferry status` lists the sessions of this host".into(),
        CancelError::Unreadable { .. } => {
            format!("pageferry recover {session} says what can be done")
        }
        CancelError::NotOnItsWay => {
            format!("pageferry recover {session} brings it to its end")
        }
        CancelError::Ending => "`pageferry status` says when it has".into(),
        CancelError::NoSocket { .. } => {
            "cancel it at its source; to end the agent ends every session it has".into()
        }
        CancelError::Socket(_) | CancelError::Signal { .. } => {
            "run this as the user who runs the agent".into()
        }
    }
}

fn wait_until_ended(path: &Path, args: &CancelArgs) -> Exit {
    let until = Instant::now() + WAIT;
    while record::is_in_use(path) {
        if Instant::now() >= until {
            eprintln!("error: {} was told and has not ended", args.session);
            eprintln!(
                "hint: after the hand-over was decided a session can't be cancelled any more"
            );
            return Exit::HandoverUncertain;
        }
        std::thread::sleep(LOOK);
    }
    println!("{} has ended", args.session);
    Exit::Done
}
