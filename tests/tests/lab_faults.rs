//! The guest program finds what a faulty migration would do: memory that fell back to an older
//! state, whether the processor or the disk had written it. And the slow disk is slow.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::disk_image::{self, block_is};
use pageferry_ctl::lab::{
    Disk, GuestAssets, Qemu, QemuSpec, SlowDisk, Workplace, is_root, one_at_a_time, skip,
};
use pageferry_ctl::qmp::Qmp;
use serde_json::json;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;

fn word(page: &[u8], index: usize) -> u64 {
    page[index * 8..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Puts pages back that `lost` picks by their content before and after; returns how many.
fn forget(
    memory: &Path,
    before: &[u8],
    count: usize,
    lost: impl Fn(&[u8], &[u8]) -> bool,
) -> std::io::Result<usize> {
    let after = std::fs::read(memory)?;
    let file = OpenOptions::new().write(true).open(memory)?;
    let pages = before.chunks_exact(PAGE).zip(after.chunks_exact(PAGE)).enumerate();
    let picked: Vec<_> = pages.filter(|(_, (old, new))| old != new && lost(old, new)).collect();
    // From the middle: the first ones may be read into next, before anyone looks.
    let picked: Vec<_> = picked.iter().skip(picked.len() / 2).take(count).collect();
    for (index, (old, _)) in &picked {
        file.write_all_at(old, (index * PAGE) as u64)?;
    }
    Ok(picked.len())
}

#[test]
fn memory_that_fell_back_is_found() -> Outcome {
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let image = workplace.file("disk.raw");
    disk_image::create(&image, 64, 1)?;
    let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
    spec.memory_mib = 256;
    spec.disk = Some(Disk { image, aio: "threads" });
    spec.params.disk_readers = 1;
    spec.params.disk_scratch_mib = 1;
    let mut guest = Qemu::launch(&workplace, "guest", &spec)?;
    guest.wait_ready(BOOT)?;
    let memory = guest.memory_file().ok_or("memory without a name")?.to_owned();
    let busy = |tick: &pageferry_ctl::lab::Tick| tick.disk_reads > 300 && tick.disk_writes > 10;
    guest.console().wait_tick_where("some disk reads", SOON, busy)?;
    let clean = guest.console().verify(SOON)?;
    assert_eq!((clean.bad, clean.disk_bad), (0, 0), "the guest found bad memory");
    assert!(clean.slots > 200, "{clean:?}");

    let qmp = Qmp::connect(guest.qmp())?;
    qmp.execute("stop", json!({}))?;
    let before = std::fs::read(&memory)?;
    qmp.execute("cont", json!({}))?;
    let reads = guest.console().wait_tick(SOON)?.disk_reads;
    guest
        .console()
        .wait_tick_where("more disk reads", SOON, |tick| tick.disk_reads > reads + 40)?;
    qmp.execute("stop", json!({}))?;
    let from_disk = forget(&memory, &before, 2, |old, new| {
        block_is(new, word(new, 0), 0) && block_is(old, word(old, 0), 0)
    })?;
    let from_processor = forget(&memory, &before, 3, |old, new| {
        let same_page = word(old, 0) == word(new, 0) && word(new, 0) < 16 * 256;
        same_page && word(old, 1) < word(new, 1) && word(new, 1) < 1 << 20
    })?;
    assert_eq!((from_disk, from_processor), (2, 3));
    qmp.execute("cont", json!({}))?;
    // Found by the writers and readers themselves, without being asked.
    let found = guest.console().wait_tick_where("the loss to be found", SOON, |tick| {
        tick.bad >= 3 && tick.disk_bad >= 1
    })?;
    assert_eq!(found.bad, 3, "{found:?}");
    Ok(())
}

#[test]
fn a_slow_disk_keeps_requests_in_flight() -> Outcome {
    const BYTES_PER_SECOND: u64 = 1 << 20;
    if !is_root() {
        skip("a_slow_disk_keeps_requests_in_flight", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let image = workplace.file("disk.raw");
    disk_image::create(&image, 64, 0)?;
    for aio in ["native", "io_uring", "threads"] {
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        spec.memory_mib = 256;
        spec.disk = Some(Disk { image: image.clone(), aio });
        spec.params.disk_readers = 2;
        spec.params.disk_request_kib = 128;
        let mut guest = Qemu::launch(&workplace, aio, &spec)?;
        guest.wait_ready(BOOT)?;
        let fast = guest.console().wait_tick_where("reads", SOON, |tick| tick.disk_reads > 100)?;
        let slow = match SlowDisk::throttle(&workplace, guest.pid(), &image, BYTES_PER_SECOND) {
            Ok(slow) => slow,
            Err(error) => {
                skip("a_slow_disk_keeps_requests_in_flight", error);
                return Ok(());
            }
        };
        std::thread::sleep(Duration::from_millis(500));
        let (first, started) = (guest.console().wait_tick(SOON)?, Instant::now());
        std::thread::sleep(Duration::from_secs(3));
        let last = guest.console().wait_tick(SOON)?;
        let reads = last.disk_reads - first.disk_reads;
        let rate = (reads * 128 * 1024) as f64 / started.elapsed().as_secs_f64();
        println!(
            "{aio}: {} reads before tick {}, then {reads} in 3 s: {rate:.0} B/s",
            fast.disk_reads, fast.n
        );
        assert!(reads > 0 && rate < 1.5 * BYTES_PER_SECOND as f64, "{aio}: {rate} B/s");
        assert_eq!((last.bad, last.disk_bad), (0, 0), "the guest found bad memory");
        drop(slow);
        let n = last.disk_reads + 200;
        guest.console().wait_tick_where("a fast disk again", SOON, |tick| tick.disk_reads > n)?;
    }
    Ok(())
}
