//! What the laboratory downloads and builds once, and keeps.
//!
//! An entry is a folder that appears whole or not at all. Where entries of one kind follow each other
//! (an initramfs for each build of the program), the ones used last are kept and the others removed:
//!
//! ```text
//! KIND/KEY/…   flock on the folder itself: shared by each process that uses it, as long as it lives,
//!              exclusive for the one that removes it, which never waits for it
//! ```

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};

use super::error::{LabError, io};

/// The folders that this process uses, until it ends.
static IN_USE: Mutex<Vec<(PathBuf, Flock<File>)>> = Mutex::new(Vec::new());

/// Where the laboratory keeps what it downloads and builds: `$PAGEFERRY_CACHE`, else
/// `~/.cache/pageferry`.
fn cache_folder() -> Result<PathBuf, LabError> {
    let folder = std::env::var_os("PAGEFERRY_CACHE").map_or_else(
        || {
            let home = std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from);
            home.join(".cache/pageferry")
        },
        PathBuf::from,
    );
    fs::create_dir_all(&folder).map_err(io("create", &folder))?;
    Ok(folder)
}

/// Fills `cache/name` by `make`, once: it appears whole or not at all, whoever else tries.
pub(super) fn cached(
    name: &str,
    make: impl FnOnce(&Path) -> Result<(), LabError>,
) -> Result<PathBuf, LabError> {
    cached_in(&cache_folder()?, name, make)
}

/// The same for `cache/kind/key`, which stays while this process lives; of other keys only those of
/// that kind stay that are in use, or among the `keep` used last.
pub(super) fn cached_among(
    kind: &str,
    key: &str,
    keep: usize,
    make: impl Fn(&Path) -> Result<(), LabError>,
) -> Result<PathBuf, LabError> {
    let cache = cache_folder()?;
    let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
    let entry = cache.join(kind).join(key);
    if in_use.iter().any(|(used, _)| *used == entry) {
        return Ok(entry);
    }
    let held = loop {
        let entry = cached_in(&cache, &format!("{kind}/{key}"), &make)?;
        // It may be removed before it is held: then it is made again.
        if let Some(held) = hold(&entry) {
            break held;
        }
    };
    in_use.push((entry.clone(), held));
    remove_others(&cache.join(kind), keep);
    Ok(entry)
}

fn cached_in(
    cache: &Path,
    name: &str,
    make: impl FnOnce(&Path) -> Result<(), LabError>,
) -> Result<PathBuf, LabError> {
    let folder = cache.join(name);
    if folder.exists() {
        return Ok(folder);
    }
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, source)| LabError::Call { call: "flock", source })?;
    if folder.exists() {
        return Ok(folder);
    }
    let parent = folder.parent().unwrap_or(cache);
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    let unfinished = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(parent)
        .map_err(io("create", parent))?;
    make(unfinished.path())?;
    fs::rename(unfinished.path(), &folder).map_err(io("create", &folder))?;
    Ok(folder)
}

/// What is not whole yet is nobody's to remove.
const UNFINISHED: &str = ".unfinished-";

/// Notes the use of `entry` in its time and holds it; `None` if it was removed meanwhile.
fn hold(entry: &Path) -> Option<Flock<File>> {
    let held = Flock::lock(File::open(entry).ok()?, FlockArg::LockShared).ok()?;
    let (ours, there) = (held.metadata().ok()?, fs::metadata(entry).ok()?);
    let _who_may_not_say_so_does_not_write_here = held.set_modified(SystemTime::now());
    (ours.ino() == there.ino()).then_some(held)
}

fn remove_others(kind: &Path, keep: usize) {
    let Ok(entries) = fs::read_dir(kind) else { return };
    let whole = entries
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with(UNFINISHED));
    let mut by_use: Vec<(SystemTime, PathBuf)> =
        whole.filter_map(|it| Some((it.metadata().ok()?.modified().ok()?, it.path()))).collect();
    by_use.sort_unstable_by(|a, b| b.cmp(a));
    for (_, entry) in by_use.into_iter().skip(keep) {
        let Ok(folder) = File::open(&entry) else { continue };
        if let Ok(_nobody_uses_it) = Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            let _it_is_tried_again_next_time = fs::remove_dir_all(&entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_and_what_is_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let kind = folder.path();
        let names = ["oldest", "used", "older", "newer", "newest"];
        let mut age = 100;
        for name in names {
            fs::create_dir(kind.join(name)).unwrap();
            fs::write(kind.join(name).join("file"), name).unwrap();
            let time = SystemTime::now() - std::time::Duration::from_secs(age);
            File::open(kind.join(name)).unwrap().set_modified(time).unwrap();
            age -= 10;
        }
        let unfinished = kind.join(format!("{UNFINISHED}x"));
        fs::create_dir(&unfinished).unwrap();
        let there = || names.map(|name| kind.join(name).exists());
        let old = File::open(kind.join("used")).unwrap();
        let in_use = Flock::lock(old, FlockArg::LockShared).unwrap();
        remove_others(kind, 2);
        assert_eq!(there(), [false, true, false, true, true]);
        drop(in_use);
        remove_others(kind, 2);
        assert_eq!(there(), [false, false, false, true, true]);
        // Using one makes it the newest.
        drop(hold(&kind.join("newer")).unwrap());
        remove_others(kind, 1);
        assert_eq!(there(), [false, false, false, true, false]);
        assert!(unfinished.exists());
        assert!(hold(&kind.join("newest")).is_none());
    }
}
