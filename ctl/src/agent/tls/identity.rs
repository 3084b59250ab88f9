//! Who a peer is by its certificate, as short as a record needs it.
//!
//! Whether a certificate is believed at all was decided before, by rustls.

use serde::{Deserialize, Serialize};

/// SHA-256 over every name in a certificate, in their order; a renewed one with the same names is the
/// same peer. Not the names: a host may have many, and a record has little room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(String);

impl Identity {
    /// Of whom these names name.
    pub(super) fn of(names: &[String]) -> Self {
        if names.iter().all(String::is_empty) {
            return Self(String::new());
        }
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        for name in names {
            // With its length, or two lists could read as one.
            digest.update(&(name.len() as u64).to_le_bytes());
            digest.update(name.as_bytes());
        }
        Self(digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether both are the same peer. Nobody is the same as one whose certificate names nobody.
    pub fn is(&self, other: &Self) -> bool {
        !self.0.is_empty() && self == other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str]) -> Identity {
        Identity::of(&names.iter().map(|&name| name.into()).collect::<Vec<_>>())
    }

    #[test]
    fn peers_are_told_apart_by_every_name_and_its_place() {
        let one = of(&["host-a", "10.0.0.1"]);
        assert!(one.is(&of(&["host-a", "10.0.0.1"])));
        let others =
            [&["host-a"][..], &["10.0.0.1", "host-a"], &["host-a1", "0.0.0.1"], &["host-a", ""]];
        for other in others {
            assert!(!one.is(&of(other)), "{other:?}");
        }
    }

    #[test]
    fn certificates_that_name_nobody_are_nobody_s() {
        for names in [&[][..], &[""]] {
            assert!(!of(names).is(&of(names)), "{names:?}");
        }
    }

    #[test]
    fn a_certificate_of_many_names_is_no_longer_than_others() {
        let many = vec!["a-host-with-a-long-name.example".to_owned(); 500];
        assert_eq!(Identity::of(&many).0.len(), 64);
    }
}
