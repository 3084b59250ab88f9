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
    ];
}
