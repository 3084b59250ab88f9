//! RDMA devices, or the first thing missing on the way to one.
//!
//! Of a RoCE port it is judged what its packets will be: their version and address by the GID that
//! rdma_cm takes for each of the interface's addresses, their size by the interface's MTU, and what
//! keeps switches from dropping them.

use pageferry_rdma::RdmaProbe;
use pageferry_rdma::device::{Device, GidType, Port, Transport};
use pageferry_uring::nic::Nic;

use super::finding::{Finding, Group};
use crate::report::units;

/// RoCE's headers, as the kernel reserves for them in a packet (`iboe_get_mtu`).
const ROCE_HEADER_BYTES: u32 = 96;
/// RoCE's packets are of a power of two, and no larger than this.
const ROCE_PACKET_BYTES_MAX: u32 = 4096;
/// What an interface's MTU has to be for that, where it is not raised as far as it goes.
const MTU_BYTES: u32 = 9000;

/// Judges what `pageferry-rdma` found. Nothing is required: TCP always is there.
pub(super) fn findings(probe: Option<&RdmaProbe>, nics: &[Nic]) -> Vec<Finding> {
    let Some(probe) = probe else { return Vec::new() };
    let mut findings = Vec::new();
    for device in &probe.devices {
        for port in &device.ports {
            let name = format!("rdma.{}.{}", device.name, port.number);
            findings.push(Finding::ok(Group::Rdma, &name, describe(device, port)));
            let nic = nics.iter().find(|nic| port.netdev.as_ref() == Some(&nic.name));
            if let Some(nic) = nic.filter(|_| port.is_active() && port.transport == Transport::Roce)
            {
                findings.push(gid(&name, device, port, nic));
                findings.extend(packets(&name, nic));
                findings.extend((!device.is_software).then(|| lossless(&name, port, nic)));
            }
        }
    }
    findings.push(match &probe.why_none {
        None => Finding::ok(
            Group::Rdma,
            "rdma.usable",
            "yes; lanes take it where the other host has it too",
        ),
        Some(why) => {
            let text = "memory can't be written from NIC to NIC; lanes use TCP";
            let finding = Finding::missing(Group::Rdma, "rdma.usable", why.to_string(), text);
            match why.fix() {
                Some(fix) => finding.fix(fix),
                None => finding,
            }
        }
    });
    findings
}

/// Which packets go out for the interface's addresses: RoCE v2, if all is well.
fn gid(name: &str, device: &Device, port: &Port, nic: &Nic) -> Finding {
    let name = format!("{name}.gid");
    let of_addresses: Vec<_> =
        nic.addresses.iter().map(|address| (address, port.gid_of(*address))).collect();
    let value: Vec<String> = of_addresses
        .iter()
        .map(|(address, gid)| match gid {
            Some(gid) => format!("{address}: {} at {}", version(gid.kind), gid.index),
            None => format!("{address}: none"),
        })
        .collect();
    let value = match value.is_empty() {
        true => format!("{} has no address", nic.name),
        false => value.join(", "),
    };
    let mode = |why| {
        Finding::warn(Group::Rdma, &name, &value, why)
            .fix(format!("cma_roce_mode -d {} -p {} -m 2", device.name, port.number))
    };
    if of_addresses.iter().all(|(_, gid)| gid.is_none()) {
        let why = "rdma_cm finds a device by the GID that stands for an address";
        return Finding::warn(Group::Rdma, &name, value, why)
            .fix(format!("ip addr add ADDRESS/24 dev {} && rdma link show", nic.name));
    }
    if port.default_roce == Some(GidType::IbOrRoceV1) {
        return mode("rdma_cm is set to RoCE v1, whose packets no router takes");
    }
    match of_addresses.iter().any(|(_, gid)| gid.is_some_and(|it| it.kind == GidType::IbOrRoceV1)) {
        true => mode("packets of RoCE v1 are taken by no router, and marked by few switches"),
        false => Finding::ok(Group::Rdma, &name, value),
    }
}

fn version(kind: GidType) -> &'static str {
    match kind {
        GidType::RoceV2 => "RoCE v2",
        GidType::IbOrRoceV1 => "RoCE v1",
        GidType::Unknown => "a GID",
    }
}

/// The packets that fit the interface's MTU.
fn packets(name: &str, nic: &Nic) -> Option<Finding> {
    let mtu = nic.mtu_bytes?;
    let room = mtu.saturating_sub(ROCE_HEADER_BYTES).min(ROCE_PACKET_BYTES_MAX);
    let bytes = room.checked_ilog2().map_or(0, |exponent| 1 << exponent);
    let (name, value) = (format!("{name}.mtu"), format!("{bytes} bytes a packet (MTU {mtu})"));
    Some(match bytes < ROCE_PACKET_BYTES_MAX {
        true => Finding::warn(
            Group::Rdma,
            &name,
            value,
            "small packets cost the device's time; switch and peer must agree to larger ones",
        )
        .fix(format!("ip link set dev {} mtu {MTU_BYTES}", nic.name)),
        false => Finding::ok(Group::Rdma, &name, value),
    })
}

/// What keeps switches from dropping packets, of which RoCE makes much: one lost, many sent again.
fn lossless(name: &str, port: &Port, nic: &Nic) -> Finding {
    let name = format!("{name}.congestion");
    let why =
        "after a lost packet RoCE sends many again; switches have to pause (PFC) or mark (ECN)";
    let fix = format!("dcb pfc show dev {0}; dcb pfc set dev {0} prio-pfc 3:on", nic.name);
    match &port.ecn_priorities {
        Some(priorities) if !priorities.is_empty() => {
            let list: Vec<String> = priorities.iter().map(ToString::to_string).collect();
            Finding::ok(Group::Rdma, &name, format!("ECN for priority {}", list.join(", ")))
        }
        Some(_) => Finding::warn(Group::Rdma, &name, "ECN is off", why).fix(format!(
            "for e in np rp; do echo 1 > /sys/class/net/{}/ecn/roce_$e/enable/3; done",
            nic.name
        )),
        None => Finding::warn(Group::Rdma, &name, "not shown by this driver", why).fix(fix),
    }
}

fn describe(device: &Device, port: &Port) -> String {
    let mut parts = vec![port.transport.to_string(), port.state.clone()];
    parts.extend(port.bits_per_second.map(units::bits_per_second));
    parts.extend(port.netdev.clone());
    parts.extend(device.driver.clone());
    if device.is_software {
        parts.push("in software".into());
    }
    let gids = port.gids.len();
    parts.push(format!("{gids} GID{}", if gids == 1 { "" } else { "s" }));
    parts.join(", ")
}
