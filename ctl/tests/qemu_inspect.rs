//! What is found out about real QEMUs of every version at hand, before anything is touched.
#![forbid(unsafe_code)]

mod bare_qemu;

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use bare_qemu::{BareQemu, MACHINE, make_disk, with_each_qemu};
use pageferry_ctl::lab::QemuBinary;
use pageferry_ctl::qemu::checks::{self, CheckError, Side, ask};
use pageferry_ctl::qemu::memory::{self, BackendKind};
use pageferry_ctl::qemu::pid;
use pageferry_ctl::qemu::recorded::Recorder;
use pageferry_ctl::qemu::refusal::Refusal;
use pageferry_ctl::qmp::{Qmp, QmpError};
use pageferry_datapath::attach::Process;
use pageferry_datapath::backing::MemoryKind;

#[test]
fn monitor_serves_one_client_and_says_so() {
    with_each_qemu("monitor_serves_one_client", |binary| {
        let mut qemu = BareQemu::start(binary, &["-S", "-m", "64", "-machine", MACHINE]);
        let first = qemu.qmp();
        let soon = || Instant::now() + Duration::from_millis(300);
        let second = Qmp::connect_by(qemu.path("qmp"), soon()).expect_err("held");
        assert!(matches!(second, QmpError::Busy { .. }), "{second:?}");
        // With the backlog full, connecting itself has to wait.
        let waiting: Vec<_> = (0..4).map(|_| Qmp::connect_by(qemu.path("qmp"), soon())).collect();
        assert!(waiting.iter().all(Result::is_err));
        drop(first);
        qemu.qmp();
    });
}

#[test]
fn owner_of_the_socket_is_found_whoever_made_it() {
    with_each_qemu("owner_of_the_socket_is_found", |binary| {
        let mut qemu = BareQemu::start(binary, &["-S", "-m", "64", "-machine", MACHINE]);
        assert_eq!(pid::find(&qemu.qmp()).expect("pid"), qemu.pid());

        // As libvirt does it: the socket is made by somebody else and handed over.
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("monitor");
        let listener = UnixListener::bind(&path).expect("bind");
        let qemu = BareQemu::start_with_stdin(
            binary,
            &[
                "-S",
                "-m",
                "64",
                "-machine",
                MACHINE,
                "-chardev",
                "socket,id=q,fd=0,server=on,wait=off",
                "-mon",
                "chardev=q,mode=control",
            ],
            Some(listener.into()),
        );
        assert_eq!(pid::find(&Qmp::connect(&path).expect("connect")).expect("pid"), qemu.pid());
    });
}

#[test]
fn blocks_of_equal_size_are_told_apart() {
    with_each_qemu("blocks_of_equal_size", |binary| {
        let mut qemu = BareQemu::start(
            binary,
            &[
                "-S",
                "-m",
                "64",
                "-smp",
                "2",
                "-machine",
                MACHINE,
                "-object",
                "memory-backend-memfd,id=a,size=16M,share=on",
                "-object",
                "memory-backend-memfd,id=b,size=16M,share=on",
                "-object",
                "memory-backend-file,id=c,mem-path={},size=16M,share=on",
                "-object",
                "memory-backend-file,id=d,mem-path={}/d,size=16M,share=on",
                "-numa",
                "node,memdev=a",
                "-numa",
                "node,memdev=b",
                "-numa",
                "node,memdev=c",
                "-numa",
                "node,memdev=d",
            ],
        );
        let qmp = qemu.qmp();
        let process = Process::open(qemu.pid()).expect("process");
        let map = memory::discover(&qmp).expect("discover");
        assert_eq!(map.claimed_bytes, 64 << 20);
        let places = memory::locate(&qmp, &process, &map.ram).expect("locate");
        let names: Vec<_> = places.iter().map(|place| place.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d"]);
        for (index, place) in places.iter().enumerate() {
            let told = qmp.human(&format!("gpa2hva {:#x}", index << 24)).expect("gpa2hva");
            assert!(told.trim().ends_with(&format!("{:#x}", place.hva)), "{place:?} {told}");
            let backing = place.open(&process).expect("open");
            assert_eq!((backing.len(), backing.page_bytes()), (16 << 20, 4096));
        }
        assert!(matches!(map.ram[2].kind, BackendKind::File { .. }));
        let file = qemu.path("d").metadata().expect("metadata");
        assert_eq!(places[3].identity, (file.dev(), file.ino()));
        let kinds: Vec<_> =
            places.iter().map(|place| place.open(&process).expect("open").kind()).collect();
        assert_eq!(kinds[..2], [MemoryKind::Memfd; 2]);
        assert_eq!(kinds[2..], [MemoryKind::Tmpfs; 2]);
    });
}

/// The machine of the recordings: every kind of backend, a disk with direct I/O below a format
/// node, devices with and without ids.
const TYPICAL: &[&str] = &[
    "-m",
    "64,slots=2,maxmem=256M",
    "-smp",
    "2",
    "-object",
    "memory-backend-file,id=ram0,mem-path={}/ram,size=64M,share=on",
    "-machine",
    "pc-q35-7.2,memory-backend=ram0",
    "-object",
    "memory-backend-memfd,id=ram1,size=32M,share=on",
    "-device",
    "pc-dimm,memdev=ram1,id=dimm1",
    "-object",
    "memory-backend-ram,id=unused,size=32M",
    "-blockdev",
    "driver=null-co,node-name=null0,size=1048576",
    "-device",
    "virtio-blk-pci,drive=null0,id=scratch",
    "-netdev",
    "user,id=net0",
    "-device",
    "virtio-net-pci,netdev=net0,id=nic0",
    "-device",
    "virtio-rng-pci",
];

fn typical(binary: &QemuBinary, more: &[&str]) -> BareQemu {
    let mut qemu = BareQemu::start(binary, &[TYPICAL, more].concat());
    make_disk(&qemu.path("disk"));
    let qmp = qemu.qmp();
    let disk = qemu.path("disk");
    for node in [
        serde_json::json!({ "driver": "file", "node-name": "disk0", "filename": disk,
            "cache": { "direct": true } }),
        serde_json::json!({ "driver": "raw", "node-name": "format0", "file": "disk0" }),
    ] {
        qmp.execute("blockdev-add", node).expect("blockdev-add");
    }
    qemu
}

#[test]
fn running_guest_passes_except_for_its_memfd() {
    with_each_qemu("running_guest_passes", |binary| {
        let mut qemu = typical(binary, &[]);
        let checked = checks::source(&qemu.qmp());
        if (binary.version.major, binary.version.minor) < (8, 1) {
            let facts = checked.expect("7.2 leaves out memfds");
            assert_eq!(facts.process.pid(), qemu.pid());
            assert_eq!(facts.machine, MACHINE);
            assert_eq!(facts.direct_io_nodes, ["disk0"]);
            let names: Vec<_> = facts.places.iter().map(|place| place.name.as_str()).collect();
            assert_eq!(names, ["ram0", "ram1"]);
        } else {
            let error = checked.expect_err("10.0 would send the memfd");
            let CheckError::Refused { refusals } = &error else { panic!("{error:?}") };
            assert!(
                matches!(&refusals[..], [Refusal::NotNamedFile { name, .. }] if name == "ram1"),
                "{refusals:?}"
            );
            assert!(error.hints()[0].contains("memory-backend-file"), "{:?}", error.hints());
        }
    });
}

#[test]
fn waiting_target_passes_and_others_do_not() {
    with_each_qemu("waiting_target_passes", |binary| {
        let mut waiting = typical(binary, &["-incoming", "defer"]);
        let facts = checks::target(&waiting.qmp()).expect("fit, memfd included");
        assert_eq!(facts.memory.ram.len(), 2);

        let mut running = BareQemu::with_memory_file(binary, 64, &[]);
        let error = checks::target(&running.qmp()).expect_err("runs");
        let CheckError::Refused { refusals } = error else { panic!("{error:?}") };
        assert_eq!(refusals, [Refusal::NotWaiting { status: "running".into() }]);

        let listen = ["-incoming", "unix:{}/incoming"];
        let mut listening = BareQemu::with_memory_file(binary, 64, &listen);
        let error = checks::target(&listening.qmp()).expect_err("listens already");
        let CheckError::Refused { refusals } = error else { panic!("{error:?}") };
        assert!(matches!(refusals[..], [Refusal::MigrationActive { .. }]), "{refusals:?}");
    });
}

#[test]
fn private_memory_is_refused() {
    with_each_qemu("private_memory_is_refused", |binary| {
        let refused = |args: &[&str]| {
            let error = checks::source(&BareQemu::start(binary, args).qmp()).expect_err("private");
            let CheckError::Refused { refusals } = error else { panic!("{error:?}") };
            refusals
        };
        let plain = refused(&["-m", "64", "-machine", MACHINE]);
        assert!(matches!(&plain[..], [Refusal::Anonymous { name, .. }] if name == "pc.ram"));

        let share_off = refused(&[
            "-m",
            "64",
            "-object",
            "memory-backend-file,id=ram0,mem-path={}/ram,size=64M,share=off",
            "-machine",
            "pc-q35-7.2,memory-backend=ram0",
        ]);
        assert!(matches!(&share_off[..], [Refusal::NotShared { name, .. }] if name == "ram0"));
    });
}

/// Also writes the recordings that the unit tests replay, into the folder that
/// `PAGEFERRY_RECORD` names.
#[test]
fn answers_are_understood_and_recorded() {
    with_each_qemu("answers_are_understood", |binary| {
        let variants: [(&str, &[&str]); 2] =
            [("source", &["-S"]), ("target", &["-incoming", "defer"])];
        for (name, args) in variants {
            let mut qemu = typical(binary, args);
            let qmp = qemu.qmp();
            let recorder = Recorder::new(&qmp);
            let answers = ask(&recorder).expect("ask");
            let recording = recorder.finish();
            let replayed = ask(&recording).expect("replay");
            for side in [Side::Source, Side::Target] {
                assert_eq!(replayed.judge(side, &[]), answers.judge(side, &[]));
            }
            if let Some(folder) = std::env::var_os("PAGEFERRY_RECORD") {
                let text = serde_json::to_string_pretty(&recording).expect("serialise");
                let version = format!("{}.{}", binary.version.major, binary.version.minor);
                let path = std::path::Path::new(&folder).join(format!("{version}-{name}.json"));
                std::fs::write(path, text + "\n").expect("write");
            }
        }
    });
}
