//! QEMU's device state, moved between real QEMUs that run their firmware; guest memory is copied
//! file to file while the guest is paused.
#![forbid(unsafe_code)]

mod bare_qemu;

use std::time::{Duration, Instant};

use bare_qemu::{BareQemu, status, with_each_qemu};
use pageferry_ctl::lab::QemuBinary;
use pageferry_ctl::qemu::capabilities::Settings;
use pageferry_ctl::qemu::channel::Channel;
use pageferry_ctl::qemu::checks::{self, Side};
use pageferry_ctl::qemu::device_state::{DeviceStateError, Incoming, Outgoing, PausedBy};
use pageferry_ctl::qemu::runstate::{self, RunState};
use pageferry_ctl::qmp::Qmp;
use serde_json::{Value, json};

const MIB: u64 = 64;

/// Enough for firmware to run and for a state with some devices in it.
const DEVICES: &[&str] = &["-device", "virtio-rng-pci", "-vga", "std", "-smp", "2"];

fn source(binary: &QemuBinary) -> BareQemu {
    let qemu = BareQemu::with_memory_file(binary, MIB, DEVICES);
    // The firmware has set up its devices after some 200 ms.
    std::thread::sleep(Duration::from_millis(500));
    qemu
}

/// Without `-S`: what keeps the target paused is what we tell it.
fn target(binary: &QemuBinary) -> BareQemu {
    BareQemu::with_memory_file(binary, MIB, &[DEVICES, &["-incoming", "defer"]].concat())
}

fn in_20_s() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Passes on what comes, until the end; returns how much it was.
fn pass_on(from: &Channel, to: &Channel) -> u64 {
    let mut bytes = vec![0; 256 << 10];
    let mut count = 0;
    loop {
        match from.read(&mut bytes, in_20_s()) {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                count += read as u64;
                if to.write_all(&bytes[..read], in_20_s()).is_err() {
                    break;
                }
            }
        }
    }
    let _ = to.finish();
    count
}

fn copy_memory(from: &BareQemu, to: &BareQemu) {
    // In place: the target's QEMU has the file mapped.
    let bytes = std::fs::read(from.path("ram")).expect("read");
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(to.path("ram")).expect("open");
    file.write_all_at(&bytes, 0).expect("write");
}

fn settings_of(qmp: &Qmp) -> (Value, Value) {
    let ask = |command: &str| qmp.execute(command, json!({})).expect(command);
    (ask("query-migrate-capabilities"), ask("query-migrate-parameters"))
}

/// Moves and returns how long the guest was paused, without the copy of its memory.
fn move_guest(source: &mut BareQemu, target: &mut BareQemu, paused_by: PausedBy) -> Duration {
    let (from, to) = (source.qmp(), target.qmp());
    let facts = checks::source(&from).expect("fit as a source");
    assert_eq!(facts.memory.ram.len(), 1);
    checks::target(&to).expect("fit as a target");
    let _ = Settings::apply(&from, Side::Source, paused_by).expect("source settings");
    let _ = Settings::apply(&to, Side::Target, paused_by).expect("target settings");
    let (incoming, to_channel) = Incoming::begin(&to).expect("incoming");

    let (mut outgoing, from_channel) = Outgoing::prepare(&from, paused_by).expect("prepare");
    let mut paused = Instant::now();
    if paused_by == PausedBy::Agent {
        runstate::stop(&from).expect("stop");
        let copying = Instant::now();
        copy_memory(source, target);
        paused += copying.elapsed();
    }
    outgoing.begin(&from).expect("begin");
    std::thread::scope(|scope| {
        let state = scope.spawn(|| pass_on(&from_channel, &to_channel));
        let answers = scope.spawn(|| pass_on(&to_channel, &from_channel));
        if paused_by == PausedBy::Qemu {
            let stopped = outgoing.wait_paused(&from, in_20_s()).expect("paused");
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("clock");
            paused = Instant::now() - now.saturating_sub(stopped);
            assert_eq!(status(&from), "finish-migrate");
            let copying = Instant::now();
            copy_memory(source, target);
            paused += copying.elapsed();
            outgoing.resume(&from).expect("resume");
        }
        incoming.wait_loaded(&to, in_20_s()).expect("loaded");
        let loaded = paused.elapsed();
        assert_eq!(status(&to), "paused");
        let sent = outgoing.wait_completed(&from, in_20_s()).expect("completed");
        assert!(sent.own_ram_bytes > 200 << 10, "{sent:?}");
        assert_eq!(status(&from), "postmigrate");
        runstate::cont(&to).expect("cont");
        let running = paused.elapsed();
        assert_eq!(status(&to), "running");
        eprintln!("{paused_by:?}: loaded {loaded:?}, running {running:?}, {sent:?}");
        assert!(state.join().expect("state") > 200 << 10);
        assert!(answers.join().expect("answers") > 0, "the return path is used");
        running
    })
}

#[test]
fn state_moves_whoever_pauses_and_the_target_waits_for_us() {
    with_each_qemu("state_moves", |binary| {
        for paused_by in [PausedBy::Agent, PausedBy::Qemu] {
            let (mut source, mut target) = (source(binary), target(binary));
            let pause = move_guest(&mut source, &mut target, paused_by);
            assert!(pause < Duration::from_secs(5), "{pause:?}");
            // Nothing brings the source's guest back by itself.
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(status(&source.qmp()), "postmigrate");
        }
    });
}

#[test]
fn settings_are_set_back() {
    with_each_qemu("settings_are_set_back", |binary| {
        let mut qemu = BareQemu::with_memory_file(binary, MIB, &["-S"]);
        let qmp = qemu.qmp();
        let theirs = json!({ "capabilities": [
            { "capability": "multifd", "state": true },
            { "capability": "pause-before-switchover", "state": true },
        ]});
        qmp.execute("migrate-set-capabilities", theirs).expect("capabilities");
        qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 12345678 }))
            .expect("parameters");
        let before = settings_of(&qmp);
        let settings = Settings::apply(&qmp, Side::Source, PausedBy::Agent).expect("apply");
        let set = settings_of(&qmp);
        assert_ne!(set, before);
        assert_eq!(set.1["max-bandwidth"], 1u64 << 40);
        settings.restore(&qmp).expect("restore");
        assert_eq!(settings_of(&qmp), before);
    });
}

#[test]
fn cut_channel_leaves_the_source_able_to_run() {
    with_each_qemu("cut_channel", |binary| {
        for paused_by in [PausedBy::Agent, PausedBy::Qemu] {
            let mut source = source(binary);
            let qmp = source.qmp();
            let before = settings_of(&qmp);
            let settings = Settings::apply(&qmp, Side::Source, paused_by).expect("settings");
            let (mut outgoing, channel) = Outgoing::prepare(&qmp, paused_by).expect("prepare");
            if paused_by == PausedBy::Agent {
                runstate::stop(&qmp).expect("stop");
            }
            outgoing.begin(&qmp).expect("begin");
            let mut bytes = vec![0; 4096];
            assert!(channel.read(&mut bytes, in_20_s()).expect("read") > 0);
            channel.close();
            outgoing.cancel(&qmp, in_20_s()).expect("cancel");
            runstate::settle_and_cont(&qmp).expect("cont");
            assert!(RunState::query(&qmp).expect("status").running);
            settings.restore(&qmp).expect("restore");
            assert_eq!(settings_of(&qmp), before);
            // And it can be tried again, with success.
            drop(qmp);
            move_guest(&mut source, &mut target(binary), PausedBy::Agent);
        }
    });
}

#[test]
fn cancel_between_pause_and_device_state_lets_the_guest_run() {
    with_each_qemu("cancel_in_pre_switchover", |binary| {
        let mut source = source(binary);
        let qmp = source.qmp();
        let settings = Settings::apply(&qmp, Side::Source, PausedBy::Qemu).expect("settings");
        let (mut outgoing, channel) = Outgoing::prepare(&qmp, PausedBy::Qemu).expect("prepare");
        outgoing.begin(&qmp).expect("begin");
        std::thread::scope(|scope| {
            let drain = scope.spawn(|| {
                let mut bytes = vec![0; 256 << 10];
                while channel.read(&mut bytes, in_20_s()).is_ok_and(|count| count > 0) {}
            });
            outgoing.wait_paused(&qmp, in_20_s()).expect("paused");
            channel.close();
            outgoing.cancel(&qmp, in_20_s()).expect("cancel");
            drain.join().expect("drain");
        });
        runstate::settle_and_cont(&qmp).expect("cont");
        assert!(RunState::query(&qmp).expect("status").running);
        settings.restore(&qmp).expect("restore");
    });
}

#[test]
fn target_with_other_devices_fails_and_the_source_goes_on() {
    with_each_qemu("target_with_other_devices", |binary| {
        for paused_by in [PausedBy::Agent, PausedBy::Qemu] {
            let mut source = source(binary);
            let args = ["-device", "virtio-balloon-pci", "-incoming", "defer"];
            let mut target = BareQemu::with_memory_file(binary, MIB, &args);
            let (from, to) = (source.qmp(), target.qmp());
            let settings = Settings::apply(&from, Side::Source, paused_by).expect("settings");
            let _ = Settings::apply(&to, Side::Target, paused_by).expect("settings");
            let (incoming, to_channel) = Incoming::begin(&to).expect("incoming");
            let (mut outgoing, from_channel) =
                Outgoing::prepare(&from, paused_by).expect("prepare");
            if paused_by == PausedBy::Agent {
                runstate::stop(&from).expect("stop");
            }
            outgoing.begin(&from).expect("begin");
            std::thread::scope(|scope| {
                scope.spawn(|| pass_on(&from_channel, &to_channel));
                scope.spawn(|| pass_on(&to_channel, &from_channel));
                if paused_by == PausedBy::Qemu && outgoing.wait_paused(&from, in_20_s()).is_ok() {
                    let _ = outgoing.resume(&from);
                }
                let error = incoming.wait_loaded(&to, in_20_s()).expect_err("other devices");
                eprintln!("{paused_by:?}: {error}");
                assert!(
                    matches!(
                        error,
                        DeviceStateError::TargetExited { .. } | DeviceStateError::Failed { .. }
                    ),
                    "{error:?}"
                );
                let error = outgoing.wait_completed(&from, in_20_s()).expect_err("told");
                eprintln!("{paused_by:?}: {error}");
                from_channel.close();
                to_channel.close();
            });
            outgoing.cancel(&from, in_20_s()).expect("cancel");
            runstate::settle_and_cont(&from).expect("cont");
            assert!(RunState::query(&from).expect("status").running);
            settings.restore(&from).expect("restore");
        }
    });
}
