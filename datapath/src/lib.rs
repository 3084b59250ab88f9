//! What Pageferry decides and knows, without moving a byte over a network.
//!
//! Owned here: guest memory as regions, dirty bitmaps, trackers, the control protocol, the two
//! state machines, the planner, lane framing, events. The state machines touch no socket, thread,
//! sleep or clock. `uring` and `rdma` move bytes; `ctl` is arguments, sockets and text.

pub mod attach;
pub mod backing;
pub mod bitmap;
pub mod clear;
pub mod codec;
pub mod control;
mod copy;
pub mod digest;
pub mod extent;
pub mod framing;
pub mod governor;
pub mod holes;
pub mod ids;
pub mod lane;
pub mod limits;
pub mod narrow;
pub mod pace;
pub mod placed;
pub mod planner;
pub mod populate;
pub mod priority;
pub mod recover;
pub mod region;
pub mod source;
pub mod target;
#[cfg(test)]
mod testing;
mod thp;
pub mod tracker;
pub mod work;
pub mod zero;
