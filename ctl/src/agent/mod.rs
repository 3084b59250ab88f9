//! The two agents: what carries out the commands of `datapath`'s state machines on real hosts.
//!
//! ```text
//!            ┌ control reader ┐   ┌ lane workers ┐   ┌ state relay ┐   Ctrl-C
//!            └───────┬────────┘   └──────┬───────┘   └─────┬───────┘     │
//!                    └───────> inputs (one channel) <──────┴─────────────┘
//!                                      │
//!                     machine.handle(input, now) ──> commands
//!                                      │
//!                        carry_out(command) ──> input, at once or later
//! ```
//!
//! One thread runs the loop and carries out what is short; the lanes, the device state relay and
//! the control reader are threads that only ever send inputs. No decision is made here.

pub mod acceptor;
pub mod admin;
pub mod allow;
pub mod backlog;
pub mod compress;
pub mod control;
pub mod core_use;
mod digest_job;
pub mod failure;
mod hold;
pub mod lanes;
pub mod link;
pub mod mixed;
pub mod monitor;
pub mod queues;
pub mod rails;
#[cfg(feature = "rdma")]
pub mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "no_rdma.rs"]
pub mod rdma;
pub mod record;
pub mod recovery;
pub mod shares;
pub mod source;
mod stranger;
pub mod target;
pub mod tickets;
pub mod tls;
