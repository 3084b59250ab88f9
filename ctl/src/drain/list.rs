//! Which guests: from a file, from sockets that are there, from libvirt, from the run before.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::args::DrainArgs;
use super::error::DrainError;
use super::guest::{self, Guest};
use super::ledger::Ledger;
use super::libvirt;
use super::view::View;
use crate::qemu::pid;
use crate::qemu::runstate::RunState;
use crate::qmp::{Qmp, QmpError};

/// A file of guests.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    guest: Vec<Guest>,
}

/// All guests that were asked for, each once.
pub(super) fn guests(
    args: &DrainArgs,
    ledger: &Ledger,
    view: &mut View,
) -> Result<Vec<Guest>, DrainError> {
    let mut guests = Vec::new();
    if args.resume {
        guests = ledger.guests();
        if guests.is_empty() {
            return Err(DrainError::NothingToResume { path: ledger.path().into() });
        }
    }
    if let Some(path) = &args.guests {
        guests.extend(read(path)?);
    }
    let mut pids = BTreeSet::new();
    for path in sockets(args)? {
        match found(&path, ledger) {
            // A guest may have two sockets.
            Ok((guest, pid)) if pid.is_none_or(|pid| pids.insert(pid)) => guests.push(guest),
            Ok(_) => {}
            Err(why) => view.note(&format!("{} is left out: {why}", path.display())),
        }
    }
    if let Some(uri) = &args.libvirt {
        let (domains, left_out) = libvirt::guests(uri)?;
        guests.extend(domains);
        for (name, why) in left_out {
            view.note(&format!("{name} is left out: {why}"));
        }
    }
    guest::check(&guests)?;
    Ok(guests)
}

fn read(path: &Path) -> Result<Vec<Guest>, DrainError> {
    let text = fs::read_to_string(path)
        .map_err(|source| DrainError::Unreadable { path: path.into(), source })?;
    parse(path, &text)
}

/// By the name's end, else by what it looks like.
fn parse(path: &Path, text: &str) -> Result<Vec<Guest>, DrainError> {
    let is_json = match path.extension().and_then(|it| it.to_str()) {
        Some("json") => true,
        Some("toml") => false,
        _ => text.trim_start().starts_with('{'),
    };
    let path = path.to_owned();
    let list: List = match is_json {
        true => serde_json::from_str(text).map_err(|source| DrainError::Json { path, source })?,
        false => toml::from_str(text)
            .map_err(|source| DrainError::Toml { path, source: Box::new(source) })?,
    };
    let mut guests = list.guest;
    guests.iter_mut().for_each(Guest::name_after_socket);
    Ok(guests)
}

/// Sockets of `--qmp-dir` and `--qmp`, in order.
fn sockets(args: &DrainArgs) -> Result<BTreeSet<PathBuf>, DrainError> {
    let mut paths = BTreeSet::new();
    for dir in &args.qmp_dir {
        let unreadable = |source| DrainError::Unreadable { path: dir.clone(), source };
        for entry in fs::read_dir(dir).map_err(unreadable)? {
            paths.insert(entry.map_err(unreadable)?.path());
        }
    }
    for pattern in &args.qmp {
        let bad = |source| DrainError::Pattern { pattern: pattern.clone(), source };
        paths.extend(glob::glob(pattern).map_err(bad)?.flatten());
    }
    let is_socket = |path: &PathBuf| fs::metadata(path).is_ok_and(|it| it.file_type().is_socket());
    paths.retain(is_socket);
    Ok(paths)
}

/// The guest behind a socket, with its QEMU's pid. One whose QEMU is gone is known from the run
/// before, or not at all.
fn found(path: &Path, ledger: &Ledger) -> Result<(Guest, Option<i32>), String> {
    let known = || ledger.entry(path).map(|entry| entry.guest.clone());
    let qmp = match Qmp::connect(path) {
        Ok(qmp) => qmp,
        Err(QmpError::Connect { .. }) if known().is_some() => {
            return Ok((known().expect("just seen"), None));
        }
        Err(error) => return Err(crate::agent::failure::chain("", &error)),
    };
    let state = RunState::query(&qmp).map_err(|error| error.to_string())?;
    let guest = match (state.running, known()) {
        (false, Some(known)) => known,
        (false, None) => return Err(format!("its guest does not run ({})", state.status)),
        (true, _) => Guest::at(path.into(), name_of(&qmp)),
    };
    Ok((guest, pid::find(&qmp).ok()))
}

/// QEMU's `-name`.
fn name_of(qmp: &Qmp) -> Option<String> {
    let answer = qmp.execute("query-name", serde_json::json!({})).ok()?;
    Some(answer["name"].as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_toml_or_json() {
        let toml = "[[guest]]\nqmp = '/run/a.qmp'\n\n[[guest]]\nname = 'db'\nqmp = '/run/b.qmp'\n\
                    to = 'h:1'\ntarget_qmp = '/in/{name}'\nweight = 3\n";
        let json = r#"{"guest":[{"qmp":"/run/a.qmp"},{"name":"db","qmp":"/run/b.qmp","to":"h:1",
                       "target_qmp":"/in/{name}","weight":3}]}"#;
        let of_toml = parse(Path::new("guests.toml"), toml).unwrap();
        assert_eq!(of_toml, parse(Path::new("guests.json"), json).unwrap());
        assert_eq!(of_toml, parse(Path::new("guests"), json).unwrap());
        assert_eq!((of_toml[0].name.as_str(), of_toml[0].weight), ("a", 1));
        assert_eq!(of_toml[1].target_qmp(None), "/in/db");
    }

    #[test]
    fn what_is_mistyped_is_said() {
        let text = "[[guest]]\nqmp = '/run/a.qmp'\nwieght = 3\n";
        let error = parse(Path::new("guests.toml"), text).unwrap_err();
        let text = crate::agent::failure::chain("", &error);
        assert!(text.contains("wieght") && text.contains("not a list"), "{text}");
        let error = parse(Path::new("x.json"), "{}").unwrap_err();
        assert_eq!(error.exit(), crate::report::exit::Exit::BadUsage);
    }
}
