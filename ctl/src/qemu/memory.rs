//! Which memory of a QEMU is the guest's RAM, what it is made of, and where it lies.
//!
//! [`discover`] asks QEMU alone: backends under `/objects`, joined by name with the RAM blocks that
//! QEMU's migration knows (`info ramblock`). [`locate`] finds each in the process's mappings, by
//! the first of these that gives an answer: the address QEMU itself tells (8.2 and newer), the
//! inode or the temporary file of `mem-path`, the only mapping of that size, and last the address
//! that `gpa2hva` gives for a guest address of the block. Nothing is opened or mapped until
//! [`Place::open`]. What is unfit to be migrated is found here and refused in
//! [`checks`](super::checks).

mod blocks;
mod locate;

use std::path::PathBuf;

use pageferry_datapath::attach::AttachError;
use pageferry_datapath::backing::BackingError;
use serde_json::{Value, json};

use self::blocks::RamBlock;
pub use self::locate::{Place, locate};
use super::Execute;
use crate::qmp::QmpError;

/// What a memory backend is, as far as QEMU says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// `memory-backend-file`: a file with a name (or a temporary one, if the path is a directory).
    File {
        /// `mem-path`, as QEMU was given it.
        path: PathBuf,
    },
    /// `memory-backend-memfd`: shared, without a name.
    Memfd,
    /// Anything else: `memory-backend-ram`, which is also what QEMU makes of a plain `-m`.
    Other {
        /// The QOM type.
        qom_type: String,
    },
}

impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path } => write!(f, "memory-backend-file {}", path.display()),
            Self::Memfd => f.write_str("memory-backend-memfd"),
            Self::Other { qom_type } => f.write_str(qom_type),
        }
    }
}

/// One block of guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRam {
    /// QEMU's name of the block in migrations (RAMBlock id), equal on both sides.
    pub name: String,
    /// The backend's QOM path, as `/objects/m0`.
    pub backend: String,
    /// What it is made of.
    pub kind: BackendKind,
    /// Size in bytes, as the guest has it.
    pub bytes: u64,
    /// Page size in bytes: 4096, or the huge page's.
    pub page_bytes: u64,
    /// `share=on`.
    pub shared: bool,
    /// `prealloc=on`.
    pub preallocated: bool,
    /// Host virtual address, from QEMUs that tell (8.2 and newer).
    pub hva: Option<u64>,
}

impl GuestRam {
    /// Bytes that QEMU maps for it, and that its file has: whole pages. Where the last page is a
    /// huge one of which the guest has a part only, all of it moves: its rest belongs to this QEMU
    /// alone, nobody writes it, and a page is the least that can be tracked.
    pub fn mapped_bytes(&self) -> u64 {
        let whole_pages = match self.page_bytes {
            0 => None,
            page_bytes => self.bytes.checked_next_multiple_of(page_bytes),
        };
        whole_pages.unwrap_or(self.bytes)
    }
}

/// What [`discover`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestMemoryMap {
    /// Blocks of guest RAM, in QEMU's order: the machine's own first.
    pub ram: Vec<GuestRam>,
    /// Bytes of all other blocks (firmware, option ROMs, video memory): QEMU sends them itself
    /// with the device state.
    pub carried_bytes: u64,
    /// RAM that QEMU says the guest has: at boot plus hotplugged. More than all of `ram` if some
    /// of it has no backend.
    pub claimed_bytes: u64,
}

/// Why guest RAM could not be found or opened.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The monitor could not be asked.
    #[error("can't ask QEMU for its memory")]
    Qmp(#[from] QmpError),
    /// QEMU's text for humans has a shape that is not known.
    #[error("QEMU's answer to \"{command}\" is not understood: {line:?}")]
    Text {
        /// The command of the human monitor.
        command: &'static str,
        /// The line.
        line: String,
    },
    /// The process could not be looked into.
    #[error("can't look into QEMU's memory")]
    Process(#[from] AttachError),
    /// No mapping, or more than one, fits the block.
    #[error("can't tell where block {name} of {bytes} bytes lies in QEMU: {candidates} candidates")]
    NotLocated {
        /// The block.
        name: String,
        /// Its size.
        bytes: u64,
        /// Mappings that would fit.
        candidates: usize,
    },
    /// None of the ways to the file worked.
    #[error("can't open block {name} of QEMU's memory")]
    Open {
        /// The block.
        name: String,
        /// Why the first way failed.
        #[source]
        source: AttachError,
    },
    /// The file is none that can be moved.
    #[error("block {name} of QEMU's memory can't be used")]
    Backing {
        /// The block.
        name: String,
        /// Why.
        #[source]
        source: BackingError,
    },
}

impl MemoryError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Process(_) | Self::Open { .. } => {
                Some("run pageferry as root, or as QEMU's user with CAP_SYS_PTRACE")
            }
            Self::NotLocated { .. } => Some(
                "give each block of guest memory a file of its own: -object \
                 memory-backend-file,mem-path=FILE,share=on",
            ),
            Self::Qmp(_) | Self::Text { .. } | Self::Backing { .. } => None,
        }
    }
}

/// Asks QEMU which RAM its guest has. Nothing is touched.
pub fn discover(qemu: &dyn Execute) -> Result<GuestMemoryMap, MemoryError> {
    let blocks = blocks::query(qemu)?;
    let objects = qemu.execute("qom-list", json!({ "path": "/objects" }))?;
    let mut backends = Vec::new();
    for object in objects.as_array().into_iter().flatten() {
        let (Some(id), Some(qom_type)) = (object["name"].as_str(), child_type(object)) else {
            continue;
        };
        if qom_type.starts_with("memory-backend-") {
            backends.push((id.to_owned(), qom_type.to_owned()));
        }
    }
    let mut ram = Vec::new();
    let mut carried_bytes = 0;
    for block in &blocks {
        // A block is named after its backend's id, or by its path with
        // x-use-canonical-path-for-ramblock-id=on.
        let id = block.name.strip_prefix("/objects/").unwrap_or(&block.name);
        match backends.iter().find(|(backend, _)| backend == id) {
            Some((id, qom_type)) => ram.push(describe(qemu, block, id, qom_type)?),
            // A block without name belongs to a backend that no device uses.
            None if block.name.is_empty() => {}
            None => carried_bytes += block.bytes,
        }
    }
    let summary = qemu.execute("query-memory-size-summary", json!({}))?;
    let part = |name: &str| summary[name].as_u64().unwrap_or(0);
    let claimed_bytes = part("base-memory") + part("plugged-memory");
    Ok(GuestMemoryMap { ram, carried_bytes, claimed_bytes })
}

/// The type of a QOM child, out of `child<TYPE>`.
pub(super) fn child_type(property: &Value) -> Option<&str> {
    property["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')
}

fn describe(
    qemu: &dyn Execute,
    block: &RamBlock,
    id: &str,
    qom_type: &str,
) -> Result<GuestRam, MemoryError> {
    let backend = format!("/objects/{id}");
    let get = |property: &str| -> Result<Value, QmpError> {
        qemu.execute("qom-get", json!({ "path": backend, "property": property }))
    };
    let kind = match qom_type {
        "memory-backend-file" => {
            BackendKind::File { path: get("mem-path")?.as_str().unwrap_or_default().into() }
        }
        "memory-backend-memfd" => BackendKind::Memfd,
        other => BackendKind::Other { qom_type: other.into() },
    };
    Ok(GuestRam {
        name: block.name.clone(),
        kind,
        bytes: block.bytes,
        page_bytes: block.page_bytes,
        shared: get("share")?.as_bool().unwrap_or(false),
        preallocated: get("prealloc")?.as_bool().unwrap_or(false),
        hva: block.hva,
        backend,
    })
}
