//! The thread of a lane's worker, at either end: pinned, with a wire of its own.
//!
//! What it does with the wire is said in `source` and `target`.

use std::thread::{self, JoinHandle};

use caps::{CapSet, Capability, CapsHashSet};
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LaneStats};

use crate::placement;
use crate::plan::{PathWish, ZeroCopyWish};
use crate::wire::{Line, Wire};

/// What a worker's thread starts with.
#[derive(Debug)]
pub(crate) struct Start {
    /// Which end: `source` or `target`.
    pub(crate) end: &'static str,
    pub(crate) lane: LaneId,
    pub(crate) cpu: Option<usize>,
    pub(crate) path: PathWish,
    pub(crate) zero_copy: ZeroCopyWish,
}

/// A started worker.
#[derive(Debug)]
pub(crate) struct Worker(JoinHandle<Option<LaneStats>>);

impl Worker {
    /// Starts a thread that opens its wire and then lives in `body`, which is told the core it is
    /// pinned to. Returns once the wire stands, or with the reason why it does not: a ring belongs
    /// to the thread that made it, so nobody else can open it.
    pub(crate) fn start(
        start: Start,
        line: &Line,
        body: impl FnOnce(Wire, Option<usize>) -> LaneStats + Send + 'static,
    ) -> Result<Self, LaneError> {
        let Start { end, lane, cpu, path, zero_copy } = start;
        let (ready, stands) = crossbeam_channel::bounded(1);
        let sealed = line.sealed().is_some();
        let zero_copy = match line.is_encrypted() {
            true => ZeroCopyWish::Not("what is encrypted is a copy"),
            false => zero_copy,
        };
        let thread = thread::Builder::new()
            .name(format!("{end}-lane-{lane}"))
            .spawn(move || {
                drop_rights();
                let cpu = placement::pin(cpu);
                let opened = match sealed {
                    true => Ok(Wire::plain("TLS in this process works on plain sockets")),
                    false => Wire::open(path, zero_copy),
                };
                let (wire, error) = match opened {
                    Ok(wire) => (Some(wire), None),
                    Err(error) => (None, Some(error)),
                };
                // `start` waits for it.
                let _ = ready.send(error);
                wire.map(|wire| body(wire, cpu))
            })
            .map_err(|source| LaneError::Host { lane, call: "clone", source })?;
        match stands.recv() {
            Ok(None) => Ok(Self(thread)),
            Ok(Some(error)) => Err(error
                .into_lane_error(lane, line)
                .unwrap_or_else(|| unreachable!("nobody else holds a lane that is being started"))),
            Err(_) => panic!("{end} lane {lane}: its thread ended before its wire stood"),
        }
    }

    /// Waits for its end. A panic on its thread goes on here.
    pub(crate) fn join(self) -> LaneStats {
        let ended = self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.expect("a worker whose wire stands has counters")
    }

    /// Waits for its end where a panic must not go on.
    pub(crate) fn join_quietly(self) -> Option<LaneStats> {
        self.0.join().ok().flatten()
    }
}

/// A worker reads what the peer sends: of this process's rights it keeps the one to come back from
/// giving way to the guest.
fn drop_rights() {
    let kept = [Capability::CAP_SYS_NICE].into_iter().collect();
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        let dropped = caps::read(None, set).and_then(|now| {
            caps::set(None, set, &now.intersection(&kept).copied().collect::<CapsHashSet>())
        });
        if let Err(error) = dropped {
            tracing::warn!(%error, "a lane's worker keeps its capabilities");
        }
    }
}
