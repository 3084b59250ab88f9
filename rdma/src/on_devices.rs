//! What no lane of ours does, done to a target on real verbs: WRITEs without the right key, and with
//! one that was right once.
//!
//! Run by `make test-rdma`, as `rdma/tests` is; said and skipped where there is no RDMA device.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::control::Ticket;
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::lane::{LaneError, LaneEvent};
use pageferry_datapath::region::{GuestMemory, Region};

use crate::cm_sys::CmId;
use crate::connection::{self, Dialled};
use crate::error::{RdmaError, Status};
use crate::guest::RdmaMemory;
use crate::message::Message;
use crate::plan::{ConnectPlan, LanePlan, Pin, TargetLaneConfig};
use crate::qp_sys::{RemoteAddr, Write};
use crate::stop::Stop;
use crate::sys::{Access, Context, MemoryRegion};
use crate::target::{Listener, TargetLane};

const SOON: Duration = Duration::from_secs(60);
const BYTES: u64 = 4 << 20;
const PAGE: usize = 4096;

fn addresses(test: &str) -> Option<(IpAddr, IpAddr)> {
    let address = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let found = address("PF_LOCAL_ADDR").zip(address("PF_PEER_ADDR"));
    let found = found.filter(|_| std::env::var("PF_RDMA_DEV").is_ok_and(|name| !name.is_empty()));
    if found.is_none() {
        let required = std::env::var("PAGEFERRY_REQUIRE_ALL").is_ok_and(|value| value == "1");
        assert!(!required, "{test}: no RDMA device, and nothing may be skipped");
        println!("SKIP {test}: needs an RDMA device (make test-rdma)");
    }
    found
}

fn memory() -> GuestMemory {
    let backing = Backing::memfd("on-devices", BYTES, None).expect("memory");
    GuestMemory::new(vec![Region::open(RegionIndex(0), backing).expect("mapped")])
}

fn bytes_of(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    let lease = memory.regions()[0].lease(0, BYTES).expect("all of it");
    lease.copy_out(0, &mut bytes).expect("inside");
    bytes
}

/// A lane by hand, to a target whose worker answers as ever.
struct Attempt {
    line: Dialled,
    source: RdmaMemory,
    key: RemoteAddr,
    events: Receiver<LaneEvent>,
    target: GuestMemory,
    registered: Arc<RdmaMemory>,
    listener: Listener,
    address: IpAddr,
}

impl Attempt {
    /// To memory that may be written, or only read.
    fn new((here, there): (IpAddr, IpAddr), may_be_written: bool) -> Self {
        let target = memory();
        let registered = match may_be_written {
            true => RdmaMemory::target(target.clone(), Pin::Touched, 1),
            false => RdmaMemory::source(target.clone(), Pin::Touched, 1, 1),
        };
        let registered = Arc::new(registered.expect("allowed"));
        registered.begin(Vec::new()).expect("allowed");
        let (to_events, events) = unbounded();
        let (mut lanes, taken_to) = (Vec::new(), Arc::clone(&registered));
        let listener = Listener::start(SocketAddr::new(there, 0), move |arriving| {
            let config = TargetLaneConfig::default();
            let (arriving, memory) = (arriving.expect("ours"), Arc::clone(&taken_to));
            lanes.push(TargetLane::start(arriving, memory, &config, to_events.clone()));
        });
        let listener = listener.expect("listening");
        let lane = LanePlan { lane: LaneId(0), ticket: Ticket([0; 32]), cpu: None, route: None };
        let address = SocketAddr::new(there, listener.port());
        let plan = ConnectPlan::new(address, SessionId(1), vec![lane.clone()]);
        let plan = ConnectPlan { from: Some(here), connect_wait: SOON, ..plan };
        let source = RdmaMemory::source(memory(), Pin::Touched, 1, 1).expect("allowed");
        source.begin(Vec::new()).expect("allowed");
        let stop = Arc::new(Stop::new().expect("an eventfd"));
        let mut line = connection::dial(&plan, &lane, &source, &stop).expect("connected");
        line.line.send(&Message::Want { slice: 0 }, SOON).expect("sent");
        let Message::Keys(keys) = answer(&mut line).expect("an answer") else { panic!("no keys") };
        let key = keys[0].at;
        Self { line, source, key, events, target, registered, listener, address: there }
    }

    /// The target's memory registered once more, in the same domain, by nobody who will use it.
    fn register_once_more(&self) -> Arc<MemoryRegion> {
        let id = CmId::new().expect("an identifier");
        id.listen(SocketAddr::new(self.address, 0)).expect("listening");
        let context = Context::open(id.verbs()).expect("a device");
        let domain = self.registered.domain(&context).expect("the lane's");
        let lease = self.target.regions()[0].lease(0, BYTES).expect("all of it");
        MemoryRegion::register(&domain, lease, Access::RemoteWrite).expect("registered")
    }

    /// Writes a page full of one byte and asks whether it is placed.
    fn ask(&mut self, to: RemoteAddr, byte: u8) -> Result<Message, RdmaError> {
        let from = self.line.registered.slice(0, self.line.line.stop()).expect("registered");
        from.lease().copy_in(0, &[byte; PAGE]).expect("inside");
        let write = Write { from, offset: 0, len: PAGE as u32, to };
        self.line.line.qp.post_writes(&[write]).expect("posted");
        self.line.line.send(&Message::Barrier { round: RoundIndex(0), seq: 0 }, SOON)?;
        answer(&mut self.line)
    }

    /// The same where nothing may be placed; what went wrong here, and there.
    fn write(mut self, to: RemoteAddr) -> (RdmaError, Option<LaneError>) {
        let before = bytes_of(&self.target);
        let error = self.ask(to, 0xee).expect_err("not acknowledged");
        self.line.line.qp.hang_up();
        let there = match self.ending() {
            LaneEvent::Failed { error, .. } => Some(error),
            LaneEvent::Closed { .. } => None,
            event => panic!("{event:?}"),
        };
        assert!(bytes_of(&self.target) == before, "something was written");
        drop(self.source);
        (error, there)
    }

    /// The target's last event; what was placed before is no news.
    fn ending(&self) -> LaneEvent {
        loop {
            match self.events.recv_timeout(SOON).expect("an event in time") {
                LaneEvent::Placed { .. } => {}
                event => return event,
            }
        }
    }

    /// Ends in order, as a migration does, and deregisters all memory, which stays mapped.
    fn end(mut self) -> GuestMemory {
        self.line.line.send(&Message::Close, SOON).expect("sent");
        let event = self.ending();
        assert!(matches!(event, LaneEvent::Closed { .. }), "{event:?}");
        // With it go the lanes, and with the last holder what was registered.
        drop(self.listener);
        assert_eq!(Arc::strong_count(&self.registered), 1, "somebody holds it still");
        self.target
    }
}

fn answer(dialled: &mut Dialled) -> Result<Message, RdmaError> {
    let mut answer = None;
    dialled.line.until(SOON, |line| {
        answer = line.message();
        answer.is_some()
    })?;
    Ok(answer.expect("waited for"))
}

type Change = fn(RemoteAddr) -> RemoteAddr;

#[test]
fn a_write_without_the_right_key_places_nothing_and_is_named() {
    let name = "a_write_without_the_right_key_places_nothing_and_is_named";
    let Some(addresses) = addresses(name) else { return };
    let attempts: [(&str, bool, Change); 4] = [
        ("another key", true, |key| RemoteAddr { rkey: key.rkey ^ 0x5a, ..key }),
        ("past the end", true, |key| RemoteAddr { addr: key.addr + BYTES, ..key }),
        ("across the end", true, |key| RemoteAddr { addr: key.addr + BYTES - 1, ..key }),
        ("not to be written", false, |key| key),
    ];
    for (what, may_be_written, change) in attempts {
        let attempt = Attempt::new(addresses, may_be_written);
        let to = change(attempt.key);
        let (here, there) = attempt.write(to);
        assert_named(what, &here, there.as_ref());
    }
}

/// Both ends say that a WRITE was not allowed.
fn assert_named(what: &str, here: &RdmaError, there: Option<&LaneError>) {
    println!("{what}: source: {here:?}; target: {there:?}");
    let is_siw = std::env::var("PF_DRIVER").is_ok_and(|driver| driver == "siw");
    assert!(there.is_some(), "{what}: the target has to say so too");
    let is_named = matches!(
        here,
        RdmaError::Completion { status: Status::RemoteAccess, .. } | RdmaError::QueuePair { .. }
    );
    // iWARP's WRITE is over here before the target has looked at it.
    assert!(is_named || is_siw && matches!(here, RdmaError::PeerClosed), "{what}: {here:?}");
}

#[test]
fn a_key_is_good_until_its_memory_is_deregistered_and_no_longer() {
    let name = "a_key_is_good_until_its_memory_is_deregistered_and_no_longer";
    let Some(addresses) = addresses(name) else { return };
    let mut attempt = Attempt::new(addresses, true);
    let region = attempt.register_once_more();
    let key = RemoteAddr { addr: region.addr(), rkey: region.rkey() };
    let placed = attempt.ask(key, 0x11).expect("acknowledged");
    assert_eq!(placed, Message::Placed { round: RoundIndex(0), seq: 0 });
    assert_eq!(bytes_of(&attempt.target)[..PAGE], [0x11; PAGE]);
    // The connection stays; only the memory is not registered under this key any more.
    assert!(Arc::into_inner(region).is_some(), "nobody else holds it");
    let (here, there) = attempt.write(key);
    assert_named("deregistered", &here, there.as_ref());
}

#[test]
fn a_key_of_a_migration_that_is_over_is_good_for_nothing_in_the_next() {
    let name = "a_key_of_a_migration_that_is_over_is_good_for_nothing_in_the_next";
    let Some(addresses) = addresses(name) else { return };
    let mut attempt = Attempt::new(addresses, true);
    let old = attempt.key;
    attempt.ask(old, 0x22).expect("acknowledged");
    let target = attempt.end();
    let before = bytes_of(&target);
    assert_eq!(before[..PAGE], [0x22; PAGE]);
    let (here, there) = Attempt::new(addresses, true).write(old);
    assert_named("of the migration before", &here, there.as_ref());
    assert!(bytes_of(&target) == before, "something was written where the last one arrived");
}
