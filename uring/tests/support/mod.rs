//! What the lane tests share: guest memory to fill and compare, a target with its acceptor.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Greeting, Reply, Ticket};
use pageferry_datapath::ids::{LaneId, RegionIndex, SessionId};
use pageferry_datapath::lane::LaneEvent;
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_uring::greet;
use pageferry_uring::plan::{ConnectPlan, LanePlan, PathWish, TargetLaneConfig};
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
    let regions = sizes.iter().enumerate().map(|(index, &bytes)| {
        let file = memory_file(bytes, false).expect("memfd");
        Region::map(RegionIndex(index as u16), file, bytes, 4096).expect("map")
    });
    GuestMemory::new(regions.collect())
}

/// Writes a page's worth of bytes that tell where and when they were written.
pub(crate) fn fill(region: &Region, extent: Extent, salt: u64) {
    let mut page = [0; 4096];
    let file = File::from(region.file().try_clone_to_owned().expect("dup"));
    for offset in (extent.offset..extent.end()).step_by(4096) {
        let mut state = offset ^ salt.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        for word in page.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all_at(&page, offset).expect("fill");
    }
}

/// All bytes of a region.
pub(crate) fn contents(region: &Region) -> Vec<u8> {
    read(region, Extent { region: region.index(), offset: 0, len: region.len() })
}

/// The bytes of an extent.
pub(crate) fn read(region: &Region, extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0; extent.len as usize];
    let file = File::from(region.file().try_clone_to_owned().expect("dup"));
    file.read_exact_at(&mut bytes, extent.offset).expect("read");
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
            bind: None,
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

/// The next event, which must come soon.
pub(crate) fn next(events: &Receiver<LaneEvent>) -> LaneEvent {
    events.recv_timeout(SOON).expect("an event in time")
}

/// An `Arc` of a region, for compares while lanes hold it too.
pub(crate) fn region(memory: &GuestMemory, index: usize) -> &Arc<Region> {
    &memory.regions()[index]
}
