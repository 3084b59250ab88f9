//! What no lane of ours does, done to a target on real verbs: WRITEs without the right key.
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

use crate::connection::{self, Dialled};
use crate::error::{RdmaError, Status};
use crate::guest::RdmaMemory;
use crate::message::Message;
use crate::plan::{ConnectPlan, LanePlan, Pin, TargetLaneConfig};
use crate::qp_sys::{RemoteAddr, Write};
use crate::stop::Stop;
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
    _listener: Listener,
}

impl Attempt {
    /// To memory that may be written, or only read.
    fn new((here, there): (IpAddr, IpAddr), may_be_written: bool) -> Self {
        let target = memory();
        let registered = match may_be_written {
            true => RdmaMemory::target(target.clone(), Pin::Touched, 1),
            false => RdmaMemory::source(target.clone(), Pin::Touched, 1),
        };
        let registered = Arc::new(registered.expect("allowed"));
        registered.begin(Vec::new()).expect("allowed");
        let (to_events, events) = unbounded();
        let mut lanes = Vec::new();
        let listener = Listener::start(SocketAddr::new(there, 0), move |arriving| {
            let config = TargetLaneConfig::default();
            let (arriving, memory) = (arriving.expect("ours"), Arc::clone(&registered));
            lanes.push(TargetLane::start(arriving, memory, &config, to_events.clone()));
        });
        let listener = listener.expect("listening");
        let lane = LanePlan { lane: LaneId(0), ticket: Ticket([0; 32]), cpu: None };
        let address = SocketAddr::new(there, listener.port());
        let plan = ConnectPlan::new(address, SessionId(1), vec![lane.clone()]);
        let plan = ConnectPlan { from: Some(here), connect_wait: SOON, ..plan };
        let source = RdmaMemory::source(memory(), Pin::Touched, 1).expect("allowed");
        source.begin(Vec::new()).expect("allowed");
        let stop = Arc::new(Stop::new().expect("an eventfd"));
        let mut line = connection::dial(&plan, &lane, &source, &stop).expect("connected");
        line.line.send(&Message::Want { slice: 0 }, SOON).expect("sent");
        let Message::Keys(keys) = answer(&mut line).expect("an answer") else { panic!("no keys") };
        let key = keys[0].at;
        Self { line, source, key, events, target, _listener: listener }
    }

    /// Writes a page and asks whether it is placed; what went wrong here, and there.
    fn write(mut self, to: RemoteAddr) -> (RdmaError, Option<LaneError>) {
        let before = bytes_of(&self.target);
        let from = self.line.registered.slice(0, self.line.line.stop()).expect("registered");
        from.lease().copy_in(0, &[0xee; PAGE]).expect("inside");
        let write = Write { from, offset: 0, len: PAGE as u32, to };
        self.line.line.qp.post_writes(&[write]).expect("posted");
        let asked = self.line.line.send(&Message::Barrier { round: RoundIndex(0), seq: 0 }, SOON);
        let error = asked.and_then(|()| answer(&mut self.line)).expect_err("not acknowledged");
        self.line.line.qp.hang_up();
        let there = match self.events.recv_timeout(SOON).expect("an event in time") {
            LaneEvent::Failed { error, .. } => Some(error),
            LaneEvent::Closed { .. } => None,
            event => panic!("{event:?}"),
        };
        assert!(bytes_of(&self.target) == before, "something was written");
        drop(self.source);
        (error, there)
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
    let is_siw = std::env::var("PF_DRIVER").is_ok_and(|driver| driver == "siw");
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
        println!("{what}: source: {here:?}; target: {there:?}");
        assert!(there.is_some(), "{what}: the target has to say so too");
        let is_named = matches!(
            here,
            RdmaError::Completion { status: Status::RemoteAccess, .. }
                | RdmaError::QueuePair { .. }
        );
        // iWARP's WRITE is over here before the target has looked at it.
        assert!(is_named || is_siw && matches!(here, RdmaError::PeerClosed), "{what}: {here:?}");
    }
}
