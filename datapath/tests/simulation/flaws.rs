//! Worlds that break one rule on purpose: proof that the checker can fail.

use crate::check::Rule;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// A scan's pages are read before they are protected.
    ReadsFirst,
    /// Where data lies is looked up before tracking is armed.
    LooksBeforeArming,
    /// Direct I/O escapes the tracker, and no drain point is taken.
    NeverDrains,
    /// The pause is reported before the guest stands still.
    PausesLate,
    /// What the target's memory held where the guest has holes stays.
    ClearsNothing,
    /// A barrier is acknowledged when it arrives, not when what is before it is placed.
    AcksEarly,
    /// A lane that broke is not waited for, though it had not placed its part.
    CountsLanesAlive,
    /// What arrived before the lanes were fenced is placed after it.
    FencesNothing,
    /// The record is called written before it is.
    AnswersBeforeRecording,
    /// The decision is called taken back, and is not.
    RetractsNothing,
    /// The target drops what was loaded without a record of it.
    DropsUnrecorded,
    /// The source is told that the guest runs before the target's record says so.
    RunsUnrecorded,
    /// The monitor's settings stay changed after a failure.
    LeavesSettings,
}

impl Flaw {
    /// Each with the rules that may find it first.
    pub(crate) const ALL: &'static [(Self, &'static [Rule])] = &[
        (Self::ReadsFirst, &[Rule::Protected, Rule::Placed, Rule::Stale]),
        (Self::LooksBeforeArming, &[Rule::Protected, Rule::Same]),
        (Self::NeverDrains, &[Rule::Same]),
        (Self::PausesLate, &[Rule::Protected, Rule::Same]),
        (Self::ClearsNothing, &[Rule::Stale, Rule::Same]),
        (Self::AcksEarly, &[Rule::Placed, Rule::Stale]),
        (Self::CountsLanesAlive, &[Rule::Placed]),
        (Self::FencesNothing, &[Rule::Fenced]),
        (Self::AnswersBeforeRecording, &[Rule::RecordFirst]),
        (Self::RetractsNothing, &[Rule::OneOwner]),
        (Self::DropsUnrecorded, &[Rule::OneOwner]),
        (Self::RunsUnrecorded, &[Rule::OneOwner]),
        (Self::LeavesSettings, &[Rule::LeftAsItWas]),
    ];
}
