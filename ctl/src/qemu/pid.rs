//! Which process a QMP socket belongs to.
//!
//! SO_PEERCRED names the process that called `listen()`. That is QEMU's when QEMU made the socket,
//! and somebody else's when it was handed over, as libvirt does. So a candidate must hold the
//! socket: `/proc/net/unix` lists the inodes bound to the path (those accepted from it carry the
//! same path), `/proc/PID/fd` who holds them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::qmp::{Qmp, QmpError};

/// Why QEMU's process could not be found.
#[derive(Debug, thiserror::Error)]
pub enum PidError {
    /// The monitor could not be asked.
    #[error("can't tell whose socket this is")]
    Qmp(#[from] QmpError),
    /// No visible process holds the socket.
    #[error("no process that is visible here holds the QMP socket {}", path.display())]
    NoOwner {
        /// The socket.
        path: PathBuf,
    },
    /// `/proc` could not be read.
    #[error("can't read {}", path.display())]
    Proc {
        /// The file.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

impl PidError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoOwner { .. } => Some(
                "run pageferry as root, in the pid namespace of the host: another user's \
                 descriptors are hidden, and so is a process outside a container",
            ),
            Self::Qmp(_) | Self::Proc { .. } => None,
        }
    }
}

/// Finds the process at the other end of `qmp`.
pub fn find(qmp: &Qmp) -> Result<i32, PidError> {
    let (listener, _) = qmp.listener_credentials()?;
    // The table is per network namespace; QEMU's may be another than ours.
    let mut tables = vec![PathBuf::from("/proc/net/unix")];
    if listener > 0 {
        tables.push(format!("/proc/{listener}/net/unix").into());
    }
    let mut inodes = HashSet::new();
    for table in tables {
        match fs::read_to_string(&table) {
            Ok(text) => inodes.extend(inodes_bound_to(&text, qmp.path())),
            Err(_) if !inodes.is_empty() => {}
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(PidError::Proc { path: table, source }),
        }
    }
    if listener > 0 && holds_any(listener, &inodes) {
        return Ok(listener);
    }
    let proc = Path::new("/proc");
    let entries =
        fs::read_dir(proc).map_err(|source| PidError::Proc { path: proc.into(), source })?;
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|pid| holds_any(*pid, &inodes))
        .ok_or_else(|| PidError::NoOwner { path: qmp.path().into() })
}

/// Inodes of the sockets that `table` (as `/proc/net/unix`) lists under `path`. The path is listed
/// as it was bound, perhaps relative or by another mount, so the file name decides.
fn inodes_bound_to(table: &str, path: &Path) -> Vec<u64> {
    let name = path.file_name();
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            // Num: RefCount Protocol Flags Type St Inode Path
            let mut fields = line.split_ascii_whitespace().skip(6);
            let inode = fields.next()?.parse().ok()?;
            let bound = Path::new(fields.next()?);
            (bound.file_name() == name).then_some(inode)
        })
        .collect()
}

/// Whether the process has one of these sockets open. A process that can't be looked into (gone,
/// or another user's) has none.
fn holds_any(pid: i32, inodes: &HashSet<u64>) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).any(|target| {
        let inode = target.to_str().and_then(|target| {
            target.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()
        });
        inode.is_some_and(|inode| inodes.contains(&inode))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_read_by_name_whatever_the_directory() {
        let table = "\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01  4711 ./qmp.sock
0000000000000000: 00000003 00000000 00000000 0001 03  4712 /run/vm/qmp.sock
0000000000000000: 00000003 00000000 00000000 0001 03  4713
0000000000000000: 00000002 00000000 00010000 0001 01  4714 /run/vm/other.sock
";
        assert_eq!(inodes_bound_to(table, Path::new("/run/vm/qmp.sock")), [4711, 4712]);
    }
}
