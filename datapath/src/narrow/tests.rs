//! Against a target that is simulated: it gets what was sent, and nothing else.

use proptest::prelude::*;

use super::*;
use crate::backing::Backing;
use crate::region::Region;

const REGION: RegionIndex = RegionIndex(0);
const BUFFER: usize = 1 << 20;

fn memory(pages: u64) -> GuestMemory {
    let backing = Backing::memfd("narrow-test", pages * PAGE_BYTES_MIN, None).unwrap();
    GuestMemory::new(vec![Region::open(REGION, backing).unwrap()])
}

fn held(memory: &GuestMemory, lanes: usize) -> Held {
    let regions = memory.regions().iter();
    Held::over(regions.map(|it| (it.len(), BLOCK_BYTES)), lanes).unwrap()
}

fn extent(page: u64, pages: u64) -> Extent {
    Extent { region: REGION, offset: page * PAGE_BYTES_MIN, len: pages * PAGE_BYTES_MIN }
}

fn write(memory: &GuestMemory, page: u64, value: u8) {
    memory.lease(extent(page, 1)).unwrap().copy_in(100, &[value, 1]).unwrap();
}

/// Copies what was sent to the target.
fn place(target: &GuestMemory, extents: &[Extent], bytes: &[u8]) {
    let mut at = 0;
    for extent in extents {
        let len = extent.len as usize;
        target.lease(*extent).unwrap().copy_in(0, &bytes[at..at + len]).unwrap();
        at += len;
    }
    assert_eq!(at, bytes.len());
}

fn is_same(source: &GuestMemory, target: &GuestMemory) -> bool {
    let bytes = |memory: &GuestMemory| {
        let region = &memory.regions()[0];
        let mut bytes = vec![0; region.len() as usize];
        region.lease(0, region.len()).unwrap().copy_out(0, &mut bytes).unwrap();
        bytes
    };
    bytes(source) == bytes(target)
}

/// Sends the pages as one round of one lane.
fn send(
    held: &Held,
    round: u32,
    source: &GuestMemory,
    target: &GuestMemory,
    pages: Extent,
) -> (Vec<Extent>, Narrowed) {
    let (mut extents, mut buffer) = (vec![pages], vec![0; BUFFER]);
    let narrowed =
        held.narrow(RoundIndex(round), source, (&mut extents, 0), (&mut buffer, 0), 200).unwrap();
    place(target, &extents, &buffer[..narrowed.used]);
    (extents, narrowed)
}

#[test]
fn a_huge_page_is_sent_again_without_what_the_target_holds() {
    let (source, target) = (memory(512), memory(512));
    let held = held(&source, 1);
    for page in 0..256 {
        write(&source, page, page as u8);
    }
    held.begin();
    let (all, narrowed) = send(&held, 0, &source, &target, extent(0, 256));
    assert_eq!((&all[..], narrowed.spared_bytes), (&[extent(0, 256)][..], 0));
    held.acknowledged();

    held.begin();
    write(&source, 7, 77);
    write(&source, 9, 99);
    write(&source, 10, 100);
    let (changed, narrowed) = send(&held, 1, &source, &target, extent(0, 256));
    assert_eq!(changed, [extent(7, 1), extent(9, 2)]);
    assert_eq!(narrowed.spared_bytes, 253 * PAGE_BYTES_MIN);
    assert_eq!(narrowed.known_bytes, 256 * PAGE_BYTES_MIN);
    assert!(is_same(&source, &target));
    assert_eq!(held.table_bytes(), BLOCK_BYTES / 256);
}

#[test]
fn what_was_sent_in_the_same_round_is_sent_again() {
    // Nobody has said yet that it is placed.
    let (source, target) = (memory(512), memory(512));
    let held = held(&source, 1);
    held.begin();
    send(&held, 0, &source, &target, extent(0, 8));
    let (again, _) = send(&held, 0, &source, &target, extent(0, 8));
    assert_eq!(again, [extent(0, 8)]);
}

#[test]
fn nothing_is_left_out_after_a_round_that_a_lane_did_not_acknowledge() {
    let (source, target) = (memory(512), memory(512));
    let held = held(&source, 2);
    held.begin();
    send(&held, 0, &source, &target, extent(0, 8));
    held.acknowledged();
    held.begin();
    for round in 1..4 {
        assert_eq!(send(&held, round, &source, &target, extent(0, 8)).0, [extent(0, 8)]);
        held.acknowledged();
        held.acknowledged();
        held.begin();
    }
}

#[test]
fn a_page_that_was_something_else_for_the_target_meanwhile_is_sent() {
    let (source, target) = (memory(512), memory(512));
    let held = held(&source, 1);
    let next_round = || {
        held.acknowledged();
        held.begin();
    };
    write(&source, 3, 5);
    held.begin();
    send(&held, 0, &source, &target, extent(0, 8));
    // Sent as zeros, and back.
    next_round();
    held.zero(RoundIndex(1), extent(3, 1));
    next_round();
    assert_eq!(send(&held, 2, &source, &target, extent(0, 8)).0, [extent(3, 1)]);
    // Sent as it was, by somebody who did not look.
    next_round();
    held.forget(extent(2, 4));
    next_round();
    assert_eq!(send(&held, 4, &source, &target, extent(0, 8)).0, [extent(2, 4)]);
    // Zero at the target and zero now: nobody has to be told.
    next_round();
    held.zero(RoundIndex(5), extent(100, 20));
    next_round();
    assert_eq!(send(&held, 6, &source, &target, extent(100, 21)).0, [extent(120, 1)]);
}

#[test]
fn where_there_is_no_room_for_more_extents_pages_stay_between() {
    let (source, target) = (memory(512), memory(512));
    let held = held(&source, 1);
    held.begin();
    send(&held, 0, &source, &target, extent(0, 256));
    held.acknowledged();
    held.begin();
    for page in (10..200).step_by(10) {
        write(&source, page, 1);
    }
    let (mut extents, mut buffer) = (vec![extent(400, 1), extent(0, 256)], vec![0; BUFFER]);
    let narrowed =
        held.narrow(RoundIndex(1), &source, (&mut extents, 1), (&mut buffer, 0), 3).unwrap();
    assert_eq!(extents[0], extent(400, 1), "what was there before is left alone");
    assert_eq!(&extents[1..4], [extent(10, 1), extent(20, 1), extent(30, 1)]);
    assert_eq!(extents.len(), 5);
    assert_eq!(extents[4].offset, 40 * PAGE_BYTES_MIN);
    place(&target, &extents[1..], &buffer[..narrowed.used]);
    assert!(is_same(&source, &target));
}

#[test]
fn regions_of_small_pages_are_not_looked_at() {
    let memory = memory(512);
    assert!(Held::new(&memory, 1).is_none(), "there are no huge pages");
    let held = Held::over([(4096, 4096), (4 << 20, 2 << 20)].into_iter(), 1).unwrap();
    assert!(!held.covers(extent(0, 1)));
    assert!(held.covers(Extent { region: RegionIndex(1), ..extent(0, 1) }));
}

#[test]
fn tags_tell_pages_apart_and_differ_from_guest_to_guest() {
    let memory = memory(512);
    let (one, other) = (held(&memory, 1), held(&memory, 1));
    let mut page = [7; PAGE];
    let was = tag(&one.key, &page);
    assert_ne!(was, tag(&other.key, &page));
    for bit in [0, 1, 8 * PAGE - 1] {
        page[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(was, tag(&one.key, &page));
        page[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(was, tag(&one.key, &page));
}

/// What happens in one round, beside the pages being sent.
#[derive(Clone, Debug)]
struct Round {
    writes: Vec<(u64, u8)>,
    /// Written after the dirty pages were protected, while they are sent.
    late: Vec<(u64, u8)>,
    /// Sent unseen, narrowed, or as zeros where they are.
    narrow: Vec<bool>,
    /// Lanes are lost after so many batches.
    lost: Option<usize>,
}

fn round() -> impl Strategy<Value = Round> {
    // Few values, so that pages become again what they were.
    let writes = || prop::collection::vec((0..1024u64, 0..3u8), 0..40);
    let narrow = prop::collection::vec(prop::bool::weighted(0.8), 8);
    let lost = prop::option::weighted(0.2, 0..8usize);
    (writes(), writes(), narrow, lost).prop_map(|(writes, late, narrow, lost)| Round {
        writes,
        late,
        narrow,
        lost,
    })
}

/// A migration over two huge pages: rounds, late writes, lanes that are lost and renewed.
fn migrate(rounds: &[Round]) {
    let (source, target) = (memory(1024), memory(1024));
    let mut held = self::held(&source, 1);
    let mut dirty = [true; 2];
    let mut rounds = rounds.iter();
    let mut number = 0;
    loop {
        let quiet = Round { writes: vec![], late: vec![], narrow: vec![true; 8], lost: None };
        let round = rounds.next();
        let is_last = round.is_none();
        let round = round.unwrap_or(&quiet);
        for &(page, value) in &round.writes {
            write(&source, page, value);
            dirty[page as usize / 512] = true;
        }
        // Protected before anything is read.
        let sending = std::mem::take(&mut dirty);
        held.begin();
        let mut late = round.late.iter();
        let mut lost = round.lost;
        let mut batch = 0;
        while batch < 8 {
            if lost == Some(batch) {
                // Other lanes send all of the round again, and know nothing.
                (held, lost, batch) = (self::held(&source, 1), None, 0);
                held.begin();
            }
            if sending[batch / 4] {
                let mut extents = vec![extent(batch as u64 * 128, 128)];
                let mut buffer = vec![0; BUFFER];
                if round.narrow[batch] {
                    let (out, into) = ((&mut extents, 0), (&mut buffer[..], 0));
                    let narrowed = held.narrow(RoundIndex(number), &source, out, into, 20).unwrap();
                    // Written between the copy and the sending.
                    for &(page, value) in late.by_ref().take(3) {
                        write(&source, page, value);
                        dirty[page as usize / 512] = true;
                    }
                    place(&target, &extents, &buffer[..narrowed.used]);
                } else {
                    held.forget(extents[0]);
                    let bytes = extents[0].len as usize;
                    source.lease(extents[0]).unwrap().copy_out(0, &mut buffer[..bytes]).unwrap();
                    place(&target, &extents, &buffer[..bytes]);
                }
            }
            batch += 1;
        }
        held.acknowledged();
        number += 1;
        if is_last && dirty == [false; 2] {
            break;
        }
    }
    assert!(is_same(&source, &target));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_written_and_lost_the_target_ends_up_with_the_guests_memory(
        rounds in prop::collection::vec(round(), 1..6),
    ) {
        migrate(&rounds);
    }
}
