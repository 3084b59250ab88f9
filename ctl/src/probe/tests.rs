//! A host that lacks everything, one that lacks nothing, and this one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use pageferry_rdma::WhyNone;
use pageferry_uring::nic::{Channels, HashFunction, QueueIrq, Rss};
use tempfile::TempDir;

use super::finding::{Group, State};
use super::tracking::{Outcome, Tried};
use super::*;

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Everything that can be read from files, as `root` has it.
fn read(root: &Path) -> Facts {
    Facts {
        kernel: kernel::Kernel::read(root),
        privileges: privileges::Privileges::read(root),
        memory: memory::Memory::read(root),
        cpu: cpu::Cpu::read(root, vec![0, 1]),
        sockets: network::Sockets::read(root),
        rdma: Some(pageferry_rdma::probe(root)),
        ..Facts::default()
    }
}

/// An old kernel, an ordinary user, nothing set up.
fn bare() -> Facts {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    write(root, "proc/sys/kernel/osrelease", "5.10.0-8-amd64\n");
    write(root, "proc/self/status", "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n");
    write(root, "proc/sys/kernel/yama/ptrace_scope", "1\n");
    write(root, "proc/sys/vm/unprivileged_userfaultfd", "0\n");
    write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n");
    write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n");
    write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "0\n");
    let thp = "always within_size advise [never] deny force\n";
    write(root, "sys/kernel/mm/transparent_hugepage/shmem_enabled", thp);
    write(root, "sys/devices/system/cpu/online", "0-3\n");
    write(root, "proc/sys/net/core/rmem_max", "212992\n");
    write(root, "proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456\n");
    let mut facts = read(root);
    facts.uring.disabled = Some(2);
    facts.uring.error = Some(ErrorKind::PermissionDenied);
    facts.memory.memlock_bytes = Some(64 << 10);
    let fails = Outcome::Fails("userfaultfd offers features 0x1ff, tracking needs 0xffff".into());
    facts.tracking = vec![
        Tried { page_bytes: 4096, outcome: fails },
        Tried { page_bytes: 2 << 20, outcome: Outcome::Untried },
    ];
    facts
}

/// A server that was set up.
fn complete() -> Facts {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    write(root, "proc/sys/kernel/osrelease", "6.12.38+deb13-amd64\n");
    write(root, "proc/self/status", "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n");
    write(root, "proc/meminfo", "MemTotal: 65536 kB\nMemAvailable:   32768 kB\n");
    write(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 9354\n");
    write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "1024\n");
    write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "1000\n");
    write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "100\n");
    let thp = "always within_size [advise] never deny force\n";
    write(root, "sys/kernel/mm/transparent_hugepage/shmem_enabled", thp);
    write(root, "sys/devices/system/cpu/online", "0-1\n");
    write(root, "sys/devices/system/node/node0/cpulist", "0-1\n");
    write(root, "proc/sys/net/core/rmem_max", "33554432\n");
    let mut facts = read(root);
    facts.uring.has_deferred_taskrun = true;
    facts.uring.has_send_zero_copy = true;
    facts.tracking =
        [4096, 2 << 20].map(|page_bytes| Tried { page_bytes, outcome: Outcome::Works }).to_vec();
    facts.nics = vec![card(&[0, 1])];
    if let Some(rdma) = &mut facts.rdma {
        rdma.why_none = None;
    }
    let program =
        qemu::Program { path: "/usr/bin/qemu-system-x86_64".into(), version: Some((10, 0, 2)) };
    facts.qemu.installed = BTreeMap::from([("qemu-system-x86_64".into(), program)]);
    facts
}

fn card(cores: &[usize]) -> Nic {
    Nic {
        name: "eth2".into(),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        is_up: true,
        driver: Some("ice".into()),
        mtu_bytes: Some(9000),
        bits_per_second: Some(100_000_000_000),
        numa_node: Some(0),
        channels: Some(Channels { rx: 0, tx: 0, combined: 2, combined_max: 64 }),
        rss: Some(Rss {
            tcp4_ports: Some(true),
            tcp6_ports: None,
            function: HashFunction::Toeplitz,
            key: vec![1; 52],
            indirection: vec![0, 1, 0, 1],
        }),
        queue_irqs: (0..2)
            .map(|queue| QueueIrq {
                queue,
                irq: 120 + queue,
                cpus: vec![cores[queue as usize % cores.len()]],
                name: format!("ice-eth2-TxRx-{queue}"),
            })
            .collect(),
        ..Nic::default()
    }
}

fn finding<'a>(report: &'a Report, name: &str) -> &'a Finding {
    let found = report.findings.iter().find(|finding| finding.name == name);
    found.unwrap_or_else(|| panic!("no finding {name} in {:#?}", report.findings))
}

#[test]
fn a_bare_host_is_told_everything_it_lacks_and_how_to_mend_it() {
    let report = Report::of(bare());
    let blocking: Vec<&str> =
        report.findings.iter().filter(|f| f.blocks()).map(|f| f.name.as_str()).collect();
    assert_eq!(
        blocking,
        ["kernel.version", "privileges.ptrace", "tracking.4kib", "qemu.installed"]
    );
    assert!(!report.can_migrate);
    assert_eq!(report.exit(), Exit::Refused);
    assert_eq!(report.would_use.tracker.name, None);
    assert_eq!(report.would_use.transport.name.as_deref(), Some("tcp-plain"));

    for (name, state, fix) in [
        ("kernel.version", State::Missing, "backports && reboot"),
        ("privileges.ptrace", State::Missing, "setcap cap_sys_ptrace+ep"),
        ("tracking.4kib", State::Missing, "backports && reboot"),
        ("tracking.2mib", State::Warn, "+ 1)) > /sys/kernel/mm/hugepages"),
        ("io_uring.ring", State::Missing, "sysctl -w kernel.io_uring_disabled=0"),
        ("memory.huge_2mib", State::Missing, "+ 512)) > /sys/kernel/mm/hugepages"),
        ("memory.memlock", State::Warn, "prlimit --pid $$ --memlock=unlimited"),
        ("memory.thp_shmem", State::Warn, "echo advise >"),
        ("cpu.cores", State::Warn, "taskset -pc 0-3 $$"),
        ("net.nics", State::Warn, "ip link set"),
        ("net.core.rmem_max", State::Warn, "sysctl -w net.core.rmem_max=33554432"),
        ("rdma.usable", State::Missing, "linux-image-amd64"),
        ("qemu.installed", State::Missing, "apt-get install -y qemu-system-x86"),
    ] {
        let finding = finding(&report, name);
        assert_eq!(finding.state, state, "{finding:?}");
        assert!(finding.why.is_some(), "{finding:?}");
        assert!(finding.fix.as_ref().is_some_and(|text| text.contains(fix)), "{finding:?}");
    }
    assert_eq!(finding(&report, "net.ipv4.tcp_rmem").state, State::Ok);
}

#[test]
fn a_complete_host_has_nothing_amiss() {
    let report = Report::of(complete());
    for finding in &report.findings {
        assert_eq!(finding.state, State::Ok, "{finding:?}");
        assert!(finding.why.is_none() && finding.fix.is_none(), "{finding:?}");
    }
    assert!(report.can_migrate);
    assert_eq!(report.exit(), Exit::Done);
    assert_eq!(report.would_use.tracker.name.as_deref(), Some("uffd-one-phase"));
    assert_eq!(report.would_use.transport.name.as_deref(), Some("tcp-uring"));
    let value = &finding(&report, "memory.huge_2mib").value;
    assert_eq!(value, "900 of 1024 free (1.76 GiB)", "promised pages are not free");
    assert_eq!(
        finding(&report, "net.eth2").value,
        "10.0.0.1, 100 Gbit/s, ice, MTU 9000, NUMA node 0"
    );
    assert_eq!(
        finding(&report, "net.eth2.queues").value,
        "2 receiving; RSS Toeplitz, key of 52 bytes, table of 4; queue->core 0->0 1->1"
    );
}

#[test]
fn queues_on_one_core_and_small_packets_are_found() {
    let mut facts = complete();
    facts.nics = vec![Nic { mtu_bytes: Some(1500), ..card(&[3]) }];
    let report = Report::of(facts);
    let queues = finding(&report, "net.eth2.queues");
    assert_eq!(queues.state, State::Warn);
    assert!(queues.fix.as_ref().unwrap().contains("for i in 120 121;"), "{queues:?}");
    let link = finding(&report, "net.eth2");
    assert_eq!(link.fix.as_deref(), Some("ip link set dev eth2 mtu 9000"));
    assert!(report.can_migrate, "slower is not impossible");
}

#[test]
fn yama_and_capabilities_decide_over_attaching() {
    for (scope, capable, works) in [
        (None, false, true),
        (Some(0), false, true),
        (Some(1), false, false),
        (Some(1), true, true),
        (Some(2), false, false),
        (Some(2), true, true),
        (Some(3), true, false),
    ] {
        let mut facts = complete();
        facts.privileges.ptrace_scope = scope;
        facts.privileges.capabilities = if capable { 1 << 19 } else { 0 };
        assert_eq!(Report::of(facts).can_migrate, works, "yama {scope:?}, capable {capable}");
    }
}

#[test]
fn the_first_missing_step_to_rdma_is_named() {
    let mut facts = complete();
    if let Some(rdma) = &mut facts.rdma {
        rdma.why_none = Some(WhyNone::ConnectionManager);
    }
    let report = Report::of(facts);
    assert_eq!(finding(&report, "rdma.usable").fix.as_deref(), Some("modprobe rdma_ucm"));
    assert!(report.would_use.transport.reason.contains("rdma_ucm is not loaded"));
}

/// A RoCE port on `eth2`, with GIDs of these versions for 10.0.0.1.
fn roce(facts: &mut Facts, versions: &[&str], ecn: Option<&str>) {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let class = "sys/class/infiniband/mlx5_0";
    write(root, &format!("{class}/node_type"), "1: CA\n");
    fs::create_dir_all(root.join("sys/bus/pci/drivers/mlx5_core")).unwrap();
    fs::create_dir_all(root.join(class).join("device/net/eth2")).unwrap();
    let driver = root.join("sys/bus/pci/drivers/mlx5_core");
    std::os::unix::fs::symlink(driver, root.join(class).join("device/driver")).unwrap();
    let port = format!("{class}/ports/1");
    write(root, &format!("{port}/state"), "4: ACTIVE\n");
    write(root, &format!("{port}/link_layer"), "Ethernet\n");
    for (index, version) in versions.iter().enumerate() {
        let gid = "0000:0000:0000:0000:0000:ffff:0a00:0001\n";
        write(root, &format!("{port}/gids/{index}"), gid);
        write(root, &format!("{port}/gid_attrs/types/{index}"), version);
        write(root, &format!("{port}/gid_attrs/ndevs/{index}"), "eth2\n");
    }
    for (end, on) in ["roce_np", "roce_rp"].into_iter().zip(ecn.into_iter().cycle()) {
        write(root, &format!("sys/class/net/eth2/ecn/{end}/enable/3"), on);
    }
    facts.rdma = Some(pageferry_rdma::probe(root));
}

#[test]
fn a_roce_port_is_judged_by_what_its_packets_will_be() {
    let mut facts = complete();
    roce(&mut facts, &["IB/RoCE v1\n", "RoCE v2\n"], Some("1\n"));
    let report = Report::of(facts.clone());
    let of = |name: &str| finding(&report, &format!("rdma.mlx5_0.1.{name}")).clone();
    assert_eq!(of("gid").value, "10.0.0.1: RoCE v2 at 1");
    assert_eq!(of("mtu").value, "4096 bytes a packet (MTU 9000)");
    assert_eq!(of("congestion").value, "ECN for priority 3");
    assert!(["gid", "mtu", "congestion"].iter().all(|name| of(name).state == State::Ok));

    roce(&mut facts, &["IB/RoCE v1\n"], Some("0\n"));
    facts.nics[0].mtu_bytes = Some(1500);
    let report = Report::of(facts.clone());
    for (name, fix) in [
        ("gid", "cma_roce_mode -d mlx5_0 -p 1 -m 2"),
        ("mtu", "ip link set dev eth2 mtu 9000"),
        ("congestion", "/sys/class/net/eth2/ecn/roce_$e/enable/3"),
    ] {
        let finding = finding(&report, &format!("rdma.mlx5_0.1.{name}"));
        assert_eq!(finding.state, State::Warn, "{finding:?}");
        assert!(finding.fix.as_deref().is_some_and(|it| it.contains(fix)), "{finding:?}");
    }
    assert_eq!(finding(&report, "rdma.mlx5_0.1.mtu").value, "1024 bytes a packet (MTU 1500)");

    roce(&mut facts, &[], None);
    let report = Report::of(facts);
    assert_eq!(finding(&report, "rdma.mlx5_0.1.gid").value, "10.0.0.1: none");
    let congestion = finding(&report, "rdma.mlx5_0.1.congestion");
    assert!(congestion.fix.as_deref().is_some_and(|fix| fix.contains("dcb pfc")));
}

#[test]
fn the_text_is_one_table_in_groups_with_why_and_fix_under_what_is_amiss() {
    let report = Report { software: "pageferry 0".into(), host: "vm".into(), ..Report::of(bare()) };
    let text = text::report(&report, false);
    assert!(text.starts_with(
        "pageferry 0 on vm (Linux 5.10.0-8-amd64)\n\
         \n\
         Kernel\n  MISSING  version            5.10.0-8-amd64\n"
    ));
    let values: BTreeSet<usize> = text
        .lines()
        .filter(|line| line.starts_with("  ok  ") || line.starts_with("  warn  "))
        .map(|line| line.len() - line[11..].trim_start_matches(|c| c != ' ').trim_start().len())
        .collect();
    assert_eq!(values.len(), 1, "values start in one column:\n{text}");
    assert!(
        text.contains("\n                              fix: sysctl -w kernel.io_uring"),
        "{text}"
    );
    assert!(text.ends_with(
        "A migration from this host can't work: missing kernel.version, privileges.ptrace, \
         tracking.4kib, qemu.installed\n"
    ));
    let coloured = text::report(&report, true);
    assert_eq!(console::strip_ansi_codes(&coloured), text);
}

#[test]
fn this_host_is_probed_and_its_json_has_the_keys_that_programs_rely_on() {
    let report = Report::of(Facts::here());
    let names: BTreeSet<&str> = report.findings.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names.len(), report.findings.len(), "names are unique: {names:?}");
    for finding in &report.findings {
        assert_eq!(finding.state == State::Ok, finding.why.is_none(), "{finding:?}");
    }
    assert!(report.findings.is_sorted_by_key(|finding| finding.group as u8));
    let json = serde_json::to_value(&report).unwrap();
    for key in
        ["software", "host", "kernel", "can_migrate", "would_use", "findings", "nics", "rdma"]
    {
        assert!(json.get(key).is_some(), "{key} is missing");
    }
    for key in ["group", "name", "state", "required", "value", "why", "fix"] {
        assert!(json["findings"][0].get(key).is_some(), "{key} is missing");
    }
    assert!(json["would_use"]["transport"]["reason"].is_string());
    let groups: BTreeSet<u8> = report.findings.iter().map(|f| f.group as u8).collect();
    assert_eq!(groups.len(), Group::Qemu as usize + 1, "each group has something to say");
}
