//! The host block: what a number is worth nothing without.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use crate::cpu;
use crate::error::BenchError;
use crate::rig::Rig;

/// The machine and the software of one run of the benchmarks.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Host {
    /// Our commit; `+` if files were changed since.
    pub(crate) commit: String,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// The processor's name.
    pub(crate) cpu: String,
    /// Cores that this process, and so everyone, may use.
    pub(crate) cores: Vec<usize>,
    /// All memory in MiB.
    pub(crate) memory_mib: u64,
    /// The limit on locked memory in KiB; null is none.
    pub(crate) memlock_kib: Option<u64>,
    /// What guest memory is made of.
    pub(crate) guest_memory: String,
    /// Free memory is given back to a hypervisor: fresh memory comes late.
    pub(crate) free_page_reporting: bool,
    /// What joins the ends.
    pub(crate) link: String,
    /// The congestion control that sockets begin with.
    pub(crate) congestion_control: String,
    /// The kernel's bounds of socket buffers.
    pub(crate) tcp_rmem: String,
    /// The kernel's bounds of socket buffers.
    pub(crate) tcp_wmem: String,
    /// QEMU's version.
    pub(crate) qemu: String,
    /// iperf3's version.
    pub(crate) iperf3: String,
    /// Who is pinned where.
    pub(crate) pinning: String,
    /// The load average at the start: this benchmark wants the machine to itself.
    pub(crate) load_average: f64,
}

impl Host {
    /// Looks.
    pub(crate) fn of(rig: &Rig) -> Result<Self, BenchError> {
        let common = rig.common();
        let mut pinning = "guests not pinned; pageferry as it chooses".to_owned();
        for words in [&common.migrate_args, &common.target_args] {
            if !words.is_empty() {
                pinning.push_str(&format!(" ({words})"));
            }
        }
        let (soft, _) =
            getrlimit(Resource::RLIMIT_MEMLOCK).map_err(BenchError::call("getrlimit"))?;
        Ok(Self {
            commit: commit(),
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: field("/proc/cpuinfo", "model name"),
            cores: pageferry_ctl::host::cpus_allowed(),
            memory_mib: first_number(&field("/proc/meminfo", "MemTotal")) / 1024,
            memlock_kib: (soft != nix::libc::RLIM_INFINITY).then_some(soft / 1024),
            guest_memory: rig.memory_name().into(),
            free_page_reporting: Path::new("/sys/module/page_reporting").exists(),
            link: format!("{:?}", common.net).to_lowercase(),
            congestion_control: rig.net().congestion_control()?,
            tcp_rmem: read("/proc/sys/net/ipv4/tcp_rmem"),
            tcp_wmem: read("/proc/sys/net/ipv4/tcp_wmem"),
            qemu: rig.qemu_version(),
            iperf3: first_line(Command::new("iperf3").arg("--version")),
            pinning,
            load_average: cpu::load_average(),
        })
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let memlock = self.memlock_kib.map_or("unlimited".into(), |kib| format!("{kib} KiB"));
        format!(
            "commit {}, kernel {}, {} ({} cores), {} MiB of memory, memlock {memlock}\n\
             guest memory: {}{}\n\
             link: {}, congestion control {}, tcp_rmem {}, tcp_wmem {}\n\
             QEMU {}, {}; {}; load average {}",
            self.commit,
            self.kernel,
            self.cpu,
            self.cores.len(),
            self.memory_mib,
            self.guest_memory,
            if self.free_page_reporting { "; the hypervisor takes free memory back" } else { "" },
            self.link,
            self.congestion_control,
            self.tcp_rmem.replace('\t', " "),
            self.tcp_wmem.replace('\t', " "),
            self.qemu,
            self.iperf3,
            self.pinning,
            self.load_average,
        )
    }
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        first_line(command.args(["-C", env!("CARGO_MANIFEST_DIR")]).args(arguments))
    };
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    git(&["rev-parse", "--short=12", "HEAD"]) + if changed { "+" } else { "" }
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
}

fn read(path: &str) -> String {
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
