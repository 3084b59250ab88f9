//! RDMA devices and their ports as sysfs shows them.
//!
//! The attributes are those of the kernel's `Documentation/ABI/stable/sysfs-class-infiniband`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sysfs;

const LINK_LOCAL_PREFIX: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0);

/// What carries the verbs of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// RDMA over TCP: connections through librdmacm only, no immediate data, no atomics.
    Iwarp,
    /// RDMA over converged Ethernet.
    Roce,
    /// InfiniBand proper.
    InfiniBand,
    /// Something without reliable connections as we need them (usNIC, EFA).
    Other,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iwarp => "iWARP",
            Self::Roce => "RoCE",
            Self::InfiniBand => "InfiniBand",
            Self::Other => "other",
        })
    }
}

/// Which packets a GID stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GidType {
    /// InfiniBand, or RoCE v1: its own ethertype, not routable.
    IbOrRoceV1,
    /// RoCE v2: UDP, routable. The one to use.
    RoceV2,
    /// A name this version does not know.
    Unknown,
}

impl GidType {
    /// As `gid_attrs/types` and rdma_cm's configfs name it.
    fn from_name(name: &str) -> Self {
        match name {
            "RoCE v2" => Self::RoceV2,
            "IB/RoCE v1" => Self::IbOrRoceV1,
            _ => Self::Unknown,
        }
    }
}

/// One entry of a port's GID table; empty entries are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gid {
    /// Its place in the table: what `sgid_index` means.
    pub index: u32,
    /// The GID itself; an IPv4 address shows as `::ffff:a.b.c.d`.
    pub gid: Ipv6Addr,
    /// Which packets it stands for.
    pub kind: GidType,
    /// The network interface whose address it is.
    pub netdev: Option<String>,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// Numbered from 1.
    pub number: u32,
    /// What carries the verbs.
    pub transport: Transport,
    /// `ACTIVE` when it can be used; other names as the kernel has them.
    pub state: String,
    /// The physical state: `LinkUp`, `Disabled`, ….
    pub physical_state: Option<String>,
    /// `Ethernet` or `InfiniBand`.
    pub link_layer: Option<String>,
    /// Signalling rate.
    pub bits_per_second: Option<u64>,
    /// The network interface under it.
    pub netdev: Option<String>,
    /// Its GIDs.
    pub gids: Vec<Gid>,
    /// Which packets rdma_cm makes on RoCE, where somebody has looked or set it in configfs.
    #[serde(default)]
    pub default_roce: Option<GidType>,
    /// Priorities on which congestion is marked (ECN), where the driver shows it in sysfs.
    #[serde(default)]
    pub ecn_priorities: Option<Vec<u32>>,
}

impl Port {
    /// The GID that stands for an address: RoCE v2 before v1, as rdma_cm takes them.
    pub fn gid_of(&self, address: IpAddr) -> Option<&Gid> {
        let address = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let of_address = || self.gids.iter().filter(move |gid| gid.gid == address);
        of_address().find(|gid| gid.kind == GidType::RoceV2).or_else(|| of_address().next())
    }

    /// Ready to carry traffic.
    pub fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }
}

/// One RDMA device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// The kernel's name: `mlx5_0`, `rxe0`, ….
    pub name: String,
    /// Its kernel driver; for soft devices, which have none in sysfs, `rdma_rxe` or `siw`.
    pub driver: Option<String>,
    /// The libibverbs provider that speaks to that driver: `mlx5`, `irdma`, `cxgb4`, `rxe`, ….
    pub provider: Option<String>,
    /// No hardware behind it: soft-RoCE or soft-iWARP.
    pub is_software: bool,
    /// Firmware version.
    pub firmware: Option<String>,
    /// PCI address.
    pub pci: Option<String>,
    /// NUMA node of its slot.
    pub numa_node: Option<u32>,
    /// The character device verbs go through, `uverbsN`; none without `ib_uverbs`.
    pub uverbs: Option<String>,
    /// Its ports.
    pub ports: Vec<Port>,
}

impl Device {
    /// Reads `/sys/class/infiniband/NAME`, given as `class`, and what belongs to it elsewhere below
    /// `root`.
    pub(crate) fn read(class: &Path, root: &Path) -> Self {
        let verbs = &root.join("sys/class/infiniband_verbs");
        let nets = &root.join("sys/class/net");
        let name = sysfs::name(class);
        let node_type = sysfs::label(class.join("node_type")).unwrap_or_default();
        let hardware = sysfs::link_name(class.join("device/driver"));
        let driver = hardware.clone().or_else(|| soft_driver(class, &name));
        let mut ports: Vec<Port> = sysfs::entries(class.join("ports"))
            .iter()
            .filter_map(|port| read_port(port, &node_type))
            .collect();
        let parent = parent_netdev(class);
        for port in &mut ports {
            if port.netdev.is_none() {
                port.netdev = parent.clone().or_else(|| netdev_by_address(port, nets));
            }
            let ports = root.join("sys/kernel/config/rdma_cm").join(&name).join("ports");
            let mode = ports.join(port.number.to_string()).join("default_roce_mode");
            port.default_roce = sysfs::text(mode).map(|mode| GidType::from_name(&mode));
            port.ecn_priorities = port.netdev.as_ref().and_then(|net| ecn_priorities(nets, net));
        }
        Self {
            provider: driver.as_deref().map(|driver| provider_of(driver).to_owned()),
            is_software: hardware.is_none(),
            firmware: sysfs::text(class.join("fw_ver")),
            pci: sysfs::link_name(class.join("device")),
            numa_node: sysfs::number(class.join("device/numa_node")),
            uverbs: sysfs::entries(verbs)
                .iter()
                .find(|node| sysfs::text(node.join("ibdev")).as_deref() == Some(&name))
                .map(|node| sysfs::name(node)),
            ports,
            driver,
            name,
        }
    }
}

/// Soft devices have no `device` link; rxe names its interface in `parent`, and both describe
/// themselves in `node_desc`. The device's name is the last resort: it is the operator's choice.
fn soft_driver(class: &Path, name: &str) -> Option<String> {
    let description = sysfs::text(class.join("node_desc")).unwrap_or_default();
    let driver = match description.as_str() {
        "rxe" => "rdma_rxe",
        "Software iWARP stack" => "siw",
        _ if class.join("parent").exists() || name.starts_with("rxe") => "rdma_rxe",
        _ if name.starts_with("siw") => "siw",
        _ => return None,
    };
    Some(driver.to_owned())
}

/// rdma-core's provider for a kernel driver; most share the driver's name.
fn provider_of(driver: &str) -> &str {
    match driver {
        "mlx5_core" | "mlx5_ib" => "mlx5",
        "mlx4_core" | "mlx4_ib" => "mlx4",
        "rdma_rxe" => "rxe",
        "iw_cxgb4" => "cxgb4",
        "ice" | "i40e" | "idpf" => "irdma",
        "bnxt_en" => "bnxt_re",
        "qede" => "qedr",
        "hns3" | "hns_roce_hw_v2" => "hns",
        "ib_mthca" => "mthca",
        "vmw_pvrdma" => "vmw_pvrdma",
        other => other,
    }
}

fn parent_netdev(class: &Path) -> Option<String> {
    sysfs::text(class.join("parent"))
        .or_else(|| sysfs::entries(class.join("device/net")).first().map(|path| sysfs::name(path)))
}

/// An iWARP GID begins with the MAC address of its interface, and soft-iWARP names that interface
/// nowhere else. Two interfaces of one address (a VLAN on top) leave it open which is meant.
fn netdev_by_address(port: &Port, nets: &Path) -> Option<String> {
    let first = port.gids.first().filter(|_| port.transport == Transport::Iwarp)?;
    let [a, b, c, d, e, f, ..] = first.gid.octets();
    let address = [a, b, c, d, e, f].map(|byte| format!("{byte:02x}")).join(":");
    let mut matches = sysfs::entries(nets)
        .into_iter()
        .filter(|net| sysfs::text(net.join("address")).as_ref() == Some(&address));
    match (matches.next(), matches.next()) {
        (Some(only), None) => Some(sysfs::name(&only)),
        _ => None,
    }
}

/// As mlx5's driver has them, `ecn/roce_np/enable/0..7` (the end that notices congestion) and
/// `roce_rp` (the end that slows down): those that both have on.
fn ecn_priorities(nets: &Path, netdev: &str) -> Option<Vec<u32>> {
    let ecn = nets.join(netdev).join("ecn");
    let is_on = |end: &str, priority: u32| {
        sysfs::number(ecn.join(end).join("enable").join(priority.to_string())) == Some(1u8)
    };
    let both = |priority: &u32| is_on("roce_np", *priority) && is_on("roce_rp", *priority);
    ecn.exists().then(|| (0..8).filter(both).collect())
}

fn read_port(port: &Path, node_type: &str) -> Option<Port> {
    let link_layer = sysfs::text(port.join("link_layer"));
    let transport = match (node_type, link_layer.as_deref()) {
        ("RNIC", _) => Transport::Iwarp,
        ("CA", Some("Ethernet")) => Transport::Roce,
        ("CA", Some("InfiniBand") | None) => Transport::InfiniBand,
        _ => Transport::Other,
    };
    let gids = read_gids(port);
    Some(Port {
        number: sysfs::name(port).parse().ok()?,
        transport,
        state: sysfs::label(port.join("state")).unwrap_or_else(|| "unknown".into()),
        physical_state: sysfs::label(port.join("phys_state")),
        link_layer,
        bits_per_second: sysfs::text(port.join("rate")).as_deref().and_then(bits_per_second),
        netdev: gids.iter().find_map(|gid| gid.netdev.clone()),
        gids,
        default_roce: None,
        ecn_priorities: None,
    })
}

fn read_gids(port: &Path) -> Vec<Gid> {
    let attributes = port.join("gid_attrs");
    sysfs::entries(port.join("gids"))
        .iter()
        .filter_map(|path| {
            let entry = sysfs::name(path);
            let index = entry.parse().ok()?;
            let gid: Ipv6Addr = sysfs::text(path)?.parse().ok()?;
            // Empty entries are zeros, or a link-local prefix with nothing behind it. An iWARP GID
            // is a MAC address followed by zeros.
            if gid.is_unspecified() || gid == LINK_LOCAL_PREFIX {
                return None;
            }
            let kind = sysfs::text(attributes.join("types").join(&entry));
            let kind = kind.as_deref().map_or(GidType::Unknown, GidType::from_name);
            let netdev = sysfs::text(attributes.join("ndevs").join(&entry));
            Some(Gid { index, gid, kind, netdev })
        })
        .collect()
}

/// `100 Gb/sec (4X EDR)`, `2.5 Gb/sec (1X SDR)`.
fn bits_per_second(rate: &str) -> Option<u64> {
    let (number, rest) = rate.split_once(' ')?;
    let gigabits: f64 = number.parse().ok()?;
    (rest.starts_with("Gb/sec") && gigabits >= 0.0).then_some((gigabits * 1e9) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_nonsense_is_not() {
        assert_eq!(bits_per_second("100 Gb/sec (4X EDR)"), Some(100_000_000_000));
        assert_eq!(bits_per_second("2.5 Gb/sec (1X SDR)"), Some(2_500_000_000));
        assert_eq!(bits_per_second("fast"), None);
        assert_eq!(bits_per_second("-1 Gb/sec"), None);
    }
}
