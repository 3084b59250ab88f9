//! Makes a process's disk slow, so that its direct reads stay in flight for long.
//!
//! A fast disk answers before anyone can look; what happens to a request that is under way while
//! memory is scanned shows on a slow one only. The block layer's own throttle does it: control
//! groups of either version, whichever the machine has.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{LabError, io};
use super::workplace::{Undo, Workplace};

const V1: &str = "/sys/fs/cgroup/blkio";
const V2: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A control group with a slow disk; dropped, its processes go back and the disk is fast again.
#[derive(Debug)]
pub struct SlowDisk {
    group: PathBuf,
    parent: PathBuf,
    _workplace: Arc<Workplace>,
}

impl SlowDisk {
    /// Limits what the process `pid` reads from, and writes to, the disk under `file`.
    pub fn throttle(
        workplace: &Arc<Workplace>,
        pid: u32,
        file: &Path,
        bytes_per_second: u64,
    ) -> Result<Self, LabError> {
        let device = disk_under(file)?;
        let (parent, limits) = if Path::new(V1).join("blkio.throttle.read_bps_device").exists() {
            let limit = format!("{device} {bytes_per_second}");
            let files = ["blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"];
            (PathBuf::from(V1), files.map(|name| (name, limit.clone())).to_vec())
        } else {
            let parent = v2_with_io()?;
            let limit = format!("{device} rbps={bytes_per_second} wbps={bytes_per_second}");
            (parent, vec![("io.max", limit)])
        };
        let group = parent.join(format!("{}disk{pid}", workplace.unique_word()));
        workplace.promise(&Undo::Folder { path: group.clone() })?;
        fs::create_dir(&group).map_err(io("create", &group))?;
        let slow = Self { group, parent, _workplace: Arc::clone(workplace) };
        for (name, limit) in limits {
            write(&slow.group.join(name), &limit)?;
        }
        write(&slow.group.join("cgroup.procs"), &pid.to_string())?;
        Ok(slow)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let procs = self.group.join("cgroup.procs");
        for pid in fs::read_to_string(procs).unwrap_or_default().lines() {
            let _ = fs::write(self.parent.join("cgroup.procs"), pid);
        }
        Undo::Folder { path: self.group.clone() }.undo();
    }
}

/// The number (major:minor) of the whole disk that holds `file`: partitions can't be throttled.
fn disk_under(file: &Path) -> Result<String, LabError> {
    let device = fs::metadata(file).map_err(io("look at", file))?.dev();
    let number = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let node = Path::new("/sys/dev/block").join(&number);
    let node = fs::canonicalize(&node).map_err(|_| LabError::Missing {
        what: format!("a disk under {}", file.display()),
        hint: "put the image on a file system with a disk of its own (not tmpfs, not overlay)",
    })?;
    if !node.join("partition").exists() {
        return Ok(number);
    }
    let disk = node.parent().unwrap_or(&node).join("dev");
    Ok(fs::read_to_string(&disk).map_err(io("read", &disk))?.trim().to_owned())
}

fn v2_with_io() -> Result<PathBuf, LabError> {
    for root in V2.map(Path::new) {
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        if controllers.split_whitespace().any(|name| name == "io") {
            write(&root.join("cgroup.subtree_control"), "+io")?;
            return Ok(root.to_owned());
        }
    }
    Err(LabError::Missing {
        what: "a control group that can throttle disks".into(),
        hint: "mount -t cgroup -o blkio none /sys/fs/cgroup/blkio, or boot with cgroup v2 and io",
    })
}

fn write(path: &Path, text: &str) -> Result<(), LabError> {
    fs::write(path, text).map_err(io("write", path))
}
