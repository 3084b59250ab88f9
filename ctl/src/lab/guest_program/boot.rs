//! What PID 1 does before anything else can run: file systems, kernel modules, parameters.

use std::fs::File;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};

use super::GuestError;

/// Folder of the initramfs whose modules are loaded in the order of their names.
const MODULES: &str = "/modules";

pub(super) fn mount_kernel_file_systems() -> Result<(), GuestError> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            .map_err(GuestError::call("mount", target))?;
    }
    Ok(())
}

pub(super) fn load_modules() -> Result<(), GuestError> {
    let mut paths = Vec::new();
    let entries = std::fs::read_dir(MODULES).map_err(GuestError::file("list", MODULES))?;
    for entry in entries {
        paths.push(entry.map_err(GuestError::file("list", MODULES))?.path());
    }
    paths.sort();
    for path in paths {
        let name = path.display().to_string();
        let file = File::open(&path).map_err(GuestError::file("open", &name))?;
        match finit_module(file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(source) => return Err(GuestError::call("finit_module", &name)(source)),
        }
    }
    Ok(())
}

pub(super) fn kernel_command_line() -> Result<String, GuestError> {
    read("/proc/cmdline")
}

pub(super) fn uptime_ms() -> Result<u64, GuestError> {
    const PATH: &str = "/proc/uptime";
    let text = read(PATH)?;
    let seconds: f64 = text
        .split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or(GuestError::NotANumber { path: PATH.to_owned() })?;
    Ok((seconds * 1000.0) as u64)
}

/// A whole number from a file of `/sys` or `/proc`.
pub(super) fn read_number(path: &str) -> Result<u64, GuestError> {
    read(path)?.trim().parse().map_err(|_| GuestError::NotANumber { path: path.to_owned() })
}

fn read(path: &str) -> Result<String, GuestError> {
    std::fs::read_to_string(path).map_err(GuestError::file("read", path))
}
