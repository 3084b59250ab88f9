//! Worlds and machines that break one rule on purpose: proof that the search can fail.

use crate::rules::Rule;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// A scan's pages are reported first and protected later.
    ProtectsLate,
    /// The pause is reported before the guest stands still.
    PausesLate,
    /// What the target's memory held where the guest has holes stays.
    ClearsNothing,
    /// A barrier is acknowledged when it is sent, not when what is before it is placed.
    AcksEarly,
    /// What arrives after the lanes were fenced is placed.
    FencesNothing,
    /// The record is called written before it is.
    AnswersBeforeRecording,
    /// The decision is called taken back, and is not.
    RetractsNothing,
    /// The target drops what was loaded without a record of it.
    DropsUnrecorded,
    /// The source is told that the guest runs before the target's record says so.
    RunsUnrecorded,
    /// A source whose target is lost after the commit takes the guest back.
    TakesBack,
    /// A target whose source is lost when it is ready runs the guest.
    RunsUnasked,
    /// A guard lets the guest go on whatever the record says.
    GuardsBlindly,
    /// A source that took the guest back forgets that before the target has heard of it.
    ForgetsUnheard,
    /// A side forgets its record when the other has heard the end, and may not have acted on it.
    ForgetsHeard,
    /// The source says that it has no record any more when a crash may bring it back.
    SettlesInCache,
    /// The target runs the guest before it is on record that it may.
    MayRunUnrecorded,
    /// `recover` at the target gives back what may have run there.
    TakesLostForUnrun,
    /// `recover` tells what it has not put on record.
    TellsUnrecorded,
    /// `recover` at the target runs what is loaded there without the source's word.
    TargetRunsUntold,
    /// `recover` at the source takes back what it has handed over without the target's word.
    SourceRunsUntold,
    /// `recover` lets the guest go on, and then writes down that it took it back.
    RunsBeforeRecording,
    /// `recover` at the source forgets what it could not tell.
    ForgetsUntold,
    /// A guard goes by a record that may not have come to the disk.
    GuardTrustsCache,
}

impl Flaw {
    /// Each with the faults it takes, and the rules that may find it first.
    pub(crate) const ALL: &'static [(Self, u8, &'static [Rule])] = &[
        (Self::ProtectsLate, 0, &[Rule::Same, Rule::Placed, Rule::Stale]),
        (Self::PausesLate, 0, &[Rule::Same]),
        (Self::ClearsNothing, 0, &[Rule::Stale, Rule::Same]),
        (Self::AcksEarly, 0, &[Rule::Placed]),
        (Self::FencesNothing, 1, &[Rule::Fenced]),
        (Self::AnswersBeforeRecording, 0, &[Rule::RecordFirst]),
        (Self::RetractsNothing, 1, &[Rule::OneOwner]),
        (Self::DropsUnrecorded, 2, &[Rule::OneOwner]),
        (Self::RunsUnrecorded, 1, &[Rule::OneOwner]),
        (Self::TakesBack, 1, &[Rule::OneOwner]),
        (Self::RunsUnasked, 1, &[Rule::OneOwner]),
        (Self::GuardsBlindly, 1, &[Rule::OneOwner]),
        (Self::GuardTrustsCache, 2, &[Rule::OneOwner]),
        (Self::ForgetsUnheard, 1, &[Rule::WayOut]),
        (Self::ForgetsHeard, 1, &[Rule::WayOut]),
        (Self::SettlesInCache, 1, &[Rule::WayOut]),
        (Self::MayRunUnrecorded, 1, &[Rule::OneOwner, Rule::WayOut]),
        (Self::TakesLostForUnrun, 1, &[Rule::OneOwner, Rule::WayOut]),
        (Self::TellsUnrecorded, 1, &[Rule::RecordFirst, Rule::WayOut]),
        (Self::TargetRunsUntold, 1, &[Rule::OneOwner]),
        (Self::SourceRunsUntold, 1, &[Rule::OneOwner]),
        (Self::RunsBeforeRecording, 2, &[Rule::OneOwner]),
        (Self::ForgetsUntold, 1, &[Rule::WayOut]),
    ];

    /// How often `recover` is called on each side, where it takes that.
    pub(crate) fn recovers(self) -> u8 {
        match self {
            Self::ForgetsUnheard
            | Self::ForgetsHeard
            | Self::SettlesInCache
            | Self::MayRunUnrecorded
            | Self::TakesLostForUnrun
            | Self::TellsUnrecorded
            | Self::TargetRunsUntold
            | Self::SourceRunsUntold
            | Self::RunsBeforeRecording
            | Self::ForgetsUntold => 1,
            _ => 0,
        }
    }
}
