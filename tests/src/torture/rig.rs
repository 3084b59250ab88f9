//! Where faults are made: two hosts, one self-checking guest, and records on disks that can be
//! filled. The guest is used again as long as it lives.

use std::sync::Arc;

use pageferry_ctl::lab::{
    Disk, GUEST_ADDRESS, GUEST_PREFIX, GuestAssets, HugePages, LabError, Memory, Qemu, QemuSpec,
    SmallDisk, TAP, Workplace, disk_image,
};

use crate::scene::Scene;

/// Small, so that a migration takes about a second.
const MEMORY_MIB: u64 = 128;
/// A few hundred records.
const RECORDS_BYTES: u64 = 4 << 20;
/// What its readers read past the page cache, so that there are drain points.
const DISK_MIB: u64 = 16;

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Pages of 4 KiB.
    Tmpfs,
    /// Pages of 2 MiB.
    HugePages,
}

/// Fields are dropped in this order: guests before what they lie in.
pub struct Rig {
    /// Hosts and guest.
    pub(super) scene: Scene,
    /// Whether the guest does not run any more, by a fault.
    pub(super) guest_is_gone: bool,
    /// Faults so far.
    pub(super) trials: u32,
    /// Guests booted so far.
    pub boots: u32,
    /// Records of the first host and of the second.
    records: [SmallDisk; 2],
    /// Guest memory of the first host and of the second.
    huge: Option<([SmallDisk; 2], HugePages)>,
    backing: Backing,
}

impl Rig {
    /// Makes the hosts and boots a guest. Needs root, and for huge pages room for them.
    pub fn new(backing: Backing) -> Result<Self, LabError> {
        let workplace = &Workplace::new()?;
        let of = |word: &str, host: usize| format!("{word}-{host}");
        let disk = |host| SmallDisk::tmpfs(workplace, &of("records", host), RECORDS_BYTES);
        let records = [disk(0)?, disk(1)?];
        let huge = match backing {
            Backing::Tmpfs => None,
            Backing::HugePages => {
                let bytes = MEMORY_MIB << 20;
                let pages = HugePages::reserve(workplace, 2 * bytes)?;
                let disk = |host| SmallDisk::hugetlbfs(workplace, &of("memory", host), bytes);
                Some(([disk(0)?, disk(1)?], pages))
            }
        };
        let mut spec = Self::spec(workplace)?;
        if let Some((disks, _)) = &huge {
            spec.memory = memory(&disks[0]);
        }
        let scene = Scene::boot(workplace, spec)?;
        Ok(Self { scene, guest_is_gone: false, trials: 0, boots: 1, records, huge, backing })
    }

    fn spec(workplace: &Arc<Workplace>) -> Result<QemuSpec, LabError> {
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        spec.memory_mib = MEMORY_MIB;
        spec.smp = 1;
        spec.params.fill_mib = 24;
        spec.params.hot_mib = 4;
        spec.params.writers = 1;
        spec.params.pages_per_second = 400;
        spec.params.tick_ms = 50;
        let image = workplace.file("disk.img");
        disk_image::create(&image, DISK_MIB, 0)?;
        spec.disk = Some(Disk { image, aio: "native" });
        spec.params.disk_readers = 1;
        spec.params.disk_keep_mib = 2;
        Ok(spec.with_network(TAP, GUEST_ADDRESS, GUEST_PREFIX))
    }

    /// What its guests' memory is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// A living guest, booted anew if a fault has killed the last one.
    pub(super) fn ensure_guest(&mut self) -> Result<(), LabError> {
        if !self.guest_is_gone {
            return Ok(());
        }
        let memory = self.memory_of(self.host_of_guest());
        self.scene.boot_again(|spec| spec.memory = memory.unwrap_or(spec.memory.clone()))?;
        self.guest_is_gone = false;
        self.boots += 1;
        Ok(())
    }

    /// A QEMU that waits on the other host.
    pub(super) fn waiting(&self) -> Result<Qemu, LabError> {
        let memory = self.memory_of(1 - self.host_of_guest());
        self.scene.waiting(|spec| spec.memory = memory.unwrap_or(spec.memory.clone()))
    }

    /// The records of the host that the guest is on.
    pub(super) fn records_here(&self) -> &SmallDisk {
        &self.records[self.host_of_guest()]
    }

    /// The records of the other host.
    pub(super) fn records_there(&self) -> &SmallDisk {
        &self.records[1 - self.host_of_guest()]
    }

    /// Where guest memory of the other host lies, if that is huge pages.
    pub(super) fn huge_pages_there(&self) -> Option<&SmallDisk> {
        self.huge.as_ref().map(|(disks, _)| &disks[1 - self.host_of_guest()])
    }

    fn memory_of(&self, host: usize) -> Option<Memory> {
        self.huge.as_ref().map(|(disks, _)| memory(&disks[host]))
    }

    fn host_of_guest(&self) -> usize {
        usize::from(self.scene.away)
    }
}

/// Without a reservation a QEMU starts although there are no pages for its guest.
fn memory(disk: &SmallDisk) -> Memory {
    Memory::File { folder: disk.path().to_owned(), share: true, reserve: false }
}
