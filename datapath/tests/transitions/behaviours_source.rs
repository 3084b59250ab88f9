//! What the source does where it once did something else, or easily could.

use std::time::Duration;

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{AbortReason, Message, MessageKind};
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::limits;
use pageferry_datapath::recover::Guest;
use pageferry_datapath::source::{Command, FailureKind, Input, Outcome, Phase};

use crate::source::{Walk, after, at, choice, config, failure, message, pages, placed};

const SECOND: Duration = Duration::from_secs(1);

fn kind(walk: &Walk) -> Option<FailureKind> {
    match walk.outcome() {
        Some(Outcome::Failed { kind, .. }) => Some(*kind),
        _ => None,
    }
}

/// Through the greeting, and attached with every page populated.
fn attached(drain: bool) -> Walk {
    let mut walk = Walk::start(config(drain, false));
    walk.feed(Input::Message(message(MessageKind::Welcome)))
        .feed(Input::Message(Message::Choice(choice())))
        .feed(Input::LanesOpen)
        .feed(Input::Attached { populated: pages(0..64), fixed: Duration::from_millis(1) });
    walk
}

#[test]
fn a_lane_that_goes_after_the_commit_does_not_end_the_wait_for_the_target() {
    let mut walk = after("Committed", Input::Failed(failure()));
    assert_eq!(walk.phase(), Phase::Committed);
    walk.feed(Input::Message(message(MessageKind::Running))).feed(Input::Released);
    assert_eq!(walk.outcome(), Some(&Outcome::Migrated));
}

#[test]
fn lanes_that_acknowledge_what_is_not_on_its_way_end_the_attempt_and_no_more() {
    let placed = |round| Input::Placed { round: RoundIndex(round), zero_bytes: 0 };
    for (situation, round) in
        [("Moving", 1), ("Closing", 0), ("Scanning", 0), ("LastScanning", 2), ("Verifying", 3)]
    {
        assert_eq!(after(situation, placed(round)).phase(), Phase::Unwinding, "{situation}");
    }
    for situation in ["Saving", "Deciding"] {
        assert_eq!(after(situation, placed(4)).phase(), Phase::Retracting, "{situation}");
    }
    assert_eq!(after("Committed", placed(4)).phase(), Phase::Committed);
}

#[test]
fn the_wait_for_the_target_ends_whatever_else_keeps_coming() {
    for late in [Input::Failed(failure()), Input::Cancelled, Input::Tick] {
        let mut walk = at("Committed");
        walk.feed_after(SECOND * 3600, late);
        assert_eq!(kind(&walk), Some(FailureKind::Uncertain));
    }
}

#[test]
fn a_message_while_the_moved_guest_is_let_go_of_changes_nothing() {
    for kind in MessageKind::OF_MACHINES {
        let mut walk = after("Releasing", Input::Message(message(*kind)));
        walk.feed(Input::Failed(failure())).feed(Input::Released);
        assert_eq!(walk.outcome(), Some(&Outcome::Migrated));
    }
}

#[test]
fn a_guest_that_is_all_at_the_target_goes_on_there_though_its_monitor_here_has_ended() {
    let mut walk = after("Saving", Input::DeviceStateSent);
    walk.feed(Input::Failed(failure()));
    assert_eq!((walk.phase(), walk.gave().as_str()), (Phase::Saving, ""));
    walk.feed(Input::Message(message(MessageKind::Ready)));
    assert_eq!((walk.phase(), walk.gave().as_str()), (Phase::Deciding, "Record"));
    // Not all of it had left.
    let walk = after("Saving", Input::Failed(failure()));
    assert_eq!(walk.phase(), Phase::Retracting);
}

#[test]
fn a_guest_whose_monitor_has_ended_is_not_called_paused() {
    let mut walk = after("Saving", Input::Failed(failure()));
    walk.feed(Input::Retracted { durable: true }).feed(Input::Unwound { guest: Guest::Absent });
    assert_eq!(kind(&walk), Some(FailureKind::Gone));
}

#[test]
fn the_guest_runs_here_again_only_after_the_decision_was_taken_back() {
    let lost = after("Deciding", Input::PeerLost(failure()));
    let failed = after("Deciding", Input::Failed(failure()));
    let refused = after("Deciding", Input::Message(message(MessageKind::Abort)));
    let given_back = after("Committed", Input::Message(message(MessageKind::Abort)));
    for mut walk in [lost, failed, refused, given_back] {
        assert_eq!((walk.phase(), walk.gave().as_str()), (Phase::Retracting, "Retract"));
        // The record's answer, late, and lanes that go meanwhile.
        walk.feed(Input::Recorded).feed(Input::Failed(failure())).feed(Input::Cancelled);
        walk.feed(Input::Retracted { durable: true });
        assert!(walk.gave().ends_with("Unwind"), "{}", walk.gave());
        walk.feed(Input::Unwound { guest: Guest::Runs });
        assert_eq!(kind(&walk), Some(FailureKind::RunsAtSource));
    }
}

#[test]
fn a_decision_that_can_not_be_taken_back_leaves_the_guest_paused_and_says_so() {
    let mut walk = after("Deciding", Input::PeerLost(failure()));
    walk.feed(Input::Retracted { durable: false });
    assert!(walk.out.is_empty(), "{}", walk.gave());
    assert_eq!(kind(&walk), Some(FailureKind::Uncertain));
}

#[test]
fn the_last_round_is_not_waited_for_as_long_as_the_first() {
    let first = at("Closing").machine().deadline().expect("a deadline") - at("Closing").now;
    let last = at("Closing (last)").machine().deadline().expect("a deadline");
    let last = last - at("Closing (last)").now;
    assert!(first > SECOND * 60 && last <= limits::LAST_CLOSING_MAX, "{first:?} {last:?}");
    let mut walk = at("Closing (last)");
    walk.feed_after(limits::LAST_CLOSING_MAX, Input::Tick);
    assert_eq!(walk.phase(), Phase::Unwinding);
}

#[test]
fn a_guest_of_too_many_pages_for_a_message_is_refused_before_it_is_touched() {
    let mut config = config(false, false);
    config.offer.regions[0].bytes = 4 << 40;
    let mut walk = Walk::start(config);
    walk.feed(Input::Message(message(MessageKind::Welcome)));
    let aborted = walk.out.iter().find_map(|command| match command {
        Command::Send(Message::Abort(abort)) => Some(abort.reason),
        _ => None,
    });
    assert_eq!(aborted, Some(AbortReason::Refused));
    walk.feed(Input::Unwound { guest: Guest::Runs });
    assert_eq!(kind(&walk), Some(FailureKind::Refused));
}

#[test]
fn what_devices_wrote_to_when_tracking_began_is_read_after_they_finished() {
    let mut walk = attached(true);
    assert_eq!(walk.gave(), "Pause");
    walk.feed(Input::Paused);
    assert_eq!(walk.gave(), "Resume");
    walk.feed(Input::Resumed);
    assert_eq!(walk.moving(), Some(&pages(0..64)));
}

#[test]
fn a_guest_without_direct_io_is_not_paused_to_drain() {
    let walk = attached(false);
    assert_eq!((walk.phase(), walk.moving()), (Phase::Moving, Some(&pages(0..64))));
}

/// A device may write to a page long after it was reported and moved.
#[test]
fn all_that_was_reported_since_a_drain_point_moves_after_the_next() {
    let mut walk = attached(true);
    walk.feed(Input::Paused).feed(Input::Resumed);
    walk.feed_after(Duration::from_millis(30), placed(0));
    walk.feed(Input::Message(Message::RoundClosed(RoundIndex(0))));
    walk.feed(Input::Scanned(pages(0..20)));
    assert_eq!((walk.phase(), walk.moving()), (Phase::Moving, Some(&pages(0..20))));
    walk.round(1, pages([40]));
    assert_eq!(walk.phase(), Phase::DrainPausing);
    walk.feed(Input::Paused).feed(Input::Scanned(pages([41]))).feed(Input::Resumed);
    // Pages 1 to 19 were reported two scans ago.
    assert_eq!(walk.moving(), Some(&union([pages(0..20), pages(40..42)])));
    walk.round(2, pages([50]));
    // And inside the pause what was reported since, though it has not moved yet, once.
    assert_eq!(walk.phase(), Phase::Preparing);
    walk.feed(Input::SwitchoverPrepared).feed(Input::Message(Message::Prepared));
    walk.feed(Input::Paused).feed(Input::Scanned(pages([51])));
    assert_eq!(walk.moving(), Some(&pages(50..52)));
}

#[test]
fn a_drain_point_is_taken_before_a_round_so_long_that_it_costs_little() {
    let mut walk = attached(true);
    walk.feed(Input::Paused).feed(Input::Resumed);
    walk.feed_after(SECOND, placed(0));
    walk.feed(Input::Message(Message::RoundClosed(RoundIndex(0))));
    walk.feed(Input::Scanned(pages(0..20)));
    assert_eq!(walk.phase(), Phase::DrainPausing);
    walk.feed(Input::Paused).feed(Input::Scanned(pages([]))).feed(Input::Resumed);
    walk.feed_after(SECOND / 3, placed(1));
    walk.feed(Input::Message(Message::RoundClosed(RoundIndex(1))));
    walk.feed_after(SECOND * 2, Input::Tick).feed(Input::Scanned(pages([30])));
    // This one takes 16 ms: too short for a pause of its own.
    assert_eq!((walk.phase(), walk.moving()), (Phase::Moving, Some(&pages([30]))));
    walk.round(2, pages([]));
    // What was reported before the drain point does not move again.
    walk.feed(Input::Paused).feed(Input::Scanned(pages([31]))).feed(Input::Resumed);
    assert_eq!(walk.moving(), Some(&pages(30..32)));
}

#[test]
fn clearing_the_targets_memory_is_not_taken_for_a_part_of_the_pause() {
    let mut walk = attached(false);
    walk.feed(placed(0));
    walk.feed_after(SECOND * 3, Input::Message(Message::RoundClosed(RoundIndex(0))));
    walk.feed(Input::Scanned(pages([1])));
    assert_eq!(walk.phase(), Phase::Preparing);
}

#[test]
fn one_slow_scan_does_not_end_a_migration() {
    let mut walk = attached(false);
    walk.moved(0).feed_after(SECOND, Input::Scanned(pages([1])));
    assert_eq!(walk.phase(), Phase::Moving);
    walk.round(1, pages([1]));
    assert_eq!(walk.phase(), Phase::Preparing);
}

fn union(sets: [DirtySet; 2]) -> DirtySet {
    let [mut all, more] = sets;
    all.union_with(&more);
    all
}
