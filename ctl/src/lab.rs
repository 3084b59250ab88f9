//! The laboratory that `pageferry demo`, the tests and the benchmarks share: real guests in real
//! QEMUs, hosts that are network namespaces, and instruments to look at them.
//!
//! ```no_run
//! use std::time::Duration;
//! use pageferry_ctl::lab::{GuestAssets, Qemu, QemuSpec, TwoHosts, Workplace};
//! use pageferry_ctl::lab::{GUEST_ADDRESS, GUEST_PREFIX, TAP};
//!
//! # fn main() -> Result<(), pageferry_ctl::lab::LabError> {
//! let workplace = Workplace::new()?;
//! let hosts = TwoHosts::new(&workplace)?;
//! let mut spec = QemuSpec::new(GuestAssets::prepare()?)?
//!     .with_network(TAP, GUEST_ADDRESS, GUEST_PREFIX);
//! spec.namespace = Some(hosts.source.namespace.name().into());
//! let mut source = Qemu::launch(&workplace, "source", &spec)?;
//! spec.namespace = Some(hosts.target.namespace.name().into());
//! let target = Qemu::launch(&workplace, "target", &spec.to_target())?;
//! source.wait_ready(Duration::from_secs(60))?;
//! // … move the guest from source.qmp() to target.qmp() …
//! assert_eq!(target.console().verify(Duration::from_secs(60))?.bad, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Everything made here is a guard that takes it back when dropped, and stands in the journal of
//! its [`Workplace`] in case nobody lives to drop it. Declare guards in the order of use: a QEMU
//! goes before the namespace and the huge pages that it uses. Nothing here moves a guest, and
//! nothing of the product depends on it.

pub mod assets;
mod cache;
mod certificates;
mod command;
pub mod console;
pub mod debian;
pub mod disk_image;
pub mod error;
pub mod guest_params;
pub mod guest_program;
pub mod hugepages;
mod initramfs;
mod kernel_image;
pub mod libvirt;
pub mod netns;
pub mod ping;
pub mod process;
pub mod qemu;
pub mod qemu_binaries;
pub mod skip;
pub mod slow_disk;
pub mod small_disk;
pub mod workplace;

pub use assets::{GuestAssets, program};
pub use certificates::certificates;
pub use console::{Console, Tick, Verified};
pub use error::LabError;
pub use guest_params::GuestParams;
pub use hugepages::{HugePages, HugetlbMount};
pub use libvirt::{Domain, Libvirt};
pub use netns::{GUEST_ADDRESS, GUEST_PREFIX, Host, Namespace, TAP, TwoHosts};
pub use ping::{PingReport, Pinger};
pub use process::{CpuTime, LeftBehind, cpu_time, left_behind, with_environment};
pub use qemu::{Disk, Memory, Nic, Qemu, QemuSpec};
pub use qemu_binaries::{QemuBinary, qemu_binaries};
pub use skip::{is_root, one_at_a_time, skip};
pub use slow_disk::SlowDisk;
pub use small_disk::SmallDisk;
pub use workplace::Workplace;
