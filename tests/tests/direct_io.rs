//! Direct I/O in flight escapes write tracking: without a drain point the guest's memory is wrong
//! after the move, with one it never is. On a slowed disk, where requests are in flight for long.
//!
//! ```text
//!   request pins its pages    scan protects them again     the disk answers
//!   (seen as a write)         and they are moved           (seen by nobody)
//! ```
//! The block layer's throttle holds requests in exactly that gap. QEMU's own would not do: it
//! delays a request before the kernel has pinned anything.
#![forbid(unsafe_code)]

use pageferry_ctl::lab::{Disk, SlowDisk, Workplace, disk_image, is_root, one_at_a_time, skip};
use pageferry_tests::agents::is_kvm;
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const NAME: &str = "direct_io_in_flight_is_lost_without_a_drain_point_and_never_with_one";
/// A 64 KiB request takes an eighth of a second at this, and four of them are always waiting.
const SLOW_BYTES_PER_SECOND: u64 = 512 << 10;
const READERS: u32 = 4;
/// Moves with drain points; none may lose anything.
const DRAINED_MOVES: u32 = 3;
/// Moves without: one of them has to lose something, and each is expected to.
const UNDRAINED_MOVES_MAX: u32 = 4;

/// Moves the guest while its disk is slow; how often it has found bad memory by then.
///
/// At the target the disk is fast again, and buffers are soon read into anew. The guest checks each
/// right before that, and counts: the counter, not what is bad at the end, knows of all losses.
fn move_on_a_slow_disk(
    workplace: &std::sync::Arc<Workplace>,
    scene: &mut Scene,
    more: &[&str],
) -> Result<u64, Box<dyn std::error::Error>> {
    let image = scene.spec.disk.as_ref().map(|disk| disk.image.clone()).ok_or("no disk")?;
    let slow = SlowDisk::throttle(workplace, scene.guest.pid(), &image, SLOW_BYTES_PER_SECOND)?;
    // In flight from before tracking is armed.
    let now = scene.guest.console().wait_tick(SOON)?;
    scene.guest.console().wait_tick_where("ticks", SOON, |tick| tick.n > now.n + 5)?;
    let mut args = vec!["--downtime-ms", "400"];
    if is_kvm() {
        args = vec!["--downtime-ms", "2000", "--rounds-max", "12", "--not-converging=switch-over"];
    }
    args.extend(more);
    let (source, target) = scene.migrate(&args)?;
    assert_eq!((source.code, target.code), (0, 0), "{} {}", source.stderr, target.stderr);
    assert_eq!(source.event("drain").is_some(), more.is_empty(), "{:#}", source.summary());
    drop(slow);
    // Every buffer has been read into anew when as many reads are done as there are buffers.
    let verified = scene.guest.console().verify(SOON)?;
    let tick = scene.guest.console().wait_tick(SOON)?;
    let all = tick.disk_reads + verified.slots;
    let tick =
        scene.guest.console().wait_tick_where("every buffer to be reused", SOON, |tick| {
            tick.disk_reads > all || tick.disk_bad > 0
        })?;
    assert_eq!(tick.bad, 0, "what the processor writes is always tracked");
    Ok(tick.disk_bad)
}

#[test]
fn direct_io_in_flight_is_lost_without_a_drain_point_and_never_with_one() -> Outcome {
    if !is_root() {
        skip(NAME, "needs root for namespaces and a slowed disk");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    let image = workplace.file("disk.img");
    disk_image::create(&image, 32, 0)?;
    spec.disk = Some(Disk { image: image.clone(), aio: "native" });
    spec.params.disk_readers = READERS;
    spec.params.disk_keep_mib = 8;
    let mut scene = Scene::boot(&workplace, spec)?;
    let busy = |tick: &pageferry_ctl::lab::Tick| tick.disk_reads > 200;
    scene.guest.console().wait_tick_where("every buffer to be read into", SOON, busy)?;
    // A machine whose disks can't be slowed can't show anything.
    if let Err(error) = SlowDisk::throttle(&workplace, scene.guest.pid(), &image, 1 << 30) {
        skip(NAME, error);
        return Ok(());
    }
    for hop in 0..DRAINED_MOVES {
        let lost = move_on_a_slow_disk(&workplace, &mut scene, &[])?;
        assert_eq!(lost, 0, "hop {hop}: with a drain point nothing is lost");
    }
    for hop in 1..=UNDRAINED_MOVES_MAX {
        let lost = move_on_a_slow_disk(&workplace, &mut scene, &["--unsafe-no-drain"])?;
        println!("without a drain point, move {hop}: {lost} looks at buffers found bad memory");
        if lost > 0 {
            return Ok(());
        }
    }
    panic!("the disk was not slow enough to show the loss");
}
