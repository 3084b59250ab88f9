//! Lanes over TCP. Bytes only: what to send and when is decided in `pageferry-datapath`.
//!
//! ```text
//! source: LanePool --- one worker per lane ---> socket ---> TargetLane: one worker each
//!         pulls batches from RoundWork                      receives into guest memory
//!         [header | extent | extent ...]  ------------->    [extent | extent ... | next header]
//!                                         <-------------    acknowledgement of each barrier
//! ```
//!
//! A worker moves bytes through a [`wire`]: an io_uring of its own, or plain system calls. Both
//! speak the same framing, so the two ends of a lane choose for themselves.

pub mod bare;
pub mod ceiling;
pub mod cpulist;
pub mod greet;
pub mod handshake;
mod kernel_tls;
pub mod limits;
pub mod nic;
pub mod placement;
mod plain;
pub mod plan;
mod ring;
pub mod rss;
mod sealed;
mod socket;
pub mod source;
mod stats;
mod sys;
pub mod target;
mod wire;
mod worker;
