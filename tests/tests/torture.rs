//! A minute of `make torture`: one fault of each kind that ends differently, then a few at random.
//! The whole matrix and longer runs are in `SPECIFICATION.md`.
#![forbid(unsafe_code)]

use std::time::Duration;

use pageferry_ctl::lab::{is_root, one_at_a_time, skip};
use pageferry_tests::torture::{Backing, Chance, Fault, Moment, Outcome, Rig, Trial, When, draw};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CELLS: [(Fault, Moment, Outcome); 10] = [
    (Fault::KillSourceAgentAndGuard, Moment::LastExtents, Outcome::RecoveredAtSource),
    (Fault::KillTargetAgent, Moment::DeviceState, Outcome::Stayed),
    (Fault::KillTargetQemu, Moment::Committed, Outcome::Stayed),
    (Fault::LinkDownForGood, Moment::DrainPoint, Outcome::Stayed),
    (Fault::LinkDownForGood, Moment::Prepared, Outcome::Stayed),
    (Fault::ResetLane, Moment::MiddleRound, Outcome::Moved),
    (Fault::KillSourceAgent, Moment::Resume, Outcome::Moved),
    (Fault::KillTargetAgent, Moment::Resume, Outcome::Moved),
    (Fault::KillBothAgents, Moment::Decided, Outcome::RecoveredAtTarget),
    (Fault::FillTargetDisk, Moment::FirstPass, Outcome::Moved),
];
/// A source whose target is gone lets the guest go on before it stops waiting for its own QEMU, 25 s.
const STANDS_STILL_MAX: Duration = Duration::from_secs(20);
const RANDOM: u64 = 6;

#[test]
fn no_fault_loses_a_guest() -> Result<()> {
    if !is_root() {
        skip("no_fault_loses_a_guest", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let mut rig = Rig::new(Backing::Tmpfs)?;
    for (fault, moment, wanted) in CELLS {
        let trial = rig.trial(fault, When::at(moment))?;
        check(&trial);
        assert!(trial.injected && trial.migration < STANDS_STILL_MAX, "{trial:#?}");
        assert_eq!(trial.verdict.outcome, wanted, "{trial:#?}");
    }
    for number in 0..RANDOM {
        let typical = Duration::from_secs(1);
        let (fault, when) = draw(&mut Chance::of(1, number), Backing::Tmpfs, typical);
        check(&rig.trial(fault, when)?);
    }
    Ok(())
}

fn check(trial: &Trial) {
    println!("{:?} {:?}: {:?}", trial.fault, trial.when, trial.verdict.outcome);
    assert!(trial.is_sound(), "{trial:#?}");
}
