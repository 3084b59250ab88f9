//! What the agents need of a virtual machine monitor, whichever it is.
//!
//! QEMU's side of it is in [`qemu`](crate::qemu), by QMP and from outside. Nothing here knows the
//! network. Calls block; each has a deadline of its own inside.

use std::io;
use std::path::Path;
use std::time::Duration;

use pageferry_datapath::control::{Offer, RegionOffer};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;
use pageferry_datapath::tracker::DirtyTracker;

use crate::qemu::capabilities::Settings;

/// What is known of a guest before anything is touched.
#[derive(Clone, Debug, Default)]
pub struct GuestFacts {
    /// The monitor's name and version.
    pub monitor: String,
    /// The machine type.
    pub machine: String,
    /// The monitor's pid.
    pub pid: i32,
    /// The threads of its vCPUs, if they are known.
    pub vcpus: Vec<i32>,
    /// Its regions, in the order that numbers them.
    pub regions: Vec<RegionOffer>,
    /// Why a drain point is needed (a disk whose direct I/O escapes the tracker), if one is.
    pub drain: Option<String>,
    /// The device, if there is one, by which the guest may give memory back while it runs.
    pub gives_memory_back: Option<String>,
    /// Which tracker will be used, and why it.
    pub tracker: (String, String),
}

/// What attaching gave.
pub struct Attached {
    /// Armed on all guest memory.
    pub tracker: Box<dyn DirtyTracker>,
    /// For how long a thread of the monitor was stopped.
    pub stopped: Duration,
}

/// A paused guest's device state on its way between two monitors: bytes in both directions.
pub trait StateStream: Send + Sync {
    /// Reads some of it; 0 at its end.
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize>;
    /// Writes all of `bytes`.
    fn write_all(&self, bytes: &[u8]) -> io::Result<()>;
    /// Nothing more will be written.
    fn finish(&self) -> io::Result<()>;
}

/// A monitor whose guest is to move.
pub trait SourceMonitor: Send {
    /// What was found when it was inspected.
    fn facts(&self) -> &GuestFacts;

    /// Whether the monitor is still there.
    fn is_alive(&self) -> bool;

    /// The migration settings of a QEMU before anything was touched, for the session's record.
    fn settings(&self) -> Option<Settings>;

    /// From here on somebody else looks after the guest if this process dies while it holds it; the
    /// session's record tells whose it is. Touches nothing.
    fn guard(&mut self, record: &Path) -> Result<(), Failure>;

    /// Maps guest memory here, in the order of the facts' regions. Touches nothing.
    fn map_memory(&mut self) -> Result<GuestMemory, Failure>;

    /// Arms tracking on all of `memory`.
    fn attach(&mut self, memory: &GuestMemory) -> Result<Attached, Failure>;

    /// What pausing and resuming will cost, as far as it can be measured beforehand.
    fn fixed_cost(&self) -> Duration;

    /// Makes ready whatever of the device state's way can be ready before the pause.
    fn prepare_switchover(&mut self) -> Result<(), Failure>;

    /// Pauses the guest; when it returns, every block request has finished.
    fn pause(&mut self) -> Result<(), Failure>;

    /// Lets the guest go on.
    fn resume(&mut self) -> Result<(), Failure>;

    /// Starts writing the device state to the stream returned.
    fn save_state(&mut self) -> Result<std::sync::Arc<dyn StateStream>, Failure>;

    /// Waits until the monitor says that it has written all of it.
    fn state_saved(&mut self) -> Result<(), Failure>;

    /// The guest runs elsewhere: lets go of it here, paused.
    fn release(&mut self);

    /// Leaves the monitor as it was found. Returns whether its guest runs.
    fn unwind(&mut self) -> bool;
}

/// A monitor that waits for a guest.
pub trait TargetMonitor: Send {
    /// The monitor's pid.
    fn pid(&self) -> i32;

    /// The threads of its vCPUs, as far as it says.
    fn vcpus(&self) -> Vec<i32> {
        Vec::new()
    }

    /// Whether the monitor is still there: without it, memory would be moved for nobody.
    fn is_alive(&self) -> bool;

    /// As [`SourceMonitor::settings`].
    fn settings(&self) -> Option<Settings>;

    /// Checks the offer against this monitor, and maps its memory in the offer's order.
    fn inspect(&mut self, offer: &Offer) -> Result<GuestMemory, Failure>;

    /// Has the monitor wait for its device state on the stream returned.
    fn prepare_incoming(&mut self) -> Result<std::sync::Arc<dyn StateStream>, Failure>;

    /// Waits until the monitor has loaded it, and is paused.
    fn state_loaded(&mut self) -> Result<(), Failure>;

    /// Lets the guest run here, and tells how long it took until it did, which may be less than
    /// until this returns. An error means that it does not and will not.
    fn resume(&mut self) -> Result<Duration, Failure>;

    /// Leaves nothing of the attempt behind.
    fn unwind(&mut self);
}
