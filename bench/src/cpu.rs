//! Processor time, read from outside.
//!
//! A running process by `/proc/PID/stat` (10 ms ticks), ended children by `getrusage` (µs), this
//! process's own threads by `getrusage`, and the whole machine by `/proc/stat`: what the network
//! does on nobody's account (ksoftirqd) shows in the last one only.

use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

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

/// How many cores are busy while something runs, whoever keeps them so. Its beginning and its end,
/// when programs start and stop, are left out: what is counted is from half of its time to nine
/// tenths.
#[derive(Debug)]
pub(crate) struct Busy {
    stop: crossbeam_channel::Sender<()>,
    reader: std::thread::JoinHandle<Vec<(f64, f64)>>,
}

/// A reading of /proc/stat: its clock has ticks of 10 ms.
const READ_EVERY: Duration = Duration::from_millis(50);

impl Busy {
    pub(crate) fn begin() -> Self {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let reader = std::thread::spawn(move || {
            let (began, mut readings) = (Instant::now(), Vec::new());
            loop {
                let busy = machine_busy_s().unwrap_or(f64::NAN);
                readings.push((began.elapsed().as_secs_f64(), busy));
                if stopped.recv_timeout(READ_EVERY) != Err(RecvTimeoutError::Timeout) {
                    return readings;
                }
            }
        });
        Self { stop, reader }
    }

    /// Cores, on average; nothing if it was too short to say.
    pub(crate) fn finish(self) -> Option<f64> {
        drop(self.stop);
        busy_cores(&self.reader.join().unwrap_or_default())
    }
}

/// Of readings of (seconds, busy seconds).
fn busy_cores(readings: &[(f64, f64)]) -> Option<f64> {
    let (end, _) = *readings.last()?;
    let within = |(at, _): &&(f64, f64)| (0.5 * end..=0.9 * end).contains(at);
    let kept: Vec<_> = readings.iter().filter(within).collect();
    let (&&(from, before), &&(until, after)) = (kept.first()?, kept.last()?);
    (until > from).then(|| (after - before) / (until - from))
}

/// What one core has done since the machine started, in ticks.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct CoreTicks {
    cpu: u16,
    /// In interrupts, soft ones too: what the network does on nobody's account.
    softirq: u64,
    /// Whatever else it was not idle for.
    others: u64,
    idle: u64,
}

/// What one core did in a span of time.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct CoreShare {
    pub(crate) cpu: u16,
    pub(crate) softirq_percent: f64,
    pub(crate) others_percent: f64,
    pub(crate) busy_percent: f64,
}

impl CoreTicks {
    /// All cores, now.
    pub(crate) fn now() -> Result<Vec<Self>, BenchError> {
        let path = "/proc/stat";
        let text = std::fs::read_to_string(path).map_err(BenchError::io("read", path))?;
        Ok(text.lines().filter_map(Self::parse).collect())
    }

    fn parse(line: &str) -> Option<Self> {
        let (name, numbers) = line.split_once(' ')?;
        let cpu = name.strip_prefix("cpu")?.parse().ok()?;
        let ticks: Vec<u64> =
            numbers.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
        // proc_stat(5): user nice system idle iowait irq softirq steal.
        let [user, nice, system, idle, iowait, irq, softirq, ..] = ticks[..] else { return None };
        let others = user + nice + system;
        Some(Self { cpu, softirq: irq + softirq, others, idle: idle + iowait })
    }

    /// What each did between two readings.
    pub(crate) fn since(after: &[Self], before: &[Self]) -> Vec<CoreShare> {
        let share = |now: &Self| {
            let then = before.iter().find(|core| core.cpu == now.cpu)?;
            let of = |read: fn(&Self) -> u64| read(now).saturating_sub(read(then)) as f64;
            let (softirq, others, idle) =
                (of(|core| core.softirq), of(|core| core.others), of(|core| core.idle));
            let percent = |ticks: f64| ticks / (softirq + others + idle).max(1.0) * 100.0;
            Some(CoreShare {
                cpu: now.cpu,
                softirq_percent: percent(softirq),
                others_percent: percent(others),
                busy_percent: percent(softirq + others),
            })
        };
        after.iter().filter_map(share).collect()
    }
}

/// Keeps the calling thread, and what it starts, on one core.
pub(crate) fn pin_to(core: usize) -> Result<(), BenchError> {
    let mut set = CpuSet::new();
    set.set(core)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(BenchError::call("sched_setaffinity"))
}

/// Processes that want a processor, averaged over a minute: who else is on this machine.
pub(crate) fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::{CoreTicks, busy_cores};

    #[test]
    fn interrupts_and_others_are_told_apart() {
        let read =
            |text: &str| -> Vec<CoreTicks> { text.lines().filter_map(CoreTicks::parse).collect() };
        let before = read("cpu  9 9 9 9 9 9 9 9\ncpu1 10 0 10 80 0 0 0 0 0 0\nintr 5\n");
        let after = read("cpu  9 9 9 9 9 9 9 9\ncpu1 20 10 20 140 0 5 5 0 0 0\nintr 5\n");
        let shares = CoreTicks::since(&after, &before);
        assert_eq!(shares.len(), 1);
        let share = shares[0];
        assert_eq!((share.cpu, share.softirq_percent), (1, 10.0));
        assert_eq!((share.others_percent, share.busy_percent), (30.0, 40.0));
    }

    #[test]
    fn start_and_end_are_left_out() {
        let readings: Vec<(f64, f64)> = (0..=20)
            .map(|tick| {
                (f64::from(tick) / 10.0, if tick < 8 { 9.0 } else { f64::from(tick) / 5.0 })
            })
            .collect();
        assert!(busy_cores(&readings).is_some_and(|cores| (cores - 2.0).abs() < 1e-9));
        assert_eq!(busy_cores(&readings[..1]), None);
        assert_eq!(busy_cores(&[]), None);
    }
}
