//! Guests under KVM: its own MMU, its own page tables, notified of each change of protection. Run in
//! a machine of `tests/rdma-vm/kvm`, where KVM is emulated but is KVM.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{
    GUEST_ADDRESS, LabError, Nic, Pinger, TAP, Tick, Workplace, is_root, one_at_a_time, skip,
};
use pageferry_tests::agents::{Ended, MIGRATION_MAX, is_kvm};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Two moves are compared; a pause of a second is short for an emulated processor.
const ARGS: [&str; 4] = ["--verify", "--downtime-ms", "1500", "--not-converging=switch-over"];

/// Whether this is such a machine; said if not.
fn is_here(test: &str) -> bool {
    let is_here = is_kvm() && is_root();
    if !is_here {
        skip(test, "needs a KVM that works, and root (tests/rdma-vm/kvm)");
    }
    is_here
}

/// How often this QEMU's processors have left the guest, and found a page missing, so far.
fn kvm_counters(pid: u32) -> (u64, u64) {
    let vms = std::fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let of_pid = format!("{pid}-");
    let folder = vms.map(|entry| entry.path()).find(|path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&of_pid))
    });
    let count = |name: &str| {
        let text = std::fs::read_to_string(folder.as_ref()?.join(name)).ok()?;
        text.trim().parse().ok()
    };
    (count("exits").unwrap_or(0), count("pf_taken").unwrap_or(0))
}

/// Pages that the guest writes while nobody moves it.
fn pages_per_second(scene: &Scene) -> Result<f64, LabError> {
    let (since, first) = (Instant::now(), scene.guest.console().wait_tick(SOON)?);
    let enough = |tick: &Tick| tick.n >= first.n + 20;
    let last = scene.guest.console().wait_tick_where("twenty ticks", SOON, enough)?;
    Ok((last.writes - first.writes) as f64 / since.elapsed().as_secs_f64())
}

fn assert_migrated((source, target): &(Ended, Ended)) {
    let summary = source.summary();
    let codes = (source.code, target.code);
    assert_eq!(codes, (0, 0), "{} {}\n{summary:#}", source.stderr, target.stderr);
    assert_eq!(summary["verified"], true, "{summary:#}");
}

#[test]
fn kvm_scans_of_one_and_of_two_phases_lose_no_page_and_are_compared() -> Outcome {
    let name = "kvm_scans_of_one_and_of_two_phases_lose_no_page_and_are_compared";
    if !is_here(name) {
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.params.pages_per_second = 600;
    let mut scene = Scene::boot(&workplace, spec)?;
    for phases in ["one-phase", "two-phase"] {
        let pid = scene.guest.pid();
        let alone = pages_per_second(&scene)?;
        let (before, writes) = (kvm_counters(pid), scene.guest.console().wait_tick(SOON)?);
        let since = Instant::now();
        let waiting = scene.waiting(|_| {})?;
        let args = [&ARGS[..], &["--scan", phases, "--rounds-max", "12"]].concat();
        let (source, target) = scene.agents(&waiting, &args)?;
        // The source's QEMU is still there when its agent has let go of it: paused, with counters.
        let source = source.wait(MIGRATION_MAX)?;
        let (after, took) = (kvm_counters(pid), since.elapsed());
        let last = scene.guest.console().last_tick().unwrap_or(writes);
        let target = target.wait(SOON)?;
        let summary = source.summary().clone();
        println!(
            "{phases}: {} rounds, {} pages written in {:.1} s ({:.0} a second, {alone:.0} before), \
             scans {}; exits {}, faults {}; pause {} ms",
            summary["rounds"],
            last.writes - writes.writes,
            took.as_secs_f64(),
            (last.writes - writes.writes) as f64 / took.as_secs_f64(),
            summary["latencies"].as_array().and_then(|all| all.last()).unwrap_or(&summary["none"]),
            after.0 - before.0,
            after.1 - before.1,
            summary["blackout_ms"],
        );
        assert_migrated(&(source, target));
        assert!(after.0 > before.0, "KVM's counters can't be read: is debugfs mounted?");
        scene.guest = waiting;
        scene.away = !scene.away;
        scene.assert_goes_on()?;
        let verified = scene.guest.console().verify(SOON)?;
        assert_eq!(verified.bad, 0, "the guest found bad memory");
    }
    Ok(())
}

/// What the kernel's own network backend writes is tracked: all memory is compared inside the pause,
/// after rounds in which packets arrived and were answered.
#[test]
fn kvm_vhost_net_under_traffic_is_tracked() -> Outcome {
    let name = "kvm_vhost_net_under_traffic_is_tracked";
    if !is_here(name) {
        return Ok(());
    }
    if !std::path::Path::new("/dev/vhost-net").exists() {
        skip(name, "needs /dev/vhost-net");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.nic = Some(Nic { tap: TAP.into(), vhost: true });
    let mut scene = Scene::boot(&workplace, spec)?;
    for hop in 0..VHOST_HOPS {
        assert!(has_open(scene.guest.pid(), "/dev/vhost-net")?, "QEMU does without vhost-net");
        let pinger = Pinger::start(&scene.hosts.lan, GUEST_ADDRESS, Duration::from_millis(10))?;
        let both = scene.migrate(&ARGS)?;
        let pings = pinger.stop();
        assert_migrated(&both);
        let summary = both.0.summary();
        println!(
            "hop {hop}: verified, {} rounds, {} bytes, pause {} ms, pings {pings:?}",
            summary["rounds"], summary["moved_bytes"], summary["blackout_ms"]
        );
        assert!(pings.answered >= ANSWERED_MIN, "there was no traffic to be tracked: {pings:?}");
        scene.assert_goes_on()?;
    }
    Ok(())
}

/// There and back.
const VHOST_HOPS: u32 = 2;
/// An emulated guest answers hundreds while it moves. Each is a packet in its memory, and in a ring.
const ANSWERED_MIN: u64 = 50;

/// Whether a process has a device open; its name may begin with a root that is not ours.
fn has_open(pid: u32, device: &str) -> std::io::Result<bool> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
    let mut links = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    Ok(links.any(|link| link.to_string_lossy().ends_with(device)))
}
