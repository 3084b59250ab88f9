//! The QEMUs that guests can run on: the installed one, and the other version that Debian has.
//!
//! What matters to a migration changed between 7.2 and 8.1 (named RAM files), so both sides of
//! that line are tried. The other version is unpacked beside the system in the cache; it brings
//! its data files and any library that the system lacks.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::cache::cached;
use super::command::output;
use super::debian::{Apt, codename};
use super::error::LabError;
use crate::qmp::Version;

const PROGRAM: &str = "qemu-system-x86_64";
/// Packages that a QEMU without recommended extras consists of.
const PACKAGES: [&str; 4] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
/// From here on a Debian 12 machine has the newer QEMU installed, and the older one is fetched.
const NEW_MAJOR: u32 = 8;

/// One QEMU that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuBinary {
    /// The program.
    pub program: PathBuf,
    /// Its version.
    pub version: Version,
    /// Where it was unpacked, if it is not the system's own.
    pub root: Option<PathBuf>,
}

impl QemuBinary {
    /// The installed QEMU.
    pub fn system() -> Result<Self, LabError> {
        let version = version_of(&mut Command::new(PROGRAM))?;
        Ok(Self { program: PROGRAM.into(), version, root: None })
    }

    /// The version of QEMU that Debian also has, downloaded on first use: from backports, or, where
    /// that one is installed, from the release itself.
    pub fn other() -> Result<Self, LabError> {
        let codename = codename()?;
        let suite = match Self::system()?.version.major {
            NEW_MAJOR.. => codename,
            _ => format!("{codename}-backports"),
        };
        let root = cached(&format!("qemu-{suite}"), |folder| fetch(&suite, folder))?;
        Self::unpacked(root)
    }

    fn unpacked(root: PathBuf) -> Result<Self, LabError> {
        let program = root.join("usr/bin").join(PROGRAM);
        let version = Version { major: 0, minor: 0, micro: 0 };
        let mut binary = Self { program, version, root: Some(root) };
        binary.version = version_of(&mut binary.command())?;
        Ok(binary)
    }

    /// A command that runs it with its own data files and libraries.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        self.prepare(&mut command);
        command
    }

    /// Adds what it needs to a `command` that runs it, perhaps by way of another program.
    pub(super) fn prepare(&self, command: &mut Command) {
        let Some(root) = &self.root else { return };
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        command.env("LD_LIBRARY_PATH", libraries);
    }

    /// Arguments that name its data files.
    pub fn data_arguments(&self) -> Vec<String> {
        let Some(root) = &self.root else { return Vec::new() };
        ["usr/share/qemu", "usr/share/seabios"]
            .iter()
            .flat_map(|folder| ["-L".to_owned(), root.join(folder).display().to_string()])
            .collect()
    }
}

/// Every QEMU that can be run here, the system's first, and why the others can't.
pub fn qemu_binaries() -> (Vec<QemuBinary>, Vec<LabError>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for binary in [QemuBinary::system(), QemuBinary::other()] {
        match binary {
            Ok(binary) => found.push(binary),
            Err(error) => missing.push(error),
        }
    }
    (found, missing)
}

fn fetch(suite: &str, folder: &Path) -> Result<(), LabError> {
    let lists = tempfile::tempdir().map_err(super::error::io("create", &std::env::temp_dir()))?;
    let apt = Apt::new(lists.path(), Some(suite))?;
    let mut packages: Vec<String> = PACKAGES.map(str::to_owned).to_vec();
    // Also libraries that the system lacks. Not being able to tell is not fatal: asking the
    // program for its version shows soon enough whether it runs.
    packages.extend(apt.would_install(PACKAGES[0]).unwrap_or_default());
    packages.sort();
    packages.dedup();
    apt.unpack(&packages, folder)
}

fn version_of(command: &mut Command) -> Result<Version, LabError> {
    let text = output(command.arg("--version"))?;
    parse_version(&text)
        .ok_or(LabError::Unexpected { what: "qemu-system-x86_64 --version", found: text })
}

fn parse_version(text: &str) -> Option<Version> {
    let words = text.split_once("version ")?.1;
    let mut numbers = words.split([' ', '\n', '.']).map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(Version { major: next()?, minor: next()?, micro: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds)\nCopyright";
        assert_eq!(parse_version(text), Some(Version { major: 10, minor: 0, micro: 2 }));
        let bare = "QEMU emulator version 7.2.22\n";
        assert_eq!(parse_version(bare), Some(Version { major: 7, minor: 2, micro: 22 }));
        assert_eq!(parse_version("something else"), None);
    }
}
