//! Lanes over RDMA and lanes over TCP in one migration: two pools that pull from one round's work.
//!
//! Owned by the source's mover, on its thread. Which lane is over what was decided before, by its
//! rail; each pool drives its own. A lane takes the next batch when it has done one, whatever it
//! runs on, so each rail gets what it can carry.

use std::sync::Arc;

use pageferry_datapath::lane::{LaneStats, SourceLanes};
use pageferry_datapath::work::RoundWork;

/// The lanes of both pools, as one.
pub struct MixedLanes {
    rdma: Box<dyn SourceLanes>,
    tcp: Box<dyn SourceLanes>,
    /// Of each lane, whether it is one of those over RDMA.
    is_rdma: Vec<bool>,
}

impl MixedLanes {
    /// Of two pools; `is_rdma` has a place for each lane, in their order.
    pub fn new(rdma: Box<dyn SourceLanes>, tcp: Box<dyn SourceLanes>, is_rdma: Vec<bool>) -> Self {
        Self { rdma, tcp, is_rdma }
    }
}

impl SourceLanes for MixedLanes {
    fn alive(&self) -> usize {
        self.rdma.alive() + self.tcp.alive()
    }

    fn move_round(&mut self, work: Arc<RoundWork>) {
        self.rdma.move_round(Arc::clone(&work));
        self.tcp.move_round(work);
    }

    fn moved_bytes(&self) -> u64 {
        self.rdma.moved_bytes() + self.tcp.moved_bytes()
    }

    fn zero_bytes(&self) -> u64 {
        self.rdma.zero_bytes() + self.tcp.zero_bytes()
    }

    fn close(self: Box<Self>, abort: bool) -> Vec<LaneStats> {
        let mut rdma = self.rdma.close(abort).into_iter();
        let mut tcp = self.tcp.close(abort).into_iter();
        let next = |is_rdma| if is_rdma { rdma.next() } else { tcp.next() };
        self.is_rdma.into_iter().filter_map(next).collect()
    }
}
