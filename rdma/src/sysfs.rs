//! Reading sysfs attributes: one small file, one value.
//!
//! An attribute that is missing and one that can't be read (many drivers answer EINVAL for an
//! empty table entry) are the same to a probe: the value is not known.

use std::fs;
use std::path::{Path, PathBuf};

/// The attribute's text without its newline; `None` when missing, unreadable or empty.
pub(crate) fn text(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim_end_matches(['\n', '\0', ' ']);
    (!text.is_empty()).then(|| text.to_owned())
}

/// The part after the number in attributes like `4: ACTIVE`.
pub(crate) fn label(path: impl AsRef<Path>) -> Option<String> {
    let text = text(path)?;
    Some(match text.split_once(": ") {
        Some((number, label)) if number.bytes().all(|b| b.is_ascii_digit()) => label.to_owned(),
        _ => text,
    })
}

/// A whole number.
pub(crate) fn number<T: std::str::FromStr>(path: impl AsRef<Path>) -> Option<T> {
    text(path)?.parse().ok()
}

/// The last component of what a link points to: how sysfs names drivers and parent devices.
pub(crate) fn link_name(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// Entries of a directory, sorted, `9` before `10`; empty when there is none.
pub(crate) fn entries(path: impl AsRef<Path>) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort_by_key(|path| (name(path).len(), path.clone()));
    entries
}

/// A path's last component.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
