//! Cores: which there are, which a guest owns, and which are left for lanes.
//!
//! A vCPU thread that was pinned owns its cores: a lane's worker there would steal the guest's
//! time, and be throttled by it. How many lanes there are and which of these cores each gets is
//! decided with the lanes; here is only what may be chosen from, best first.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pageferry_uring::cpulist;

use crate::host;

/// The cores of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Those that are running.
    pub online: Vec<usize>,
    /// Those that this process may use: its affinity mask.
    pub allowed: Vec<usize>,
    /// NUMA nodes, by number; one with all cores where the kernel knows none.
    pub nodes: Vec<Node>,
}

/// One NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// Its cores.
    pub cpus: Vec<usize>,
}

/// Cores to choose lanes' workers from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneCores {
    /// Those near the NIC first.
    pub cpus: Vec<usize>,
    /// Why these.
    pub reason: String,
}

impl Topology {
    /// This host's.
    pub fn here() -> Self {
        Self::read(Path::new("/"), host::cpus_allowed())
    }

    /// The one that the file system below `root` describes.
    pub fn read(root: &Path, allowed: Vec<usize>) -> Self {
        let devices = root.join("sys/devices/system");
        let online = list(devices.join("cpu/online")).unwrap_or_else(|| allowed.clone());
        let mut nodes: Vec<Node> = fs::read_dir(devices.join("node"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
                Some(Node { number, cpus: list(entry.path().join("cpulist"))? })
            })
            .collect();
        nodes.sort_by_key(|node| node.number);
        if nodes.is_empty() {
            nodes.push(Node { number: 0, cpus: online.clone() });
        }
        Self { online, allowed, nodes }
    }

    /// What lanes may run on: allowed, not `taken` by vCPUs, those of NUMA node `near` first.
    /// Where vCPUs own every allowed core, all allowed ones: a slow migration beats none.
    pub fn for_lanes(&self, near: Option<u32>, taken: &[usize]) -> LaneCores {
        let (owned, mut cpus): (Vec<usize>, Vec<usize>) =
            self.allowed.iter().partition(|cpu| taken.contains(cpu));
        let mut reason = match (owned.is_empty(), cpus.is_empty()) {
            (true, _) => "no vCPU is pinned to a core that lanes may use".to_owned(),
            (false, false) => format!("cores {} belong to pinned vCPUs", cpulist::format(&owned)),
            (false, true) => {
                cpus.clone_from(&self.allowed);
                "pinned vCPUs own every core; lanes share theirs".to_owned()
            }
        };
        let near = self.nodes.iter().find(|node| Some(node.number) == near);
        if let Some(node) = near.filter(|_| self.nodes.len() > 1) {
            cpus.sort_by_key(|cpu| !node.cpus.contains(cpu));
            reason.push_str(&format!("; NUMA node {} of the NIC first", node.number));
        }
        LaneCores { cpus, reason }
    }
}

impl Topology {
    /// The core for the worker of a lane whose packets are taken from the NIC on core `interrupt`:
    /// one beside it on the same NUMA node that no lane has (`busy`) and no lane's queue interrupts,
    /// so that both work at the same time; else that core itself, in whose cache the packets are;
    /// else what is nearest. One of `cpus`, which lanes may use; `None` if there are none.
    pub fn beside(
        &self,
        interrupt: usize,
        cpus: &[usize],
        busy: &[usize],
        interrupted: &[usize],
    ) -> Option<usize> {
        let node = |cpu: usize| self.nodes.iter().position(|node| node.cpus.contains(&cpu));
        let rank = |cpu: &usize| {
            let away = node(*cpu) != node(interrupt);
            let kind = match (busy.contains(cpu), *cpu == interrupt, interrupted.contains(cpu)) {
                (false, false, false) if !away => 0,
                (false, true, _) => 1,
                (false, false, _) => 2,
                (true, ..) => 3,
            };
            (kind, away, cpu.abs_diff(interrupt), *cpu)
        };
        cpus.iter().copied().min_by_key(rank)
    }
}

/// What lanes may run on here, beside the guest of process `pid` with these vCPU threads and beside
/// other guests.
pub fn free_of_vcpus(pid: i32, threads: &[i32]) -> LaneCores {
    let (root, topology) = (Path::new("/"), Topology::here());
    let mut taken = pinned_by_vcpus(root, pid, threads, &topology.allowed);
    for (pid, threads) in named_vcpus(root) {
        taken.extend(pinned_by_vcpus(root, pid, &threads, &topology.allowed));
    }
    topology.for_lanes(None, &taken)
}

/// The vCPU threads of every QEMU that names them (`-name debug-threads=on`, as libvirt has it).
fn named_vcpus(root: &Path) -> Vec<(i32, Vec<i32>)> {
    let numbers = |path: &Path| -> Vec<i32> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    };
    let is = |path: std::path::PathBuf, named: fn(&str) -> bool| {
        fs::read_to_string(path.join("comm")).is_ok_and(|name| named(&name))
    };
    let proc = root.join("proc");
    let qemus = numbers(&proc).into_iter().filter(|pid| {
        // `qemu-system-x86_64` cut to 15 letters, `qemu-kvm`, `kvm`.
        is(proc.join(pid.to_string()), |name| name.starts_with("qemu") || name.starts_with("kvm"))
    });
    qemus
        .map(|pid| {
            let tasks = proc.join(pid.to_string()).join("task");
            let threads = numbers(&tasks).into_iter();
            // `CPU 3/KVM`
            let is_vcpu = |name: &str| name.starts_with("CPU ") && name.contains('/');
            let vcpus = threads.filter(|thread| is(tasks.join(thread.to_string()), is_vcpu));
            (pid, vcpus.collect())
        })
        .collect()
}

/// The cores that the vCPU threads of process `pid` are pinned to; `threads` are their ids as QMP
/// `query-cpus-fast` has them. A thread counts as pinned when it may not run on all of the cores
/// that this process may (`allowed`); so a container around both pins nobody.
pub fn pinned_by_vcpus(root: &Path, pid: i32, threads: &[i32], allowed: &[usize]) -> Vec<usize> {
    let tasks = root.join("proc").join(pid.to_string()).join("task");
    let cores: BTreeSet<usize> = threads
        .iter()
        // A thread that is gone (unplugged) owns nothing.
        .filter_map(|thread| fs::read_to_string(tasks.join(thread.to_string()).join("status")).ok())
        .filter_map(|status| {
            let line = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"))?;
            cpulist::parse(line)
        })
        .filter(|cpus| !allowed.iter().all(|cpu| cpus.contains(cpu)))
        .flatten()
        .collect();
    cores.into_iter().collect()
}

fn list(path: impl AsRef<Path>) -> Option<Vec<usize>> {
    cpulist::parse(&fs::read_to_string(path).ok()?).filter(|cpus| !cpus.is_empty())
}

#[cfg(test)]
mod tests {
    use std::process;

    use nix::sched::{CpuSet, sched_setaffinity};
    use nix::unistd::{Pid, gettid};
    use tempfile::TempDir;

    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn lanes_keep_off_pinned_vcpus_and_near_the_nic() {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        write(root, "sys/devices/system/cpu/online", "0-7\n");
        write(root, "sys/devices/system/node/node0/cpulist", "0-3\n");
        write(root, "sys/devices/system/node/node1/cpulist", "4-7\n");
        let topology = Topology::read(root, (0..8).collect());
        assert_eq!(topology.nodes.len(), 2);

        write(root, "proc/77/task/80/status", "Name:\tCPU 0/KVM\nCpus_allowed_list:\t4\n");
        write(root, "proc/77/task/81/status", "Name:\tCPU 1/KVM\nCpus_allowed_list:\t0-1\n");
        write(root, "proc/77/task/82/status", "Name:\tCPU 2/KVM\nCpus_allowed_list:\t0-7\n");
        let taken = pinned_by_vcpus(root, 77, &[80, 81, 82, 99], &topology.allowed);
        assert_eq!(taken, [0, 1, 4]);

        let cores = topology.for_lanes(Some(1), &taken);
        assert_eq!(cores.cpus, [5, 6, 7, 2, 3]);
        assert_eq!(
            cores.reason,
            "cores 0-1,4 belong to pinned vCPUs; NUMA node 1 of the NIC first"
        );
        assert_eq!(topology.for_lanes(None, &[]).cpus, (0..8).collect::<Vec<_>>());
        let all = topology.for_lanes(None, &(0..8).collect::<Vec<_>>());
        assert_eq!(all.cpus.len(), 8);
        assert!(all.reason.contains("own every core"));
    }

    #[test]
    fn a_worker_is_put_beside_its_queue() {
        let node = |number, cpus: std::ops::Range<usize>| Node { number, cpus: cpus.collect() };
        let topology =
            Topology { nodes: vec![node(0, 0..4), node(1, 4..8)], ..Topology::default() };
        let all: Vec<usize> = (0..8).collect();
        // Two queues on 4 and 5: their workers on 6 and 7, not on the other node.
        assert_eq!(topology.beside(4, &all, &[], &[4, 5]), Some(6));
        assert_eq!(topology.beside(5, &all, &[6], &[4, 5]), Some(7));
        // A queue on each core: every worker on its own.
        assert_eq!(topology.beside(5, &all, &[4], &[4, 5, 6, 7]), Some(5));
        // Cores of vCPUs are none of ours, whatever interrupts them.
        assert_eq!(topology.beside(5, &[1, 2, 7], &[], &[4, 5, 6, 7]), Some(7));
        assert_eq!(topology.beside(5, &[1, 2, 7], &[7], &[4, 5, 6, 7]), Some(2));
        assert_eq!(topology.beside(5, &[7], &[7], &[4, 5, 6, 7]), Some(7));
        assert_eq!(topology.beside(5, &[], &[], &[]), None);
    }

    #[test]
    fn guests_that_name_their_threads_are_found() {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        write(root, "proc/77/comm", "qemu-system-x86\n");
        write(root, "proc/77/task/77/comm", "qemu-system-x86\n");
        write(root, "proc/77/task/80/comm", "CPU 0/KVM\n");
        write(root, "proc/78/comm", "bash\n");
        write(root, "proc/78/task/78/comm", "CPU 0/KVM\n");
        write(root, "proc/self/comm", "cores\n");
        assert_eq!(named_vcpus(root), [(77, vec![80])]);
    }

    #[test]
    fn a_cpuset_around_both_pins_nobody() {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        write(root, "proc/77/task/80/status", "Cpus_allowed_list:\t2-3\n");
        assert!(pinned_by_vcpus(root, 77, &[80], &[2, 3]).is_empty());
    }

    #[test]
    fn a_real_pinned_thread_is_seen() {
        let topology = Topology::here();
        let (Some(&first), true) = (topology.allowed.first(), topology.allowed.len() > 1) else {
            crate::lab::skip::skip("a_real_pinned_thread_is_seen", "one core only");
            return;
        };
        let (ready, id) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut set = CpuSet::new();
            set.set(first).unwrap();
            sched_setaffinity(Pid::from_raw(0), &set).unwrap();
            ready.send(gettid().as_raw()).unwrap();
            let _ = stopped.recv();
        });
        let tid = id.recv().unwrap();
        let pid = i32::try_from(process::id()).unwrap();
        assert_eq!(pinned_by_vcpus(Path::new("/"), pid, &[tid], &topology.allowed), [first]);
        drop(stop);
        thread.join().unwrap();
    }
}
