//! Why a guest is not migrated, found before anything is touched.

use std::borrow::Cow;

use crate::qmp::Version;

/// One reason, with what to change about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Guest RAM that QEMU keeps to itself.
    #[error("guest memory {name} is private to QEMU (share=off)")]
    NotShared {
        /// The RAM block.
        name: String,
        /// The backend's QOM path.
        backend: String,
    },
    /// Guest RAM without a file behind it.
    #[error("guest memory {name} has no file behind it ({qom_type})")]
    Anonymous {
        /// The RAM block.
        name: String,
        /// The backend's QOM type.
        qom_type: String,
    },
    /// A source whose QEMU would send this memory itself, inside the pause.
    #[error(
        "guest memory {name} is a memfd, which QEMU {version} sends itself even with \
         x-ignore-shared (since 8.1 it leaves out only files with a name)"
    )]
    NotNamedFile {
        /// The RAM block.
        name: String,
        /// This QEMU's version.
        version: Version,
    },
    /// No guest RAM was found at all.
    #[error("QEMU has no memory backend that a device uses")]
    NoMemory,
    /// RAM that has no backend: it can't be reached.
    #[error(
        "QEMU says that the guest has {claimed_bytes} bytes of memory, but its backends hold \
         {found_bytes}"
    )]
    MemoryUnaccounted {
        /// What QEMU says.
        claimed_bytes: u64,
        /// What the backends hold.
        found_bytes: u64,
    },
    /// Something besides QEMU writes into guest memory, where its writes can't be seen.
    #[error("{what} writes into guest memory from outside QEMU, where it is not tracked")]
    OutsideWriter {
        /// The device, network or device file.
        what: String,
    },
    /// Memory that is encrypted or otherwise bound to its host.
    #[error("the guest's memory is confidential ({object}): a copy of it is worthless")]
    Confidential {
        /// The QOM path of what protects it.
        object: String,
    },
    /// A QEMU that lacks what is needed.
    #[error("QEMU {version} has no migration capability {capability}")]
    CapabilityMissing {
        /// Its name.
        capability: &'static str,
        /// This QEMU's version.
        version: Version,
    },
    /// A source whose guest does not run.
    #[error("the guest is not running ({status})")]
    NotRunning {
        /// QEMU's run state.
        status: String,
    },
    /// A target that does not wait for a migration.
    #[error("the target's QEMU does not wait for a migration ({status})")]
    NotWaiting {
        /// QEMU's run state.
        status: String,
    },
    /// QEMU is migrating already, or a target was told where to listen.
    #[error("QEMU has a migration of its own under way ({status})")]
    MigrationActive {
        /// QEMU's migration status.
        status: String,
    },
    /// QEMU itself refuses to migrate.
    #[error("QEMU can't migrate this guest: {reason}")]
    Blocked {
        /// QEMU's own words.
        reason: String,
    },
    /// Source and target are not the same machine.
    #[error("the source is a {source_machine}, the target a {target_machine}")]
    MachineDiffers {
        /// The source's machine type.
        source_machine: String,
        /// The target's.
        target_machine: String,
    },
    /// The source has RAM that the target lacks.
    #[error("the target has no guest memory {name}")]
    RegionMissing {
        /// The RAM block.
        name: String,
    },
    /// The target has RAM that the source lacks.
    #[error("the target has guest memory {name}, which the source has not")]
    RegionUnexpected {
        /// The RAM block.
        name: String,
    },
    /// Blocks of different sizes.
    #[error(
        "guest memory {name} has {source_bytes} bytes at the source and {target_bytes} at the \
         target"
    )]
    SizeDiffers {
        /// The RAM block.
        name: String,
        /// Size at the source.
        source_bytes: u64,
        /// Size at the target.
        target_bytes: u64,
    },
    /// Blocks of different pages.
    #[error(
        "guest memory {name} has pages of {source_bytes} bytes at the source and of \
         {target_bytes} at the target"
    )]
    PageSizeDiffers {
        /// The RAM block.
        name: String,
        /// Page size at the source.
        source_bytes: u64,
        /// Page size at the target.
        target_bytes: u64,
    },
}

impl Refusal {
    /// What to change.
    pub fn hint(&self) -> Cow<'static, str> {
        match self {
            Self::NotShared { backend, .. } => {
                let id = backend.rsplit('/').next().unwrap_or(backend);
                format!("start QEMU with share=on in -object memory-backend-file,id={id},…").into()
            }
            Self::Anonymous { .. } | Self::NoMemory | Self::MemoryUnaccounted { .. } => {
                NAMED_FILE.into()
            }
            Self::NotNamedFile { .. } => {
                format!("{NAMED_FILE} (a file on tmpfs is as fast as a memfd)").into()
            }
            Self::OutsideWriter { .. } => {
                "unplug the device (device_del), or use one that QEMU emulates itself".into()
            }
            Self::Confidential { .. } => "such guests can't be moved by copying memory".into(),
            Self::CapabilityMissing { .. } => "use QEMU 4.0 or newer".into(),
            Self::NotRunning { .. } => "let it run: QMP cont".into(),
            Self::NotWaiting { .. } => {
                "start the target's QEMU with the source's options and -incoming defer".into()
            }
            Self::MigrationActive { .. } => "wait for it, or end it: QMP migrate_cancel; a target \
                                             must be started with -incoming defer"
                .into(),
            Self::Blocked { .. } => "remove what QEMU names".into(),
            Self::MachineDiffers { source_machine, .. } => {
                format!("start the target with -machine {source_machine}").into()
            }
            Self::RegionMissing { .. }
            | Self::RegionUnexpected { .. }
            | Self::SizeDiffers { .. } => {
                "start the target with the same -m, -object memory-backend-… and -device pc-dimm \
                 options, ids included"
                    .into()
            }
            Self::PageSizeDiffers { .. } => {
                "put the memory of both on tmpfs, or of both on hugetlbfs with the same page size"
                    .into()
            }
        }
    }
}

const NAMED_FILE: &str = "start QEMU with -object \
     memory-backend-file,id=ram0,mem-path=/dev/shm/GUEST,size=SIZE,share=on -machine \
     …,memory-backend=ram0";
