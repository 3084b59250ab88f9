//! Processor time, read from outside.
//!
//! A running process by `/proc/PID/stat` (10 ms ticks), ended children by `getrusage` (µs), this
//! process's own threads by `getrusage`, and the whole machine by `/proc/stat`: what the network
//! does on nobody's account (ksoftirqd) shows in the last one only.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

use crate::error::BenchError;

/// Processor seconds that all children have used that have ended and were waited for.
pub(crate) fn ended_children_s() -> Result<f64, BenchError> {
    usage_s(UsageWho::RUSAGE_CHILDREN)
}

/// Processor seconds that all threads of this process have used.
pub(crate) fn own_s() -> Result<f64, BenchError> {
    usage_s(UsageWho::RUSAGE_SELF)
}

fn usage_s(who: UsageWho) -> Result<f64, BenchError> {
    let usage = getrusage(who).map_err(BenchError::call("getrusage"))?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Processor seconds that a running process has used.
pub(crate) fn process_s(pid: u32) -> Result<f64, BenchError> {
    Ok(pageferry_ctl::lab::cpu_time(pid)?.total().as_secs_f64())
}

/// Seconds that all processors together were not idle.
pub(crate) fn machine_busy_s() -> Result<f64, BenchError> {
    let path = "/proc/stat";
    let text = std::fs::read_to_string(path).map_err(BenchError::io("read", path))?;
    // proc_stat(5): user nice system idle iowait irq softirq steal, in ticks of 10 ms.
    let numbers: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|&field| numbers.get(field)).sum::<f64>();
    Ok(busy / 100.0)
}

/// Keeps the calling thread, and what it starts, on one core.
pub(crate) fn pin_to(core: usize) -> Result<(), BenchError> {
    let mut set = CpuSet::new();
    set.set(core)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(BenchError::call("sched_setaffinity"))
}

/// Where two ends that poll run: neither takes turns with the other. The first and the last core of
/// those that may be used; nothing where there is only one.
pub(crate) fn two_cores() -> Option<(usize, usize)> {
    let cores = pageferry_ctl::host::cpus_allowed();
    match cores.len() {
        0 | 1 => None,
        count => Some((cores[0], cores[count - 1])),
    }
}

/// Processes that want a processor, averaged over a minute: who else is on this machine.
pub(crate) fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}
