//! NICs: what there is, which queues they have, and which core each queue interrupts.
//!
//! Lane placement rests on this: a lane wants to run near the core that its flow's receive queue
//! interrupts, and which queue that is follows from the RSS key and the indirection table. Read
//! once at start, on whichever thread asks; nothing here changes a setting or picks a core.

mod irq;
#[path = "nic_sys.rs"]
mod sys;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use serde::{Deserialize, Serialize};

pub use irq::QueueIrq;

/// Why the NICs could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// A system call failed.
    #[error("{call} for the list of NICs failed")]
    Host {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The kernel's name.
    pub name: String,
    /// Its addresses, without link-local ones.
    pub addresses: Vec<IpAddr>,
    /// The same with the networks they are in.
    pub networks: Vec<IpNet>,
    /// Set up and with a carrier.
    pub is_up: bool,
    /// The loopback interface.
    pub is_loopback: bool,
    /// No hardware behind it: veth, bridge, loopback and the like.
    pub is_virtual: bool,
    /// The driver's name.
    pub driver: Option<String>,
    /// PCI address.
    pub pci: Option<String>,
    /// NUMA node of its slot; `None` also where the host has but one.
    pub numa_node: Option<u32>,
    /// Largest packet.
    pub mtu_bytes: Option<u32>,
    /// Link speed; unknown for many virtual ones.
    pub bits_per_second: Option<u64>,
    /// Queues in use.
    pub channels: Option<Channels>,
    /// How received flows are spread over the queues; `None` when the driver has no RSS.
    pub rss: Option<Rss>,
    /// Why that is not known.
    #[serde(default)]
    pub no_rss: Option<String>,
    /// Which core each receive queue interrupts, by queue; empty when not known.
    pub queue_irqs: Vec<QueueIrq>,
}

/// Queues in use, as `ethtool -l` counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channels {
    /// Receive only.
    pub rx: u32,
    /// Transmit only.
    pub tx: u32,
    /// Both in one.
    pub combined: u32,
    /// The most there could be of both in one.
    pub combined_max: u32,
}

impl Channels {
    /// Queues that receive.
    pub fn receiving(&self) -> u32 {
        self.rx.saturating_add(self.combined)
    }
}

/// The hash that spreads flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HashFunction {
    /// The one whose result can be computed from the key.
    Toeplitz,
    /// A fold of the header's words.
    Xor,
    /// CRC-32.
    Crc32,
    /// None that this version knows.
    Unknown,
}

/// Receive-side scaling: hash a flow, look the hash up in the table, get a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rss {
    /// The hash.
    pub function: HashFunction,
    /// Its key.
    pub key: Vec<u8>,
    /// The table: queue by the hash's lowest bits.
    pub indirection: Vec<u32>,
    /// Whether the ports of TCP over IPv4 are hashed beside its addresses; `None` if the driver does
    /// not say.
    #[serde(default)]
    pub tcp4_ports: Option<bool>,
    /// The same over IPv6.
    #[serde(default)]
    pub tcp6_ports: Option<bool>,
}

/// What `ethtool` knows; a seam, so that tests bring their own NICs.
pub trait EthtoolSource {
    /// The driver's name.
    fn driver(&self, interface: &str) -> io::Result<String>;
    /// Queues in use.
    fn channels(&self, interface: &str) -> io::Result<Channels>;
    /// RSS key and table.
    fn rss(&self, interface: &str) -> io::Result<Rss>;
}

impl Nic {
    /// Every interface of this network namespace, sorted by name.
    pub fn all() -> Result<Vec<Self>, NicError> {
        let host = |call| move |source| NicError::Host { call, source };
        let ethtool = sys::Ethtool::open().map_err(host("socket"))?;
        let interfaces = getifaddrs().map_err(|errno| host("getifaddrs")(errno.into()))?;
        let mut links: BTreeMap<String, Link> = BTreeMap::new();
        for interface in interfaces {
            let link = links.entry(interface.interface_name).or_default();
            link.flags |= interface.flags;
            let address = interface.address.as_ref().and_then(ip).filter(is_routable);
            let mask = interface.netmask.as_ref().and_then(ip);
            link.addresses.extend(address);
            link.networks.extend(
                address
                    .zip(mask)
                    .and_then(|(address, mask)| IpNet::with_netmask(address, mask).ok()),
            );
        }
        Ok(links
            .into_iter()
            .map(|(name, link)| Self::read(Path::new("/"), &name, link, &ethtool))
            .collect())
    }

    /// The one that has `address`; where a connection from or to it goes through.
    pub fn with_address<'a>(nics: &'a [Self], address: &IpAddr) -> Option<&'a Self> {
        nics.iter().find(|nic| nic.addresses.contains(address))
    }

    /// Reads one from the file system below `root` and from `ethtool`.
    pub fn read(root: &Path, name: &str, link: Link, ethtool: &dyn EthtoolSource) -> Self {
        let class = root.join("sys/class/net").join(name);
        let device = class.join("device");
        let pci = pci_device(&device);
        // Down or virtual interfaces answer -1, or EINVAL.
        let megabits = text(class.join("speed")).and_then(|text| text.parse::<u64>().ok());
        let (rss, no_rss) = match ethtool.rss(name) {
            Ok(rss) if !rss.indirection.is_empty() => (Some(rss), None),
            Ok(_) => (None, Some("its driver has no indirection table".to_owned())),
            Err(error) => (None, Some(format!("its driver does not tell: {error}"))),
        };
        Self {
            name: name.to_owned(),
            is_up: link.flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_LOWER_UP),
            is_loopback: link.flags.contains(InterfaceFlags::IFF_LOOPBACK),
            is_virtual: !device.exists(),
            addresses: link.addresses,
            networks: link.networks,
            driver: ethtool.driver(name).ok().or_else(|| link_name(&device.join("driver"))),
            numa_node: text(device.join("numa_node"))
                .or_else(|| text(pci.as_ref()?.join("numa_node")))
                .and_then(|text| text.parse().ok()),
            mtu_bytes: text(class.join("mtu")).and_then(|text| text.parse().ok()),
            bits_per_second: megabits.filter(|mbit| *mbit > 0).map(|mbit| mbit * 1_000_000),
            channels: ethtool.channels(name).ok(),
            rss,
            no_rss,
            queue_irqs: irq::queue_irqs(root, name, pci.as_deref()),
            pci: pci.and_then(|path| Some(path.file_name()?.to_str()?.to_owned())),
        }
    }
}

/// Interfaces that are up and have a carrier.
pub fn running() -> io::Result<Vec<String>> {
    let ready = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_LOWER_UP;
    let interfaces = getifaddrs()?.filter(|interface| interface.flags.contains(ready));
    Ok(interfaces.map(|interface| interface.interface_name).collect())
}

/// What the network namespace says of an interface.
#[derive(Clone, Debug)]
pub struct Link {
    /// Up, running, loopback.
    pub flags: InterfaceFlags,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The same with the networks they are in.
    pub networks: Vec<IpNet>,
}

impl Default for Link {
    fn default() -> Self {
        Self { flags: InterfaceFlags::empty(), addresses: Vec::new(), networks: Vec::new() }
    }
}

fn ip(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

/// Link-local addresses need a scope to be of use; nobody migrates over them.
fn is_routable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    }
}

/// The PCI function behind a NIC: its device, or for virtio the device's parent.
fn pci_device(device: &Path) -> Option<std::path::PathBuf> {
    let mut path = fs::canonicalize(device).ok()?;
    loop {
        let name = path.file_name()?.to_str()?;
        // 0000:00:03.0
        if name.len() >= 12 && name.matches(':').count() == 2 && name.contains('.') {
            return Some(path);
        }
        path.pop();
    }
}

fn text(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests;
