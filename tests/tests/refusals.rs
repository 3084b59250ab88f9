//! What can't work is refused before the guest is touched; what fails on the way leaves the guest
//! running where it was, and nothing of ours in it.
#![forbid(unsafe_code)]

use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry_ctl::lab::{Memory, Workplace, is_root, one_at_a_time, skip};
use pageferry_tests::agents::{Agent, Ended, MIGRATION_MAX};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const REFUSED: i32 = 3;
const RUNS_AT_SOURCE: i32 = 1;

fn assert_refused(what: &str, ended: &Ended, word: &str) {
    let summary = ended.summary();
    let reason = summary["reason"].as_str().unwrap_or_default();
    println!("{what}: {reason}; hint: {}", summary["hint"]);
    assert_eq!(ended.code, REFUSED, "{what}: {}\n{summary:#}", ended.stderr);
    assert_eq!(summary["guest_running_on"], "source", "{what}");
    assert!(reason.contains(word), "{what}: {reason}");
    assert!(summary["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{what}: no hint");
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason_and_a_hint() -> Outcome {
    if !is_root() {
        skip("what_does_not_fit_is_refused_with_a_reason_and_a_hint", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let scene = Scene::boot(&workplace, Scene::spec()?)?;

    let nobody = Agent::source(
        &workplace,
        Some(scene.here()),
        "nobody",
        &scene.guest,
        Some(scene.there()),
        &[],
    )?;
    assert_refused("target not there", &nobody.wait(MIGRATION_MAX)?, "no connection");

    let refused_there =
        |what: &str, change: &dyn Fn(&mut pageferry_ctl::lab::QemuSpec), word| -> Outcome {
            let waiting = scene.waiting(|spec| change(spec))?;
            let (source, target) = scene.agents(&waiting, &[])?;
            assert_refused(what, &source.wait(MIGRATION_MAX)?, word);
            let target = target.wait(SOON)?;
            assert_eq!(target.code, RUNS_AT_SOURCE, "{what}: {}", target.stderr);
            Ok(())
        };
    refused_there("wrong size", &|spec| spec.memory_mib = 512, "bytes")?;
    refused_there("another machine", &|spec| spec.machine = "pc".into(), "q35")?;

    // A target that can't take anything in says so before it listens.
    let private =
        scene.waiting(|spec| spec.memory = Memory::Memfd { hugetlb: false, share: false })?;
    let qmp = private.qmp().display().to_string();
    let state = workplace.file("private.state").display().to_string();
    let args =
        ["target", "--listen", "127.0.0.1:0", "--qmp", &qmp, "--state-dir", &state, "--once"];
    let ended = Agent::start(&workplace, Some(scene.there()), "private", &args)?.wait(SOON)?;
    assert_eq!(ended.code, REFUSED, "{}", ended.stderr);
    assert!(ended.stderr.contains("share") && ended.stderr.contains("hint: "), "{}", ended.stderr);

    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}

#[test]
fn memory_that_is_not_shared_at_the_source_is_refused() -> Outcome {
    if !is_root() {
        skip("memory_that_is_not_shared_at_the_source_is_refused", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.memory = Memory::Anonymous;
    let mut scene = Scene::boot(&workplace, spec)?;
    scene.spec.memory = Memory::tmpfs();
    let (source, _target) = scene.migrate(&[])?;
    assert_refused("anonymous memory", &source, "");
    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}

/// The events after which something is done to an agent; each is another phase.
const MOMENTS: [&str; 3] = ["\"event\":\"start\"", "\"event\":\"round\"", "\"round\":1"];

#[test]
fn ctrl_c_or_a_killed_agent_in_any_phase_leaves_the_guest_running() -> Outcome {
    if !is_root() {
        skip("ctrl_c_or_a_killed_agent_in_any_phase_leaves_the_guest_running", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = Scene::spec()?;
    spec.params.pages_per_second = 4000;
    let scene = Scene::boot(&workplace, spec)?;
    // Slow enough to be hit in the middle of a round.
    scene.hosts.shape(400)?;
    let delays = [0, 40, 120].map(Duration::from_millis);
    for (moment, delay) in MOMENTS.into_iter().zip(delays) {
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            let waiting = scene.waiting(|_| {})?;
            let (source, target) = scene.agents(&waiting, &[])?;
            source.wait_text(moment, SOON)?;
            std::thread::sleep(delay);
            source.signal(signal);
            let source = source.wait(SOON)?;
            let target = target.wait(SOON)?;
            println!("{moment} {signal}: source {}, target {}", source.code, target.code);
            assert_eq!(target.code, RUNS_AT_SOURCE, "{}", target.stderr);
            if signal == Signal::SIGINT {
                assert_eq!(source.code, RUNS_AT_SOURCE, "{}", source.stderr);
                assert_eq!(source.summary()["guest_running_on"], "source");
            }
            scene.assert_goes_on()?;
            scene.assert_clean()?;
        }
    }
    Ok(())
}

#[test]
fn a_target_that_dies_mid_round_leaves_the_guest_running() -> Outcome {
    if !is_root() {
        skip("a_target_that_dies_mid_round_leaves_the_guest_running", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let scene = Scene::boot(&workplace, Scene::spec()?)?;
    scene.hosts.shape(500)?;
    for what in ["agent", "QEMU"] {
        let mut waiting = scene.waiting(|_| {})?;
        let (source, target) = scene.agents(&waiting, &[])?;
        source.wait_text("\"event\":\"start\"", SOON)?;
        match what {
            "agent" => target.signal(Signal::SIGKILL),
            _ => waiting.kill(),
        }
        let source = source.wait(MIGRATION_MAX)?;
        println!("target's {what} killed: {}", source.summary()["reason"]);
        let reason = source.summary()["reason"].as_str().unwrap_or_default();
        assert!(!reason.contains("writes faster"), "{reason}");
        assert_eq!(source.code, RUNS_AT_SOURCE, "{}", source.stderr);
        assert_eq!(source.summary()["guest_running_on"], "source");
        scene.assert_goes_on()?;
        scene.assert_clean()?;
        drop(target);
    }
    Ok(())
}
