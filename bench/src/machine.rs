//! The machine of a run: what a number is worth nothing without, whatever is measured.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use crate::cpu;

/// Hardware, kernel and limits.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// Our commit; `+` if files were changed since.
    pub(crate) commit: String,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// The processor's name.
    pub(crate) cpu: String,
    /// Who emulates it, as the kernel sees it; empty on bare metal or where it is not told.
    pub(crate) hypervisor: String,
    /// Cores that this process, and so everyone, may use.
    pub(crate) cores: Vec<usize>,
    /// All memory in MiB.
    pub(crate) memory_mib: u64,
    /// The limit on locked memory in KiB; null is none.
    pub(crate) memlock_kib: Option<u64>,
    /// Free memory is given back to a hypervisor: fresh memory comes late.
    pub(crate) free_page_reporting: bool,
    /// Network interfaces with their MTU, and RDMA devices with what they are on.
    pub(crate) interfaces: Vec<String>,
    /// The congestion control that sockets begin with.
    pub(crate) congestion_control: String,
    /// The load average at the start: benchmarks want the machine to themselves.
    pub(crate) load_average: f64,
}

impl Machine {
    /// Looks.
    pub(crate) fn here() -> Self {
        let memlock = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
        Self {
            commit: commit(),
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: field("/proc/cpuinfo", "model name"),
            hypervisor: read("/sys/class/dmi/id/sys_vendor"),
            cores: pageferry_ctl::host::cpus_allowed(),
            memory_mib: first_number(&field("/proc/meminfo", "MemTotal")) / 1024,
            memlock_kib: (memlock != nix::libc::RLIM_INFINITY).then_some(memlock / 1024),
            free_page_reporting: Path::new("/sys/module/page_reporting").exists(),
            interfaces: interfaces(),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control"),
            load_average: cpu::load_average(),
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let memlock = self.memlock_kib.map_or("unlimited".into(), |kib| format!("{kib} KiB"));
        format!(
            "commit {}, kernel {}, {} ({} cores{}), {} MiB of memory, memlock {memlock}\n\
             {}; congestion control {}; load average {}",
            self.commit,
            self.kernel,
            self.cpu,
            self.cores.len(),
            match self.hypervisor.as_str() {
                "" => String::new(),
                by => format!(", {by}"),
            },
            self.memory_mib,
            self.interfaces.join(", "),
            self.congestion_control,
            self.load_average,
        )
    }
}

fn interfaces() -> Vec<String> {
    let names = |class: &str| -> Vec<String> {
        let entries = fs::read_dir(format!("/sys/class/{class}")).into_iter().flatten();
        let mut names: Vec<String> =
            entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let nets = names("net").into_iter().map(|name| {
        let mtu = read(&format!("/sys/class/net/{name}/mtu"));
        format!("{name} MTU {mtu}")
    });
    let rdma = names("infiniband").into_iter().map(|name| format!("RDMA device {name}"));
    nets.chain(rdma).collect()
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        // Also where the tree belongs to another user, as in a machine that shares it.
        let safe = ["-c", "safe.directory=*", "-C", env!("CARGO_MANIFEST_DIR")];
        first_line(command.args(safe).args(arguments))
    };
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    git(&["rev-parse", "--short=12", "HEAD"]) + if changed { "+" } else { "" }
}

/// The first line of what a program says.
pub(crate) fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
}

/// A file's text, nothing if it can't be read.
pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The value of the first `name : value` line.
fn field(path: &str, name: &str) -> String {
    let text = read(path);
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    let found = pairs.find(|(key, _)| key.trim() == name);
    found.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

fn first_number(text: &str) -> u64 {
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
}
