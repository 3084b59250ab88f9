//! `pageferry status` and `pageferry cancel`: what the records of this host say, and how to end what
//! is on its way.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::agent::record::{self, Record, Role, Unreadable};
use crate::agent::recovery::LOOK;
use crate::cli::{CancelArgs, StatusArgs};
use crate::report::exit::Exit;

/// How long a cancelled agent may take to put everything back.
const CANCEL_WAIT: Duration = Duration::from_secs(30);

/// Lists sessions.
pub fn run(args: &StatusArgs) -> Exit {
    let records = record::list(&args.state_dir);
    let unreadable = match record::unreadable(&args.state_dir) {
        Ok(unreadable) => unreadable,
        Err(error) => return not_seen(&args.state_dir, &error),
    };
    if records.is_empty() && unreadable.is_empty() && !args.json {
        println!("no sessions: no records in {}", args.state_dir.display());
    }
    for (path, record) in &records {
        let live = record::is_in_use(path);
        match args.json {
            true => println!(
                "{}",
                serde_json::json!({
                    "session": record.session.to_string(),
                    "role": record.role,
                    "decision": record.decision,
                    "live": live,
                    "agent": record.agent,
                    "peer": record.peer,
                    "qmp": record.qmp,
                    "written_at": record.written_at,
                })
            ),
            false => println!("{}", line(record, live)),
        }
    }
    for found in &unreadable {
        match args.json {
            true => println!(
                "{}",
                serde_json::json!({
                    "session": found.session.to_string(),
                    "role": found.role,
                    "live": found.live,
                    "path": found.path,
                    "unreadable": found.in_words(),
                })
            ),
            false => println!("{}", unread_line(found)),
        }
    }
    Exit::Done
}

/// Nobody may take a folder that can't be looked into for an empty one.
pub(crate) fn not_seen(dir: &Path, error: &std::io::Error) -> Exit {
    eprintln!("error: the records in {}: {error}", dir.display());
    eprintln!(
        "hint: run this as the user who runs the agents, or name the folder with --state-dir"
    );
    Exit::Refused
}

fn unread_line(found: &Unreadable) -> String {
    let state = match found.live {
        true => "being made by its agent".into(),
        false => format!("{}; see `pageferry recover`", found.in_words()),
    };
    format!("{}  {}  {}  {state}", found.session, found.role.name(), found.path.display())
}

fn line(record: &Record, live: bool) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (role, preposition) = match record.role {
        Role::Source => (record.role.name(), "to"),
        Role::Target => (record.role.name(), "from"),
    };
    let state = match live {
        true => format!("on its way (agent {})", record.agent),
        false => format!("left behind: {:?}; see `pageferry recover`", record.decision),
    };
    format!(
        "{}  {role}  {} {preposition} {}  {state}  {} s ago",
        record.session,
        record.qmp.display(),
        record.peer,
        now.saturating_sub(record.written_at)
    )
}

/// Ends a session as Ctrl-C at its agent does, and waits until everything is put back.
pub fn cancel(args: &CancelArgs) -> Exit {
    let dir = &args.state_dir;
    let of = |role| record::path_of(dir, args.session, role);
    let Some(path) = [of(Role::Source), of(Role::Target)].into_iter().find(|path| path.exists())
    else {
        eprintln!("error: no record of {} in {}", args.session, dir.display());
        eprintln!("hint: `pageferry status` lists the sessions of this host");
        return Exit::Refused;
    };
    let agent = match record::read(&path) {
        Ok(record) => record.agent,
        Err(error) => {
            eprintln!("error: {} can't be read: {error}", path.display());
            eprintln!("hint: pageferry recover {} says what can be done", args.session);
            return Exit::Refused;
        }
    };
    if !record::is_in_use(&path) || agent == 0 {
        eprintln!("error: {} is not on its way: its agent is gone", args.session);
        eprintln!("hint: pageferry recover {} brings it to its end", args.session);
        return Exit::Refused;
    }
    if let Err(error) = kill(Pid::from_raw(agent as i32), Signal::SIGINT) {
        eprintln!("error: agent {agent} can't be told: {error}");
        return Exit::Refused;
    }
    wait_until_ended(&path, args)
}

fn wait_until_ended(path: &Path, args: &CancelArgs) -> Exit {
    let until = Instant::now() + CANCEL_WAIT;
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
