//! Memory to memory through real lanes on loopback: every byte arrives, in every combination.

mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pageferry_datapath::codec::Codec;
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::holes::HoleLook;
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::lane::{LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::work::RoundWork;
use pageferry_datapath::zero;
use pageferry_uring::plan::{ConnectPlan, HolePlan, NarrowingWish, PackingWish, PathWish};
use support::{Session, extent, fill, fill_thirds, memory_of, next, same};

const SIZES: [u64; 2] = [24 << 20, 4 << 20];

fn move_between(source_path: PathWish, target_path: PathWish, huge: bool) {
    move_packed(source_path, target_path, huge, PackingWish::Not("not in this test".into()));
}

/// The same, compressed; what the source's lanes counted.
fn move_packed(
    source_path: PathWish,
    target_path: PathWish,
    huge: bool,
    packing: PackingWish,
) -> Vec<LaneStats> {
    let guests = (memory_of(&SIZES, huge), memory_of(&SIZES, huge));
    move_with((source_path, target_path), guests, |plan| plan.packing = packing)
}

/// The same, by a plan that `change` adapts.
fn move_with(
    paths: (PathWish, PathWish),
    guests: (GuestMemory, GuestMemory),
    change: impl FnOnce(&mut ConnectPlan),
) -> Vec<LaneStats> {
    let mut packs = false;
    let session = Session::open(2, guests, paths, |plan| {
        change(plan);
        packs = !matches!(plan.packing, PackingWish::Not(_));
    });
    let Session { from, to, mut pool, targets, at_source, at_target } = session;
    assert_eq!(pool.alive(), 2);
    let mut seed = 1u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut total = 0;
    for round in 0..12 {
        let extents: Vec<_> = if round == 0 {
            SIZES.iter().enumerate().map(|(i, &bytes)| extent(i as u16, 0, bytes)).collect()
        } else {
            (0..random(300))
                .map(|_| {
                    let region = random(2);
                    let pages = SIZES[region as usize] / 4096;
                    let at = random(pages);
                    let len = (1 + random(40)).min(pages - at);
                    extent(region as u16, at * 4096, len * 4096)
                })
                .collect()
        };
        for (index, &e) in extents.iter().enumerate() {
            let region = support::region(&from, usize::from(e.region.0));
            match packs && index % 3 < 2 {
                true => fill_thirds(region, e, round),
                false => fill(region, e, round),
            }
            // Zero throughout, or from its second page on.
            match index % 4 {
                1 => zero::clear(&from, e).expect("inside"),
                2 if e.len > 4096 => {
                    zero::clear(&from, extent(e.region.0, e.offset + 4096, e.len - 4096))
                        .expect("inside");
                }
                _ => {}
            }
        }
        total += extents.iter().map(|e| e.len).sum::<u64>();
        pool.move_round(Arc::new(RoundWork::new(RoundIndex(round as u32), extents)));
        for events in [&at_source, &at_target] {
            for _ in 0..2 {
                let event = next(events);
                assert!(
                    matches!(event, LaneEvent::Placed { round: r, .. } if r.0 == round as u32),
                    "{event:?}"
                );
            }
        }
        assert!(same(&from, &to), "round {round}");
    }
    let (moved, zero) = (pool.moved_bytes(), pool.zero_bytes());
    assert!(zero > 0, "zero pages were not told apart");
    let stats = pool.close(false);
    let spared = stats.iter().map(|lane| lane.narrowing.spared_bytes).sum::<u64>();
    assert_eq!(moved + zero + spared, total);
    let sums = |stats: &[LaneStats]| {
        let sum = |of: fn(&LaneStats) -> u64| stats.iter().map(of).sum::<u64>();
        (sum(|lane| lane.moved_bytes), sum(|lane| lane.zero_bytes))
    };
    assert_eq!(sums(&stats), (moved, zero));
    for _ in 0..2 {
        assert!(matches!(next(&at_target), LaneEvent::Closed { .. }));
    }
    let target_stats: Vec<_> = targets.into_iter().map(|lane| lane.finish()).collect();
    assert_eq!(sums(&target_stats), (moved, zero));
    assert!(at_source.try_recv().is_err(), "an event after the close");
    stats
}

/// What is punched between two rounds is a hole at the target, if it takes holes; and nothing that
/// is a hole is populated on either side by being sent.
fn move_holes(huge: bool, punches: bool) {
    use std::os::unix::fs::MetadataExt;
    let page_bytes = if huge { support::HUGE_PAGE_BYTES } else { 4096 };
    let pages = 12;
    let guests = (memory_of(&[pages * page_bytes], huge), memory_of(&[pages * page_bytes], huge));
    let look = Arc::new(HoleLook::new(&guests.0, true).expect("the kernel tells"));
    let session = Session::open(2, guests, (PathWish::Auto, PathWish::Auto), |plan| {
        plan.holes = Some(HolePlan { look: Arc::clone(&look), punches });
    });
    let Session { from, to, mut pool, targets, at_source, at_target } = session;
    let all = extent(0, 0, pages * page_bytes);
    fill(support::region(&from, 0), all, 1);
    let there = |memory: &GuestMemory| {
        let file = memory.regions()[0].file().try_clone_to_owned().expect("dup");
        std::fs::File::from(file).metadata().expect("fstat").blocks() * 512
    };
    // It does not read holes, which would populate them.
    let digest =
        |memory| MemoryDigest::of_memory(memory, 2, &AtomicBool::new(false)).expect("read");
    let mut expected = pages;
    for (round, punched) in [(0, 0..0), (1, 2..5), (2, 7..11)] {
        expected -= punched.end - punched.start;
        for page in punched {
            support::region(&from, 0).punch(page * page_bytes, page_bytes).expect("punch");
        }
        pool.move_round(Arc::new(RoundWork::new(RoundIndex(round), [all])));
        for events in [&at_source, &at_target] {
            for _ in 0..2 {
                let event = next(events);
                assert!(matches!(event, LaneEvent::Placed { .. }), "{event:?}");
            }
        }
        assert_eq!(there(&from), expected * page_bytes, "sending populated something");
        let at_target = if punches { expected } else { pages };
        assert_eq!(there(&to), at_target * page_bytes);
        assert_eq!(digest(&from), digest(&to), "round {round}");
    }
    let told: u64 = look.take_told().iter().map(|hole| hole.len).sum();
    assert_eq!(told, if punches { (3 + 7) * page_bytes } else { 0 });
    let holes = pool.close(false).iter().map(|lane| lane.hole_bytes).sum::<u64>();
    assert_eq!(holes, told);
    let taken = targets.into_iter().map(|lane| lane.finish().hole_bytes).sum::<u64>();
    assert_eq!(taken, told);
}

#[test]
fn what_is_punched_on_the_way_becomes_a_hole_or_zeros() {
    move_holes(false, true);
    move_holes(false, false);
}

#[test]
fn punched_huge_pages_become_holes_or_zeros() {
    let name = "punched_huge_pages_become_holes_or_zeros";
    let Some(_pages) = support::HugePages::reserve(name, 2 * 12 * 2) else { return };
    move_holes(true, true);
    move_holes(true, false);
}

#[test]
fn packed_memory_arrives_as_it_was_and_is_less_on_the_way() {
    let zstd = Codec::Zstd { level: 3 };
    for (source, target, codec) in [
        (PathWish::Plain, PathWish::Uring, Codec::Lz4),
        (PathWish::Uring, PathWish::Plain, zstd),
        (PathWish::Uring, PathWish::Uring, Codec::Lz4),
    ] {
        let stats = move_packed(source, target, false, PackingWish::Always(codec));
        let sum = |of: fn(&LaneStats) -> u64| stats.iter().map(of).sum::<u64>();
        let (raw, packed) = (sum(|s| s.packing.raw_bytes), sum(|s| s.packing.packed_bytes));
        assert!(raw * 2 > packed * 3, "{codec}: {raw} became {packed}");
        assert!(sum(|s| s.wire_bytes) < sum(|s| s.moved_bytes), "{codec}");
        assert!(stats.iter().all(|s| s.packing.codec == Some(codec)));
    }
}

#[test]
fn lanes_that_decide_for_themselves_move_every_byte() {
    let codecs = vec![Codec::Lz4, Codec::Zstd { level: 1 }];
    for path in [PathWish::Plain, PathWish::Uring] {
        let stats = move_packed(path, path, false, PackingWish::Auto(codecs.clone()));
        assert!(stats.iter().all(|lane| !lane.packing.reason.is_empty()));
    }
}

#[test]
fn plain_to_plain() {
    move_between(PathWish::Plain, PathWish::Plain, false);
}

#[test]
fn plain_to_uring() {
    move_between(PathWish::Plain, PathWish::Uring, false);
}

#[test]
fn uring_to_plain() {
    move_between(PathWish::Uring, PathWish::Plain, false);
}

#[test]
fn uring_to_uring() {
    move_between(PathWish::Uring, PathWish::Uring, false);
}

#[test]
fn hugetlb_memory() {
    let name = "hugetlb_memory";
    let pages = 2 * SIZES.iter().sum::<u64>() / support::HUGE_PAGE_BYTES;
    let Some(_pages) = support::HugePages::reserve(name, pages) else { return };
    for path in [PathWish::Plain, PathWish::Uring] {
        move_between(path, path, true);
        for packing in
            [PackingWish::Not("not in this test".into()), PackingWish::Always(Codec::Lz4)]
        {
            let guests = (memory_of(&SIZES, true), memory_of(&SIZES, true));
            let stats = move_with((path, path), guests, |plan| {
                plan.narrowing = NarrowingWish::Always;
                plan.packing = packing.clone();
            });
            // Extents overlap: some pages are sent again as they were.
            let hashed = stats.iter().map(|lane| lane.narrowing.hashed_bytes).sum::<u64>();
            assert!(hashed > SIZES[0], "{hashed} bytes were looked at");
            assert!(stats.iter().all(|lane| lane.narrowing.reason == "asked for"));
        }
    }
}
