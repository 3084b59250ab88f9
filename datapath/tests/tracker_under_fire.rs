//! The tracker against a shadow copy, while another process writes as fast as it can.
//!
//! ```text
//!   this test                                      guest: this program again
//!     take its userfaultfd, start tracking           threads write, the kernel writes for them
//!     scan, copy what was reported to the shadow
//!     SIGSTOP, scan, copy ▶ shadow == memory?
//! ```
//!
//! One write that was not reported is one page that differs.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_datapath::attach::{Process, UffdPrivilege, take_userfaultfd, tracked_ranges};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::holes::{data_within, guest_data_extents};
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::tracker::{DirtyTracker, ScanPhases, UffdTracker};

#[path = "../src/testing.rs"]
mod testing;

use testing::{HugePages, skip};

const MEMORY_BYTES: u64 = 32 << 20;
/// Mostly holes too large to be watched; a guest of this size writes here and there, now and then.
const SPARSE_BYTES: u64 = 2 << 30;
const SPARSE_PAUSE: Duration = Duration::from_micros(300);
const HUGE_BYTES: u64 = 2 << 20;
const CHECKS: u32 = 8;
const WRITERS: u64 = 2;
const NOBODY: u32 = 65534;

fn main() {
    match std::env::var("ROLE").as_deref() {
        Ok("guest") => return guest(),
        Ok("agent") => return agent(std::env::var("GUEST").unwrap().parse().unwrap()),
        _ => {}
    }
    let mut arguments = Arguments::from_args();
    // Each of them wants both cores.
    arguments.test_threads = Some(1);
    let test = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    macro_rules! trials {
        ($($name:ident,)*) => { vec![$(test(stringify!($name), $name)),*] };
    }
    let trials = trials![
        no_write_to_small_pages_is_missed,
        no_write_into_large_holes_is_missed,
        no_write_to_huge_pages_is_missed,
        no_write_to_transparent_huge_pages_is_missed,
        no_write_of_an_unprivileged_guest_is_missed,
        nothing_is_left_in_the_guest,
        a_guest_outlives_an_agent_that_is_killed,
        a_guest_that_dies_ends_tracking_with_that_reason,
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

// The guest.

/// Maps the file it has as its standard input, and writes to it until it is killed.
fn guest() {
    let file = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let region = Region::open(RegionIndex(0), Backing::from_fd(file).unwrap()).unwrap();
    let len = region.len();
    let memory = region.lease(0, len).unwrap();
    // The rest stays a hole until a writer comes by.
    let populated = (len / 2).min(MEMORY_BYTES / 2);
    for offset in (0..populated).step_by(4096) {
        memory.copy_in(offset, &offset.to_le_bytes()).unwrap();
    }
    println!("ready");
    let memory = &memory;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                let mut random = Random(writer + 1);
                let noise = File::open("/dev/urandom").unwrap();
                loop {
                    let writes = if len == SPARSE_BYTES { 1 } else { 64 };
                    for _ in 0..writes {
                        let at = random.below(len / 8) * 8;
                        memory.copy_in(at, &random.next().to_le_bytes()).unwrap();
                    }
                    memory.read_in(random.below(len - 64), 64, noise.as_fd()).unwrap();
                    if len == SPARSE_BYTES {
                        std::thread::sleep(SPARSE_PAUSE);
                    }
                }
            });
        }
    });
}

/// xorshift: fast, and the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A guest that runs, its memory here, and a copy of it.
struct Guest {
    child: Child,
    process: Process,
    memory: GuestMemory,
    shadow: GuestMemory,
}

impl Guest {
    fn start(backing: Backing, uid: Option<u32>) -> Self {
        let (len, page_bytes) = (backing.len(), backing.page_bytes());
        let file = backing.into_file();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("ROLE", "guest").stdin(file.try_clone().unwrap()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "ready");
        let memory = vec![Region::map(RegionIndex(0), file, len, page_bytes).unwrap()];
        let shadow = Backing::memfd("shadow", len, None).unwrap();
        Self {
            process: Process::open(child.id() as libc::pid_t).unwrap(),
            child,
            memory: GuestMemory::new(memory),
            shadow: GuestMemory::new(vec![Region::open(RegionIndex(0), shadow).unwrap()]),
        }
    }

    fn track(&self, phases: ScanPhases) -> (Box<dyn DirtyTracker>, UffdPrivilege) {
        let taken = take_userfaultfd(&self.process).unwrap();
        let ranges = tracked_ranges(&self.process, &self.memory).unwrap();
        let populated = guest_data_extents(&self.memory).unwrap();
        let pagemap = self.process.pagemap().unwrap();
        let tracker = UffdTracker::start(
            taken.fd,
            pagemap,
            self.memory.regions(),
            ranges,
            &populated,
            phases,
        )
        .unwrap();
        (Box::new(tracker), taken.privilege)
    }

    /// Brings to the shadow what is in `dirty`: data is copied, holes are punched.
    fn copy(&self, dirty: &DirtySet) {
        let copied = data_within(&self.memory, dirty).unwrap();
        let mut holes = dirty.clone();
        holes.subtract(&copied);
        let mut bytes = vec![0; 1 << 20];
        for extent in copied.extents() {
            let (from, into) =
                (self.memory.lease(extent).unwrap(), self.shadow.lease(extent).unwrap());
            for at in (0..extent.len).step_by(bytes.len()) {
                let bytes = &mut bytes[..(1 << 20).min(extent.len - at) as usize];
                from.copy_out(at, bytes).unwrap();
                into.copy_in(at, bytes).unwrap();
            }
        }
        for Extent { offset, len, .. } in holes.extents() {
            self.shadow.regions()[0].punch(offset, len).unwrap();
        }
    }

    fn all(&self) -> DirtySet {
        let mut all = DirtySet::for_memory(&self.memory);
        let len = self.memory.regions()[0].len();
        all.set_extent(Extent { region: RegionIndex(0), offset: 0, len }).unwrap();
        all
    }

    /// Stops all of its threads.
    fn stop(&self) {
        let pid = Pid::from_raw(self.process.pid());
        kill(pid, Signal::SIGSTOP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let stopped = || {
            std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                stat.rsplit(')').next().unwrap().trim_start().starts_with('T')
            })
        };
        while !stopped() {
            assert!(Instant::now() < deadline, "the guest does not stop");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn go_on(&self) {
        kill(Pid::from_raw(self.process.pid()), Signal::SIGCONT).unwrap();
    }

    /// Whether its writers still write.
    fn writes(&self) -> bool {
        let digest = || MemoryDigest::of_memory(&self.memory, 2, &AtomicBool::new(false)).unwrap();
        let before = digest();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if digest() != before {
                return true;
            }
        }
        false
    }

    fn write_protected(&self) -> bool {
        let smaps = format!("/proc/{}/smaps", self.process.pid());
        let smaps = std::fs::read_to_string(smaps).unwrap();
        smaps.lines().any(|line| {
            line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split(' ').any(|f| f == "uw"))
        })
    }

    fn has_uffd(&self) -> bool {
        let fds = self.process.fds().unwrap();
        fds.iter().any(|(_, name)| name.to_string_lossy().contains("userfaultfd"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// The tests.

/// Copies under fire and compares `CHECKS` times, with each kind of scan.
fn misses_nothing(backing: impl Fn() -> Backing, uid: Option<u32>, privilege: UffdPrivilege) {
    for phases in [ScanPhases::One, ScanPhases::Two] {
        let guest = Guest::start(backing(), uid);
        let (mut tracker, has) = guest.track(phases);
        assert_eq!(has, privilege);
        guest.copy(&guest.all());
        let mut random = Random(77);
        let mut reported = 0;
        for check in 0..CHECKS {
            let mut given_back = DirtySet::for_memory(&guest.memory);
            for _ in 0..3 {
                let mut dirty = DirtySet::for_memory(&guest.memory);
                reported += tracker.scan(&mut dirty).unwrap().reported_bytes;
                guest.copy(&dirty);
                let freed = free_a_page(&guest.memory.regions()[0], &mut random);
                if let Some(page) = freed {
                    given_back.set_extent(page).unwrap();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            guest.stop();
            let mut dirty = DirtySet::for_memory(&guest.memory);
            reported += tracker.scan(&mut dirty).unwrap().reported_bytes;
            // A page that was given back and is there again unwritten is not reported: the
            // tracker's documentation has it. This test knows which they are.
            dirty.union_with(&given_back);
            guest.copy(&dirty);
            let digest =
                |memory| MemoryDigest::of_memory(memory, 2, &AtomicBool::new(false)).unwrap();
            let differs = digest(&guest.memory).first_difference(&digest(&guest.shadow));
            assert_eq!(differs, None, "the copies differ at it: {phases:?}, check {check}");
            guest.go_on();
        }
        assert!(reported > 0);
        tracker.stop().unwrap();
        println!("{phases:?}: {CHECKS} checks, {} MiB reported, 0 differences", reported >> 20);
    }
}

/// What a balloon does: a page of the guest becomes a hole. Not with huge pages, which somebody else
/// may take from the pool before the guest wants its page back.
fn free_a_page(region: &Arc<Region>, random: &mut Random) -> Option<Extent> {
    let (len, index) = (region.page_bytes(), region.index());
    if len != 4096 {
        return None;
    }
    let offset = random.below(region.len() / len) * len;
    region.punch(offset, len).unwrap();
    Some(Extent { region: index, offset, len })
}

fn no_write_to_small_pages_is_missed() {
    let backing = || Backing::memfd("under-fire", MEMORY_BYTES, None).unwrap();
    misses_nothing(backing, None, UffdPrivilege::Full);
}

fn no_write_into_large_holes_is_missed() {
    let backing = || Backing::memfd("under-fire", SPARSE_BYTES, None).unwrap();
    misses_nothing(backing, None, UffdPrivilege::Full);
}

fn no_write_to_huge_pages_is_missed() {
    let Some(_pages) = HugePages::reserve(HUGE_BYTES, MEMORY_BYTES / HUGE_BYTES) else { return };
    let backing = || Backing::memfd("under-fire", MEMORY_BYTES, Some(HUGE_BYTES)).unwrap();
    misses_nothing(backing, None, UffdPrivilege::Full);
}

fn no_write_to_transparent_huge_pages_is_missed() {
    let name = "transparent huge pages";
    let Some(tmpfs) = HugeTmpfs::mount() else { return skip(name, "no tmpfs with huge=always") };
    let path = tmpfs.dir.join("ram");
    let guest = Guest::start(Backing::create(&path, MEMORY_BYTES).unwrap(), None);
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", guest.process.pid())).unwrap();
    let huge = smaps
        .lines()
        .any(|line| line.strip_prefix("ShmemPmdMapped:").is_some_and(|kb| kb.trim() != "0 kB"));
    drop(guest);
    if !huge {
        return skip(name, "the kernel gave none");
    }
    let backing = || {
        let _ = std::fs::remove_file(&path);
        Backing::create(&path, MEMORY_BYTES).unwrap()
    };
    misses_nothing(backing, None, UffdPrivilege::Full);
}

fn no_write_of_an_unprivileged_guest_is_missed() {
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if !nix::unistd::geteuid().is_root() || allowed.is_ok_and(|allowed| allowed.trim() == "1") {
        return skip("unprivileged guest", "not root, or vm.unprivileged_userfaultfd is 1");
    }
    let backing = || Backing::memfd("under-fire", MEMORY_BYTES, None).unwrap();
    misses_nothing(backing, Some(NOBODY), UffdPrivilege::UserModeOnly);
}

fn nothing_is_left_in_the_guest() {
    let guest = Guest::start(Backing::memfd("under-fire", MEMORY_BYTES, None).unwrap(), None);
    let (tracker, _) = guest.track(ScanPhases::One);
    assert!(guest.write_protected() && !guest.has_uffd());
    tracker.stop().unwrap();
    assert!(!guest.write_protected() && !guest.has_uffd());
    let (tracker, _) = guest.track(ScanPhases::Two);
    drop(tracker);
    assert!(!guest.write_protected() && guest.writes());
    assert_eq!(guest.process.tracer().unwrap(), 0);
}

fn agent(guest: libc::pid_t) {
    let process = Process::open(guest).unwrap();
    let maps = process.maps().unwrap();
    let mapping =
        maps.iter().find(|mapping| mapping.name.starts_with("/memfd:under-fire")).unwrap();
    let backing = Backing::from_file(process.open_mapping(mapping).unwrap()).unwrap();
    let memory = GuestMemory::new(vec![Region::open(RegionIndex(0), backing).unwrap()]);
    let taken = take_userfaultfd(&process).unwrap();
    let ranges = tracked_ranges(&process, &memory).unwrap();
    let populated = guest_data_extents(&memory).unwrap();
    let pagemap = process.pagemap().unwrap();
    let phases = ScanPhases::One;
    let _tracker =
        UffdTracker::start(taken.fd, pagemap, memory.regions(), ranges, &populated, phases)
            .unwrap();
    println!("tracking");
    std::thread::sleep(Duration::from_secs(60));
}

fn a_guest_outlives_an_agent_that_is_killed() {
    let guest = Guest::start(Backing::memfd("under-fire", MEMORY_BYTES, None).unwrap(), None);
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .env("ROLE", "agent")
        .env("GUEST", guest.process.pid().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let tracked = guest.write_protected();
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert!(line.trim() == "tracking" && tracked);
    assert!(!guest.write_protected() && !guest.has_uffd() && guest.writes());
    let (mut tracker, _) = guest.track(ScanPhases::One);
    std::thread::sleep(Duration::from_millis(20));
    let mut dirty = DirtySet::for_memory(&guest.memory);
    assert!(tracker.scan(&mut dirty).unwrap().reported_bytes > 0);
}

fn a_guest_that_dies_ends_tracking_with_that_reason() {
    use pageferry_datapath::tracker::TrackerError;
    let mut guest = Guest::start(Backing::memfd("under-fire", MEMORY_BYTES, None).unwrap(), None);
    let (mut tracker, _) = guest.track(ScanPhases::One);
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    let mut dirty = DirtySet::for_memory(&guest.memory);
    let error = tracker.scan(&mut dirty).unwrap_err();
    assert!(matches!(error, TrackerError::MonitorGone), "{error:?}");
    drop(tracker);
}

/// A tmpfs of its own, as the machine's may give no huge pages.
struct HugeTmpfs {
    dir: PathBuf,
}

impl HugeTmpfs {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap().keep();
        let options = Some("huge=always,size=256m");
        match mount(Some("pageferry"), &dir, Some("tmpfs"), MsFlags::empty(), options) {
            Ok(()) => Some(Self { dir }),
            Err(_) => {
                let _ = std::fs::remove_dir::<&Path>(&dir);
                None
            }
        }
    }
}

impl Drop for HugeTmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.dir);
    }
}
