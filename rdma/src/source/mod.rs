//! The source's lanes: a pool of workers that pull batches from one round's work.
//!
//! Owned by the migration's driver, on its thread; each worker owns one connection. The driver
//! talks to a worker through a channel, and stops it by its [`Stop`].

mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::Sender;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::work::RoundWork;

use crate::connection::{self, Dialled};
use crate::error::RdmaError;
use crate::guest::RdmaMemory;
use crate::plan::ConnectPlan;
use crate::stop::Stop;

/// What the driver tells a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// Move what there is of this round, then a barrier.
    Round(Arc<RoundWork>),
    /// Say so on the wire, and end.
    Close,
}

/// What all workers of a pool share.
#[derive(Debug, Default)]
pub(crate) struct PoolCounters {
    pub(crate) alive: AtomicUsize,
    pub(crate) moved_bytes: AtomicU64,
    pub(crate) zero_bytes: AtomicU64,
}

/// Open lanes to one target, each with its worker. Dropping it aborts them.
#[derive(Debug)]
pub struct RdmaPool {
    lanes: Vec<Lane>,
    counters: Arc<PoolCounters>,
    /// Registered until the last lane is closed.
    memory: Arc<RdmaMemory>,
    /// The first round was begun, and with it registering.
    begun: bool,
}

#[derive(Debug)]
struct Lane {
    stop: Arc<Stop>,
    commands: Sender<Command>,
    worker: JoinHandle<LaneStats>,
}

impl RdmaPool {
    /// Opens every lane of the plan, all at the same time, proves each with a WRITE and a READ, and
    /// starts its worker; events of all lanes go to `events`. If one lane can't be opened, the
    /// others are closed and the first error is returned, with the lane it is about.
    pub fn connect(
        plan: &ConnectPlan,
        memory: GuestMemory,
        events: Sender<LaneEvent>,
    ) -> Result<Self, (LaneId, RdmaError)> {
        let first = plan.lanes[0].lane;
        let threads = plan.lanes.len();
        let memory = RdmaMemory::source(memory, plan.pin, threads, plan.devices());
        let memory = memory.map_err(|e| (first, e))?;
        let memory = Arc::new(memory);
        let opened: Vec<_> = thread::scope(|scope| {
            let opening: Vec<_> = plan
                .lanes
                .iter()
                .map(|lane| {
                    let memory = &memory;
                    scope.spawn(move || {
                        let stop = Arc::new(Stop::new()?);
                        connection::dial(plan, lane, memory, &stop).map(|dialled| (stop, dialled))
                    })
                })
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            opening.into_iter().map(join).collect()
        });
        let counters = Arc::new(PoolCounters::default());
        let mut pool = Self { lanes: Vec::new(), counters, memory, begun: false };
        for (lane, opened) in plan.lanes.iter().zip(opened) {
            let (stop, dialled): (Arc<Stop>, Dialled) = opened.map_err(|e| (lane.lane, e))?;
            let (commands, inbox) = crossbeam_channel::unbounded();
            let setup = worker::Setup {
                lane: lane.lane,
                cpu: lane.cpu,
                progress_wait: plan.progress_wait,
                events: events.clone(),
                counters: Arc::clone(&pool.counters),
                pacer: Arc::clone(&plan.pacer),
                memory: Arc::clone(&pool.memory),
            };
            let worker = thread::Builder::new()
                .name(format!("source-lane-{}", lane.lane))
                .spawn(move || worker::run(setup, dialled, &inbox))
                .map_err(|source| (lane.lane, RdmaError::Call { call: "clone", source }))?;
            pool.counters.alive.fetch_add(1, Ordering::AcqRel);
            pool.lanes.push(Lane { stop, commands, worker });
        }
        Ok(pool)
    }

    fn end(&mut self, abort: bool) -> Vec<LaneStats> {
        for lane in &self.lanes {
            if abort {
                lane.stop.tell();
            } else {
                // A worker that has ended already is closed already.
                let _ = lane.commands.send(Command::Close);
            }
        }
        let lanes = std::mem::take(&mut self.lanes);
        lanes
            .into_iter()
            .filter_map(|Lane { commands, worker, .. }| {
                // Without its sender a worker that waits for a command ends too.
                drop(commands);
                worker.join().ok()
            })
            .collect()
    }
}

impl SourceLanes for RdmaPool {
    fn alive(&self) -> usize {
        self.counters.alive.load(Ordering::Acquire)
    }

    fn move_round(&mut self, work: Arc<RoundWork>) {
        if !std::mem::replace(&mut self.begun, true)
            && let Err(error) = self.memory.begin(work.left())
        {
            // A lane that needs what can't be registered says so.
            tracing::warn!(%error, "registering ahead failed");
        }
        for lane in &self.lanes {
            // A lane that has failed has said so and takes no part.
            let _ = lane.commands.send(Command::Round(Arc::clone(&work)));
        }
    }

    fn moved_bytes(&self) -> u64 {
        self.counters.moved_bytes.load(Ordering::Relaxed)
    }

    fn zero_bytes(&self) -> u64 {
        self.counters.zero_bytes.load(Ordering::Relaxed)
    }

    fn close(mut self: Box<Self>, abort: bool) -> Vec<LaneStats> {
        self.end(abort)
    }
}

impl Drop for RdmaPool {
    fn drop(&mut self) {
        self.end(true);
    }
}

/// As the driver reports it.
pub fn lane_error((lane, error): (LaneId, RdmaError)) -> LaneError {
    error.into_lane_error(lane).unwrap_or(LaneError::PeerClosed { lane })
}
