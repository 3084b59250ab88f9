//! `pageferry recover`: brings sessions to their end whose agents, hosts or network were lost.
//!
//! The source asks the target. A target waits for it to ask, whether it needs the source's word or the
//! source its own: where no `pageferry target` listens any more, by listening in its place.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::{after, select};
use pageferry_datapath::control::Message;
use pageferry_datapath::recover::{End, Peer};

use crate::agent::acceptor::{Acceptor, Arrival};
use crate::agent::failure;
use crate::agent::record::{self, Record, Role, Unreadable};
use crate::agent::recovery::{self, LOOK, RecoveryError, Side};
use crate::agent::tls::Door;
use crate::cli::RecoverArgs;
use crate::qmp::QmpError;
use crate::report::exit::Exit;
use crate::status;

/// Runs the subcommand.
pub fn run(args: &RecoverArgs) -> Exit {
    let asked = |session| args.session.is_none_or(|it| it == session);
    let mut found = record::list(&args.state_dir);
    found.retain(|(_, record)| asked(record.session));
    let mut unread = match record::unreadable(&args.state_dir) {
        Ok(unread) => unread,
        Err(error) => return status::not_seen(&args.state_dir, &error),
    };
    // One that its agent is just making is none of ours.
    unread.retain(|file| asked(file.session) && !(file.live && args.session.is_none()));
    if found.is_empty() && unread.is_empty() {
        return nothing_found(args);
    }
    let unread = unread.into_iter().map(|file| unreadable(args, file));
    let mut worst = unread.max_by_key(|exit| exit.code()).unwrap_or(Exit::Done);
    for (path, record) in found {
        if args.session.is_none() && record::is_in_use(&path) {
            passed_over(args, &record);
            continue;
        }
        let exit = match recover(args, &path, &record) {
            Ok(_) if args.forget => {
                forgotten(args, &record);
                Exit::Done
            }
            Ok(end) => {
                say(args, &record, end);
                exit_of(end)
            }
            Err(error) => {
                eprintln!("error: {}: {}", record.session, failure::chain("", &error));
                eprintln!("hint: {}", hint(&error));
                match error {
                    RecoveryError::Record(_) | RecoveryError::Undecided { .. } => Exit::Refused,
                    RecoveryError::Run { .. } => Exit::PausedAtSource,
                    RecoveryError::Silent { .. } => Exit::HandoverUncertain,
                }
            }
        };
        worst = if exit.code() > worst.code() { exit } else { worst };
    }
    worst
}

fn recover(args: &RecoverArgs, path: &Path, record: &Record) -> Result<End, RecoveryError> {
    if args.forget {
        return Side::open(path)?.forget_settled();
    }
    let until = Instant::now() + Duration::from_secs(args.wait);
    match record.role {
        Role::Source => Side::open(path)?.recover_source(args.peer_is_dead, until),
        Role::Target => {
            let peer = if args.peer_is_dead { Peer::Dead } else { Peer::Unreachable };
            let end = Side::open(path)?.recover_target(peer)?;
            match args.peer_is_dead {
                true => Ok(end),
                false => wait_for_the_source(args, path, record, end, until),
            }
        }
    }
}

/// Waits until the source has asked: here, or at a target agent that listens already. Until then it
/// ends as it is known to, by what there is on this side.
fn wait_for_the_source(
    args: &RecoverArgs,
    path: &Path,
    record: &Record,
    known: End,
    until: Instant,
) -> Result<End, RecoveryError> {
    let before = record::read(path).map(|record| record.decision).ok();
    let security = &record.security;
    let door = |address| Door::of(address, security.tls_dir.as_deref(), security.insecure);
    let acceptor = record.listen.as_ref().and_then(|at| Acceptor::listen(at, door).ok());
    if let Some(at) = record.listen.as_ref().filter(|_| !args.json) {
        println!("{}: waiting for `pageferry recover` at the source, on {at}", record.session);
    }
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(known);
        }
        match &acceptor {
            Some(acceptor) => select! {
                recv(acceptor.arrivals()) -> arrival => match arrival {
                    Ok(Arrival::Control { link, first }) => {
                        if let Message::Recover(ask) = *first
                            && let Some(end) = recovery::answer(&args.state_dir, &link, ask)
                            && ask.session == record.session
                        {
                            return Ok(end);
                        }
                    }
                    Ok(Arrival::Lane(_) | Arrival::Stranger { .. }) | Err(_) => {}
                },
                recv(after(left.min(LOOK))) -> _ => {}
            },
            None => std::thread::sleep(left.min(LOOK)),
        }
        // Without the source's word nothing changes here; with it the record does, or both sides know
        // and it is gone.
        match record::read(path) {
            Ok(now) if Some(now.decision) != before => {
                return Side::open(path)?.recover_target(Peer::Unreachable);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let runs = recovery::runs(record);
                return Ok(if runs { End::RunsHere } else { End::TheOthers });
            }
            Ok(_) | Err(_) => {}
        }
    }
}

/// What its file says nobody can know; it goes by the operator's word.
fn unreadable(args: &RecoverArgs, file: Unreadable) -> Exit {
    let (session, path, said) = (file.session, file.path.clone(), file.in_words());
    let blank = file.never_written;
    if !args.forget {
        eprintln!("error: {session}: {}: {said}", path.display());
        if !blank {
            eprintln!(
                "hint: look with `query-status` at the QEMUs of both hosts whose guest it is; the \
                 other side's record may say"
            );
        }
        eprintln!("hint: pageferry recover {session} --forget removes it");
        return Exit::Refused;
    }
    match file.remove() {
        Ok(()) if args.json => println!(
            "{}",
            serde_json::json!({
                "event": "forgotten",
                "session": session.to_string(),
                "path": path,
                "unreadable": said,
            })
        ),
        Ok(()) => println!("{session}: {} is removed: {said}", path.display()),
        Err(error) => {
            eprintln!("error: {session}: {}", failure::chain("", &error));
            eprintln!("hint: `pageferry status` says who has it");
            return Exit::Refused;
        }
    }
    Exit::Done
}

/// One of all whose agent lives, or that somebody else is bringing to its end.
fn passed_over(args: &RecoverArgs, record: &Record) {
    let session = record.session;
    match args.json {
        true => println!(
            "{}",
            serde_json::json!({
                "event": "passed-over",
                "session": session.to_string(),
                "role": record.role,
            })
        ),
        false => println!("{session}: passed over: in use, see `pageferry status`"),
    }
}

/// A record that said how it ended, and is removed by the operator's word: what is so now, on either
/// side, was not looked at.
fn forgotten(args: &RecoverArgs, record: &Record) {
    match args.json {
        true => println!(
            "{}",
            serde_json::json!({
                "event": "forgotten",
                "session": record.session.to_string(),
                "role": record.role,
                "decision": record.decision,
            })
        ),
        false => {
            println!("{}: its record is removed; it said {:?}", record.session, record.decision)
        }
    }
}

fn nothing_found(args: &RecoverArgs) -> Exit {
    match args.session {
        None => {
            if !args.json {
                println!("nothing to recover: no records in {}", args.state_dir.display());
            }
            Exit::Done
        }
        Some(session) => {
            eprintln!("error: no record of {session} in {}", args.state_dir.display());
            eprintln!(
                "hint: name the folder with --state-dir; a session that both sides know the end of \
                 has no record"
            );
            Exit::Refused
        }
    }
}

fn say(args: &RecoverArgs, record: &Record, end: End) {
    let text = recovery::in_words(end, record.role);
    match args.json {
        true => println!(
            "{}",
            serde_json::json!({
                "event": "recovered",
                "session": record.session.to_string(),
                "role": record.role,
                "end": name(end),
                "text": text,
            })
        ),
        false => println!("{}: {text}", record.session),
    }
    if end == End::Unknown {
        let (other, session) = (other_side(record.role), record.session);
        eprintln!(
            "hint: run `pageferry recover {session}` at the {other} too, within --wait seconds"
        );
        eprintln!(
            "hint: if its QEMU does not run and never will: pageferry recover {session} \
             --peer-is-dead"
        );
        eprintln!(
            "hint: if it runs there, and `recover` there finds no record: pageferry recover {session} \
             --forget"
        );
    }
}

fn other_side(role: Role) -> &'static str {
    match role {
        Role::Source => "target",
        Role::Target => "source",
    }
}

/// As scripts read it.
fn name(end: End) -> &'static str {
    match end {
        End::RunsHere => "runs-here",
        End::TheOthers => "the-others",
        End::Unknown => "unknown",
        End::Gone => "gone",
        End::RunsTwice => "runs-twice",
    }
}

fn exit_of(end: End) -> Exit {
    match end {
        End::RunsHere | End::TheOthers => Exit::Done,
        End::Gone => Exit::GuestGone,
        End::RunsTwice => Exit::RunningAtSource,
        End::Unknown => Exit::HandoverUncertain,
    }
}

fn hint(error: &RecoveryError) -> String {
    match error {
        RecoveryError::Record(error) if error.step == "locked" => {
            "its agent lives: see `pageferry status`, end it with `pageferry cancel`".into()
        }
        RecoveryError::Record(error) => format!("look at {}", shown(&error.path)),
        RecoveryError::Undecided { .. } => "leave out --forget".into(),
        RecoveryError::Silent { qmp, source, .. } => match source {
            Some(QmpError::Busy { .. }) => format!(
                "close the client that is connected to {} (socat, virsh, a script), and run it again",
                shown(qmp)
            ),
            _ => format!("nothing was changed; make {} that QEMU's again", shown(qmp)),
        },
        RecoveryError::Run { qmp, .. } => {
            format!("connect to {} and look with `query-status`", shown(qmp))
        }
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
