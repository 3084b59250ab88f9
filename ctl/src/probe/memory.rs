//! Huge pages, locked memory and transparent huge pages.

use std::fs;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::finding::{Finding, Group, number, text};
use super::privileges::Privileges;
use crate::report::units;

/// One pool of huge pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HugePool {
    /// The page size.
    pub page_bytes: u64,
    /// Pages in the pool.
    pub total: u64,
    /// And how many of them are neither in use nor promised.
    pub free: u64,
}

/// What there is to put guests in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Pools, smallest pages first.
    pub huge: Vec<HugePool>,
    /// Memory that could be had now without swapping.
    pub available_bytes: Option<u64>,
    /// The word in brackets of `transparent_hugepage/shmem_enabled`.
    pub thp_shmem: Option<String>,
    /// `RLIMIT_MEMLOCK`; `None` for no limit.
    pub memlock_bytes: Option<u64>,
}

impl Memory {
    /// Reads it below `root`; the limits of a process are not in a file that a root could hold.
    pub fn read(root: &Path) -> Self {
        let pools = fs::read_dir(root.join("sys/kernel/mm/hugepages")).into_iter().flatten();
        let mut huge: Vec<HugePool> = pools
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let kib = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
                let pool = |file: &str| number(&entry.path(), file).unwrap_or(0);
                Some(HugePool {
                    page_bytes: kib.parse::<u64>().ok()? << 10,
                    total: pool("nr_hugepages"),
                    free: pool("free_hugepages").saturating_sub(pool("resv_hugepages")),
                })
            })
            .collect();
        huge.sort_by_key(|pool| pool.page_bytes);
        Self {
            huge,
            available_bytes: available(root),
            thp_shmem: text(root, "sys/kernel/mm/transparent_hugepage/shmem_enabled")
                .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())),
            memlock_bytes: None,
        }
    }

    /// Adds what only the process itself knows.
    #[must_use]
    pub fn with_limits_of_this_process(self) -> Self {
        // Unknown counts as no limit: the migration says so itself if it meets one.
        let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((RLIM_INFINITY, 0));
        Self { memlock_bytes: (soft != RLIM_INFINITY).then_some(soft), ..self }
    }

    /// Judges it.
    pub(super) fn findings(&self, privileges: &Privileges) -> Vec<Finding> {
        let group = Group::Memory;
        let mut findings = Vec::new();
        if let Some(bytes) = self.available_bytes {
            findings.push(Finding::ok(group, "memory.available", units::bytes(bytes)));
        }
        findings.extend(self.huge.iter().map(huge));
        findings.push(self.memlock(privileges));
        if let Some(thp) = &self.thp_shmem {
            findings.push(shmem(thp));
        }
        findings
    }

    fn memlock(&self, privileges: &Privileges) -> Finding {
        let (group, name) = (Group::Memory, "memory.memlock");
        match self.memlock_bytes {
            None => Finding::ok(group, name, "no limit"),
            Some(bytes) if privileges.can("ipc_lock") => {
                let limit = units::bytes(bytes);
                Finding::ok(group, name, format!("no limit (CAP_IPC_LOCK; else {limit})"))
            }
            Some(bytes) => Finding::warn(
                group,
                name,
                units::bytes(bytes),
                "guest memory registered with io_uring or an RDMA NIC counts as locked",
            )
            .fix("sudo prlimit --pid $$ --memlock=unlimited:unlimited"),
        }
    }
}

/// `4 KiB`, `2 MiB`, `1 GiB`.
pub(super) fn page_name(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 => format!("{} GiB", bytes >> 30),
        bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        bytes => format!("{} KiB", bytes >> 10),
    }
}

fn huge(pool: &HugePool) -> Finding {
    let size = page_name(pool.page_bytes);
    let name = format!("memory.huge_{}", size.replace(' ', "").to_lowercase());
    let value = format!(
        "{} of {} free ({})",
        pool.free,
        pool.total,
        units::bytes(pool.free.saturating_mul(pool.page_bytes)),
    );
    if pool.free > 0 {
        return Finding::ok(Group::Memory, &name, value);
    }
    let why = format!("a guest on hugetlbfs with {size} pages finds no room here");
    // As many more as 1 GiB of guest needs; the operator knows the guest's size, we don't.
    let more = ((1 << 30) / pool.page_bytes).max(1);
    Finding::missing(Group::Memory, &name, value, why).fix(more_pages(pool.page_bytes, more))
}

/// The command that adds `count` pages to a pool, whatever is in it by then.
pub(super) fn more_pages(page_bytes: u64, count: u64) -> String {
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", page_bytes >> 10);
    format!("echo $(($(cat {pool}) + {count})) > {pool}")
}

/// A target on tmpfs or memfd gets huge pages only where the kernel may give them.
fn shmem(setting: &str) -> Finding {
    let (group, name) = (Group::Memory, "memory.thp_shmem");
    match setting {
        "never" | "deny" => Finding::warn(
            group,
            name,
            setting,
            "a guest received on tmpfs or memfd stays on 4 KiB pages, slower to fill and to run",
        )
        .fix("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        setting => Finding::ok(group, name, setting),
    }
}

fn available(root: &Path) -> Option<u64> {
    let meminfo = text(root, "proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
