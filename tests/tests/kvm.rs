//! Guests under KVM: its own MMU, its own page tables, notified of each change of protection. Run in
//! a machine of `tests/rdma-vm/kvm`, where KVM is emulated but is KVM.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{
    GUEST_ADDRESS, LabError, Nic, Pinger, TAP, Tick, Workplace, is_root, one_at_a_time, skip,
};
use pageferry_tests::agents::{Ended, MIGRATION_MAX};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Two moves are compared; a pause of a second is short for an emulated processor.
const ARGS: [&str; 4] = ["--verify", "--downtime-ms", "1500", "--not-converging=switch-over"];

/// Whether this is such a machine; said if not.
fn is_kvm(test: &str) -> bool {
    let wanted = std::env::var("PAGEFERRY_LAB_KVM").is_ok_and(|value| value == "1");
    if !wanted || !is_root() {
        skip(test, "needs a KVM that works, and root (tests/rdma-vm/kvm)");
    }
    wanted && is_root()
}

/// A small guest that writes at a rate.
fn spec(pages_per_second: u64) -> Result<pageferry_ctl::lab::QemuSpec, LabError> {
    let mut spec = Scene::spec()?;
    spec.memory_mib = 192;
    (spec.params.fill_mib, spec.params.hot_mib) = (16, 8);
    spec.params.pages_per_second = pages_per_second;
    Ok(spec)
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
    if !is_kvm(name) {
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = Scene::boot(&workplace, spec(600)?)?;
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
        assert_eq!(verified.bad, 0);
    }
    Ok(())
}

/// Refused as it is. With `PAGEFERRY_TRY_VHOST_NET` it is moved under traffic instead, and all
/// memory compared inside the pause: does tracking see what the kernel's backend writes?
#[test]
fn kvm_vhost_net_is_refused_or_shown_to_be_tracked() -> Outcome {
    let name = "kvm_vhost_net_is_refused_or_shown_to_be_tracked";
    if !is_kvm(name) {
        return Ok(());
    }
    if !std::path::Path::new("/dev/vhost-net").exists() {
        skip(name, "needs /dev/vhost-net");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = spec(200)?;
    spec.nic = Some(Nic { tap: TAP.into(), vhost: true });
    let mut scene = Scene::boot(&workplace, spec)?;
    let tries = std::env::var_os("PAGEFERRY_TRY_VHOST_NET").is_some();
    if !tries {
        let (source, _target) = scene.migrate(&ARGS)?;
        assert_eq!(source.code, 3, "{:#}", source.summary());
        let hint = source.summary()["hint"].as_str().unwrap_or_default().to_owned();
        assert!(hint.contains("vhost=off"), "{hint}");
        scene.assert_goes_on()?;
        return Ok(());
    }
    let pinger = Pinger::start(&scene.hosts.lan, GUEST_ADDRESS, Duration::from_millis(10))?;
    for hop in 0..3 {
        let both = scene.migrate(&ARGS)?;
        assert_migrated(&both);
        let summary = both.0.summary();
        println!(
            "hop {hop}: verified, {} rounds, {} bytes",
            summary["rounds"], summary["moved_bytes"]
        );
        scene.assert_goes_on()?;
    }
    let pings = pinger.stop();
    println!("pings {pings:?}");
    Ok(())
}
