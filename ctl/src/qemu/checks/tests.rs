//! Verdicts on what real QEMUs answered (`tests/qemu_inspect.rs` records it), and on small changes
//! to those answers.

use serde_json::json;

use super::*;
use crate::qemu::memory::GuestRam;
use crate::qemu::recorded::Recording;

const SOURCE_7_2: &str = include_str!("recorded/7.2-source.json");
const SOURCE_10_0: &str = include_str!("recorded/10.0-source.json");
const TARGET_7_2: &str = include_str!("recorded/7.2-target.json");
const TARGET_10_0: &str = include_str!("recorded/10.0-target.json");

/// As recorded, but running: sources were recorded before their first instruction.
fn running(text: &str) -> Recording {
    let mut recording: Recording = serde_json::from_str(text).expect("a recording");
    recording.set("query-status", json!({ "status": "running", "running": true }));
    recording
}

fn judged(recording: &Recording, side: Side) -> Vec<Refusal> {
    ask(recording).expect("ask").judge(side, &[])
}

#[test]
fn what_both_versions_answer_is_understood() {
    for text in [SOURCE_7_2, SOURCE_10_0] {
        let answers = ask(&running(text)).expect("ask");
        assert_eq!(answers.machine, "pc-q35-7.2");
        assert_eq!(answers.direct_io_nodes, ["disk0"]);
        assert_eq!(answers.memory.claimed_bytes, 96 << 20);
        let ram = &answers.memory.ram;
        let facts: Vec<_> =
            ram.iter().map(|it| (it.name.as_str(), it.bytes >> 20, it.page_bytes)).collect();
        assert_eq!(facts, [("ram0", 64, 4096), ("ram1", 32, 4096)]);
        assert!(matches!(&ram[0].kind, BackendKind::File { path } if path.ends_with("ram")));
        assert_eq!(ram[1].kind, BackendKind::Memfd);
        assert_eq!(ram[0].hva.is_some(), answers.version.major == 10);
        assert!(answers.memory.carried_bytes > 400 << 10, "{}", answers.memory.carried_bytes);
    }
}

#[test]
fn only_the_newer_qemu_is_refused_for_its_memfd() {
    assert_eq!(judged(&running(SOURCE_7_2), Side::Source), []);
    let refusals = judged(&running(SOURCE_10_0), Side::Source);
    assert!(
        matches!(&refusals[..], [Refusal::NotNamedFile { name, .. }] if name == "ram1"),
        "{refusals:?}"
    );
}

#[test]
fn targets_may_be_either_and_must_wait() {
    for text in [TARGET_7_2, TARGET_10_0] {
        let recording: Recording = serde_json::from_str(text).expect("a recording");
        assert_eq!(judged(&recording, Side::Target), []);
        assert!(matches!(
            &judged(&recording, Side::Source)[..],
            [Refusal::NotRunning { status }, ..] if status == "inmigrate"
        ));
    }
    assert!(matches!(
        &judged(&running(TARGET_7_2), Side::Target)[..],
        [Refusal::NotWaiting { status }] if status == "running"
    ));
}

#[test]
fn outside_writers_are_named() {
    let mut recording = running(SOURCE_7_2);
    recording.set_where(
        "qom-list",
        |args| args["path"] == "/machine/peripheral",
        json!([
            { "name": "gpu", "type": "child<vfio-pci>" },
            { "name": "fs0", "type": "child<vhost-user-fs-pci>" },
            { "name": "nic0", "type": "child<virtio-net-pci>" },
            { "name": "type", "type": "string" },
        ]),
    );
    recording.set_where(
        "human-monitor-command",
        |args| args["command-line"] == "info network",
        json!(
            "nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \
             \\ net0: index=0,type=vhost-user,vhost-user0 to unix:/run/vhost\r\n"
        ),
    );
    let answers = ask(&recording).expect("ask");
    let named: Vec<_> = answers
        .judge(Side::Source, &["/dev/vhost-vsock".into()])
        .into_iter()
        .filter_map(|refusal| match &refusal {
            Refusal::OutsideWriter { what } => Some((what.clone(), refusal.hint().into_owned())),
            _ => None,
        })
        .collect();
    let whats: Vec<_> = named.iter().map(|(what, _)| what.as_str()).collect();
    assert_eq!(
        whats,
        [
            "device gpu (vfio-pci)",
            "device fs0 (vhost-user-fs-pci)",
            "network net0 (vhost-user)",
            "/dev/vhost-vsock"
        ]
    );
    assert!(named[3].1.contains("device_del"), "{}", named[3].1);
}

#[test]
fn migrations_and_blockers_are_refused() {
    let mut recording = running(SOURCE_7_2);
    recording.set(
        "query-migrate",
        json!({ "status": "pre-switchover", "blocked-reasons": ["device x can't be migrated\n"] }),
    );
    assert_eq!(
        judged(&recording, Side::Source),
        [
            Refusal::MigrationActive { status: "pre-switchover".into() },
            Refusal::Blocked { reason: "device x can't be migrated".into() }
        ]
    );
    recording.set("query-migrate", json!({ "status": "failed" }));
    assert_eq!(judged(&recording, Side::Source), []);
}

#[test]
fn old_qemu_without_capabilities_is_refused_by_each_name() {
    let mut recording = running(SOURCE_7_2);
    recording
        .set("query-migrate-capabilities", json!([{ "capability": "events", "state": false }]));
    let refusals = judged(&recording, Side::Source);
    let missing: Vec<_> = refusals
        .iter()
        .map(|refusal| match refusal {
            Refusal::CapabilityMissing { capability, .. } => *capability,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(missing, ["x-ignore-shared", "return-path"]);
}

#[test]
fn memory_without_backend_is_noticed() {
    let mut recording = running(SOURCE_7_2);
    recording.set("query-memory-size-summary", json!({ "base-memory": 128 << 20 }));
    let refusals = judged(&recording, Side::Source);
    assert!(matches!(refusals[..], [Refusal::MemoryUnaccounted { .. }]), "{refusals:?}");
}

#[test]
fn share_off_and_confidential_guests_are_refused() {
    let mut recording = running(SOURCE_7_2);
    let share_of_ram0 =
        |args: &Value| args["property"] == "share" && args["path"] == "/objects/ram0";
    recording.set_where("qom-get", share_of_ram0, json!(false));
    let confidential = |args: &Value| args["property"] == "confidential-guest-support";
    recording.set_where("qom-get", confidential, json!("/objects/sev0"));
    let refusals = judged(&recording, Side::Source);
    assert_eq!(
        refusals,
        [
            Refusal::NotShared { name: "ram0".into(), backend: "/objects/ram0".into() },
            Refusal::Confidential { object: "/objects/sev0".into() }
        ]
    );
    assert!(refusals[0].hint().contains("id=ram0"));
}

#[test]
fn every_difference_between_source_and_target_is_named() {
    let ram = |name: &str, bytes, page_bytes| GuestRam {
        name: name.into(),
        backend: format!("/objects/{name}"),
        kind: BackendKind::Memfd,
        bytes,
        page_bytes,
        shared: true,
        preallocated: false,
        hva: None,
    };
    let here = GuestMemoryMap {
        ram: vec![ram("a", 1 << 30, 4096), ram("b", 1 << 30, 4096), ram("x", 4096, 4096)],
        carried_bytes: 0,
        claimed_bytes: 2 << 30,
    };
    let region = |name: &str, bytes, page_bytes| RegionOffer {
        name: name.into(),
        bytes,
        page_bytes,
        backing: "tmpfs".into(),
        populated_bytes: 0,
    };
    let same = [region("a", 1 << 30, 4096), region("b", 1 << 30, 4096), region("x", 4096, 4096)];
    assert_eq!(compare_memory(&same, "q", &here, "q"), []);
    let odd = GuestMemoryMap { ram: vec![ram("a", 725 << 20, 2 << 20)], ..here.clone() };
    assert_eq!(compare_memory(&[region("a", 726 << 20, 2 << 20)], "q", &odd, "q"), []);
    for (bytes, page_bytes) in [(725 << 20, 2 << 20), (728 << 20, 2 << 20), (725 << 20, 4096)] {
        let refusals = compare_memory(&[region("a", bytes, page_bytes)], "q", &odd, "q");
        assert_eq!(refusals.len(), 1, "{bytes} in {page_bytes}: {refusals:?}");
    }
    let offered =
        [region("a", 2 << 30, 4096), region("b", 1 << 30, 2 << 20), region("c", 4096, 4096)];
    let words: Vec<_> = compare_memory(&offered, "pc", &here, "q35")
        .iter()
        .map(|refusal| {
            assert!(!refusal.hint().is_empty());
            refusal.to_string()
        })
        .collect();
    assert_eq!(
        words,
        [
            "the source is a pc, the target a q35",
            "guest memory a has 2147483648 bytes at the source and 1073741824 at the target",
            "guest memory b has pages of 2097152 bytes at the source and of 4096 at the target",
            "the target has no guest memory c",
            "the target has guest memory x, which the source has not",
        ]
    );
}

#[test]
fn devices_that_give_memory_back_are_named() {
    let mut recording = running(SOURCE_7_2);
    assert!(ask(&recording).expect("ask").balloons().is_empty());
    recording.set_where(
        "qom-list",
        |args| args["path"] == "/machine/peripheral",
        json!([
            { "name": "balloon0", "type": "child<virtio-balloon-pci>" },
            { "name": "vm0", "type": "child<virtio-mem-pci>" },
            { "name": "nic0", "type": "child<virtio-net-pci>" },
        ]),
    );
    let named = ask(&recording).expect("ask").balloons();
    assert_eq!(named, ["balloon0 (virtio-balloon-pci)", "vm0 (virtio-mem-pci)"]);
}

#[test]
fn a_backend_of_the_kernel_is_known_wherever_its_namespace_has_it() {
    assert_eq!(backend_device("/dev/vhost-scsi"), Some("/dev/vhost-scsi"));
    assert_eq!(backend_device("/srv/guest/dev/vhost-vsock"), Some("/dev/vhost-vsock"));
    assert_eq!(backend_device("/host/dev/vfio/12"), Some("/dev/vfio/12"));
    for other in
        ["/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/var/lib/vhost-scsi", "socket:[7]", ""]
    {
        assert_eq!(backend_device(other), None, "{other}");
    }
}
