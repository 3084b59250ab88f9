//! What RDMA this host has, and if none: which of the steps towards it is missing.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::device::{Device, Transport};
use crate::library::Libraries;
use crate::sysfs;

/// Everything the probe found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RdmaProbe {
    /// rdma-core's user-space half.
    pub libraries: Libraries,
    /// Devices the kernel knows.
    pub devices: Vec<Device>,
    /// `/dev/infiniband/rdma_cm` is there.
    pub has_connection_manager: bool,
    /// Why no device can be used; `None` when one can.
    pub why_none: Option<WhyNone>,
}

/// The first thing missing on the way to an RDMA lane, from the kernel upwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "missing")]
pub enum WhyNone {
    /// The kernel was built without InfiniBand/RDMA support, and has no module for it either.
    KernelSupport {
        /// The running kernel.
        kernel: String,
    },
    /// There are modules, but none is loaded.
    ModuleLoaded,
    /// RDMA support is there, a device is not.
    Device,
    /// Devices, but no port of theirs carries traffic.
    ActivePort {
        /// The devices whose ports are down.
        devices: Vec<String>,
    },
    /// Only devices without reliable connections (usNIC, EFA).
    ReliableConnections {
        /// Their names.
        devices: Vec<String>,
    },
    /// The kernel module `ib_uverbs` is not loaded: programs can't reach the device.
    Uverbs,
    /// The kernel module `rdma_ucm` is not loaded: no connections.
    ConnectionManager,
    /// A shared library of rdma-core.
    Library {
        /// Its file name.
        file: String,
    },
    /// libibverbs is there, its plug-in for this device is not.
    Provider {
        /// The plug-in's name.
        provider: String,
        /// The device that needs it.
        device: String,
    },
}

impl WhyNone {
    /// The command that takes the next step; `None` where only other hardware helps.
    pub fn fix(&self) -> Option<String> {
        match self {
            Self::ReliableConnections { .. } => None,
            // Debian's kernel has all of it as modules.
            Self::KernelSupport { .. } => {
                Some("apt-get install -y linux-image-amd64 && reboot".into())
            }
            // Named modules of the in-box providers load by themselves once the card is seen.
            Self::ModuleLoaded | Self::Device => {
                Some("modprobe rdma_rxe && rdma link add rxe0 type rxe netdev IFACE".into())
            }
            Self::ActivePort { .. } => Some("ip link set IFACE up && rdma link show".into()),
            Self::Uverbs => Some("modprobe ib_uverbs".into()),
            Self::ConnectionManager => Some("modprobe rdma_ucm".into()),
            Self::Library { .. } | Self::Provider { .. } => {
                Some("apt-get install -y libibverbs1 librdmacm1 ibverbs-providers".into())
            }
        }
    }
}

impl fmt::Display for WhyNone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KernelSupport { kernel } => {
                write!(f, "kernel {kernel} has no RDMA support and no module for it")
            }
            Self::ModuleLoaded => f.write_str("no RDMA module is loaded"),
            Self::Device => f.write_str("no RDMA device"),
            Self::ActivePort { devices } => write!(f, "no active port on {}", devices.join(", ")),
            Self::ReliableConnections { devices } => {
                write!(f, "{} has no reliable connections", devices.join(", "))
            }
            Self::Uverbs => f.write_str("module ib_uverbs is not loaded"),
            Self::ConnectionManager => f.write_str("module rdma_ucm is not loaded"),
            Self::Library { file } => write!(f, "{file} is not installed"),
            Self::Provider { provider, device } => {
                write!(f, "libibverbs has no provider {provider} for {device}")
            }
        }
    }
}

/// Probes this host.
pub fn probe_host() -> RdmaProbe {
    probe(Path::new("/"))
}

/// Network interfaces of this host that have an RDMA device with reliable connections, whether or
/// not its port is up.
pub fn interfaces() -> Vec<String> {
    let devices = probe_host().devices.into_iter();
    let ports = devices.flat_map(|device| device.ports);
    ports.filter(|port| port.transport != Transport::Other).filter_map(|port| port.netdev).collect()
}

/// Probes the file system below `root`, which tests fill as they like.
pub fn probe(root: &Path) -> RdmaProbe {
    let class = root.join("sys/class/infiniband");
    let mut probe = RdmaProbe {
        libraries: Libraries::find(root),
        devices: sysfs::entries(&class).iter().map(|path| Device::read(path, root)).collect(),
        has_connection_manager: root.join("dev/infiniband/rdma_cm").exists(),
        why_none: None,
    };
    probe.why_none = why_none(&probe, root, class.exists());
    probe
}

fn why_none(probe: &RdmaProbe, root: &Path, has_class: bool) -> Option<WhyNone> {
    if !has_class {
        return Some(kernel_support(root));
    }
    if probe.devices.is_empty() {
        return Some(WhyNone::Device);
    }
    let names = || probe.devices.iter().map(|device| device.name.clone()).collect();
    let connected = |device: &&Device| device.ports.iter().any(|p| p.transport != Transport::Other);
    let Some(_) = probe.devices.iter().find(connected) else {
        return Some(WhyNone::ReliableConnections { devices: names() });
    };
    let usable: Vec<&Device> = probe
        .devices
        .iter()
        .filter(|d| d.ports.iter().any(|p| p.is_active() && p.transport != Transport::Other))
        .collect();
    let Some(first) = usable.first() else {
        return Some(WhyNone::ActivePort { devices: names() });
    };
    if usable.iter().all(|device| device.uverbs.is_none()) {
        return Some(WhyNone::Uverbs);
    }
    if !probe.has_connection_manager {
        return Some(WhyNone::ConnectionManager);
    }
    let libraries = &probe.libraries;
    for (found, file) in
        [(&libraries.ibverbs, "libibverbs.so.1"), (&libraries.rdmacm, "librdmacm.so.1")]
    {
        if found.is_none() {
            return Some(WhyNone::Library { file: file.into() });
        }
    }
    let has_provider = |device: &&&Device| {
        device.provider.as_ref().is_none_or(|provider| libraries.providers.contains(provider))
    };
    match usable.iter().find(has_provider) {
        Some(_) => None,
        None => Some(WhyNone::Provider {
            provider: first.provider.clone().unwrap_or_default(),
            device: first.name.clone(),
        }),
    }
}

/// Without the class directory `ib_core` is not in the kernel now; could it be?
fn kernel_support(root: &Path) -> WhyNone {
    let kernel =
        sysfs::text(root.join("proc/sys/kernel/osrelease")).unwrap_or_else(|| "unknown".into());
    let modules = root.join("lib/modules").join(&kernel).join("kernel/drivers/infiniband");
    match modules.exists() {
        true => WhyNone::ModuleLoaded,
        false => WhyNone::KernelSupport { kernel },
    }
}

#[cfg(test)]
mod tests;
