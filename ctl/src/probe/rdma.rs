//! RDMA devices, or the first thing missing on the way to one.

use pageferry_rdma::RdmaProbe;
use pageferry_rdma::device::{Device, Port};

use super::finding::{Finding, Group};
use crate::report::units;

/// Judges what `pageferry-rdma` found. Nothing is required: TCP always is there.
pub(super) fn findings(probe: Option<&RdmaProbe>) -> Vec<Finding> {
    let Some(probe) = probe else { return Vec::new() };
    let mut findings: Vec<Finding> = probe
        .devices
        .iter()
        .flat_map(|device| device.ports.iter().map(move |port| (device, port)))
        .map(|(device, port)| {
            let name = format!("rdma.{}.{}", device.name, port.number);
            Finding::ok(Group::Rdma, &name, describe(device, port))
        })
        .collect();
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
