//! RDMA: today the probe of what RDMA this host has.
//!
//! Everything is read from sysfs and the file system, so that a host without libibverbs can say
//! what it lacks; nothing is linked, opened or dlopen-ed. Lanes over RDMA will live here behind the
//! feature `verbs`, beside `uring` and like it told what to do by `pageferry-datapath`.

pub mod device;
pub mod library;
pub mod probe;
mod sysfs;

pub use probe::{RdmaProbe, WhyNone, probe, probe_host};
