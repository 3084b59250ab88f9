//! The source's lanes: a pool of workers that pull batches from one round's work.
//!
//! Owned by the migration's driver, on its thread; each worker owns one connection. The driver
//! talks to a worker through a channel, and stops it by stopping its [`Line`].

mod connect;
mod cpu_watch;
mod narrowing;
mod pacing;
mod packing;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_channel::Sender;
use pageferry_datapath::lane::{LaneError, LaneEvent, LaneStats, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::work::RoundWork;

use self::narrowing::{LaneNarrowing, Sharing};
use self::pacing::LanePacing;
use self::packing::{LanePacking, Policy};
use crate::plan::ConnectPlan;
pub use crate::socket::reaches;
use crate::wire::Line;
use crate::worker::{Start, Worker};

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
pub struct LanePool {
    lanes: Vec<Lane>,
    counters: Arc<PoolCounters>,
    narrowing: Arc<Sharing>,
}

#[derive(Debug)]
struct Lane {
    line: Arc<Line>,
    commands: Sender<Command>,
    worker: Worker,
}

impl LanePool {
    /// Opens every lane of the plan, all at the same time, and starts its worker; events of all
    /// lanes go to `events`. If one lane can't be opened, the others are closed and the first error
    /// is returned.
    pub fn connect(
        plan: &ConnectPlan,
        memory: GuestMemory,
        events: Sender<LaneEvent>,
    ) -> Result<Self, LaneError> {
        let counters = Arc::new(PoolCounters::default());
        let narrowing = Arc::new(Sharing::new(&plan.narrowing, &memory, plan.lanes.len()));
        let mut pool = Self { lanes: Vec::with_capacity(plan.lanes.len()), counters, narrowing };
        if let Some(holes) = &plan.holes {
            holes.look.take_into_use(holes.punches);
        }
        let policy = Arc::new(Policy::new(&plan.packing, plan.lanes.len()));
        let lines = connect::connect_all(plan)?;
        for (place, (lane, line)) in plan.lanes.iter().zip(lines).enumerate() {
            let line = Arc::new(line);
            let (commands, inbox) = crossbeam_channel::unbounded();
            let setup = worker::Setup {
                lane: lane.lane,
                line: Arc::clone(&line),
                memory: memory.clone(),
                events: events.clone(),
                counters: Arc::clone(&pool.counters),
                packing: LanePacking::new(Arc::clone(&policy), place),
                narrowing: LaneNarrowing::new(Arc::clone(&pool.narrowing)),
                pacing: LanePacing::new(Arc::clone(&plan.pacer)),
                holes: plan.holes.clone(),
            };
            let start = Start {
                end: "source",
                lane: lane.lane,
                cpu: lane.cpu,
                path: plan.path,
                zero_copy: plan.zero_copy,
            };
            let worker = Worker::start(start, &line, move |wire, cpu| {
                worker::run(setup, &inbox, wire, cpu)
            })?;
            pool.counters.alive.fetch_add(1, Ordering::AcqRel);
            pool.lanes.push(Lane { line, commands, worker });
        }
        Ok(pool)
    }

    fn end(&mut self, abort: bool) -> Vec<LaneStats> {
        for lane in &self.lanes {
            if abort {
                lane.line.reset_on_close();
                lane.line.stop();
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
                worker.join_quietly()
            })
            .collect()
    }
}

impl SourceLanes for LanePool {
    fn alive(&self) -> usize {
        self.counters.alive.load(Ordering::Acquire)
    }

    fn move_round(&mut self, work: Arc<RoundWork>) {
        self.narrowing.round_begins();
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

impl Drop for LanePool {
    fn drop(&mut self) {
        self.end(true);
    }
}
