//! What the lane tests share: guest memory to fill and compare, a target with its acceptor.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_datapath::codec::CodecName;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Greeting, Reply, Ticket};
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, SourceLanes};
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::work::RoundWork;
use pageferry_uring::greet;
use pageferry_uring::plan::{ConnectPlan, LanePlan, PathWish, TargetLaneConfig};
use pageferry_uring::source::LanePool;
use pageferry_uring::target::TargetLane;

/// Nothing in these tests takes longer.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A file of guest memory: 4 KiB pages, or 2 MiB ones.
pub(crate) fn memory_file(bytes: u64, huge: bool) -> std::io::Result<File> {
    let flags =
        if huge { MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB } else { MFdFlags::empty() };
    let file = File::from(memfd_create("lane-test", flags)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// Guest memory with regions of these sizes.
pub(crate) fn memory(sizes: &[u64]) -> GuestMemory {
    memory_of(sizes, false)
}

/// The same, of huge pages if told so; those must have been [reserved](HugePages).
pub(crate) fn memory_of(sizes: &[u64], huge: bool) -> GuestMemory {
    let page_bytes = if huge { HUGE_PAGE_BYTES } else { 4096 };
    let regions = sizes.iter().enumerate().map(|(index, &bytes)| {
        let file = memory_file(bytes, huge).expect("memfd");
        Region::map(RegionIndex(index as u16), file, bytes, page_bytes).expect("map")
    });
    GuestMemory::new(regions.collect())
}

/// Says that a test did not run. With `PAGEFERRY_REQUIRE_ALL=1` that is a failure.
pub(crate) fn skip(name: &str, reason: &str) {
    println!("SKIP {name}: {reason}");
    assert!(std::env::var_os("PAGEFERRY_REQUIRE_ALL").is_none_or(|v| v != "1"), "{name}: {reason}");
}

pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Huge pages added to the machine's pool, and given back when dropped.
pub(crate) struct HugePages(u64);

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Adds pages; `None`, having said so for the test `name`, where that can't be done.
    pub(crate) fn reserve(name: &str, count: u64) -> Option<Self> {
        let added = Self(Self::change(|now| now + count).unwrap_or(0));
        if added.0 == count {
            return Some(added);
        }
        skip(name, &format!("{} of {count} huge pages to be had", added.0));
        None
    }

    /// Changes the pool by this rule; returns by how much it grew. Other tests change the same
    /// number: one at a time.
    fn change(to: impl Fn(u64) -> u64) -> std::io::Result<u64> {
        let lock =
            File::options().create(true).append(true).open("/tmp/pageferry-hugepages.lock")?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let read = || -> std::io::Result<u64> {
            std::fs::read_to_string(POOL)?.trim().parse().map_err(std::io::Error::other)
        };
        let before = read()?;
        std::fs::write(POOL, to(before).to_string())?;
        Ok(read()?.saturating_sub(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.0 > 0 {
            let _ = Self::change(|now| now.saturating_sub(self.0));
        }
    }
}

/// Writes a page's worth of bytes that tell where and when they were written.
pub(crate) fn fill(region: &Arc<Region>, extent: Extent, salt: u64) {
    let mut page = [0; 4096];
    let lease = region.lease(extent.offset, extent.len).expect("lease");
    for at in (0..extent.len).step_by(4096) {
        let mut state = (extent.offset + at) ^ salt.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        for word in page.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&state.to_le_bytes());
        }
        lease.copy_in(at, &page).expect("fill");
    }
}

/// Writes pages that a codec makes a third of: noise, and twice as much of one byte.
pub(crate) fn fill_thirds(region: &Arc<Region>, extent: Extent, salt: u64) {
    fill(region, extent, salt);
    let lease = region.lease(extent.offset, extent.len).expect("lease");
    for at in (0..extent.len).step_by(4096) {
        lease.copy_in(at + 4096 / 3, &[salt as u8 | 1; 4096 * 2 / 3]).expect("fill");
    }
}

/// All bytes of a region.
pub(crate) fn contents(region: &Arc<Region>) -> Vec<u8> {
    let mut bytes = vec![0; region.len() as usize];
    region.lease(0, region.len()).and_then(|l| l.copy_out(0, &mut bytes)).expect("read");
    bytes
}

/// Whether two guests hold the same bytes.
pub(crate) fn same(a: &GuestMemory, b: &GuestMemory) -> bool {
    a.regions().iter().zip(b.regions()).all(|(a, b)| contents(a) == contents(b))
}

pub(crate) fn extent(region: u16, offset: u64, len: u64) -> Extent {
    Extent { region: RegionIndex(region), offset, len }
}

/// A listener on loopback that admits lanes by their ticket.
pub(crate) struct Acceptor {
    pub(crate) listener: TcpListener,
    pub(crate) session: SessionId,
    pub(crate) tickets: Vec<Ticket>,
}

impl Acceptor {
    pub(crate) fn new(lanes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let session = SessionId::random().expect("random");
        let tickets = (0..lanes).map(|_| Ticket::random().expect("random")).collect();
        Self { listener, session, tickets }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("bound")
    }

    /// A plan that opens all lanes.
    pub(crate) fn plan(&self, path: PathWish) -> ConnectPlan {
        let lanes = self.tickets.iter().enumerate().map(|(lane, &ticket)| LanePlan {
            lane: LaneId(lane as u16),
            ticket,
            cpu: None,
            from: Vec::new(),
            route: None,
        });
        let mut plan = ConnectPlan::new(self.addr(), self.session, lanes.collect());
        plan.path = path;
        plan
    }

    /// Greets and starts as many lanes as there are tickets.
    pub(crate) fn admit_all(
        &self,
        memory: &GuestMemory,
        config: &TargetLaneConfig,
        events: &Sender<LaneEvent>,
    ) -> Vec<TargetLane> {
        let lanes = self.tickets.iter().map(|_| {
            let (stream, _) = self.listener.accept().expect("accept");
            let deadline = Instant::now() + SOON;
            let greeting = greet::peek_greeting(&stream, deadline).expect("greeting");
            assert_eq!(greeting, Greeting::Lane);
            let hello = greet::read_hello(&stream, deadline).expect("hello");
            assert_eq!(hello.session, self.session);
            assert_eq!(hello.ticket, self.tickets[usize::from(hello.lane.0)]);
            greet::send_reply(&stream, Reply::Accepted, deadline).expect("reply");
            TargetLane::start(stream, hello.lane, memory.clone(), config, events.clone())
                .expect("target lane")
        });
        lanes.collect()
    }
}

/// An open session: the source's lanes and the target's, with their events.
pub(crate) struct Session {
    pub(crate) from: GuestMemory,
    pub(crate) to: GuestMemory,
    pub(crate) pool: Box<LanePool>,
    pub(crate) targets: Vec<TargetLane>,
    pub(crate) at_source: Receiver<LaneEvent>,
    pub(crate) at_target: Receiver<LaneEvent>,
}

impl Session {
    /// Opens `lanes` lanes between two guests; `change` adapts the source's plan.
    pub(crate) fn open(
        lanes: usize,
        (from, to): (GuestMemory, GuestMemory),
        (source_path, target_path): (PathWish, PathWish),
        change: impl FnOnce(&mut ConnectPlan),
    ) -> Self {
        let acceptor = Acceptor::new(lanes);
        let (source_events, at_source) = crossbeam_channel::unbounded();
        let (target_events, at_target) = crossbeam_channel::unbounded();
        let codecs = CodecName::ALL.to_vec();
        let (path, holes) = (target_path, true);
        let config = TargetLaneConfig { path, codecs, holes, ..TargetLaneConfig::default() };
        let mut plan = acceptor.plan(source_path);
        change(&mut plan);
        let (pool, targets) = std::thread::scope(|scope| {
            let admitted = scope.spawn(|| acceptor.admit_all(&to, &config, &target_events));
            let pool = LanePool::connect(&plan, from.clone(), source_events).expect("connect");
            (Box::new(pool), admitted.join().expect("acceptor"))
        });
        Self { from, to, pool, targets, at_source, at_target }
    }

    /// Moves extents as one round, without waiting for it.
    pub(crate) fn begin(&mut self, round: u32, extents: Vec<Extent>) -> Arc<RoundWork> {
        let work = Arc::new(RoundWork::new(RoundIndex(round), extents));
        self.pool.move_round(Arc::clone(&work));
        work
    }
}

/// The next event, which must come soon.
pub(crate) fn next(events: &Receiver<LaneEvent>) -> LaneEvent {
    events.recv_timeout(SOON).expect("an event in time")
}

/// An `Arc` of a region, for compares while lanes hold it too.
pub(crate) fn region(memory: &GuestMemory, index: usize) -> &Arc<Region> {
    &memory.regions()[index]
}
