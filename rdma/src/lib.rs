//! Lanes over RDMA, on iWARP and RoCE alike. Bytes only: what to send and when is decided in
//! `pageferry-datapath`.
//!
//! ```text
//! source: RdmaPool --- one worker per lane ---> queue pair      TargetLane: one worker each
//!         pulls batches from RoundWork                          guest memory, registered
//!         WRITE WRITE WRITE ...  -------------------------->    placed by the device
//!         SEND barrier  ----------------------------------->    worker: received, so all before
//!                       <-----------------------------------    it is placed: SEND placed
//! ```
//!
//! Only what every provider has is used: reliable connections made by librdmacm, `post_send` and
//! `poll_cq`, one range per request, no immediate data, no atomics.
//!
//! The probe of what RDMA a host has reads sysfs and the file system alone, so that a host without
//! libibverbs can say what it lacks; everything else is behind the feature `rdma`.

pub mod device;
pub mod library;
pub mod probe;
mod sysfs;

#[cfg(feature = "rdma")]
pub mod bare;
#[cfg(feature = "rdma")]
mod cm_sys;
#[cfg(feature = "rdma")]
mod connection;
#[cfg(feature = "rdma")]
pub mod error;
#[cfg(feature = "rdma")]
mod events_sys;
#[cfg(feature = "rdma")]
pub mod guest;
#[cfg(feature = "rdma")]
mod kept_sys;
#[cfg(feature = "rdma")]
pub mod limits;
#[cfg(feature = "rdma")]
mod line;
#[cfg(feature = "rdma")]
mod mailbox;
#[cfg(feature = "rdma")]
mod memlock;
#[cfg(feature = "rdma")]
mod message;
#[cfg(all(test, feature = "rdma"))]
mod on_devices;
#[cfg(feature = "rdma")]
pub mod plan;
#[cfg(feature = "rdma")]
mod qp_sys;
#[cfg(feature = "rdma")]
mod registration;
#[cfg(feature = "rdma")]
mod slices;
#[cfg(feature = "rdma")]
pub mod source;
#[cfg(feature = "rdma")]
mod spin;
#[cfg(feature = "rdma")]
mod stats;
#[cfg(feature = "rdma")]
mod stop;
#[cfg(feature = "rdma")]
mod sys;
#[cfg(feature = "rdma")]
pub mod target;

#[cfg(feature = "rdma")]
#[doc(hidden)]
pub use message::fuzz_message;
pub use probe::{RdmaProbe, WhyNone, probe, probe_host};
