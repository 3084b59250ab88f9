//! Connections that are cut: a short cut costs time, a long one ends the attempt with the guest
//! running at the source; in neither is a byte wrong.
#![forbid(unsafe_code)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pageferry_ctl::lab::{Workplace, is_root, one_at_a_time, skip};
use pageferry_tests::agents::{Agent, MIGRATION_MAX};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Slow enough that the first pass is on its way when the cut comes.
const LINK_MBIT: u64 = 150;

fn scene() -> Result<Scene, Box<dyn std::error::Error>> {
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.params.hot_mib = 4;
    spec.params.pages_per_second = 500;
    let scene = Scene::boot(&workplace, spec)?;
    scene.hosts.shape(LINK_MBIT)?;
    Ok(scene)
}

/// Migrates, and does `fault` to it while the first pass is on its way.
fn with_fault(
    name: &str,
    more: &[&str],
    fault: impl FnOnce(&Scene, &Agent, &Agent) -> Outcome,
) -> Outcome {
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let mut scene = scene()?;
    let waiting = scene.waiting(|_| {})?;
    let mut all = vec!["--verify"];
    all.extend(more);
    let (source, target) = scene.agents_patient(&waiting, &all, "30")?;
    source.wait_text("\"event\":\"start\"", SOON)?;
    fault(&scene, &source, &target)?;
    let source = source.wait(MIGRATION_MAX)?;
    println!("{name}: {}", source.summary());
    assert_eq!(source.code, 0, "{}", source.stderr);
    assert_eq!(target.wait(SOON)?.code, 0);
    assert_eq!(source.summary()["verified"], true);
    scene.hosts.cut(false)?;
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    Ok(())
}

fn cut_for(scene: &Scene, length: Duration) -> Outcome {
    scene.hosts.cut(true)?;
    sleep(length);
    scene.hosts.cut(false)?;
    Ok(())
}

#[test]
fn a_cut_of_a_second_costs_time() -> Outcome {
    with_fault("a_cut_of_a_second_costs_time", &[], |scene, _, _| {
        cut_for(scene, Duration::from_secs(1))
    })
}

#[test]
fn after_a_cut_of_nine_seconds_both_sides_go_on_where_they_were() -> Outcome {
    let name = "after_a_cut_of_nine_seconds_both_sides_go_on_where_they_were";
    with_fault(name, &[], |scene, _, _| cut_for(scene, Duration::from_secs(9)))
}

#[test]
fn a_target_agent_that_was_stopped_for_eight_seconds_goes_on() -> Outcome {
    let name = "a_target_agent_that_was_stopped_for_eight_seconds_goes_on";
    with_fault(name, &[], |_, _, target| {
        target.signal(Signal::SIGSTOP);
        sleep(Duration::from_secs(8));
        target.signal(Signal::SIGCONT);
        Ok(())
    })
}

#[test]
fn a_cut_for_good_ends_the_attempt_with_the_guest_running_here() -> Outcome {
    if !is_root() {
        skip("a_cut_for_good_ends_the_attempt_with_the_guest_running_here", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let scene = scene()?;
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_patient(&waiting, &["--reconnect-timeout", "5"], "5")?;
    source.wait_text("\"event\":\"start\"", SOON)?;
    scene.hosts.cut(true)?;
    let (source, target) = (source.wait(SOON)?, target.wait(SOON)?);
    scene.hosts.cut(false)?;
    assert_eq!((source.code, target.code), (1, 1), "{} {}", source.stderr, target.stderr);
    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}

#[test]
fn a_cut_in_the_blackout_lets_the_guest_go_on_here_within_its_timeout() -> Outcome {
    if !is_root() {
        skip("a_cut_in_the_blackout_lets_the_guest_go_on_here_within_its_timeout", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let scene = scene()?;
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_held(&waiting, &[], "last-closing:30000")?;
    source.wait_error("held in", SOON)?;
    let began = Instant::now();
    scene.hosts.cut(true)?;
    let source = source.wait(SOON)?;
    let took = began.elapsed();
    scene.hosts.cut(false)?;
    assert_eq!(source.code, 1, "{}", source.stderr);
    println!("the guest went on {} ms after the cut", took.as_millis());
    assert!(took < Duration::from_secs(12), "{took:?}");
    assert_eq!(target.wait(SOON)?.code, 1);
    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}
