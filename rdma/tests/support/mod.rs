//! Two ends of lanes in one process, on the RDMA devices that the machine has.
//!
//! `tests/rdma-vm/run` says in `PF_…` which addresses they have; elsewhere these tests are skipped.
#![allow(dead_code)] // Each test binary uses its own part.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::control::Ticket;
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::Refusal;
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneEvent, SourceLanes};
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::work::RoundWork;
use pageferry_rdma::error::RdmaError;
use pageferry_rdma::guest::RdmaMemory;
use pageferry_rdma::plan::{ConnectPlan, LanePlan, Pin, TargetLaneConfig};
use pageferry_rdma::source::RdmaPool;
use pageferry_rdma::target::{ArrivingLane, Listener, TargetLane};

/// An emulated machine that others keep busy.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// The only ticket that is taken.
pub(crate) const TICKET: Ticket = Ticket([7; 32]);
/// One page.
pub(crate) const PAGE: u64 = 4096;

/// The source's and the target's address; `None` where there is no RDMA, which is said.
pub(crate) fn addresses(test: &str) -> Option<(IpAddr, IpAddr)> {
    let address = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let found = address("PF_LOCAL_ADDR").zip(address("PF_PEER_ADDR"));
    let found = found.filter(|_| std::env::var("PF_RDMA_DEV").is_ok_and(|name| !name.is_empty()));
    if found.is_none() {
        assert!(!required(), "{test}: no RDMA device, and nothing may be skipped");
        println!("SKIP {test}: needs an RDMA device (make test-rdma)");
    }
    found
}

/// Whether nothing may be skipped.
pub(crate) fn required() -> bool {
    std::env::var("PAGEFERRY_REQUIRE_ALL").is_ok_and(|value| value == "1")
}

/// Whether the devices are soft-iWARP's, which has TCP's patience and no retries of its own.
pub(crate) fn is_siw() -> bool {
    std::env::var("PF_DRIVER").is_ok_and(|driver| driver == "siw")
}

/// One page of the first region.
pub(crate) fn page(index: u64) -> Extent {
    Extent { region: RegionIndex(0), offset: index * PAGE, len: PAGE }
}

/// Of all of a guest's memory.
pub(crate) fn digest(memory: &GuestMemory) -> MemoryDigest {
    MemoryDigest::of_memory(memory, 2, &AtomicBool::new(false)).expect("digest")
}

/// The regions of several, numbered anew.
pub(crate) fn joined(memories: Vec<GuestMemory>) -> GuestMemory {
    let regions = memories.iter().flat_map(|memory| memory.regions().iter());
    let regions = regions.enumerate().map(|(index, region)| {
        let file = region.file().try_clone_to_owned().expect("a descriptor is left").into();
        let index = RegionIndex(index as u16);
        Region::map(index, file, region.len(), region.page_bytes()).expect("mapped once already")
    });
    GuestMemory::new(regions.collect())
}

/// Memory of regions of these sizes.
pub(crate) fn memory(sizes: &[u64]) -> GuestMemory {
    memory_of(sizes, None).expect("memory")
}

/// The same of huge pages; `None` where there are not enough.
pub(crate) fn memory_of(sizes: &[u64], huge: Option<u64>) -> Option<GuestMemory> {
    let regions = sizes.iter().enumerate().map(|(index, bytes)| {
        let backing = Backing::memfd("lanes-test", *bytes, huge).ok()?;
        Region::open(RegionIndex(index as u16), backing).ok()
    });
    Some(GuestMemory::new(regions.collect::<Option<_>>()?))
}

/// Fills an extent with bytes that tell each page from every other.
pub(crate) fn fill(memory: &GuestMemory, extent: Extent, seed: u64) {
    let lease = memory.lease(extent).expect("inside");
    let mut page = [0; PAGE as usize];
    for at in (0..extent.len).step_by(PAGE as usize) {
        let mut word = (extent.offset + at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
        for bytes in page.chunks_exact_mut(8) {
            word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        lease.copy_in(at, &page).expect("inside");
    }
}

/// Whether an extent is the same on both sides.
pub(crate) fn is_same(source: &GuestMemory, target: &GuestMemory, extent: Extent) -> bool {
    let lease = |memory: &GuestMemory| memory.lease(extent).expect("inside");
    let (source, target) = (lease(source), lease(target));
    let (mut a, mut b) = (vec![0; PAGE as usize], vec![0; PAGE as usize]);
    (0..extent.len).step_by(PAGE as usize).all(|at| {
        source.copy_out(at, &mut a).expect("inside");
        target.copy_out(at, &mut b).expect("inside");
        a == b
    })
}

/// All of a guest's memory.
pub(crate) fn whole(memory: &GuestMemory) -> Vec<Extent> {
    let regions = memory.regions().iter();
    regions.map(|r| Extent { region: r.index(), offset: 0, len: r.len() }).collect()
}

/// A listening target with its memory; lanes with the right ticket are taken.
pub(crate) struct Target {
    pub(crate) memory: GuestMemory,
    pub(crate) registered: Arc<RdmaMemory>,
    pub(crate) lanes: Arc<Mutex<Vec<TargetLane>>>,
    pub(crate) events: Receiver<LaneEvent>,
    pub(crate) address: SocketAddr,
    _listener: Listener,
}

impl Target {
    /// Listens at `address`; registering begins with [`Self::begin`].
    pub(crate) fn listen(address: IpAddr, sizes: &[u64], pin: Pin) -> Self {
        Self::with_memory(address, memory(sizes), pin)
    }

    /// The same with memory that is there already.
    pub(crate) fn with_memory(address: IpAddr, memory: GuestMemory, pin: Pin) -> Self {
        let registered = RdmaMemory::target(memory.clone(), pin, 2).expect("allowed");
        let (registered, lanes) = (Arc::new(registered), Arc::new(Mutex::new(Vec::new())));
        let (to_events, events) = unbounded();
        let (shared, taken) = (Arc::clone(&registered), Arc::clone(&lanes));
        let judge = move |arriving: Result<ArrivingLane, RdmaError>| {
            let arriving = arriving.expect("only our own lanes come");
            admit(arriving, &shared, &to_events, &taken);
        };
        let listener = Listener::start(SocketAddr::new(address, 0), judge).expect("listening");
        let address = SocketAddr::new(address, listener.port());
        Self { memory, registered, lanes, events, address, _listener: listener }
    }

    /// All memory may be registered.
    pub(crate) fn begin(&self) {
        self.registered.begin(Vec::new()).expect("allowed");
    }

    /// Fences one lane.
    pub(crate) fn fence_one(&self, lane: LaneId) {
        let mut lanes = self.lanes.lock().expect("not poisoned");
        let at = lanes.iter().position(|it| it.lane() == lane).expect("it was taken");
        lanes.swap_remove(at).fence();
    }

    /// Fences every lane.
    pub(crate) fn fence(&self) {
        for lane in self.lanes.lock().expect("not poisoned").drain(..) {
            lane.fence();
        }
    }
}

fn admit(
    arriving: ArrivingLane,
    memory: &Arc<RdmaMemory>,
    events: &Sender<LaneEvent>,
    lanes: &Mutex<Vec<TargetLane>>,
) {
    if arriving.hello().ticket != TICKET {
        return arriving.refuse(Refusal::Ticket);
    }
    let config = TargetLaneConfig { connect_wait: SOON, ..TargetLaneConfig::default() };
    let lane = TargetLane::start(arriving, Arc::clone(memory), &config, events.clone());
    lanes.lock().expect("not poisoned").push(lane.expect("started"));
}

/// A plan for `count` lanes.
pub(crate) fn plan(from: IpAddr, to: SocketAddr, count: u16) -> ConnectPlan {
    let lane = |lane| LanePlan { lane: LaneId(lane), ticket: TICKET, cpu: None, route: None };
    let plan = ConnectPlan::new(to, SessionId(1), (0..count).map(lane).collect());
    ConnectPlan { from: Some(from), connect_wait: SOON, progress_wait: SOON, ..plan }
}

/// Open lanes and their events.
pub(crate) struct Source {
    pub(crate) pool: Box<RdmaPool>,
    pub(crate) events: Receiver<LaneEvent>,
}

impl Source {
    /// Connects.
    pub(crate) fn connect(plan: &ConnectPlan, memory: &GuestMemory) -> Self {
        let (to_events, events) = unbounded();
        let pool = RdmaPool::connect(plan, memory.clone(), to_events).expect("connected");
        Self { pool: Box::new(pool), events }
    }

    /// Moves a round and waits until every lane has placed its part.
    pub(crate) fn move_round(&mut self, round: u32, extents: Vec<Extent>) {
        let lanes = self.pool.alive();
        self.pool.move_round(Arc::new(RoundWork::new(RoundIndex(round), extents)));
        for _ in 0..lanes {
            match self.events.recv_timeout(SOON).expect("an event in time") {
                LaneEvent::Placed { round: placed, .. } => assert_eq!(placed, RoundIndex(round)),
                event => panic!("{event:?}"),
            }
        }
    }
}
