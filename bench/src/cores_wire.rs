//! A migration's lanes over TCP, each on a receive queue of its own or wherever the NIC puts it, with
//! what every core of both ends did meanwhile.
//!
//! Ports are picked and cores are chosen by what a migration picks and chooses with.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::unbounded;
use pageferry_ctl::agent::queues::{self, Landing, Picked};
use pageferry_ctl::cores::Topology;
use pageferry_ctl::host::cpus_allowed;
use pageferry_datapath::control::{LanePlaced, LanesPlaced, NicQueues};
use pageferry_datapath::framing::hello::Reply;
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneEvent, SourceLanes};
use pageferry_datapath::work::RoundWork;
use pageferry_uring::greet;
use pageferry_uring::nic::Nic;
use pageferry_uring::plan::{ConnectPlan, LanePlan, TargetLaneConfig};
use pageferry_uring::source::LanePool;
use pageferry_uring::target::TargetLane;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cpu::CoreTicks;
use crate::error::BenchError;
use crate::lanes_wire::{self, Over, SESSION, TICKET, WAIT_MAX};
use crate::recorder::Recorded;
use crate::serve::{Peer, Request};
use crate::turns::Taken;

/// One way to use them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) lanes: u16,
    /// Size of the guest.
    pub(crate) memory_bytes: u64,
    /// Each lane on a queue of its own, its worker beside that queue's core.
    pub(crate) placed: bool,
}

impl Way {
    fn lanes(&self) -> lanes_wire::Way {
        lanes_wire::Way {
            over: Over::Tcp { uring: true, zero_copy: false },
            lanes: self.lanes,
            memory_bytes: self.memory_bytes,
            extent_bytes: 1 << 20,
            scattered: false,
            huge: false,
            same_host: false,
        }
    }
}

/// What the target says when all is over.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Said {
    lanes: LanesPlaced,
    /// At the end of each round.
    rounds: Vec<Vec<CoreTicks>>,
}

/// How the other end's NIC spreads flows.
pub(crate) fn ask(peer: &mut Peer) -> Result<Vec<NicQueues>, BenchError> {
    peer.ask(&Request::Queues)?;
    parsed(peer.done()?)
}

/// Moves `bytes` after all memory was moved once by each lane.
pub(crate) fn stream(
    peer: &mut Peer,
    told: &[NicQueues],
    way: &Way,
    bytes: u64,
) -> Result<Taken, BenchError> {
    let lanes = way.lanes();
    let memory = lanes.memory()?;
    let to = peer.ask(&Request::LanesOnCores(*way))?;
    let picked = match way.placed {
        true => queues::pick(told, way.lanes.into(), (to, &[]), SESSION),
        false => Picked { from: vec![Vec::new(); way.lanes.into()], why_not: None },
    };
    let lane = |(lane, from): (u16, &Vec<SocketAddr>)| LanePlan {
        lane: LaneId(lane),
        ticket: TICKET,
        cpu: lanes.cpu(lane),
        from: from.clone(),
        route: None,
    };
    let plans = (0..).zip(&picked.from).map(lane).collect();
    let plan = ConnectPlan { connect_wait: WAIT_MAX, ..ConnectPlan::new(to, SESSION, plans) };
    let (to_events, events) = unbounded();
    let mut pool = LanePool::connect(&plan, memory, to_events)?;
    let mut rounds = 0;
    let mut round = |bytes: u64| {
        let extents = lanes.extents(bytes);
        let bytes = extents.len() as u64 * (1 << 20);
        pool.move_round(Arc::new(RoundWork::new(RoundIndex(rounds), extents)));
        rounds += 1;
        for _ in 0..way.lanes {
            match events.recv_timeout(WAIT_MAX) {
                Ok(LaneEvent::Placed { .. }) => {}
                Ok(LaneEvent::Failed { error, .. }) => return Err(error.into()),
                Ok(LaneEvent::Closed { .. }) | Err(_) => {
                    let (what, waited_s) = ("a lane".into(), WAIT_MAX.as_secs());
                    return Err(BenchError::Timeout { what, waited_s });
                }
            }
        }
        Ok(bytes)
    };
    for _ in 0..way.lanes {
        round(way.memory_bytes)?;
    }
    let (before, began) = (CoreTicks::now()?, Instant::now());
    let bytes = round(bytes)?;
    let (after, seconds) = (CoreTicks::now()?, began.elapsed().as_secs_f64());
    let workers: f64 =
        Box::new(pool).close(false).iter().map(|stats| stats.cpu_ns as f64 / 1e9).sum();
    let said: Said = parsed(peer.done()?)?;
    let source = CoreTicks::since(&after, &before);
    let target = match said.rounds.as_slice() {
        [.., before, after] => CoreTicks::since(after, before),
        _ => Vec::new(),
    };
    let queues: BTreeSet<_> = said.lanes.lanes.iter().filter_map(|lane| lane.napi).collect();
    let placed = way.placed.then(|| queues::report(&picked, Some(&said.lanes)));
    Ok(Taken {
        recorded: Recorded { bytes, seconds, ..Recorded::default() },
        said: json!({
            "source": source, "target": target, "placed": placed, "queues": queues.len(),
            "lanes": said.lanes.lanes, "source_workers_cpu_s": workers,
        }),
    })
}

fn parsed<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, BenchError> {
    serde_json::from_value(value).map_err(|error| BenchError::Unexpected {
        program: "pageferry-bench serve".into(),
        said: error.to_string(),
    })
}

/// The other end of [`ask`].
pub(crate) fn tell(
    at: IpAddr,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    ready(0)?;
    Ok(json!(told(at)?))
}

fn told(at: IpAddr) -> Result<Vec<NicQueues>, BenchError> {
    let nics = Nic::all().map_err(|error| BenchError::Unexpected {
        program: "the list of NICs".into(),
        said: error.to_string(),
    })?;
    Ok(queues::told(&nics, &[at], &cpus_allowed()))
}

/// The other end of [`stream`].
pub(crate) fn serve(
    at: IpAddr,
    way: &Way,
    ready: &mut dyn FnMut(u16) -> Result<(), BenchError>,
) -> Result<Value, BenchError> {
    let told = told(at)?;
    let memory = way.lanes().memory()?;
    let address = SocketAddr::new(at, 0);
    let io = || BenchError::io("listen on", address);
    let listener = TcpListener::bind(address).map_err(io())?;
    ready(listener.local_addr().map_err(io())?.port())?;
    let (to_events, events) = unbounded();
    let mut lanes: Vec<(TargetLane, Landing, Option<usize>)> = Vec::new();
    for _ in 0..way.lanes {
        let (stream, from) = listener.accept().map_err(io())?;
        let to = stream.local_addr().map_err(io())?;
        let deadline = Instant::now() + WAIT_MAX;
        let greeted = || -> Result<LaneId, greet::GreetError> {
            let hello = greet::read_hello(&stream, deadline)?;
            greet::send_reply(&stream, Reply::Accepted, deadline)?;
            Ok(hello.lane)
        };
        let lane = greeted().map_err(|error| BenchError::Unexpected {
            program: "the benchmark".into(),
            said: error.to_string(),
        })?;
        let landing = queues::landing(&told, from, to);
        let taken: Vec<usize> = lanes.iter().filter_map(|(_, _, cpu)| *cpu).collect();
        let beside = way.placed.then(|| core_beside(&told, &landing, way.lanes, &taken)).flatten();
        let cpu = beside.or_else(|| way.lanes().cpu(lane.0));
        let config = TargetLaneConfig { cpu, ..TargetLaneConfig::default() };
        let started = TargetLane::start(stream, lane, memory.clone(), &config, to_events.clone())?;
        lanes.push((started, landing, cpu));
    }
    let mut said = Said { lanes: LanesPlaced::default(), rounds: Vec::new() };
    let (mut open, mut placed) = (lanes.len(), 0);
    while open > 0 {
        match events.recv() {
            Ok(LaneEvent::Placed { .. }) => {
                placed += 1;
                if placed % lanes.len() == 0 {
                    said.rounds.push(CoreTicks::now()?);
                    said.lanes.lanes = lanes.iter().map(arrived).collect();
                }
            }
            Ok(LaneEvent::Closed { .. }) => open -= 1,
            Ok(LaneEvent::Failed { error, .. }) => return Err(error.into()),
            Err(_) => break,
        }
    }
    Ok(json!(said))
}

/// As a target chooses it.
fn core_beside(
    told: &[NicQueues],
    landing: &Landing,
    lanes: u16,
    taken: &[usize],
) -> Option<usize> {
    let used = told.iter().flat_map(|nic| nic.queues.iter().take(lanes.into()));
    let interrupted: Vec<usize> = used.filter_map(|core| core.cpu.map(usize::from)).collect();
    Topology::here().beside(landing.cpu?, &cpus_allowed(), taken, &interrupted)
}

fn arrived((lane, landing, cpu): &(TargetLane, Landing, Option<usize>)) -> LanePlaced {
    let (napi, incoming_cpu) = lane.incoming();
    LanePlaced {
        lane: lane.lane().0,
        device: landing.device.clone(),
        queue: landing.queue,
        napi,
        incoming_cpu: incoming_cpu.and_then(|cpu| u16::try_from(cpu).ok()),
        cpu: cpu.and_then(|cpu| u16::try_from(cpu).ok()),
    }
}
