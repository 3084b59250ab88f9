//! Memory that a guest gives back while it moves.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{Qemu, Workplace, is_root, one_at_a_time, skip};
use pageferry_ctl::qmp::Qmp;
use pageferry_tests::scene::{SOON, Scene};
use serde_json::json;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn allocated_mib(file: Option<&Path>) -> u64 {
    file.and_then(|file| file.metadata().ok()).map_or(0, |it| (it.blocks() * 512) >> 20)
}

/// Has the balloon leave the guest so much, and waits until it does.
fn inflate_to(guest: &Qemu, mib: u64) -> Outcome {
    let qmp = Qmp::connect(guest.spare_qmp())?;
    let wanted = json!({ "value": mib << 20 });
    qmp.execute("balloon", wanted.clone())?;
    let deadline = Instant::now() + SOON;
    loop {
        let now = qmp.execute("query-balloon", json!({}))?;
        if now["actual"] == wanted["value"] {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "the balloon leaves {now}, not {mib} MiB");
        sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_a_balloon_takes_on_the_way_is_a_hole_at_the_target() -> Outcome {
    let name = "what_a_balloon_takes_on_the_way_is_a_hole_at_the_target";
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.params.hot_mib = 2;
    spec.params.pages_per_second = 100;
    // Noise in memory that is free: what the balloon takes holds something, here and at the target.
    spec.params.spare_mib = 96;
    spec.extra = ["-device", "virtio-balloon-pci,id=balloon"].map(str::to_owned).to_vec();
    let mut scene = Scene::boot(&workplace, spec)?;
    let before = allocated_mib(scene.guest.memory_file());
    let waiting = scene.waiting(|_| {})?;
    // Held after the first pass, until the guest has given back what it took to the target.
    let go = workplace.file("go");
    let held = format!("scanning:120000:{}", go.display());
    let always = ["--verify", "--compress", "off", "--downtime-ms", "1000"];
    let (source, target) = scene.agents_held(&waiting, &always, &held)?;
    source.wait_error("held in", SOON)?;
    let sent = allocated_mib(waiting.memory_file());
    inflate_to(&scene.guest, 176)?;
    let least = allocated_mib(scene.guest.memory_file());
    fs::write(&go, "")?;
    let source = source.wait(SOON)?;
    let (at_source, at_target) =
        (allocated_mib(scene.guest.memory_file()), allocated_mib(waiting.memory_file()));
    let summary = source.summary();
    let mib = |name: &str| summary[name].as_u64().unwrap_or(0) >> 20;
    println!(
        "{before} MiB at the source and {sent} at the target before, {least} at the source with the \
         balloon; {at_source} at the source and {at_target} at the target after; {} MiB moved, {} \
         zero, {} of them holes, {} rounds",
        mib("moved_bytes"),
        mib("zero_bytes"),
        mib("hole_bytes"),
        summary["rounds"],
    );
    assert_eq!(source.code, 0, "{}\n{:#}", source.stderr, summary);
    assert_eq!(summary["verified"], true);
    assert!(least + 64 < before && at_target + 64 < sent, "the balloon took nothing");
    assert!(mib("hole_bytes") > 64, "{summary:#}");
    // Moving it has not taken again what was given back, on neither side.
    assert!(at_source < least + 8, "{at_source} MiB at the source, {least} before");
    assert!(at_target < at_source + 8, "{at_target} MiB at the target, {at_source} at the source");
    assert_eq!(target.wait(SOON)?.code, 0);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    // The balloon has come along, and gives the guest its memory again.
    inflate_to(&scene.guest, scene.spec.memory_mib)?;
    scene.assert_goes_on()?;
    let bad = scene.guest.console().verify(SOON)?.bad;
    assert_eq!(bad, 0, "the guest found bad memory");
    Ok(())
}
