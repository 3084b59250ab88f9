//! When to go round again, when to switch over, when to give up.
//!
//! Pure arithmetic over what was measured: no clock, no state of the migration. Asked once after
//! every scan. The questions, in order:
//!
//! 1. Would the pause fit the downtime target if the guest were paused now?
//! 2. If so: would one more round make the pause so much shorter that it pays?
//! 3. If not: are the rounds still getting anywhere?

use std::time::Duration;

/// What the operator asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goals {
    /// The longest pause wanted.
    pub downtime: Duration,
    /// Rounds after the first pass, at most.
    pub rounds_max: u32,
    /// Rounds in a row that may bring no progress.
    pub stalled_rounds_max: u32,
    /// What to do when the rounds get nowhere.
    pub stalled: Stalled,
    /// Share of the guest's time, in percent, that write tracking may cost it.
    pub slowdown_percent_max: u32,
}

/// What to do with a guest that writes faster than the lanes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stalled {
    /// Stop; the guest runs on where it is.
    Stop,
    /// Switch over with a longer pause than asked for.
    SwitchOver,
}

impl Default for Goals {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(50),
            rounds_max: 30,
            stalled_rounds_max: 4,
            stalled: Stalled::Stop,
            slowdown_percent_max: 10,
        }
    }
}

/// What a scan found, and what the rounds so far have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Rounds moved so far, the first pass included.
    pub rounds: u32,
    /// Bytes that would have to move inside the pause, as known now.
    pub left_bytes: u64,
    /// Bytes found dirty by the last scan.
    pub dirty_bytes: u64,
    /// Time in which they became dirty.
    pub dirty_time: Duration,
    /// Bytes that the lanes have moved, zero pages not counted, and the time they took: the
    /// bandwidth, as it is when little else is to do.
    pub moved_bytes: u64,
    /// See `moved_bytes`.
    pub moved_time: Duration,
    /// The smallest `left_bytes` of the scans before this one.
    pub best_left_bytes: Option<u64>,
    /// Scans in a row, this one not counted, that were no better than the best.
    pub stalled_rounds: u32,
    /// A further round makes less to move inside the pause. Not so after a drain point taken to switch
    /// over: everything reported since moves again.
    pub shrinking: bool,
    /// The part of the pause that does not depend on what is left: pausing, scan, barrier, device
    /// state, commit, resume.
    pub fixed: Duration,
}

/// The planner's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Move what was found dirty while the guest runs, and scan again: no sooner than
    /// [`scan_spacing`] after the last scan if `spaced`, or else at once.
    AnotherRound {
        /// The rounds are getting nowhere, so that what scans cost the guest has no end in sight.
        spaced: bool,
    },
    /// Pause the guest.
    SwitchOver,
    /// The guest writes faster than the lanes move.
    GiveUp,
}

/// A further round must shorten the pause by at least this much to be worth the guest's faults.
const GAIN_MIN: Duration = Duration::from_millis(2);
/// What is left must shrink to this share, in percent, of the best before to count as progress.
const PROGRESS_PERCENT: u64 = 90;
/// What one write to a protected page costs the guest: the fault, the scan's share, and cold caches
/// after both. A guest that rewrites 256 MiB loses 100 ms over the 65,536 pages after each scan,
/// under emulation; a plain process loses half of that.
const FAULT_COST: Duration = Duration::from_nanos(1500);
/// Share of a round, in percent, for which a guest may stand still at the drain point before it.
const DRAIN_PERCENT_MAX: u32 = 5;
/// No pause between rounds is longer than this, whatever the tracking costs.
const SPACING_MAX: Duration = Duration::from_secs(2);

/// The pause to expect if the guest were paused now.
pub fn predicted_blackout(measured: &Measured) -> Duration {
    measured.fixed + move_time(measured, measured.left_bytes)
}

/// Decides what follows a scan.
pub fn plan(goals: &Goals, measured: &Measured) -> Plan {
    let predicted = predicted_blackout(measured);
    let rounds_left = measured.rounds <= goals.rounds_max;
    if predicted <= goals.downtime {
        return match rounds_left && measured.shrinking && another_round_pays(measured) {
            // Soon: waiting would only let the guest write more.
            true => Plan::AnotherRound { spaced: false },
            false => Plan::SwitchOver,
        };
    }
    let stalls = measured.shrinking && is_stalled(measured);
    let stalled = stalls && measured.stalled_rounds + 1 >= goals.stalled_rounds_max;
    // What is left is not what makes the pause too long: no round can mend that.
    // Only: one measurement may be a hiccup.
    let hopeless = measured.rounds > 1 && fixed_part_is_too_long(measured);
    if rounds_left && !stalled && !hopeless {
        return Plan::AnotherRound { spaced: stalls };
    }
    match goals.stalled {
        Stalled::Stop => Plan::GiveUp,
        Stalled::SwitchOver => Plan::SwitchOver,
    }
}

/// Whether it is not what is left that makes the pause too long.
pub fn fixed_part_is_too_long(measured: &Measured) -> bool {
    move_time(measured, measured.left_bytes) < GAIN_MIN
}

/// Whether to let the devices' requests finish, at `cost` for the guest, before the next round:
/// when it takes no more than [`DRAIN_PERCENT_MAX`] of that round.
pub fn drain_pays(measured: &Measured, cost: Duration) -> bool {
    cost * 100 <= move_time(measured, measured.left_bytes) * DRAIN_PERCENT_MAX
}

/// Whether this scan found no less than the best one before it.
pub fn is_stalled(measured: &Measured) -> bool {
    measured.best_left_bytes.is_some_and(|best| {
        u128::from(measured.left_bytes) * 100 > u128::from(best) * u128::from(PROGRESS_PERCENT)
    })
}

/// The shortest time between two scans of which the first found `dirty_pages`: each of them costs
/// the guest one fault to write again, and those faults may take only their share of its time.
pub fn scan_spacing(goals: &Goals, dirty_pages: u64) -> Duration {
    let faults = FAULT_COST.saturating_mul(u32::try_from(dirty_pages).unwrap_or(u32::MAX));
    (faults * 100 / goals.slowdown_percent_max.max(1)).min(SPACING_MAX)
}

/// What would be left after one more round is what the guest writes while it moves.
fn another_round_pays(measured: &Measured) -> bool {
    let now = move_time(measured, measured.left_bytes);
    let dirty_then = scale(measured.dirty_bytes, now, measured.dirty_time);
    let then = move_time(measured, dirty_then.min(measured.left_bytes));
    let gain = now.saturating_sub(then);
    gain >= GAIN_MIN && gain >= predicted_blackout(measured) / 5
}

fn move_time(measured: &Measured, bytes: u64) -> Duration {
    let nanos = u128::from(bytes) * measured.moved_time.as_nanos()
        / u128::from(measured.moved_bytes.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// `amount` per `per`, over `time`.
fn scale(amount: u64, time: Duration, per: Duration) -> u64 {
    let scaled = u128::from(amount) * time.as_nanos() / per.as_nanos().max(1);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// 1 GiB/s, 10 ms of fixed cost, one round done.
    fn measured(left_bytes: u64, dirty_bytes: u64, dirty_time: Duration) -> Measured {
        Measured {
            rounds: 1,
            left_bytes,
            dirty_bytes,
            dirty_time,
            moved_bytes: GIB,
            moved_time: Duration::from_secs(1),
            best_left_bytes: None,
            stalled_rounds: 0,
            shrinking: true,
            fixed: Duration::from_millis(10),
        }
    }

    #[test]
    fn an_idle_guest_is_paused_at_once() {
        let idle = measured(1 << 20, 1 << 20, Duration::from_secs(1));
        assert_eq!(plan(&Goals::default(), &idle), Plan::SwitchOver);
        assert!(predicted_blackout(&idle) < Duration::from_millis(12));
    }

    #[test]
    fn a_fitting_pause_is_shortened_while_a_round_pays() {
        let third = measured(30 << 20, 30 << 20, Duration::from_secs(1));
        assert!(predicted_blackout(&third) < Duration::from_millis(50));
        assert_eq!(plan(&Goals::default(), &third), Plan::AnotherRound { spaced: false });
        // The same amount, rewritten as fast as it moves: another round brings nothing.
        let busy = measured(30 << 20, 30 << 20, Duration::from_millis(30));
        assert_eq!(plan(&Goals::default(), &busy), Plan::SwitchOver);
    }

    #[test]
    fn a_writer_faster_than_the_lanes_is_given_up_or_forced() {
        let mut hot = measured(GIB, GIB, Duration::from_millis(500));
        // It may come down yet, and the next scan should find less than a second's writes.
        assert_eq!(plan(&Goals::default(), &hot), Plan::AnotherRound { spaced: false });
        hot.best_left_bytes = Some(GIB);
        assert_eq!(plan(&Goals::default(), &hot), Plan::AnotherRound { spaced: true });
        hot.stalled_rounds = 3;
        assert_eq!(plan(&Goals::default(), &hot), Plan::GiveUp);
        let forced = Goals { stalled: Stalled::SwitchOver, ..Goals::default() };
        assert_eq!(plan(&forced, &hot), Plan::SwitchOver);
    }

    #[test]
    fn rounds_are_bounded_even_while_each_brings_a_little() {
        let mut slow = measured(GIB, GIB, Duration::from_secs(2));
        slow.best_left_bytes = Some(2 * GIB);
        slow.rounds = 31;
        assert_eq!(plan(&Goals::default(), &slow), Plan::GiveUp);
    }

    #[test]
    fn scans_are_spaced_by_what_they_cost_the_guest() {
        let goals = Goals::default();
        assert_eq!(scan_spacing(&goals, 0), Duration::ZERO);
        assert_eq!(scan_spacing(&goals, 10_000), Duration::from_millis(150));
        assert_eq!(scan_spacing(&goals, u64::MAX), SPACING_MAX);
    }

    #[test]
    fn nothing_measured_yet_does_not_divide_by_zero() {
        let blank = Measured {
            moved_bytes: 0,
            moved_time: Duration::ZERO,
            ..measured(GIB, 0, Duration::ZERO)
        };
        plan(&Goals::default(), &blank);
    }
}
