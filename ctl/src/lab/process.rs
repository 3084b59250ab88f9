//! What `/proc` says about a process of the laboratory: processor time, and whether anything of
//! an attached mover was left behind in it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::error::{LabError, io};
use crate::host;

/// Processor time that a process has used, with that of its ended threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// In user mode.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
}

impl CpuTime {
    /// Both together.
    pub fn total(&self) -> Duration {
        self.user + self.system
    }
}

/// Processor time of `pid` so far, in the kernel's clock ticks (10 ms).
pub fn cpu_time(pid: u32) -> Result<CpuTime, LabError> {
    let path = Path::new("/proc").join(pid.to_string()).join("stat");
    let fields = host::stat_fields(pid).map_err(io("read", &path))?;
    let ticks_per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .map_or(100.0, |ticks| ticks as f64);
    // proc_pid_stat(5): utime is field 14, stime 15; the fields here begin with the third.
    let seconds = |field: usize| {
        fields
            .get(field - 3)
            .and_then(|word| word.parse::<f64>().ok())
            .map(|ticks| Duration::from_secs_f64(ticks / ticks_per_second))
            .ok_or_else(|| LabError::Unexpected { what: "/proc/PID/stat", found: fields.join(" ") })
    };
    Ok(CpuTime { user: seconds(14)?, system: seconds(15)? })
}

/// Traces of an attached mover in a process. Empty is what a test wants to see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftBehind {
    /// Descriptors that are userfaultfds.
    pub userfaultfds: Vec<i32>,
    /// A thread is still traced by this process.
    pub tracers: Vec<u32>,
    /// Mappings still registered for write protection or missing or minor faults, as the first
    /// line of `/proc/PID/smaps`.
    pub registered_mappings: Vec<String>,
}

impl LeftBehind {
    /// Nothing was left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Looks for what a mover may have left in the process `pid`.
pub fn left_behind(pid: u32) -> Result<LeftBehind, LabError> {
    let process = Path::new("/proc").join(pid.to_string());
    let mut left = LeftBehind::default();

    let fds = process.join("fd");
    for entry in fs::read_dir(&fds).map_err(io("list", &fds))?.flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if link.to_string_lossy().contains("userfaultfd") {
            left.userfaultfds.extend(entry.file_name().to_string_lossy().parse::<i32>());
        }
    }

    let tasks = process.join("task");
    for entry in fs::read_dir(&tasks).map_err(io("list", &tasks))?.flatten() {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        left.tracers
            .extend(tracer.and_then(|pid| pid.trim().parse::<u32>().ok()).filter(|pid| *pid != 0));
    }

    let smaps = process.join("smaps");
    let text = fs::read_to_string(&smaps).map_err(io("read", &smaps))?;
    left.registered_mappings = registered_mappings(&text);
    Ok(left)
}

fn registered_mappings(smaps: &str) -> Vec<String> {
    let (mut mapping, mut found) = ("", Vec::new());
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            // proc_pid_smaps(5): uw write-protect, um missing, ui minor faults tracked.
            if flags.split_ascii_whitespace().any(|flag| matches!(flag, "uw" | "um" | "ui")) {
                found.push(mapping.to_owned());
            }
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            mapping = line;
        }
    }
    found
}

/// The living processes that were started with `NAME=VALUE` in their environment, or by one that was.
pub fn with_environment(name: &str, value: &str) -> Vec<u32> {
    let word = format!("{name}={value}");
    let has = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == word.as_bytes())
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(has).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untouched_process_has_nothing_left_behind() {
        let left = left_behind(std::process::id()).expect("our own /proc");
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn a_process_is_known_by_its_environment() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env("PAGEFERRY_TEST_WORD", "there")
            .spawn()
            .expect("sleep is installed");
        // Between fork and exec it still has ours.
        let started = std::time::Instant::now();
        while !with_environment("PAGEFERRY_TEST_WORD", "there").contains(&child.id()) {
            assert!(started.elapsed() < Duration::from_secs(20), "it is not seen");
        }
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
        assert!(!with_environment("PAGEFERRY_TEST_WORD", "there").contains(&child.id()));
    }

    #[test]
    fn registered_mappings_are_found_by_their_flags() {
        let smaps = "7f00-7f10 rw-s 00000000 00:01 5 /dev/shm/ram\nSize: 4 kB\nVmFlags: rd wr uw \n\
                     7f20-7f30 rw-p 00000000 00:00 0\nSize: 4 kB\nVmFlags: rd wr mr\n";
        assert_eq!(registered_mappings(smaps), ["7f00-7f10 rw-s 00000000 00:01 5 /dev/shm/ram"]);
    }

    #[test]
    fn time_passes_for_a_busy_process() {
        let before = cpu_time(std::process::id()).expect("our own /proc").total();
        let started = std::time::Instant::now();
        while started.elapsed() < Duration::from_millis(80) {
            std::hint::spin_loop();
        }
        let after = cpu_time(std::process::id()).expect("our own /proc").total();
        assert!(after > before, "{before:?} {after:?}");
        assert!(host::start_time(std::process::id()).is_some());
        assert_eq!(host::start_time(u32::MAX), None);
    }
}
