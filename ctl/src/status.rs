//! `pageferry status`: what the records of this host say, and who has them.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::agent::admin;
use crate::agent::record::{self, Record, Role, Unreadable};
use crate::cli::StatusArgs;
use crate::report::exit::Exit;

/// Who has a session's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeper {
    /// Its agent: the session is on its way.
    Agent,
    /// Who brings it to its end: the guard of an agent that is gone, or a `pageferry recover`.
    Another,
    /// Nobody: it was left behind.
    Nobody,
}

impl Keeper {
    /// Of the record at `path`.
    pub(crate) fn of(path: &Path, record: &Record) -> Self {
        if !record::is_in_use(path) {
            return Self::Nobody;
        }
        // A target's agent outlives its sessions; their sockets go with them.
        match record.agent_lives() && record.socket.as_deref().is_none_or(admin::listens) {
            true => Self::Agent,
            false => Self::Another,
        }
    }
}

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
        let keeper = Keeper::of(path, record);
        match args.json {
            true => println!(
                "{}",
                serde_json::json!({
                    "session": record.session.to_string(),
                    "role": record.role,
                    "decision": record.decision,
                    "live": keeper != Keeper::Nobody,
                    "on_its_way": keeper == Keeper::Agent,
                    "agent": record.agent,
                    "peer": record.peer,
                    "qmp": record.qmp,
                    "written_at": record.written_at,
                })
            ),
            false => println!("{}", line(record, keeper)),
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

fn line(record: &Record, keeper: Keeper) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (role, preposition) = match record.role {
        Role::Source => (record.role.name(), "to"),
        Role::Target => (record.role.name(), "from"),
    };
    let state = match keeper {
        Keeper::Agent => format!("on its way (agent {})", record.agent),
        Keeper::Another => "its agent is gone; a guard or `pageferry recover` is at it".into(),
        Keeper::Nobody => format!("left behind: {:?}; see `pageferry recover`", record.decision),
    };
    format!(
        "{}  {role}  {} {preposition} {}  {state}  {} s ago",
        record.session,
        record.qmp.display(),
        record.peer,
        now.saturating_sub(record.written_at)
    )
}
