//! Where a source is, and how people call it.

/// Where a source is; the order is the order of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Drawn and explained at the top of `source`.
pub enum Phase {
    Greeting,
    Offering,
    Opening,
    Attaching,
    Moving,
    Closing,
    Spacing,
    Scanning,
    DrainPausing,
    DrainScanning,
    DrainResuming,
    Preparing,
    Pausing,
    LastScanning,
    Verifying,
    Saving,
    Deciding,
    Committed,
    Releasing,
    Retracting,
    Unwinding,
    Done,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: &'static [Self] = &[
        Self::Greeting,
        Self::Offering,
        Self::Opening,
        Self::Attaching,
        Self::Moving,
        Self::Closing,
        Self::Spacing,
        Self::Scanning,
        Self::DrainPausing,
        Self::DrainScanning,
        Self::DrainResuming,
        Self::Preparing,
        Self::Pausing,
        Self::LastScanning,
        Self::Verifying,
        Self::Saving,
        Self::Deciding,
        Self::Committed,
        Self::Releasing,
        Self::Retracting,
        Self::Unwinding,
        Self::Done,
    ];

    /// What a source in this phase is doing, for messages: "cancelled while ...".
    pub fn doing(self) -> &'static str {
        match self {
            Self::Greeting => "greeting the target",
            Self::Offering => "waiting for the target's choice",
            Self::Opening => "connecting the lanes",
            Self::Attaching => "attaching to the guest's memory",
            Self::Moving => "moving memory",
            Self::Closing => "closing a round",
            Self::Spacing => "waiting for the next scan",
            Self::Scanning => "scanning for dirty pages",
            Self::DrainPausing | Self::DrainScanning | Self::DrainResuming => {
                "draining the guest's direct I/O"
            }
            Self::Preparing => "preparing the switchover",
            Self::Pausing => "pausing the guest",
            Self::LastScanning => "scanning for the last dirty pages",
            Self::Verifying => "comparing memory digests",
            Self::Saving => "handing over the device state",
            Self::Deciding => "recording the decision",
            Self::Committed => "waiting for the guest to run at the target",
            Self::Releasing => "letting go of the moved guest",
            Self::Retracting => "taking back the decision",
            Self::Unwinding => "putting everything back",
            Self::Done => "done",
        }
    }
}
