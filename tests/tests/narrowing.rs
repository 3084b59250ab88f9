//! Guests on huge pages that write little of many of them: only what changed is sent again.
#![forbid(unsafe_code)]

use std::thread::sleep;
use std::time::Duration;

use pageferry_ctl::lab::{
    HugePages, HugetlbMount, Memory, Workplace, is_root, one_at_a_time, skip,
};
use pageferry_tests::agents::Ended;
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Slow enough that a round of huge pages takes long, and hashing them next to nothing.
const LINK_MBIT: u64 = 400;

fn assert_moved(what: &str, source: &Ended) -> u64 {
    assert_eq!(source.code, 0, "{}\n{:#}", source.stderr, source.summary());
    let summary = source.summary();
    assert_eq!(summary["verified"], true);
    let mib = |value: &serde_json::Value| value.as_u64().unwrap_or(0) >> 20;
    let narrowing = &summary["narrowing"];
    println!(
        "{what}: {} rounds, {} MiB on the wire of {} populated, {} MiB spared, total {} ms, \
         pause {} ms: {}",
        summary["rounds"],
        mib(&summary["wire_bytes"]),
        mib(&summary["populated_bytes"]),
        mib(&narrowing["spared_bytes"]),
        summary["total_ms"],
        summary["blackout_ms"],
        narrowing["reason"],
    );
    summary["wire_bytes"].as_u64().unwrap_or(0)
}

#[test]
fn a_guest_that_writes_a_little_of_each_huge_page_converges_and_survives_a_cut() -> Outcome {
    let name = "a_guest_that_writes_a_little_of_each_huge_page_converges_and_survives_a_cut";
    if !is_root() {
        skip(name, "needs root for huge pages");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    // Pages all over the memory: within a round of seconds each huge page is dirty.
    spec.params.hot_mib = spec.params.fill_mib;
    spec.params.scattered = true;
    spec.params.pages_per_second = 200;
    let _pages = HugePages::reserve(&workplace, 3 * (spec.memory_mib << 20))?;
    let mount = HugetlbMount::new(&workplace)?;
    spec.memory = Memory::hugetlbfs(mount.path());
    let mut scene = Scene::boot(&workplace, spec)?;
    scene.hosts.shape(LINK_MBIT)?;
    let always = [
        "--verify",
        "--compress",
        "off",
        "--downtime-ms",
        "500",
        "--not-converging",
        "switch-over",
    ];

    let (source, _) = scene.migrate(&[&always[..], &["--narrow", "off"]].concat())?;
    let whole = assert_moved("whole", &source);
    scene.assert_goes_on()?;

    let (source, _) = scene.migrate(&always)?;
    let narrowed = assert_moved("narrowed", &source);
    let spared = source.summary()["narrowing"]["spared_bytes"].as_u64().unwrap_or(0);
    assert!(spared > 32 << 20, "{:#}", source.summary()["narrowing"]);
    assert!(narrowed < whole, "{narrowed} bytes narrowed, {whole} not");
    scene.assert_goes_on()?;

    // What lanes that are gone have brought is not relied upon.
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_patient(&waiting, &always, "30")?;
    source.wait_text("\"event\":\"start\"", SOON)?;
    sleep(Duration::from_millis(1500));
    scene.hosts.cut(true)?;
    sleep(Duration::from_secs(2));
    scene.hosts.cut(false)?;
    let source = source.wait(SOON)?;
    assert_moved("cut", &source);
    assert_eq!(target.wait(SOON)?.code, 0);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    let verified = scene.guest.console().verify(SOON)?;
    assert_eq!(verified.bad, 0, "the guest found bad memory");
    Ok(())
}
