//! Cores and NUMA nodes.

use std::path::Path;

use pageferry_uring::cpulist;

use super::finding::{Finding, Group, text};
use crate::cores::Topology;

/// The processor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// As it calls itself.
    pub model: Option<String>,
    /// Its cores.
    pub topology: Topology,
}

impl Cpu {
    /// Reads it below `root`; `allowed` is this process's affinity mask.
    pub fn read(root: &Path, allowed: Vec<usize>) -> Self {
        let cpuinfo = text(root, "proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        });
        Self { model, topology: Topology::read(root, allowed) }
    }

    /// Judges it.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let Topology { online, allowed, nodes } = &self.topology;
        let group = Group::Cpu;
        let model = self.model.as_deref().unwrap_or("unknown");
        let nodes: Vec<String> = nodes
            .iter()
            .map(|node| format!("{}: {}", node.number, cpulist::format(&node.cpus)))
            .collect();
        let cores = match allowed == online {
            true => Finding::ok(group, "cpu.cores", cpulist::format(online)),
            false => Finding::warn(
                group,
                "cpu.cores",
                format!("{} of {}", cpulist::format(allowed), cpulist::format(online)),
                "lanes run only on the cores that this process may use",
            )
            .fix(format!("taskset -pc {} $$", cpulist::format(online))),
        };
        let numa = Finding::ok(group, "cpu.numa", nodes.join("; "));
        vec![Finding::ok(group, "cpu.model", model), cores, numa]
    }
}
