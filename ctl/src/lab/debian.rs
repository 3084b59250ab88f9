//! Packages of the machine's own Debian, unpacked into our cache without being installed.
//!
//! Nothing of the system changes and no root is needed: apt works on lists of its own in the
//! cache. Where packages come from is the machine's affair; a suite that is not configured is
//! derived from the configured one by changing its name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::command::{output, words};
use super::error::{LabError, io};

/// apt, looking at package lists in a folder of ours.
pub(super) struct Apt {
    options: Vec<String>,
    suite: Option<String>,
}

impl Apt {
    /// Fetches the lists of the machine's sources, and of `suite` if one is named, into `folder`.
    pub(super) fn new(folder: &Path, suite: Option<&str>) -> Result<Self, LabError> {
        for name in ["parts", "lists/partial", "cache/archives/partial"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).map_err(io("create", &path))?;
        }
        let sources = machine_sources();
        let parts = folder.join("parts");
        for (position, (name, text)) in sources.iter().enumerate() {
            let path = parts.join(format!("{position:02}-{name}"));
            fs::write(&path, text).map_err(io("write", &path))?;
        }
        if let Some(suite) = suite {
            derive_suite(&sources, suite, &parts)?;
        }
        let path = folder.display();
        let options = [
            "-qq".to_owned(),
            "-oDir::Etc::sourcelist=/dev/null".to_owned(),
            format!("-oDir::Etc::sourceparts={path}/parts"),
            format!("-oDir::State::lists={path}/lists"),
            format!("-oDir::Cache={path}/cache"),
            // As root apt would drop to a user who can't write into our cache.
            "-oAPT::Sandbox::User=".to_owned(),
            "-oAcquire::Languages=none".to_owned(),
        ];
        let apt = Self { options: options.to_vec(), suite: suite.map(str::to_owned) };
        output(apt.get().arg("update"))?;
        Ok(apt)
    }

    /// The package that `meta` depends on whose name starts with `prefix`.
    pub(super) fn dependency(&self, meta: &str, prefix: &str) -> Result<String, LabError> {
        let listing = output(Command::new("apt-cache").args(&self.options).args([
            "depends",
            "--important",
            meta,
        ]))?;
        listing
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .ok_or(LabError::Unexpected { what: "apt-cache depends", found: listing })
    }

    /// What installing `package` from the suite would bring or change on this machine, itself
    /// included.
    pub(super) fn would_install(&self, package: &str) -> Result<Vec<String>, LabError> {
        let mut command = self.get();
        command.args(["--simulate", "--no-install-recommends", "--allow-downgrades", "install"]);
        if let Some(suite) = &self.suite {
            command.arg("-t").arg(suite);
        }
        let listing = output(command.arg(package))?;
        let names = listing.lines().filter_map(|line| line.strip_prefix("Inst "));
        Ok(names.filter_map(|rest| rest.split(' ').next()).map(str::to_owned).collect())
    }

    /// Downloads `packages` (of the suite where it has them) and unpacks them into `folder`.
    pub(super) fn unpack(&self, packages: &[String], folder: &Path) -> Result<(), LabError> {
        let debs = tempfile::tempdir_in(folder).map_err(io("create", folder))?;
        for package in packages {
            let from_suite = self.suite.as_ref().map(|suite| format!("{package}/{suite}"));
            let wanted = from_suite.as_deref().unwrap_or(package);
            let get =
                |name: &str| output(self.get().current_dir(debs.path()).args(["download", name]));
            get(wanted)
                .or_else(|error| if wanted == package { Err(error) } else { get(package) })?;
        }
        for entry in fs::read_dir(debs.path()).map_err(io("list", debs.path()))?.flatten() {
            let deb = entry.path();
            let (deb, folder) = (deb.to_string_lossy(), folder.to_string_lossy());
            output(&mut words(["dpkg-deb", "-x", &deb, &folder]))?;
        }
        Ok(())
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.args(&self.options);
        command
    }
}

/// The codename of the machine's Debian.
pub(super) fn codename() -> Result<String, LabError> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).map_err(io("read", path))?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .ok_or(LabError::Unexpected { what: "/etc/os-release", found: text })
}

/// The machine's source files, name and text.
fn machine_sources() -> Vec<(String, String)> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(entries.flatten().map(|entry| entry.path()));
    }
    paths.sort();
    paths
        .iter()
        .filter(|path| path.extension().is_some_and(|end| end == "list" || end == "sources"))
        .filter_map(|path| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some((name, fs::read_to_string(path).ok()?))
        })
        .collect()
}

fn derive_suite(sources: &[(String, String)], suite: &str, parts: &Path) -> Result<(), LabError> {
    let codename = codename()?;
    for (name, text) in sources {
        let (derived, ending) = if name.ends_with(".sources") {
            (stanza_of_suite(text, &codename, suite), "sources")
        } else {
            (line_of_suite(text, &codename, suite), "list")
        };
        if let Some(derived) = derived {
            let path = parts.join(format!("99-derived.{ending}"));
            return fs::write(&path, derived).map_err(io("write", &path));
        }
    }
    Err(LabError::Missing {
        what: format!("an apt source of {codename} to derive {suite} from"),
        hint: "this part of the laboratory needs Debian",
    })
}

/// A deb822 stanza that offers `codename`, with `suite` instead.
fn stanza_of_suite(text: &str, codename: &str, suite: &str) -> Option<String> {
    let stanza = text.split("\n\n").find(|stanza| {
        let suites = stanza.lines().find_map(|line| line.strip_prefix("Suites:"));
        suites.is_some_and(|suites| suites.split_whitespace().any(|name| name == codename))
    })?;
    let lines = stanza.lines().map(|line| {
        if line.starts_with("Suites:") { format!("Suites: {suite}\n") } else { format!("{line}\n") }
    });
    Some(lines.collect())
}

/// A one-line source that offers `codename`, with `suite` instead.
fn line_of_suite(text: &str, codename: &str, suite: &str) -> Option<String> {
    let offers = |line: &&str| {
        line.starts_with("deb ") && line.split_whitespace().any(|word| word == codename)
    };
    let line = text.lines().find(offers)?;
    let words = line.split_whitespace().map(|word| if word == codename { suite } else { word });
    Some(words.collect::<Vec<_>>().join(" ") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_is_derived_from_either_form_of_source() {
        let deb822 = "Types: deb\nURIs: mirror/sec\nSuites: twelve-security\n\n\
                      Types: deb\nURIs: mirror\nSuites: twelve twelve-updates\nComponents: main\n";
        assert_eq!(
            stanza_of_suite(deb822, "twelve", "twelve-backports").as_deref(),
            Some("Types: deb\nURIs: mirror\nSuites: twelve-backports\nComponents: main\n")
        );
        let list = "# deb mirror twelve main\ndeb [signed-by=k] mirror twelve main\n";
        assert_eq!(
            line_of_suite(list, "twelve", "eleven").as_deref(),
            Some("deb [signed-by=k] mirror eleven main\n")
        );
        assert_eq!(line_of_suite(list, "ten", "eleven"), None);
    }
}
