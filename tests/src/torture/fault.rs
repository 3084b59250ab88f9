//! What is done to a migration.

use std::time::Duration;

use serde::Serialize;

use super::moment::Moment;

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // Said in words by `text`.
pub enum Fault {
    KillSourceAgent,
    KillSourceAgentAndGuard,
    KillTargetAgent,
    KillBothAgents,
    KillSourceQemu,
    KillTargetQemu,
    LinkDownShort,
    LinkDownForGood,
    ResetLane,
    ResetControl,
    StopSourceAgent,
    StopTargetAgent,
    StopSourceAgentLong,
    StopTargetAgentLong,
    FillSourceDisk,
    FillTargetDisk,
    SmallMemlock,
    FillHugepages,
}

impl Fault {
    /// Every fault, in the order of the table.
    pub const ALL: [Self; 18] = [
        Self::KillSourceAgent,
        Self::KillSourceAgentAndGuard,
        Self::KillTargetAgent,
        Self::KillBothAgents,
        Self::KillSourceQemu,
        Self::KillTargetQemu,
        Self::LinkDownShort,
        Self::LinkDownForGood,
        Self::ResetLane,
        Self::ResetControl,
        Self::StopSourceAgent,
        Self::StopTargetAgent,
        Self::StopSourceAgentLong,
        Self::StopTargetAgentLong,
        Self::FillSourceDisk,
        Self::FillTargetDisk,
        Self::SmallMemlock,
        Self::FillHugepages,
    ];

    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::KillSourceAgent => "source agent killed",
            Self::KillSourceAgentAndGuard => "source agent and its guard killed",
            Self::KillTargetAgent => "target agent killed",
            Self::KillBothAgents => "both agents and the guard killed",
            Self::KillSourceQemu => "source's QEMU killed",
            Self::KillTargetQemu => "target's QEMU killed",
            Self::LinkDownShort => "link down for 1 s",
            Self::LinkDownForGood => "link down for good",
            Self::ResetLane => "one of three lanes reset",
            Self::ResetControl => "control connection reset",
            Self::StopSourceAgent => "source agent stopped for 6 s",
            Self::StopTargetAgent => "target agent stopped for 6 s",
            Self::StopSourceAgentLong => "source agent stopped for 20 s",
            Self::StopTargetAgentLong => "target agent stopped for 20 s",
            Self::FillSourceDisk => "full disk under the source's records",
            Self::FillTargetDisk => "full disk under the target's records",
            Self::SmallMemlock => "agents without lockable memory",
            Self::FillHugepages => "no huge pages left at the target",
        }
    }

    /// How its name is written on the command line.
    pub fn name(self) -> String {
        use clap::ValueEnum;
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Whether it can happen then: there are no lanes before they are opened.
    pub fn applies(self, moment: Moment) -> bool {
        self != Self::ResetLane || moment != Moment::Negotiate
    }

    /// Whether the agents notice it by themselves where they are held: others are let go on as soon as
    /// it is made, and feel it on their way.
    pub(super) fn ends_holds(self) -> bool {
        match self {
            Self::KillSourceAgent
            | Self::KillSourceAgentAndGuard
            | Self::KillTargetAgent
            | Self::KillBothAgents
            | Self::LinkDownForGood => true,
            Self::KillSourceQemu
            | Self::KillTargetQemu
            | Self::LinkDownShort
            | Self::ResetLane
            | Self::ResetControl
            | Self::StopSourceAgent
            | Self::StopTargetAgent
            | Self::StopSourceAgentLong
            | Self::StopTargetAgentLong
            | Self::FillSourceDisk
            | Self::FillTargetDisk
            | Self::SmallMemlock
            | Self::FillHugepages => false,
        }
    }

    /// Guests whose memory lies in huge pages are needed for it.
    pub fn needs_hugepages(self) -> bool {
        self == Self::FillHugepages
    }

    /// How long an agent is stopped, or the link is down.
    pub fn length(self) -> Duration {
        match self {
            Self::LinkDownShort => Duration::from_secs(1),
            Self::StopSourceAgent | Self::StopTargetAgent => Duration::from_secs(6),
            Self::StopSourceAgentLong | Self::StopTargetAgentLong => Duration::from_secs(20),
            _ => Duration::ZERO,
        }
    }

    /// What the agents are told of cuts: shorter than by default, where a fault lasts until then.
    pub fn reconnect_timeout_s(self) -> &'static str {
        match self {
            Self::StopSourceAgentLong | Self::StopTargetAgentLong => "30",
            Self::StopSourceAgent | Self::StopTargetAgent | Self::LinkDownShort => "10",
            _ => "3",
        }
    }

    /// How often it is drawn, relative to the others.
    pub(super) fn weight(self) -> u64 {
        match self {
            Self::StopSourceAgentLong | Self::StopTargetAgentLong => 0,
            Self::KillSourceQemu => 1,
            Self::LinkDownForGood | Self::StopSourceAgent | Self::StopTargetAgent => 1,
            Self::FillSourceDisk | Self::FillTargetDisk | Self::SmallMemlock => 1,
            Self::ResetControl | Self::FillHugepages | Self::LinkDownShort => 2,
            Self::KillSourceAgentAndGuard | Self::KillBothAgents => 3,
            Self::KillSourceAgent
            | Self::KillTargetAgent
            | Self::KillTargetQemu
            | Self::ResetLane => 4,
        }
    }
}
