//! Exit codes: the one place where they are numbered, so that scripts can rely on them.

use std::process;

/// How a command ended. The numbers are part of the command line's contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked: the guest runs on the target, or the host is fit to migrate from.
    Done = 0,
    /// It failed; the guest runs at the source, as before.
    RunningAtSource = 1,
    /// The arguments make no sense; nothing was looked at. (clap's number.)
    BadUsage = 2,
    /// Refused before the guest was touched: something on one of the hosts does not fit.
    Refused = 3,
    /// The hand-over was decided and the target did not confirm it: the guest is paused at the
    /// source and may run at the target. Look before doing anything.
    HandoverUncertain = 4,
    /// It failed, and the guest, whole at the source, did not resume when asked to.
    PausedAtSource = 5,
    /// It failed; the guest is gone: its QEMU ended before it was loaded elsewhere.
    GuestGone = 6,
}

impl Exit {
    /// Every way to end, for the documentation's table and its test.
    pub const ALL: [Self; 7] = [
        Self::Done,
        Self::RunningAtSource,
        Self::BadUsage,
        Self::Refused,
        Self::HandoverUncertain,
        Self::PausedAtSource,
        Self::GuestGone,
    ];

    /// The number.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// What it means, in one line.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done: the guest runs on the target (probe: this host can migrate)",
            Self::RunningAtSource => "failed; the guest runs at the source, as before",
            Self::BadUsage => "bad usage",
            Self::Refused => {
                "refused before the guest was touched (probe: this host can't migrate)"
            }
            Self::HandoverUncertain => {
                "hand-over uncertain: the guest is paused at the source and may run at the target"
            }
            Self::PausedAtSource => "failed; the guest is whole at the source, but still paused",
            Self::GuestGone => {
                "failed; the guest is gone: its QEMU ended before it was loaded elsewhere"
            }
        }
    }
}

impl From<Exit> for process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_documented_ones() {
        let codes = Exit::ALL.map(Exit::code);
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6]);
    }
}
