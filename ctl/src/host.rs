//! What this agent says of itself and its host, and what it counts of its own.

use std::time::Duration;
use std::{fs, io};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;

/// Name and version of this software.
pub fn software() -> String {
    concat!("pageferry ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// The host's name, or `unknown`.
pub fn name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| "unknown".into())
}

/// The kernel's boot id: the same in every namespace of one machine, another after a reboot.
/// Empty where /proc does not say.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// Processor time that all threads of this process have used.
pub fn cpu_time() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return Duration::ZERO };
    let micros = |time: nix::sys::time::TimeVal| {
        u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0)
    };
    Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time()))
}

/// What `/proc/PID/stat` says of a process behind its name, in the order of `proc_pid_stat(5)`: the
/// first is that page's third.
pub fn stat_fields(pid: u32) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = text.rsplit_once(") ").map(|(_, rest)| rest.split_ascii_whitespace());
    Ok(fields.ok_or(io::ErrorKind::InvalidData)?.map(str::to_owned).collect())
}

/// When `pid` was started, in the kernel's ticks since boot; `None` if there is no such process.
/// Together with the number it names a process for good. One that has ended and was not waited
/// for yet counts as gone.
pub fn start_time(pid: u32) -> Option<u64> {
    let fields = stat_fields(pid).ok()?;
    if matches!(fields.first()?.as_str(), "Z" | "X") {
        return None;
    }
    fields.get(22 - 3)?.parse().ok()
}

/// Cores this process may run on.
pub fn cpus_allowed() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}
