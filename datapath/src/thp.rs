//! Whether transparent huge pages can turn up in a file of guest memory.
//!
//! A tracker has to know: a huge page that is split loses the note that it was written, so where
//! one can appear its place is protected from the start, which keeps the kernel from mapping it as
//! one. The knobs are those of `Documentation/admin-guide/mm/transhuge.rst`. Whatever can't be read
//! counts as a yes.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::stat::fstat;

const KNOBS: &str = "/sys/kernel/mm/transparent_hugepage";

/// Whether the kernel may put huge pages into this tmpfs file or memfd. For files on hugetlbfs,
/// whose pages are of one size, the answer means nothing.
pub(crate) fn may_be_huge(file: BorrowedFd<'_>) -> bool {
    match knob("shmem_enabled").as_deref() {
        Some("deny") => return false,
        Some("force") | None => return true,
        Some(_) => {}
    }
    let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(name) = link else { return true };
    if name.as_os_str().as_encoded_bytes().starts_with(b"/memfd:") {
        return internal_mount();
    }
    let Ok(stat) = fstat(file) else { return true };
    let device = format!("{}:{}", libc::major(stat.st_dev), libc::minor(stat.st_dev));
    match fs::read_to_string("/proc/self/mountinfo") {
        Ok(mounts) => mounted_huge(&mounts, &device),
        Err(_) => true,
    }
}

/// Memfds live on a mount of the kernel's own, which has knobs instead of options.
fn internal_mount() -> bool {
    let all = knob("shmem_enabled");
    // Kernels before 6.11 have the one knob only.
    let of_size = knob("hugepages-2048kB/shmem_enabled");
    let inherited = all.as_deref() != Some("never");
    match of_size.as_deref() {
        Some("never") => false,
        Some("inherit") | None => inherited,
        Some(_) => true,
    }
}

/// Whether the mount of `device` has any option `huge=` but `never`. A mount that is not in this
/// namespace counts as a yes.
fn mounted_huge(mounts: &str, device: &str) -> bool {
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some(device));
    let Some(options) = mount.and_then(|line| line.rsplit(' ').next()) else { return true };
    let huge = options.split(',').filter_map(|option| option.strip_prefix("huge="));
    huge.into_iter().any(|huge| huge != "never")
}

/// The choice in brackets.
fn knob(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("{KNOBS}/{name}")).ok()?;
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(choice, _)| choice.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_tell() {
        let mounts = "21 1 254:0 / / rw - ext4 /dev/vda rw,discard\n\
                      25 21 0:22 / /dev/shm rw,relatime shared:3 - tmpfs tmpfs rw,size=24684092k\n\
                      26 21 0:30 / /ram rw - tmpfs ram rw,huge=advise\n\
                      27 21 0:31 / /cold rw - tmpfs cold rw,huge=never,size=1k\n";
        assert!(!mounted_huge(mounts, "0:22"));
        assert!(mounted_huge(mounts, "0:30"));
        assert!(!mounted_huge(mounts, "0:31"));
        assert!(mounted_huge(mounts, "0:99"), "what is not seen is not trusted");
    }
}
