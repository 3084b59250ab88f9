//! Sessions whose agents were lost are brought to their end by `pageferry recover`: one running
//! guest, on the side that the records say, whoever asks.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pageferry_ctl::agent::link::Link;
use pageferry_ctl::agent::record::{self, Decision};
use pageferry_ctl::agent::tls::Caller;
use pageferry_ctl::lab::{Qemu, Workplace, certificates, is_root, one_at_a_time, skip};
use pageferry_ctl::qemu::runstate::RunState;
use pageferry_ctl::qmp::Qmp;
use pageferry_datapath::control::{Hello, Message, Recover, Word};
use pageferry_datapath::ids::SessionId;
use pageferry_tests::agents::{Agent, Ended, PORT};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn runs(qemu: &Qemu) -> Result<bool, Box<dyn std::error::Error>> {
    Ok(RunState::query(&Qmp::connect(qemu.qmp())?)?.running)
}

/// `pageferry COMMAND` about the sessions of an agent, on its host.
fn command(
    scene: &Scene,
    at_source: bool,
    agent: &str,
    args: &[&str],
) -> Result<Agent, Box<dyn std::error::Error>> {
    let host = if at_source { scene.here() } else { scene.there() };
    let dir = scene.workplace.file(&format!("{agent}.state")).display().to_string();
    let mut all = args.to_vec();
    all.extend(["--state-dir", &dir]);
    let name = format!("{}-{agent}", args[0]);
    Ok(Agent::start(&scene.workplace, Some(host), &name, &all)?)
}

fn done(agent: Agent) -> Result<Ended, Box<dyn std::error::Error>> {
    Ok(agent.wait(SOON)?)
}

/// A guest whose source agent was killed when its hand-over was on record, and a QEMU that has it
/// loaded.
fn decided(
    workplace: &std::sync::Arc<Workplace>,
) -> Result<(Scene, Qemu, Agent), Box<dyn std::error::Error>> {
    let scene = Scene::boot(workplace, Scene::spec()?)?;
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_held(&waiting, &[], "deciding:30000")?;
    source.wait_error("held in", SOON)?;
    source.signal(Signal::SIGKILL);
    source.wait_error("its record says HandedOver: the guest stays as it is", SOON)?;
    source.wait(SOON)?;
    Ok((scene, waiting, target))
}

#[test]
fn what_was_decided_is_finished_while_the_target_agent_lives() -> Outcome {
    if !is_root() {
        skip("what_was_decided_is_finished_while_the_target_agent_lives", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let (mut scene, waiting, target) = decided(&workplace)?;
    let status = done(command(&scene, true, "source-1", &["status", "--json"])?)?;
    assert_eq!(status.events[0]["decision"], "handed-over", "{:?}", status.events);
    assert_eq!(status.events[0]["live"], false);
    let recover = done(command(&scene, true, "source-1", &["recover", "--json"])?)?;
    assert_eq!(recover.code, 0, "{}", recover.stderr);
    assert_eq!(recover.events[0]["end"], "the-others");
    assert_eq!(target.wait(SOON)?.code, 0);
    assert!(runs(&waiting)? && !runs(&scene.guest)?);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn what_was_decided_is_finished_when_both_agents_are_gone() -> Outcome {
    if !is_root() {
        skip("what_was_decided_is_finished_when_both_agents_are_gone", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let (mut scene, waiting, target) = decided(&workplace)?;
    assert_eq!(target.wait(SOON)?.code, 4, "it waits in vain for its source");
    let alone = done(command(&scene, true, "source-1", &["recover", "--json", "--wait", "1"])?)?;
    assert_eq!((alone.code, &alone.events[0]["end"]), (4, &"unknown".into()), "{}", alone.stderr);
    assert!(!runs(&waiting)? && !runs(&scene.guest)?, "nobody runs what may be the other's");
    let there = command(&scene, false, "target-1", &["recover", "--json", "--wait", "20"])?;
    let here = done(command(&scene, true, "source-1", &["recover", "--json", "--wait", "15"])?)?;
    let there = done(there)?;
    assert_eq!((here.code, &here.events[0]["end"]), (0, &"the-others".into()), "{}", here.stderr);
    assert_eq!((there.code, &there.events[0]["end"]), (0, &"runs-here".into()), "{}", there.stderr);
    assert!(runs(&waiting)? && !runs(&scene.guest)?);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn with_the_target_dead_the_guest_goes_on_at_the_source_by_the_operator_s_word() -> Outcome {
    if !is_root() {
        skip("with_the_target_dead_the_guest_goes_on_at_the_source_by_the_operator_s_word", "root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let (scene, waiting, target) = decided(&workplace)?;
    target.signal(Signal::SIGKILL);
    target.wait(SOON)?;
    drop(waiting);
    let session = done(command(&scene, true, "source-1", &["status", "--json"])?)?;
    let session = session.events[0]["session"].as_str().ok_or("a session")?.to_owned();
    // It was allowed to run there, and nobody can know whether it did before it was lost.
    let there = command(&scene, false, "target-1", &["recover", "--json", "--wait", "20"])?;
    let here = done(command(&scene, true, "source-1", &["recover", "--json", "--wait", "5"])?)?;
    let there = done(there)?;
    for asked in [&here, &there] {
        assert_eq!((asked.code, &asked.events[0]["end"]), (4, &"unknown".into()));
    }
    let word = ["recover", &session, "--peer-is-dead", "--wait", "1", "--json"];
    let recover = done(command(&scene, true, "source-1", &word)?)?;
    assert_eq!((recover.code, &recover.events[0]["end"]), (0, &"runs-here".into()));
    scene.assert_goes_on()?;
    // The other side comes back, and learns of it; then nobody keeps a record.
    let there = command(&scene, false, "target-1", &["recover", "--json", "--wait", "20"])?;
    let here = done(command(&scene, true, "source-1", &["recover", "--json", "--wait", "15"])?)?;
    let there = done(there)?;
    assert_eq!((here.code, &here.events[0]["end"]), (0, &"runs-here".into()), "{}", here.stderr);
    assert_eq!(
        (there.code, &there.events[0]["end"]),
        (0, &"the-others".into()),
        "{}",
        there.stderr
    );
    for (at_source, name) in [(true, "source-1"), (false, "target-1")] {
        let left = done(command(&scene, at_source, name, &["status", "--json"])?)?;
        assert!(left.events.is_empty(), "{name}: {:?}", left.events);
    }
    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}

#[test]
fn with_the_source_s_host_dead_the_loaded_guest_runs_by_the_operator_s_word() -> Outcome {
    if !is_root() {
        skip("with_the_source_s_host_dead_the_loaded_guest_runs_by_the_operator_s_word", "root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let (mut scene, waiting, target) = decided(&workplace)?;
    scene.guest.kill();
    assert_eq!(target.wait(SOON)?.code, 4);
    let session = done(command(&scene, false, "target-1", &["status", "--json"])?)?;
    let session = session.events[0]["session"].as_str().ok_or("a session")?.to_owned();
    let word = ["recover", &session, "--peer-is-dead", "--json"];
    let recover = done(command(&scene, false, "target-1", &word)?)?;
    assert_eq!((recover.code, &recover.events[0]["end"]), (0, &"runs-here".into()));
    // Nobody will ever ask for the record.
    let forget = ["recover", &session, "--forget", "--json"];
    let forgot = done(command(&scene, false, "target-1", &forget)?)?;
    assert_eq!((forgot.code, &forgot.events[0]["decision"]), (0, &"running".into()));
    let left = done(command(&scene, false, "target-1", &["status", "--json"])?)?;
    assert!(left.events.is_empty(), "{:?}", left.events);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn a_session_on_its_way_can_be_cancelled_from_outside() -> Outcome {
    if !is_root() {
        skip("a_session_on_its_way_can_be_cancelled_from_outside", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let scene = Scene::boot(&workplace, Scene::spec()?)?;
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_held(&waiting, &[], "scanning:30000")?;
    source.wait_error("held in", SOON)?;
    let session = done(command(&scene, true, "source-1", &["status", "--json"])?)?;
    assert_eq!(session.events[0]["live"], true);
    let session = session.events[0]["session"].as_str().ok_or("a session")?.to_owned();
    let all = done(command(&scene, true, "source-1", &["recover", "--json"])?)?;
    assert_eq!((all.code, &all.events[0]["event"]), (0, &"passed-over".into()), "{}", all.stderr);
    let recover = done(command(&scene, true, "source-1", &["recover", &session])?)?;
    assert_eq!(recover.code, 3, "its agent lives: {}", recover.stderr);
    let cancel = done(command(&scene, true, "source-1", &["cancel", &session])?)?;
    assert_eq!(cancel.code, 0, "{}", cancel.stderr);
    assert_eq!((source.wait(SOON)?.code, target.wait(SOON)?.code), (1, 1));
    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}

#[test]
fn a_guest_whose_monitor_somebody_else_holds_is_not_taken_for_gone() -> Outcome {
    if !is_root() {
        skip("a_guest_whose_monitor_somebody_else_holds_is_not_taken_for_gone", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let scene = Scene::boot(&workplace, Scene::spec()?)?;
    let waiting = scene.waiting(|_| {})?;
    // Held where the target has the guest loaded and the source has not decided; then both agents die,
    // and the guard lets the guest go on.
    let (source, target) = scene.agents_held(&waiting, &[], "saving:30000")?;
    source.wait_error("held in", SOON)?;
    target.signal(Signal::SIGKILL);
    source.signal(Signal::SIGKILL);
    source.wait_error("the guest runs on here", SOON)?;
    source.wait_error("the target was not told", SOON)?;
    for agent in [source, target] {
        agent.wait(SOON)?;
    }
    let held = Qmp::connect(scene.guest.qmp())?;
    let there = command(&scene, false, "target-1", &["recover", "--json", "--wait", "20"])?;
    let here = done(command(&scene, true, "source-1", &["recover", "--wait", "5"])?)?;
    assert_eq!(here.code, 4, "{}", here.stderr);
    assert!(here.stderr.contains("lives, but does not answer"), "{}", here.stderr);
    assert!(here.stderr.contains("hint: close the client"), "{}", here.stderr);
    assert!(RunState::query(&held)?.running && !runs(&waiting)?);
    drop(held);
    let here = done(command(&scene, true, "source-1", &["recover", "--json", "--wait", "15"])?)?;
    assert_eq!((here.code, &here.events[0]["end"]), (0, &"runs-here".into()), "{}", here.stderr);
    let there = done(there)?;
    assert_eq!((there.code, &there.events[0]["end"]), (0, &"the-others".into()));
    scene.assert_goes_on()?;
    scene.assert_clean()?;
    Ok(())
}

/// The record of a target agent, when it says `decision`.
fn record_of(
    scene: &Scene,
    agent: &str,
    decision: Decision,
) -> Result<(PathBuf, SessionId), Box<dyn std::error::Error>> {
    let (dir, began) = (scene.workplace.file(&format!("{agent}.state")), Instant::now());
    while began.elapsed() < SOON {
        match record::list(&dir).pop() {
            Some((path, record)) if record.decision == decision => {
                return Ok((path, record.session));
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    Err(format!("{agent} has no record that says {decision:?}").into())
}

/// Another host, with a certificate of the same authority, says each word about a session that it knows
/// of: it is told why not, and the record stays as it is.
fn assert_a_stranger_is_refused(
    scene: &Scene,
    (path, session): &(PathBuf, SessionId),
    why: &str,
) -> Outcome {
    let before = std::fs::read(path)?;
    for word in [Word::HandedOver, Word::Aborted, Word::None] {
        let asks = Message::Recover(Recover { session: *session, word });
        let refused = refused(scene, &asks)?;
        assert!(refused.contains(why), "{word:?}: {refused}");
        assert!(std::fs::read(path)? == before, "{word:?} changed the record");
    }
    Ok(())
}

/// Why whoever listens at the target refuses what the stranger says first.
fn refused(scene: &Scene, says: &Message) -> Result<String, Box<dyn std::error::Error>> {
    let dir = certificates(&scene.workplace, "stranger")?;
    let caller = Caller { tls_dir: Some(dir), ..Caller::default() };
    let at = format!("{}:{PORT}", scene.there().address);
    let link = scene.here().namespace.run(|| Link::connect(&at, &caller, SOON))??;
    link.send(says)?;
    match link.receive(SOON)? {
        Message::Abort(abort) => Ok(abort.text),
        other => Err(format!("it was not refused: {other:?}").into()),
    }
}

#[test]
fn a_stranger_s_word_runs_and_ends_nobody_s_guest() -> Outcome {
    let name = "a_stranger_s_word_runs_and_ends_nobody_s_guest";
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let not_its_own = "stranger is not the source of session";

    // The target has the guest loaded, and the source has not decided yet.
    let waiting = scene.waiting(|_| {})?;
    let go = workplace.file("go");
    let hold = format!("saving:600000:{}", go.display());
    let (source, target) =
        scene.agents_held(&waiting, &["--blackout-timeout-ms", "600000"], &hold)?;
    source.wait_error("held in", SOON)?;
    let record = record_of(&scene, "target-1", Decision::Ready)?;
    assert_a_stranger_is_refused(&scene, &record, not_its_own)?;
    assert!(target.complained().contains(not_its_own), "{}", target.complained());
    assert_eq!(waiting.console().last_tick(), None, "it runs there");
    std::fs::write(&go, "")?;
    let (source, target) = (source.wait(SOON)?, target.wait(SOON)?);
    assert_eq!((source.code, target.code), (0, 0), "{} {}", source.stderr, target.stderr);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;

    // Both agents are gone, and the source has decided: only its word is missing.
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_held(&waiting, &[], "deciding:600000")?;
    source.wait_error("held in", SOON)?;
    source.signal(Signal::SIGKILL);
    source.wait_error("its record says HandedOver: the guest stays as it is", SOON)?;
    assert_eq!(target.wait(SOON)?.code, 4, "it waits in vain for its source");
    source.wait(SOON)?;
    let record = record_of(&scene, "target-2", Decision::Ready)?;
    let (state, dir) = (record.0.parent().unwrap_or(Path::new("/")), &scene.there().address);
    let dir = certificates(&workplace, &dir.to_string())?.display().to_string();
    let (state, at) = (state.display().to_string(), format!("{}:{PORT}", scene.there().address));
    let listens = ["target", "--listen", &at, "--tls-dir", &dir, "--state-dir", &state];
    let only = format!("peer={}", scene.here().address);
    // Nor may it begin what has this number, and be its source then.
    let hello = Message::Hello(Hello {
        session: record.1,
        software: "a test".into(),
        host: "stranger".into(),
        boot_id: String::new(),
        rejoins: false,
    });
    let (recorded, not_allowed) = ("a record of this session", "may not bring guests here");
    for (allow, why, nor) in [("peer=*", not_its_own, recorded), (&only, not_allowed, not_allowed)]
    {
        let args = [&listens[..], &["--allow", allow]].concat();
        let another = Agent::start(&workplace, Some(scene.there()), "another", &args)?;
        another.wait_text("listening", SOON)?;
        assert_a_stranger_is_refused(&scene, &record, why)?;
        assert!(another.complained().contains(why), "{}", another.complained());
        let refused = refused(&scene, &hello)?;
        assert!(refused.contains(nor), "{refused}");
        another.signal(Signal::SIGINT);
        another.wait(SOON)?;
    }
    let there = command(&scene, false, "target-2", &["recover", "--wait", "120"])?;
    there.wait_text("waiting for", SOON)?;
    assert_a_stranger_is_refused(&scene, &record, not_its_own)?;
    assert!(!runs(&waiting)? && !runs(&scene.guest)?, "nobody runs what may be the other's");

    // It was in nobody's way.
    let here = done(command(&scene, true, "source-2", &["recover", "--json", "--wait", "60"])?)?;
    assert_eq!((here.code, &here.events[0]["end"]), (0, &"the-others".into()), "{}", here.stderr);
    let there = done(there)?;
    assert_eq!(there.code, 0, "{}", there.stderr);
    assert!(there.stderr.contains(not_its_own), "{}", there.stderr);
    assert!(runs(&waiting)? && !runs(&scene.guest)?);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    Ok(())
}
