//! A look at memory that is about to be read: data, or a hole that nobody may read?
//!
//! A guest gives memory back while it moves (a balloon, free page reporting, virtio-mem): its monitor
//! punches holes into the file. Whoever reads such a page through a mapping has the kernel allocate a
//! new one, so a mover that reads what was dirty a while ago takes the memory again that the guest gave
//! back, on hugetlbfs perhaps from somebody else's share. So lanes look before they read, and the
//! target is told of a hole instead.
//!
//! **Why nothing is lost.** Three things can happen to a page between a scan that protected it and the
//! end of the round, and each is seen:
//!
//! * It was a hole at the look and the guest *writes* to it later. A write to a hole is a fault, and the
//!   page it brings is either protected no longer (where the hole kept the mark of the protection) or
//!   never was, and both count as written: the next scan reports it, and later content wins. It is the
//!   look that comes after the scan; a write in between makes it data at the look.
//! * It was data at the look and is *punched* before it is read, or after. What is read then is zeros in a
//!   new page, which is right but for the memory it takes (a window of one batch); what was read before
//!   is at the target and no longer here. A scan does not report holes, so beside each scan those pages
//!   are looked for that were sent and are holes now ([`HoleLook::find_punched`]), and join the round.
//! * It was a hole at the look and the guest *reads* it: zeros in a new page, and zeros at the target.
//!
//! The last scan and its look come when the guest stands still: what is a hole then is one at the target.
//! What was told as a hole ([`HoleLook::tell`], once the target has acknowledged it) is no longer among
//! what was sent, or each scan would find it again.
//!
//! Owned by the source's driver and shared with its lanes. Looking changes nothing: on hugetlbfs pages
//! that exist are mapped into a second view, those that don't are not made.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::Whence;

use super::within::{data_within, is_all_data, seek};
use super::{HolesError, View, host};
use crate::bitmap::DirtySet;
use crate::extent::Extent;
use crate::limits::{HOLE_LOOK_FREE, HOLE_LOOK_PERCENT};
use crate::region::{GuestMemory, Region};

/// What memory begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// At least so many bytes of data.
    Data {
        /// Not zero; up to what was asked for, or to the page's end.
        bytes: u64,
    },
    /// So many bytes of a hole.
    Hole {
        /// Not zero.
        bytes: u64,
        /// They are whole pages of their region, and may be punched elsewhere.
        whole: bool,
    },
}

/// See the [module](self).
#[derive(Debug)]
pub struct HoleLook {
    regions: Vec<RegionLook>,
    /// Holes may turn up: the guest has a device to give memory back, or it was seen to.
    expected: AtomicBool,
    /// Lanes look, and so a scan may hand them holes.
    in_use: AtomicBool,
    /// The target takes holes, and lanes tell which it took.
    punches: AtomicBool,
    told: Mutex<Vec<Extent>>,
    looked: Mutex<Option<Looked>>,
}

/// The last look at what was sent.
#[derive(Debug)]
struct Looked {
    at: Instant,
    took: Duration,
    /// What was there of each region beside what was sent: pages that were only read.
    other_bytes: Vec<u64>,
}

impl Looked {
    /// Whether one more costs little, if it takes as long.
    fn may_again(&self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.at);
        self.took <= HOLE_LOOK_FREE || self.took * 100 <= since * HOLE_LOOK_PERCENT
    }
}

#[derive(Debug)]
struct RegionLook {
    region: Arc<Region>,
    how: How,
}

#[derive(Debug)]
enum How {
    /// By seeking in the file.
    Seek,
    /// On hugetlbfs, where seeking tells nothing.
    View(View),
    /// The kernel does not tell; all of it is taken for data.
    Blind,
}

impl HoleLook {
    /// Looks at `memory`; from the start where holes are `expected`, else from when one was seen.
    ///
    /// # Errors
    /// If the kernel does not say what memory it is.
    pub fn new(memory: &GuestMemory, expected: bool) -> Result<Self, HolesError> {
        let regions = memory.regions().iter().map(|region| {
            let fs = fstatfs(region.file()).map_err(|errno| host("fstatfs", errno.into()))?;
            let how = match fs.filesystem_type() {
                HUGETLBFS_MAGIC => View::of(region).map_or_else(
                    |error| {
                        tracing::debug!(%error, "what becomes a hole is not noticed");
                        How::Blind
                    },
                    How::View,
                ),
                _ => How::Seek,
            };
            Ok(RegionLook { region: Arc::clone(region), how })
        });
        Ok(Self {
            regions: regions.collect::<Result<_, HolesError>>()?,
            expected: AtomicBool::new(expected),
            in_use: AtomicBool::new(false),
            punches: AtomicBool::new(false),
            told: Mutex::default(),
            looked: Mutex::default(),
        })
    }

    /// Lanes look from now on, and tell what became a hole at the target if it takes holes.
    pub fn take_into_use(&self, punches: bool) {
        self.punches.store(punches, Ordering::Relaxed);
        self.in_use.store(true, Ordering::Relaxed);
    }

    /// Whether what became a hole at the target is [told](Self::tell).
    pub fn is_told(&self) -> bool {
        self.punches.load(Ordering::Relaxed)
    }

    /// Whether lanes have to look now: holes are expected, and there are any. A few system calls.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn is_worth_it(&self) -> Result<bool, HolesError> {
        if self.expected.load(Ordering::Relaxed) {
            for RegionLook { region, how } in &self.regions {
                if !matches!(how, How::Blind) && allocated_bytes(region)? < region.len() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// What of `sent` is a hole now. It is looked for if
    ///
    /// * the files are not as large as they have to be, by what was sent and what else was there at the
    ///   last look (where no holes are expected: smaller than what was sent; pages that came by reads
    ///   or in huge pages make them larger, and mean nothing); or
    /// * holes are expected, and a look costs little: as many pages may have come by reads as were
    ///   punched, which leaves the size as it was.
    ///
    /// What is missed so, the next look finds; only what happens in the last moments before the pause,
    /// to a guest so large that a look takes longer than [`HOLE_LOOK_FREE`], has none.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn find_punched(
        &self,
        memory: &GuestMemory,
        sent: &DirtySet,
        now: Instant,
    ) -> Result<DirtySet, HolesError> {
        let mut punched = sent.empty_like();
        if !self.in_use.load(Ordering::Relaxed) {
            return Ok(punched);
        }
        let sizes = self.sizes(sent)?;
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = self.expected.load(Ordering::Relaxed);
        let worth_it = sizes.iter().enumerate().any(|(index, &(allocated, sent_bytes))| {
            let others = looked.as_ref().map_or(0, |looked| looked.other_bytes[index]);
            let wrong_size = match expected {
                true => allocated != sent_bytes + others,
                false => allocated < sent_bytes,
            };
            let has_holes = allocated < self.regions[index].region.len();
            has_holes
                && (wrong_size || expected && looked.as_ref().is_none_or(|it| it.may_again(now)))
        });
        if !worth_it {
            return Ok(punched);
        }
        let begun = Instant::now();
        let data = data_within(memory, sent)?;
        punched = sent.clone();
        punched.subtract(&data);
        if !punched.is_empty() {
            self.expect_more();
        }
        let others = sizes.iter().zip(data.bitmaps());
        let other_bytes =
            others.map(|(&(allocated, _), data)| allocated.saturating_sub(data.bytes())).collect();
        *looked = Some(Looked { at: now, took: begun.elapsed(), other_bytes });
        Ok(punched)
    }

    /// What is there of each region, and what of it was sent; nothing where nobody can tell holes.
    fn sizes(&self, sent: &DirtySet) -> Result<Vec<(u64, u64)>, HolesError> {
        let sizes =
            self.regions.iter().zip(sent.bitmaps()).map(|(RegionLook { region, how }, sent)| {
                Ok(match how {
                    How::Blind => (region.len(), region.len()),
                    _ => (allocated_bytes(region)?, sent.bytes()),
                })
            });
        sizes.collect()
    }

    /// A hole was found in what was sent: there may be more.
    fn expect_more(&self) {
        self.expected.store(true, Ordering::Relaxed);
    }

    /// What `extent` begins with: data is looked for in its first `enough` bytes only.
    ///
    /// # Errors
    /// If the kernel does not tell.
    ///
    /// # Panics
    /// If it is empty, or lies outside of the memory looked at.
    pub fn first_run(&self, extent: Extent, enough: u64) -> Result<Run, HolesError> {
        let RegionLook { region, how } = &self.regions[usize::from(extent.region.0)];
        assert!(extent.len > 0 && extent.end() <= region.len());
        match how {
            How::View(view) => first_huge(view, region.page_bytes(), extent),
            How::Seek => first_seen(region, extent.offset..extent.end(), enough),
            How::Blind => Ok(Run::Data { bytes: extent.len }),
        }
    }

    /// The target has acknowledged these as holes.
    pub fn tell(&self, holes: &mut Vec<Extent>) {
        if !holes.is_empty() {
            self.told.lock().unwrap_or_else(PoisonError::into_inner).append(holes);
        }
    }

    /// What was told since this was last asked.
    pub fn take_told(&self) -> Vec<Extent> {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What is there of a region, in swap too.
fn allocated_bytes(region: &Region) -> Result<u64, HolesError> {
    let stat = fstat(region.file()).map_err(|errno| host("fstat", errno.into()))?;
    Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
}

fn first_seen(region: &Region, bytes: Range<u64>, enough: u64) -> Result<Run, HolesError> {
    let Range { start: at, end } = bytes;
    let near = end.min(at.saturating_add(enough.max(region.page_bytes())));
    if is_all_data(region.file(), at..near)? {
        return Ok(Run::Data { bytes: near - at });
    }
    let data = seek(region, at, Whence::SeekData)?.filter(|data| *data < end).unwrap_or(end);
    if data > at {
        return Ok(Run::Hole { bytes: data - at, whole: true });
    }
    // There is a hole in what is near, so this does not go far; unless it was filled meanwhile.
    let hole = seek(region, at, Whence::SeekHole)?.unwrap_or(near);
    // A hole punched in between begins here.
    let bytes = if hole > at { hole.min(near) - at } else { region.page_bytes() };
    Ok(Run::Data { bytes })
}

fn first_huge(view: &View, page_bytes: u64, extent: Extent) -> Result<Run, HolesError> {
    let into_page = extent.offset % page_bytes;
    let first = extent.offset - into_page;
    let whole = into_page == 0 && extent.len >= page_bytes;
    let bytes = extent.len.min(page_bytes - into_page);
    if view.has(first)? {
        return Ok(Run::Data { bytes });
    }
    let mut end = extent.offset + bytes;
    while whole && end + page_bytes <= extent.end() && !view.has(end)? {
        end += page_bytes;
    }
    Ok(Run::Hole { bytes: end - extent.offset, whole })
}

impl View {
    /// Whether the page at `offset` is there.
    fn has(&self, offset: u64) -> Result<bool, HolesError> {
        let (mapped, result) = self.map(offset..offset + self.page_bytes());
        match result.map_err(|error| (Errno::from_raw(error.raw_os_error().unwrap_or(0)), error)) {
            Ok(()) => Ok(true),
            // Mapped by an earlier look, and a punch would have unmapped it.
            Err((Errno::EEXIST, _)) => Ok(true),
            Err((Errno::EFAULT, _)) => Ok(mapped > 0),
            Err((_, error)) => Err(host("UFFDIO_CONTINUE", error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::ids::{RegionIndex, RoundIndex};
    use crate::limits::{BATCH_BYTES_MAX, BATCH_EXTENTS_MAX};
    use crate::testing::HugePages;
    use crate::work::RoundWork;
    use crate::zero::Sorted;

    const HUGE: u64 = 2 << 20;

    fn memory(pages: u64, page_bytes: u64) -> GuestMemory {
        let huge = (page_bytes > 4096).then_some(page_bytes);
        let backing = Backing::memfd("look-test", pages * page_bytes, huge).unwrap();
        let region = Region::open(RegionIndex(0), backing).unwrap();
        let lease = region.lease(0, region.len()).unwrap();
        (0..pages).for_each(|page| lease.touch(page * page_bytes).unwrap());
        drop(lease);
        GuestMemory::new(vec![region])
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent { region: RegionIndex(0), offset, len }
    }

    /// All of `work` as one lane takes it: data, zeros, holes.
    fn take(work: &RoundWork, look: &HoleLook, punches: bool) -> [Vec<Extent>; 3] {
        let (mut data, mut sorted, mut batch) = (Vec::new(), Sorted::new(), Vec::new());
        loop {
            let limits = (BATCH_EXTENTS_MAX, BATCH_BYTES_MAX);
            work.next_batch_around(&mut batch, &mut sorted, limits, (look, punches)).unwrap();
            assert!(batch.iter().map(|it| it.len).sum::<u64>() <= BATCH_BYTES_MAX);
            data.append(&mut batch);
            if work.taken_bytes() == work.total_bytes() {
                return [data, sorted.zero, sorted.hole];
            }
        }
    }

    fn bytes(extents: &[Extent]) -> u64 {
        extents.iter().map(|extent| extent.len).sum()
    }

    fn holes_are_kept_apart_and_stay(page_bytes: u64, pages: u64) {
        let memory = memory(pages, page_bytes);
        let region = &memory.regions()[0];
        let look = HoleLook::new(&memory, true).unwrap();
        assert!(!look.is_worth_it().unwrap(), "all of it is there");
        region.punch(page_bytes, 2 * page_bytes).unwrap();
        region.punch((pages - 1) * page_bytes, page_bytes).unwrap();
        assert!(look.is_worth_it().unwrap());
        let there = allocated_bytes(region).unwrap();
        let all = [extent(0, region.len())];
        for punches in [true, false] {
            let [data, zero, hole] = take(&RoundWork::new(RoundIndex(1), all), &look, punches);
            assert_eq!(bytes(&data), (pages - 3) * page_bytes);
            let (holes, others) = if punches { (&hole, &zero) } else { (&zero, &hole) };
            assert_eq!(bytes(holes), 3 * page_bytes);
            assert!(others.is_empty());
            if punches {
                let last = extent((pages - 1) * page_bytes, page_bytes);
                assert_eq!(hole, [extent(page_bytes, 2 * page_bytes), last]);
            }
        }
        assert_eq!(allocated_bytes(region).unwrap(), there, "looking allocated something");
        // What is written later is data again, and what is punched after a look is a hole.
        region.lease(2 * page_bytes, 1).unwrap().touch(0).unwrap();
        region.punch(0, page_bytes).unwrap();
        let [data, _, hole] = take(&RoundWork::new(RoundIndex(2), all), &look, true);
        assert_eq!(bytes(&data), (pages - 3) * page_bytes);
        assert_eq!(hole[0], extent(0, 2 * page_bytes));
    }

    #[test]
    fn holes_on_tmpfs_are_kept_apart_and_stay() {
        holes_are_kept_apart_and_stay(4096, 600);
    }

    #[test]
    fn holes_on_hugetlbfs_are_kept_apart_and_stay() {
        let Some(_pages) = HugePages::reserve(HUGE, 6) else { return };
        holes_are_kept_apart_and_stay(HUGE, 6);
    }

    #[test]
    fn what_is_left_of_a_huge_page_is_zero_and_no_hole() {
        let Some(_pages) = HugePages::reserve(HUGE, 2) else { return };
        let memory = memory(2, HUGE);
        let look = HoleLook::new(&memory, true).unwrap();
        let work = RoundWork::new(RoundIndex(1), [extent(0, 2 * HUGE)]);
        let (mut sorted, mut batch) = (Sorted::new(), Vec::new());
        let limits = (BATCH_EXTENTS_MAX, BATCH_BYTES_MAX);
        work.next_batch_around(&mut batch, &mut sorted, limits, (&look, true)).unwrap();
        assert_eq!(batch, [extent(0, BATCH_BYTES_MAX)]);
        // The first half travels as data; the guest gives the page back before the second is read.
        memory.regions()[0].punch(0, HUGE).unwrap();
        let [data, zero, hole] = take(&work, &look, true);
        assert_eq!(zero, [extent(BATCH_BYTES_MAX, HUGE - BATCH_BYTES_MAX)]);
        assert_eq!((bytes(&data), &hole[..]), (HUGE, &[][..]));
        assert_eq!(allocated_bytes(&memory.regions()[0]).unwrap(), HUGE);
    }

    /// Memory of 64 pages, of which the first 60 were sent; the others are holes.
    fn sent_but_for_the_end(page_bytes: u64, expected: bool) -> (GuestMemory, DirtySet, HoleLook) {
        let memory = memory(64, page_bytes);
        memory.regions()[0].punch(60 * page_bytes, 4 * page_bytes).unwrap();
        let mut sent = DirtySet::for_memory(&memory);
        sent.set_extent(extent(0, 60 * page_bytes)).unwrap();
        let look = HoleLook::new(&memory, expected).unwrap();
        (memory, sent, look)
    }

    #[test]
    fn what_was_sent_and_is_gone_is_noticed_by_its_size() {
        let (memory, mut sent, look) = sent_but_for_the_end(4096, false);
        let found = |sent: &DirtySet| {
            look.find_punched(&memory, sent, Instant::now()).unwrap().to_extents()
        };
        memory.regions()[0].punch(4096, 4096).unwrap();
        assert_eq!(found(&sent), [], "no lane looks");
        look.take_into_use(true);
        assert_eq!(found(&sent), [extent(4096, 4096)]);
        sent.clear_extent(extent(4096, 4096)).unwrap();
        assert_eq!(found(&sent), []);
        look.tell(&mut vec![extent(0, 4096)]);
        assert_eq!(look.take_told(), [extent(0, 4096)]);
        assert!(look.take_told().is_empty());
    }

    #[test]
    fn where_nobody_gives_back_a_size_that_fits_is_not_looked_into() {
        let (memory, sent, look) = sent_but_for_the_end(4096, false);
        look.take_into_use(true);
        // More than was sent means nothing there either.
        memory.regions()[0].lease(61 * 4096, 4096).unwrap().touch(0).unwrap();
        assert!(look.find_punched(&memory, &sent, Instant::now()).unwrap().is_empty());
        assert!(look.looked.lock().unwrap().is_none());
    }

    fn as_much_punched_as_read(page_bytes: u64) {
        let (memory, mut sent, look) = sent_but_for_the_end(page_bytes, true);
        look.take_into_use(true);
        let region = &memory.regions()[0];
        let swap = |gone: u64, read: u64| {
            let before = allocated_bytes(region).unwrap();
            region.punch(gone * page_bytes, page_bytes).unwrap();
            region.lease(read * page_bytes, page_bytes).unwrap().touch(0).unwrap();
            assert_eq!(allocated_bytes(region).unwrap(), before);
        };
        let begun = Instant::now();
        // What is found is told to the target, and no longer among what was sent.
        let mut found = |now| {
            let found = look.find_punched(&memory, &sent, now).unwrap();
            sent.subtract(&found);
            found.to_extents()
        };
        assert_eq!(found(begun), []);
        swap(7, 60);
        let slow = Duration::from_millis(100);
        let takes = |time| look.looked.lock().unwrap().as_mut().unwrap().took = time;
        takes(Duration::ZERO);
        let page = |index: u64| [extent(index * page_bytes, page_bytes)];
        assert_eq!(found(begun), page(7), "so small a guest is always looked at");
        // A large one is looked at when that is no great part of the time, ...
        takes(slow);
        swap(9, 61);
        assert_eq!(found(begun + slow * 19), []);
        assert_eq!(found(begun + slow * 20), page(9));
        // ... and at once when the size is another one.
        takes(slow);
        region.punch(11 * page_bytes, page_bytes).unwrap();
        assert_eq!(found(begun + slow * 21), page(11));
        assert_eq!(look.looked.lock().unwrap().as_ref().unwrap().other_bytes, [2 * page_bytes]);
    }

    #[test]
    fn as_much_punched_as_read_is_noticed_on_tmpfs() {
        as_much_punched_as_read(4096);
    }

    #[test]
    fn as_much_punched_as_read_is_noticed_on_hugetlbfs() {
        let Some(_pages) = HugePages::reserve(HUGE, 64) else { return };
        as_much_punched_as_read(HUGE);
    }

    /// What a look at all of a GiB costs; nothing is asserted, so it runs when asked for.
    #[test]
    #[ignore = "prints figures"]
    fn what_a_look_costs() {
        let gib = 1 << 30;
        let print = |what: &str, memory: &GuestMemory, sent: &DirtySet| {
            let mut times: Vec<_> = (0..9)
                .map(|_| {
                    let begun = std::time::Instant::now();
                    let data = crate::holes::data_within(memory, sent).unwrap();
                    (begun.elapsed(), data.count())
                })
                .collect();
            times.sort();
            println!("{what}: {:?} (least {:?}, most {:?})", times[4], times[0].0, times[8].0);
        };
        let full = |memory: &GuestMemory| {
            let mut sent = DirtySet::for_memory(memory);
            sent.set_extent(extent(0, gib)).unwrap();
            sent
        };
        let small = memory(gib / 4096, 4096);
        print("tmpfs, all there", &small, &full(&small));
        let region = &small.regions()[0];
        let hole = |at: u64, bytes: u64| region.punch(at, bytes).unwrap();
        (0..64).for_each(|n| hole(n * (16 << 20), 1 << 20));
        print("tmpfs, 64 holes of 1 MiB in what was sent", &small, &full(&small));
        (0..gib / 65536).for_each(|n| hole(n * 65536, 4096));
        print("tmpfs, each 16th page a hole in what was sent", &small, &full(&small));
        let left = crate::holes::data_within(&small, &full(&small)).unwrap();
        print("tmpfs, each 16th page a hole, not sent", &small, &left);
        let Some(_pages) = HugePages::reserve(HUGE, 512) else { return };
        let huge = memory(512, HUGE);
        print("hugetlbfs, all there", &huge, &full(&huge));
        huge.regions()[0].punch(HUGE, HUGE).unwrap();
        print("hugetlbfs, one hole", &huge, &full(&huge));
        (0..256).for_each(|n| huge.regions()[0].punch(2 * n * HUGE, HUGE).unwrap());
        print("hugetlbfs, each second page a hole", &huge, &full(&huge));
    }
}
