//! The host block of benchmarks that move guests: the machine, and what joins the two ends.

use std::process::Command;

use serde::Serialize;

use crate::error::BenchError;
use crate::machine::{Machine, first_line, read};
use crate::rig::Rig;

/// The machine and the software of one run of the benchmarks.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Host {
    #[serde(flatten)]
    pub(crate) machine: Machine,
    /// What guest memory is made of.
    pub(crate) guest_memory: String,
    /// What joins the ends.
    pub(crate) link: String,
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
        // Sockets begin with what their namespace has.
        let congestion_control = rig.net().congestion_control()?;
        Ok(Self {
            machine: Machine { congestion_control, ..Machine::here() },
            guest_memory: rig.memory_name().into(),
            link: format!("{:?}", common.net).to_lowercase(),
            tcp_rmem: read("/proc/sys/net/ipv4/tcp_rmem"),
            tcp_wmem: read("/proc/sys/net/ipv4/tcp_wmem"),
            qemu: rig.qemu_version(),
            iperf3: first_line(Command::new("iperf3").arg("--version")),
            pinning,
        })
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        format!(
            "{}\n\
             guest memory: {}{}\n\
             link: {}, tcp_rmem {}, tcp_wmem {}\n\
             QEMU {}, {}; {}",
            self.machine.text(),
            self.guest_memory,
            match self.machine.free_page_reporting {
                true => "; the hypervisor takes free memory back",
                false => "",
            },
            self.link,
            self.tcp_rmem.replace('\t', " "),
            self.tcp_wmem.replace('\t', " "),
            self.qemu,
            self.iperf3,
            self.pinning,
        )
    }
}
