//! QEMUs: installed ones with their versions, and running ones.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::finding::{Finding, Group};

/// `x-ignore-shared` came with 4.0.
const IGNORE_SHARED_SINCE: (u32, u32) = (4, 0);
/// From here on RAM of a memfd is not ignored.
const NAMED_FILES_SINCE: (u32, u32) = (8, 1);
/// `--version` takes milliseconds; a wrapper script may wait for something.
const VERSION_WITHIN: Duration = Duration::from_secs(5);
/// Where Red Hat's distributions put it, outside `PATH`.
const ELSEWHERE: &str = "/usr/libexec/qemu-kvm";

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Qemus {
    /// Programs by name: the ones that a shell would run.
    pub installed: BTreeMap<String, Program>,
    /// Running ones.
    pub running: usize,
}

/// One installed program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// Its version; `None` where it can't be told.
    pub version: Option<(u32, u32, u32)>,
}

impl Qemus {
    /// This host's.
    pub fn here() -> Self {
        let search = env::var_os("PATH").unwrap_or_default();
        let mut installed = BTreeMap::new();
        for path in env::split_paths(&search)
            .flat_map(|folder| programs(&folder))
            .chain(Some(PathBuf::from(ELSEWHERE)).filter(|path| path.is_file()))
        {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            installed.entry(name).or_insert_with(|| Program { version: version(&path), path });
        }
        Self { installed, running: running(Path::new("/")) }
    }

    /// Judges them.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let group = Group::Qemu;
        let running = Finding::ok(group, "qemu.running", format!("{} running", self.running));
        if self.installed.is_empty() && self.running == 0 {
            let why = "there is no guest to move, and nothing to receive one";
            return vec![
                Finding::missing(group, "qemu.installed", "none", why)
                    .fix("apt-get install -y qemu-system-x86")
                    .required(),
            ];
        }
        self.installed.iter().map(|(name, program)| judge(name, program)).chain([running]).collect()
    }
}

fn judge(name: &str, program: &Program) -> Finding {
    let (group, name) = (Group::Qemu, format!("qemu.{name}"));
    let path = program.path.display();
    let Some((major, minor, micro)) = program.version else {
        let value = format!("{path}: version unknown");
        return Finding::warn(group, &name, value, "the migration asks the running QEMU instead");
    };
    let value = format!("{major}.{minor}.{micro} ({path})");
    match (major, minor) {
        version if version < IGNORE_SHARED_SINCE => {
            let why = "it can't leave shared memory out of its own migration; 4.0 can";
            Finding::warn(group, &name, value, why).fix("apt-get install -y qemu-system-x86")
        }
        version if version >= NAMED_FILES_SINCE => {
            let rule = "guest memory on named files (memory-backend-file), not memfd";
            Finding::ok(group, &name, format!("{value}; {rule}"))
        }
        _ => Finding::ok(group, &name, format!("{value}; guest memory on files or memfd")),
    }
}

/// `qemu-system-*` and `qemu-kvm` in a folder.
fn programs(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            (name.starts_with("qemu-system-") || name == "qemu-kvm") && path.is_file()
        })
        .collect()
}

/// `QEMU emulator version 7.2.22 (Debian …)`.
fn version(program: &Path) -> Option<(u32, u32, u32)> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    if !ends_within(&mut child, VERSION_WITHIN) {
        // It may have ended since; both calls then say so, and there is nothing left to do.
        let _ended_already = child.kill();
        let _ended_already = child.wait();
        return None;
    }
    let mut text = String::new();
    child.stdout.take()?.read_to_string(&mut text).ok()?;
    parse_version(&text)
}

fn ends_within(child: &mut Child, limit: Duration) -> bool {
    let started = Instant::now();
    while started.elapsed() < limit {
        match child.try_wait() {
            Ok(Some(_)) => return true,
            Ok(None) => thread::sleep(Duration::from_millis(5)),
            Err(_) => return false,
        }
    }
    false
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let word = text.split_once("version ")?.1.split_whitespace().next()?;
    let mut numbers = word.split('.').map(str::parse);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor)), Some(Ok(micro))) => Some((major, minor, micro)),
        _ => None,
    }
}

/// Processes whose program is a QEMU system emulator.
fn running(root: &Path) -> usize {
    let processes = fs::read_dir(root.join("proc")).into_iter().flatten().flatten();
    processes
        .filter_map(|entry| fs::read_link(entry.path().join("exe")).ok())
        .filter(|exe| {
            let name = exe.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("qemu-system-") || name.starts_with("qemu-kvm")
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2, 22)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2\n"), Some((10, 0, 2)));
        assert_eq!(parse_version("something else"), None);
    }
}
