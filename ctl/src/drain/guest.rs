//! A guest to be moved, as its operator names it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::DrainError;

/// One guest. What it leaves open the command line says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// What it is called; where it is not said, after its socket.
    #[serde(default)]
    pub name: String,
    /// QMP socket of its QEMU here.
    pub qmp: PathBuf,
    /// `HOST:PORT` of its target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// QMP socket of the QEMU that waits for it there; `{name}` is its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_qmp: Option<String>,
    /// Its weight in the budget.
    #[serde(default = "one")]
    pub weight: u32,
}

fn one() -> u32 {
    1
}

impl Guest {
    /// Of the QEMU behind a socket.
    pub fn at(qmp: PathBuf, name: Option<String>) -> Self {
        let mut guest =
            Self { name: name.unwrap_or_default(), qmp, to: None, target_qmp: None, weight: 1 };
        guest.name_after_socket();
        guest
    }

    /// Gives a guest without a name that of its socket.
    pub fn name_after_socket(&mut self) {
        if self.name.is_empty() {
            self.name = self
                .qmp
                .file_stem()
                .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        }
    }

    /// The socket at the target: its own pattern, else that for all, else the path it has here.
    pub fn target_qmp(&self, for_all: Option<&str>) -> String {
        match self.target_qmp.as_deref().or(for_all) {
            Some(pattern) => pattern.replace("{name}", &self.name),
            None => self.qmp.display().to_string(),
        }
    }
}

/// Guests have names that differ, fit a path and a line; and weights that a budget takes.
pub(super) fn check(guests: &[Guest]) -> Result<(), DrainError> {
    let mut names: Vec<&str> = Vec::new();
    for guest in guests {
        let name = guest.name.as_str();
        if name.is_empty() || name.contains('/') || name.chars().any(char::is_control) {
            return Err(DrainError::Name { name: name.into(), qmp: guest.qmp.clone() });
        }
        if names.contains(&name) {
            return Err(DrainError::Twice { what: name.into() });
        }
        if guests.iter().filter(|other| other.qmp == guest.qmp).count() > 1 {
            return Err(DrainError::Twice { what: guest.qmp.display().to_string() });
        }
        if !(1..=1000).contains(&guest.weight) {
            return Err(DrainError::Weight { name: name.into(), weight: guest.weight });
        }
        names.push(name);
    }
    match guests.is_empty() {
        true => Err(DrainError::NoGuests),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_at_the_target_comes_from_the_guest_or_from_all_or_is_the_same() {
        let mut guest = Guest::at("/run/vms/web-1.qmp".into(), None);
        assert_eq!(guest.name, "web-1");
        assert_eq!(guest.target_qmp(None), "/run/vms/web-1.qmp");
        assert_eq!(guest.target_qmp(Some("/in/{name}.sock")), "/in/web-1.sock");
        guest.target_qmp = Some("/other/{name}/{name}".into());
        assert_eq!(guest.target_qmp(Some("/in/{name}.sock")), "/other/web-1/web-1");
    }

    #[test]
    fn guests_are_told_apart() {
        let guest = |name: &str, qmp: &str| Guest::at(qmp.into(), Some(name.into()));
        assert!(check(&[guest("a", "/1"), guest("b", "/2")]).is_ok());
        assert!(matches!(check(&[]), Err(DrainError::NoGuests)));
        for two in [[guest("a", "/1"), guest("a", "/2")], [guest("a", "/1"), guest("b", "/1")]] {
            assert!(matches!(check(&two), Err(DrainError::Twice { .. })), "{two:?}");
        }
        assert!(matches!(check(&[guest("../a", "/1")]), Err(DrainError::Name { .. })));
        let heavy = Guest { weight: 1001, ..guest("a", "/1") };
        assert!(matches!(check(&[heavy]), Err(DrainError::Weight { .. })));
    }
}
