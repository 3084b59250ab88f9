//! What the target does where it once did something else, or easily could.

use std::time::Duration;

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{Message, MessageKind};
use pageferry_datapath::ids::RoundIndex;
use pageferry_datapath::target::{Input, Outcome, Phase};

use crate::source::{failure, message};
use crate::target::{after, at, round_start};

fn said(kind: MessageKind) -> Input {
    Input::Message(message(kind))
}

#[test]
fn memory_and_the_commit_may_take_longer_to_come_than_a_greeting() {
    let hour = Duration::from_secs(3600);
    for situation in ["Receiving", "Receiving (round)", "Ready", "Resuming"] {
        let mut walk = at(situation);
        assert_eq!(walk.machine().deadline(), None);
        walk.feed_after(hour, Input::Tick);
        assert_eq!(situation.split(' ').next(), Some(format!("{:?}", walk.phase()).as_str()));
    }
}

#[test]
fn device_state_is_not_taken_before_the_monitor_waits_for_it() {
    let walk = after("Receiving (preparing)", said(MessageKind::DeviceState));
    assert_eq!(walk.phase(), Phase::Unwinding);
}

#[test]
fn device_state_is_not_taken_while_memory_is_digested() {
    let mut walk = after("Receiving (digesting)", said(MessageKind::DeviceState));
    assert_eq!(walk.phase(), Phase::Unwinding);
    walk.feed(Input::Digested { digest: crate::source::digest(1), took: Duration::ZERO });
}

#[test]
fn a_source_can_not_have_memory_digested_again_and_again() {
    for situation in ["Receiving (digesting)", "Receiving (digested)"] {
        assert_eq!(after(situation, said(MessageKind::Verify)).phase(), Phase::Unwinding);
    }
}

#[test]
fn lanes_that_end_a_round_before_its_time_end_the_attempt() {
    for (situation, round) in [
        ("Receiving", 1),
        ("Receiving (lanes ahead)", 0),
        ("Receiving (placed)", 0),
        ("Receiving (placed)", 1),
        ("Receiving (closed)", 2),
        ("Receiving (complete)", 2),
        ("Loading", 2),
        ("Ready", 2),
    ] {
        let walk = after(situation, Input::Placed(RoundIndex(round)));
        assert_eq!(walk.phase(), Phase::Unwinding, "{situation}, round {round}");
    }
}

#[test]
fn lanes_may_be_ahead_of_the_word_that_a_round_began() {
    let mut walk = after("Receiving (lanes ahead)", round_start(0, false));
    walk.feed(Input::Cleared(RoundIndex(0)));
    walk.feed(Input::Message(Message::RoundEnd(RoundIndex(0))));
    assert_eq!(walk.gave(), "Send(RoundClosed)");
    walk.feed(Input::Placed(RoundIndex(1)));
    assert_eq!(walk.phase(), Phase::Receiving);
}

#[test]
fn a_loaded_guest_that_is_given_up_is_never_run_by_a_commit_that_was_on_its_way() {
    for end in [Input::Cancelled, Input::Failed(failure()), said(MessageKind::Abort)] {
        let mut walk = after("Ready", end);
        assert_eq!(walk.phase(), Phase::Unwinding);
        walk.feed(Input::Message(Message::Commit));
        assert_eq!((walk.phase(), walk.gave().as_str()), (Phase::Unwinding, ""));
        walk.feed(Input::Unwound { dropped: true });
        assert!(matches!(walk.outcome(), Some(Outcome::Failed(_))));
    }
}

#[test]
fn a_loaded_guest_whose_end_could_not_be_put_on_record_is_not_called_dropped() {
    let mut walk = after("Ready", Input::Cancelled);
    walk.feed(Input::Unwound { dropped: false });
    assert!(matches!(walk.outcome(), Some(Outcome::Uncertain(_))));
}

#[test]
fn a_lane_that_goes_while_the_guest_begins_to_run_does_not_take_it_back() {
    let mut walk = after("Resuming", Input::Failed(failure()));
    assert_eq!((walk.phase(), walk.gave().as_str()), (Phase::Resuming, ""));
    walk.feed(Input::NotResumed(failure()));
    assert_eq!(walk.gave(), "Send(Abort), Unwind");
}

#[test]
fn every_page_is_stale_until_the_first_round_has_closed() {
    for situation in ["Receiving", "Receiving (lanes ahead)", "Receiving (placed)"] {
        let stale = at(situation).machine().stale().map(DirtySet::count);
        assert_eq!(stale, Some(64), "{situation}");
    }
    let closed = at("Receiving (closed)");
    assert!(closed.machine().stale().is_some_and(DirtySet::is_empty));
}

#[test]
fn a_loaded_guest_whose_source_is_lost_stays_paused_without_a_word() {
    let walk = after("Ready", Input::PeerLost(failure()));
    assert!(walk.out.is_empty() && matches!(walk.outcome(), Some(Outcome::Uncertain(_))));
}

#[test]
fn nothing_calls_the_guest_back_once_it_was_told_to_run() {
    for input in [
        Input::Cancelled,
        Input::PeerLost(failure()),
        said(MessageKind::Abort),
        Input::Placed(RoundIndex(2)),
    ] {
        let mut walk = at("Resuming");
        walk.feed(input);
        assert_eq!((walk.phase(), walk.gave().as_str()), (Phase::Resuming, ""));
    }
}
