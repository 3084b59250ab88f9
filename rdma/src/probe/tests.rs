//! Each step towards an RDMA lane taken away in turn, on a file system made for it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::device::GidType;

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn device(root: &Path, name: &str, node_type: &str, link_layer: &str, state: &str) {
    let base = format!("sys/class/infiniband/{name}");
    write(root, &format!("{base}/node_type"), node_type);
    let port = format!("{base}/ports/1");
    write(root, &format!("{port}/state"), state);
    write(root, &format!("{port}/phys_state"), "5: LinkUp\n");
    write(root, &format!("{port}/link_layer"), link_layer);
    write(root, &format!("{port}/rate"), "100 Gb/sec (4X EDR)\n");
}

fn gid(root: &Path, device: &str, index: u32, gid: &str, kind: &str, netdev: &str) {
    let port = format!("sys/class/infiniband/{device}/ports/1");
    write(root, &format!("{port}/gids/{index}"), gid);
    write(root, &format!("{port}/gid_attrs/types/{index}"), kind);
    write(root, &format!("{port}/gid_attrs/ndevs/{index}"), netdev);
}

fn uverbs(root: &Path, device: &str) {
    write(root, "sys/class/infiniband_verbs/uverbs0/ibdev", &format!("{device}\n"));
    write(root, "sys/class/infiniband_verbs/abi_version", "6\n");
}

fn libraries(root: &Path, providers: &[&str]) {
    write(
        root,
        "etc/ld.so.conf.d/x86_64-linux-gnu.conf",
        "# Multiarch\n/usr/lib/x86_64-linux-gnu\n",
    );
    write(root, "usr/lib/x86_64-linux-gnu/libibverbs.so.1", "");
    write(root, "usr/lib/x86_64-linux-gnu/librdmacm.so.1", "");
    for provider in providers {
        write(root, &format!("usr/lib/x86_64-linux-gnu/libibverbs/lib{provider}-rdmav34.so"), "");
    }
}

#[test]
fn a_roce_card_with_everything_is_usable_and_fully_read() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    device(root, "mlx5_0", "1: CA\n", "Ethernet\n", "4: ACTIVE\n");
    let zero = "0000:0000:0000:0000:0000:0000:0000:0000\n";
    gid(root, "mlx5_0", 0, "fe80:0000:0000:0000:0202:c9ff:fe00:0001\n", "IB/RoCE v1\n", "eth2\n");
    gid(root, "mlx5_0", 3, "0000:0000:0000:0000:0000:ffff:0a00:0001\n", "RoCE v2\n", "eth2\n");
    gid(root, "mlx5_0", 10, zero, "RoCE v2\n", "eth2\n");
    write(root, "sys/devices/pci0000:00/0000:00:08.0/numa_node", "1\n");
    fs::create_dir_all(root.join("sys/bus/pci/drivers/mlx5_core")).unwrap();
    let pci = root.join("sys/devices/pci0000:00/0000:00:08.0");
    symlink("../../../bus/pci/drivers/mlx5_core", pci.join("driver")).unwrap();
    symlink(
        "../../../devices/pci0000:00/0000:00:08.0",
        root.join("sys/class/infiniband/mlx5_0/device"),
    )
    .unwrap();
    uverbs(root, "mlx5_0");
    write(root, "dev/infiniband/rdma_cm", "");
    libraries(root, &["mlx5", "rxe"]);

    let probe = probe(root);
    assert_eq!(probe.why_none, None);
    assert_eq!(probe.libraries.providers, ["mlx5", "rxe"]);
    let device = &probe.devices[0];
    assert_eq!(device.driver.as_deref(), Some("mlx5_core"));
    assert_eq!(device.provider.as_deref(), Some("mlx5"));
    assert_eq!(device.pci.as_deref(), Some("0000:00:08.0"));
    assert_eq!((device.numa_node, device.is_software), (Some(1), false));
    assert_eq!(device.uverbs.as_deref(), Some("uverbs0"));
    let port = &device.ports[0];
    assert_eq!((port.number, port.transport), (1, Transport::Roce));
    assert_eq!(port.bits_per_second, Some(100_000_000_000));
    assert_eq!(port.netdev.as_deref(), Some("eth2"));
    let gids: Vec<(u32, GidType)> = port.gids.iter().map(|gid| (gid.index, gid.kind)).collect();
    assert_eq!(gids, [(0, GidType::IbOrRoceV1), (3, GidType::RoceV2)], "empty entries left out");
    assert_eq!(port.gids[1].gid.to_ipv4_mapped(), Some([10, 0, 0, 1].into()));

    assert_eq!((port.default_roce, &port.ecn_priorities), (None, &None));

    let json = serde_json::to_string(&probe).unwrap();
    assert_eq!(serde_json::from_str::<RdmaProbe>(&json).unwrap(), probe);
}

#[test]
fn an_address_has_the_gid_that_rdma_cm_takes_for_it() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    device(root, "mlx5_0", "1: CA\n", "Ethernet\n", "4: ACTIVE\n");
    let mapped = "0000:0000:0000:0000:0000:ffff:0a00:0001\n";
    gid(root, "mlx5_0", 2, mapped, "IB/RoCE v1\n", "eth2\n");
    gid(root, "mlx5_0", 3, mapped, "RoCE v2\n", "eth2\n");
    gid(root, "mlx5_0", 4, "fd00:0000:0000:0000:0000:0000:0000:0001\n", "IB/RoCE v1\n", "eth2\n");
    let mode = "sys/kernel/config/rdma_cm/mlx5_0/ports/1/default_roce_mode";
    write(root, mode, "IB/RoCE v1\n");
    for priority in 0..8 {
        for end in ["roce_np", "roce_rp"] {
            let on = if priority == 3 || priority == 5 && end == "roce_np" { "1\n" } else { "0\n" };
            write(root, &format!("sys/class/net/eth2/ecn/{end}/enable/{priority}"), on);
        }
    }
    let probe = probe(root);
    let port = &probe.devices[0].ports[0];
    let index = |address: &str| port.gid_of(address.parse().unwrap()).map(|gid| gid.index);
    assert_eq!(index("10.0.0.1"), Some(3), "v2 before v1");
    assert_eq!(index("fd00::1"), Some(4));
    assert_eq!(index("10.0.0.2"), None);
    assert_eq!(port.default_roce, Some(GidType::IbOrRoceV1));
    assert_eq!(port.ecn_priorities, Some(vec![3]), "both ends have to take part");
}

#[test]
fn soft_devices_are_told_apart_by_what_they_say_of_themselves() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    device(root, "left", "1: CA\n", "Ethernet\n", "4: ACTIVE\n");
    write(root, "sys/class/infiniband/left/parent", "veth0\n");
    write(root, "sys/class/infiniband/left/node_desc", "rxe\n");
    device(root, "right", "4: RNIC\n", "Ethernet\n", "4: ACTIVE\n");
    write(root, "sys/class/infiniband/right/node_desc", "Software iWARP stack\n");
    gid(root, "right", 0, "1875:9b00:8133:0000:0000:0000:0000:0000\n", "IB/RoCE v1\n", "");
    gid(root, "right", 1, "fe80:0000:0000:0000:0000:0000:0000:0000\n", "IB/RoCE v1\n", "");
    write(root, "sys/class/net/veth1/address", "18:75:9b:00:81:33\n");
    let probe = probe(root);
    let [left, right] = &probe.devices[..] else { panic!("two devices") };
    assert_eq!((left.provider.as_deref(), left.is_software), (Some("rxe"), true));
    assert_eq!(left.ports[0].transport, Transport::Roce);
    assert_eq!(left.ports[0].netdev.as_deref(), Some("veth0"));
    assert_eq!(right.provider.as_deref(), Some("siw"));
    assert_eq!(right.ports[0].transport, Transport::Iwarp);
    assert_eq!(right.ports[0].netdev.as_deref(), Some("veth1"));
    assert_eq!(right.ports[0].gids.len(), 1, "a MAC address is a GID, a bare prefix is none");
}

#[test]
fn each_missing_step_is_named() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let why = |root: &Path| probe(root).why_none;

    write(root, "proc/sys/kernel/osrelease", "6.1.0\n");
    assert_eq!(why(root), Some(WhyNone::KernelSupport { kernel: "6.1.0".into() }));
    fs::create_dir_all(root.join("lib/modules/6.1.0/kernel/drivers/infiniband")).unwrap();
    assert_eq!(why(root), Some(WhyNone::ModuleLoaded));
    fs::create_dir_all(root.join("sys/class/infiniband")).unwrap();
    assert_eq!(why(root), Some(WhyNone::Device));

    device(root, "efa_0", "7: unspecified\n", "Unspecified\n", "4: ACTIVE\n");
    assert_eq!(why(root), Some(WhyNone::ReliableConnections { devices: vec!["efa_0".into()] }));
    fs::remove_dir_all(root.join("sys/class/infiniband/efa_0")).unwrap();

    device(root, "siw0", "4: RNIC\n", "Ethernet\n", "1: DOWN\n");
    assert_eq!(why(root), Some(WhyNone::ActivePort { devices: vec!["siw0".into()] }));
    device(root, "siw0", "4: RNIC\n", "Ethernet\n", "4: ACTIVE\n");
    assert_eq!(why(root), Some(WhyNone::Uverbs));
    uverbs(root, "siw0");
    assert_eq!(why(root), Some(WhyNone::ConnectionManager));
    write(root, "dev/infiniband/rdma_cm", "");
    assert_eq!(why(root), Some(WhyNone::Library { file: "libibverbs.so.1".into() }));
    libraries(root, &["rxe"]);
    let missing = WhyNone::Provider { provider: "siw".into(), device: "siw0".into() };
    assert_eq!(why(root), Some(missing.clone()));
    assert!(missing.fix().unwrap().contains("ibverbs-providers"));
    libraries(root, &["siw"]);
    assert_eq!(why(root), None);
}

#[test]
fn this_host_answers() {
    let probe = probe_host();
    println!("{}", serde_json::to_string_pretty(&probe).unwrap());
    let known = sysfs::entries("/sys/class/infiniband").len();
    assert_eq!(probe.devices.len(), known);
    assert!(known > 0 || probe.why_none.is_some(), "no device and no reason");
}
