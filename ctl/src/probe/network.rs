//! NICs with their queues, and what sockets may buffer.

use std::collections::BTreeSet;
use std::path::Path;

use pageferry_uring::cpulist;
use pageferry_uring::nic::{HashFunction, Nic};

use super::finding::{Finding, Group, number, text};
use crate::agent::queues;
use crate::report::units;

/// Below this speed a link is full whatever its packets' size.
const FAST_BITS: u64 = 10_000_000_000;
/// What a jumbo frame holds.
const JUMBO_BYTES: u32 = 9000;
/// What lanes within one machine ask for; see `pageferry_uring::limits`.
const BUFFER_BYTES: u64 = pageferry_uring::limits::SAME_HOST_SOCKET_BUFFER_BYTES as u64;
/// The most a 100 GbE link of 0.5 ms round trip keeps in flight, to a power of two.
const TUNED_BYTES: u64 = 6 << 20;

/// What sockets may buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// `net.core.rmem_max`.
    pub rmem_max: Option<u64>,
    /// `net.core.wmem_max`.
    pub wmem_max: Option<u64>,
    /// Last number of `net.ipv4.tcp_rmem`.
    pub tcp_rmem_max: Option<u64>,
    /// Last number of `net.ipv4.tcp_wmem`.
    pub tcp_wmem_max: Option<u64>,
    /// `net.ipv4.tcp_congestion_control`.
    pub congestion_control: Option<String>,
}

impl Sockets {
    /// Reads them below `root`.
    pub fn read(root: &Path) -> Self {
        let last = |path| text(root, path)?.split_whitespace().last()?.parse().ok();
        Self {
            rmem_max: number(root, "proc/sys/net/core/rmem_max"),
            wmem_max: number(root, "proc/sys/net/core/wmem_max"),
            tcp_rmem_max: last("proc/sys/net/ipv4/tcp_rmem"),
            tcp_wmem_max: last("proc/sys/net/ipv4/tcp_wmem"),
            congestion_control: text(root, "proc/sys/net/ipv4/tcp_congestion_control"),
        }
    }

    /// Judges them. What a namespace does not show (net.core is the host's) is left out.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let asked = "lanes that ask for buffers of a size get smaller ones";
        let tuned = "the kernel's tuning stops before a long, fast link is full";
        let mut findings: Vec<Finding> = [
            ("net.core.rmem_max", self.rmem_max, BUFFER_BYTES, asked),
            ("net.core.wmem_max", self.wmem_max, BUFFER_BYTES, asked),
            ("net.ipv4.tcp_rmem", self.tcp_rmem_max, TUNED_BYTES, tuned),
            ("net.ipv4.tcp_wmem", self.tcp_wmem_max, TUNED_BYTES >> 1, tuned),
        ]
        .into_iter()
        .filter_map(|(name, bytes, least, why)| Some(buffer(name, bytes?, least, why)))
        .collect();
        if let Some(name) = &self.congestion_control {
            findings.push(Finding::ok(Group::Network, "net.ipv4.tcp_congestion_control", name));
        }
        findings
    }
}

fn buffer(name: &str, bytes: u64, least: u64, why: &str) -> Finding {
    let value = units::bytes(bytes);
    if bytes >= least {
        return Finding::ok(Group::Network, name, value);
    }
    let setting = match name.contains("tcp_") {
        true => "'4096 131072 33554432'",
        false => "33554432",
    };
    Finding::warn(Group::Network, name, value, why).fix(format!("sysctl -w {name}={setting}"))
}

/// Judges the NICs, up ones only.
pub(super) fn findings(nics: &[Nic]) -> Vec<Finding> {
    let up: Vec<&Nic> = nics.iter().filter(|nic| nic.is_up && !nic.is_loopback).collect();
    if up.is_empty() {
        return vec![
            Finding::warn(
                Group::Network,
                "net.nics",
                "none is up",
                "guests can be moved within this machine only",
            )
            .fix("ip link set dev IFACE up"),
        ];
    }
    up.into_iter().flat_map(nic).collect()
}

fn nic(nic: &Nic) -> Vec<Finding> {
    let mut findings = vec![link(nic)];
    // A virtual NIC's queues are cores of the one that takes its packets.
    if !nic.is_virtual {
        findings.push(queues_of(nic));
    }
    findings
}

fn link(nic: &Nic) -> Finding {
    let name = format!("net.{}", nic.name);
    let mut parts: Vec<String> = nic.addresses.iter().map(ToString::to_string).collect();
    if parts.is_empty() {
        parts.push("no address".into());
    }
    parts.push(nic.bits_per_second.map_or("speed unknown".into(), units::bits_per_second));
    parts.extend(nic.driver.clone());
    parts.extend(nic.mtu_bytes.map(|bytes| format!("MTU {bytes}")));
    parts.extend(nic.numa_node.map(|node| format!("NUMA node {node}")));
    let value = parts.join(", ");
    let is_fast = nic.bits_per_second.is_some_and(|bits| bits >= FAST_BITS);
    match nic.mtu_bytes {
        Some(mtu) if is_fast && mtu < JUMBO_BYTES => Finding::warn(
            Group::Network,
            &name,
            value,
            "small packets cost CPU at this speed; switch and peer must agree to larger ones",
        )
        .fix(format!("ip link set dev {} mtu {JUMBO_BYTES}", nic.name)),
        _ => Finding::ok(Group::Network, &name, value),
    }
}

fn queues_of(nic: &Nic) -> Finding {
    let name = format!("net.{}.queues", nic.name);
    let mut value = match nic.channels {
        Some(channels) => format!("{} receiving", channels.receiving()),
        None => "unknown".into(),
    };
    if let Some(rss) = &nic.rss {
        value.push_str(&format!(
            "; RSS {}, key of {} bytes, table of {}",
            hash(rss.function),
            rss.key.len(),
            rss.indirection.len(),
        ));
    }
    if let Some(why) = queues::why_not(nic) {
        value.push_str(&format!("; lanes get no queues for themselves: {why}"));
    }
    let map: Vec<String> = nic
        .queue_irqs
        .iter()
        .map(|queue| format!("{}->{}", queue.queue, cpulist::format(&queue.cpus)))
        .collect();
    if !map.is_empty() {
        value.push_str(&format!("; queue->core {}", map.join(" ")));
    }
    let several = nic.queue_irqs.len() > 1;
    let cores: BTreeSet<usize> =
        nic.queue_irqs.iter().flat_map(|queue| queue.cpus.iter().copied()).collect();
    match several && cores.len() == 1 {
        true => Finding::warn(
            Group::Network,
            &name,
            value,
            "all queues interrupt one core, which limits what can be received",
        )
        .fix(spread(nic)),
        false => Finding::ok(Group::Network, &name, value),
    }
}

/// One core after another, from 0: no worse than any other choice without knowing the host.
fn spread(nic: &Nic) -> String {
    let irqs: Vec<String> = nic.queue_irqs.iter().map(|queue| queue.irq.to_string()).collect();
    format!(
        "systemctl stop irqbalance; c=0; for i in {}; do echo $c > \
         /proc/irq/$i/smp_affinity_list; c=$(((c+1) % $(nproc))); done",
        irqs.join(" ")
    )
}

fn hash(function: HashFunction) -> &'static str {
    match function {
        HashFunction::Toeplitz => "Toeplitz",
        HashFunction::Xor => "XOR",
        HashFunction::Crc32 => "CRC-32",
        HashFunction::Unknown => "of unknown kind",
    }
}
