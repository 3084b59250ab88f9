//! Real guests that write hard, moved live by the real agents between two hosts.
#![forbid(unsafe_code)]

use pageferry_ctl::lab::{
    Disk, HugePages, HugetlbMount, Memory, Pinger, QemuBinary, QemuSpec, Workplace, disk_image,
    is_root, left_behind, one_at_a_time, skip,
};
use pageferry_tests::agents::Ended;
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Two emulated guests on two busy cores write huge pages faster than the default allows for.
const DOWNTIME_MS: &str = "400";

fn assert_migrated(hop: u32, source: &Ended, target: &Ended) {
    assert_eq!(source.code, 0, "hop {hop}: {}\n{:#}", source.stderr, source.summary());
    assert_eq!(target.code, 0, "hop {hop}: {}", target.stderr);
    let summary = source.summary();
    assert_eq!(summary["outcome"], "migrated");
    assert_eq!(summary["guest_running_on"], "target");
    assert_eq!(summary["verified"], true);
    println!(
        "hop {hop}: {} rounds, {} MiB moved, blackout {} ms of which {} verifying, predicted {}",
        summary["rounds"],
        summary["moved_bytes"].as_u64().unwrap_or(0) >> 20,
        summary["blackout_ms"],
        summary["blackout_parts_ms"]["verify"],
        summary["blackout_predicted_ms"],
    );
}

/// Back and forth, `hops` times, with a disk under direct I/O and a network that is pinged all the
/// while.
fn move_live(mut spec: QemuSpec, hops: u32, workplace: &std::sync::Arc<Workplace>) -> Outcome {
    let image = workplace.file("disk.img");
    disk_image::create(&image, 16, 4)?;
    spec.disk = Some(Disk { image, aio: "threads" });
    spec.params.disk_readers = 1;
    spec.params.disk_scratch_mib = 4;
    let mut scene = Scene::boot(workplace, spec)?;
    let pinger = Pinger::start(
        &scene.hosts.lan,
        pageferry_ctl::lab::GUEST_ADDRESS,
        std::time::Duration::from_millis(100),
    )?;
    let mut before = scene.assert_goes_on()?;
    for hop in 0..hops {
        let (source, target) = scene.migrate(&["--verify", "--downtime-ms", DOWNTIME_MS])?;
        assert_migrated(hop, &source, &target);
        assert!(source.event("drain").is_some(), "a disk with direct I/O needs a drain point");
        let tick = scene.assert_goes_on()?;
        assert!(tick.n > before.n && tick.writes > before.writes, "counters go on");
        assert!(tick.disk_reads > before.disk_reads, "the disk is read on");
        scene.assert_clean()?;
        before = tick;
    }
    let verified = scene.guest.console().verify(SOON)?;
    assert_eq!((verified.bad, verified.disk_bad), (0, 0), "the guest found bad memory");
    let pings = pinger.stop();
    println!("pings: {pings:?}");
    // A ping that comes in while the guest stands still may be lost with its tap's queue.
    assert!(pings.lost() <= u64::from(hops) * 3, "{pings:?}");
    Ok(())
}

#[test]
fn a_guest_on_tmpfs_moves_live_ten_times() -> Outcome {
    if !is_root() {
        skip("a_guest_on_tmpfs_moves_live_ten_times", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    move_live(Scene::spec()?, 10, &Workplace::new()?)
}

#[test]
fn a_guest_on_hugetlbfs_moves_live_ten_times() -> Outcome {
    if !is_root() {
        skip("a_guest_on_hugetlbfs_moves_live_ten_times", "needs root for huge pages");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    // Whole huge pages are dirty when one page of them is: write less of them.
    spec.params.pages_per_second = 500;
    let _pages = HugePages::reserve(&workplace, 3 * (spec.memory_mib << 20))?;
    let mount = HugetlbMount::new(&workplace)?;
    spec.memory = Memory::hugetlbfs(mount.path());
    move_live(spec, 10, &workplace)
}

/// QEMU rounds what it maps up to the huge page; on 4 KiB pages any even number of them is whole.
#[test]
fn a_guest_whose_memory_ends_within_a_huge_page_moves() -> Outcome {
    let name = "a_guest_whose_memory_ends_within_a_huge_page_moves";
    if !is_root() {
        skip(name, "needs root for huge pages");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let mut spec = Scene::spec()?;
    spec.params.pages_per_second = 500;
    {
        let workplace = Workplace::new()?;
        let _pages = HugePages::reserve(&workplace, (2 * (spec.memory_mib + 2)) << 20)?;
        let mount = HugetlbMount::new(&workplace)?;
        let (memory, memory_odd_bytes) = (Memory::hugetlbfs(mount.path()), 1 << 20);
        move_live(QemuSpec { memory, memory_odd_bytes, ..spec.clone() }, 1, &workplace)?;
    }
    move_live(QemuSpec { memory_odd_bytes: 8192, ..spec }, 1, &Workplace::new()?)
}

#[test]
fn a_guest_moves_live_on_the_other_qemu_and_its_memfd_is_refused_there() -> Outcome {
    let name = "a_guest_moves_live_on_the_other_qemu_and_its_memfd_is_refused_there";
    let binary = match QemuBinary::other() {
        Ok(binary) if is_root() => binary,
        Ok(_) => {
            skip(name, "needs root for namespaces");
            return Ok(());
        }
        Err(error) => {
            skip(name, error);
            return Ok(());
        }
    };
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.binary = binary;
    move_live(spec.clone(), 2, &workplace)?;

    spec.memory = Memory::Memfd { hugetlb: false, share: true };
    let workplace = Workplace::new()?;
    let mut scene = Scene::boot(&workplace, spec)?;
    let (source, _target) = scene.migrate(&[])?;
    let ignores_memfd =
        scene.spec.binary.version >= pageferry_ctl::qmp::Version { major: 8, minor: 1, micro: 0 };
    if ignores_memfd {
        assert_eq!(source.code, 3, "{}", source.stderr);
        let reason = source.summary()["reason"].as_str().unwrap_or_default().to_owned();
        assert!(reason.contains("memfd"), "{reason}");
        assert!(source.summary()["hint"].as_str().is_some_and(|hint| !hint.is_empty()));
    } else {
        assert_eq!(source.code, 0, "{}", source.stderr);
    }
    scene.assert_goes_on()?;
    assert!(left_behind(scene.guest.pid())?.is_empty());
    Ok(())
}
