//! Who may move a guest where, on real guests: certificates, `--insecure`, what each side is told.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry_ctl::agent::link::Link;
use pageferry_ctl::agent::record::Role;
use pageferry_ctl::agent::tls::Caller;
use pageferry_ctl::lab::{certificates, program, skip};
use pageferry_ctl::pki::authority::{self, Validity};
use pageferry_datapath::control::{Hello, Message};
use pageferry_datapath::framing::hello::{Greeting, HELLO_BYTES, REPLY_BYTES, Refusal, Reply};
use pageferry_datapath::ids::SessionId;
use pageferry_tests::agents::{Agent, Ended, Manner, PORT};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const DONE: i32 = 0;
const REFUSED: i32 = 3;

#[test]
fn a_guest_moves_under_tls_and_the_report_says_to_whom() -> Outcome {
    let name = "a_guest_moves_under_tls_and_the_report_says_to_whom";
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let there = scene.there().address.to_string();
    let (source, target) = scene.migrate(&["--verify"])?;
    assert_eq!((source.code, target.code), (DONE, DONE), "{} {}", source.stderr, target.stderr);
    let security = &source.summary()["security"];
    assert_eq!(security["control"], "tls-1.3", "{security}");
    assert_eq!(security["peer"], there.as_str(), "{security}");
    assert!(security["cipher_suite"].as_str().is_some_and(|suite| suite.starts_with("TLS13_")));
    assert!(security.get("warning").is_none(), "{security}");
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn wrong_certificates_are_refused_before_the_guest_is_touched() -> Outcome {
    let name = "wrong_certificates_are_refused_before_the_guest_is_touched";
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let there = scene.there().address.to_string();
    let own = certificates(&workplace, &scene.here().address.to_string())?.display().to_string();

    // Another authority; one directory per case, as an operator would have them.
    let other = workplace.file("other-pki");
    authority::init(&other, "another CA", 1)?;
    let strange = other.join("hosts/strange");
    authority::issue(&other, &strange, &["strange".into()], Validity::days(1))?;
    let strange = strange.display().to_string();
    let empty = workplace.file("no-pki").display().to_string();

    let says = |ended: &Ended, words: &[&str]| {
        let summary = ended.summary();
        assert_eq!(ended.code, REFUSED, "{summary} {}", ended.stderr);
        assert_eq!(summary["guest_running_on"], "source", "{summary}");
        let said = format!("{} {} {}", summary["reason"], summary["hint"], ended.stderr);
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
    };
    let (source, target) = attempt(&scene, &["--tls-dir", &strange])?;
    says(&source, &["target's certificate is signed by another CA", "pageferry pki show"]);
    assert!(target.stderr.contains("does not believe our certificate"), "{}", target.stderr);
    let (source, _) = attempt(&scene, &["--tls-dir", &empty])?;
    says(&source, &["has no ca-cert.pem", "pageferry pki issue"]);
    let (source, _) = attempt(&scene, &["--tls-dir", &own, "--tls-hostname", "elsewhere"])?;
    says(&source, &["not for elsewhere, but for", &there, "--tls-hostname"]);
    let (source, target) = attempt(&scene, &["--insecure"])?;
    says(&source, &["only connections with certificates", "warning: --insecure"]);
    assert!(target.stderr.contains("speaks no TLS"), "{}", target.stderr);

    // After all of that, the same target host takes the guest of who is believed.
    let (source, target) = scene.migrate(&[])?;
    assert_eq!((source.code, target.code), (DONE, DONE), "{} {}", source.stderr, target.stderr);
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn insecure_is_said_on_both_sides_and_in_the_report() -> Outcome {
    let name = "insecure_is_said_on_both_sides_and_in_the_report";
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let waiting = scene.waiting(|_| {})?;
    let (here, there) = (scene.here(), scene.there());
    let target = Agent::target(&workplace, Some(there), "open", &waiting, &["--insecure"])?;
    let more = ["--insecure"];
    let source =
        Agent::source(&workplace, Some(here), "calling", &scene.guest, Some(there), &more)?;
    let (source, target) = (source.wait(SOON)?, target.wait(SOON)?);
    assert_eq!((source.code, target.code), (DONE, DONE), "{} {}", source.stderr, target.stderr);
    for ended in [&source, &target] {
        assert!(ended.stderr.contains("warning: --insecure: "), "{}", ended.stderr);
    }
    let security = &source.summary()["security"];
    assert_eq!(security["control"], "plain", "{security}");
    assert!(security["warning"].as_str().is_some_and(|text| text.contains("--insecure")));
    (scene.guest, scene.away) = (waiting, true);
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn encrypted_lanes_move_a_guest_and_their_cost_is_told() -> Outcome {
    let name = "encrypted_lanes_move_a_guest_and_their_cost_is_told";
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let (source, target) = scene.migrate(&["--encrypt", "--verify"])?;
    assert_eq!((source.code, target.code), (DONE, DONE), "{} {}", source.stderr, target.stderr);
    let security = &source.summary()["security"];
    println!("{security:#}");
    match security["lanes"].as_str() {
        Some("tls-process") => assert!(security["sealing_seconds"].as_f64() > Some(0.0)),
        lanes => assert_eq!(lanes, Some("tls-kernel")),
    }
    assert!(security["lanes_reason"].as_str().is_some_and(|text| text.starts_with("TLS13_")));
    scene.assert_goes_on()?;

    // RDMA has no encryption: it is not used without a word, and not instead of it either.
    let (source, _) = attempt(&scene, &["--encrypt", "--transport", "rdma"])?;
    assert_eq!(source.code, REFUSED, "{}", source.stderr);
    let reason = source.summary()["reason"].to_string();
    assert!(reason.contains("encryption was asked for"), "{reason}");

    // A target that demands it says so to a source that does not offer it.
    let waiting = scene.waiting(|_| {})?;
    let (here, there) = (scene.here(), scene.there());
    let strict = Agent::target(&workplace, Some(there), "strict", &waiting, &["--encrypt"])?;
    let source = Agent::source(&workplace, Some(here), "lax", &scene.guest, Some(there), &[])?;
    let source = source.wait(SOON)?;
    assert_eq!(source.code, REFUSED, "{}", source.stderr);
    let summary = source.summary();
    assert!(summary["reason"].to_string().contains("only encrypted lanes"), "{summary}");
    assert!(summary["hint"].to_string().contains("--encrypt"), "{summary}");
    strict.wait(SOON)?;
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn a_target_writes_only_what_it_was_allowed_to_and_a_guest_is_claimed_once() -> Outcome {
    let name = "a_target_writes_only_what_it_was_allowed_to_and_a_guest_is_claimed_once";
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let (here, there) = (scene.here(), scene.there());
    let waiting = scene.waiting(|_| {})?;
    let named = waiting.qmp().canonicalize()?.display().to_string();
    let dir = certificates(&workplace, &there.address.to_string())?.display().to_string();
    let listen = format!("{}:{PORT}", there.address);

    // Each rule lets nothing through that it does not match, and the source is told which.
    let rules = [
        ("qmp=/nowhere/*", "may not choose the QMP socket"),
        ("memory=/nowhere/**", "may not be written to"),
        ("guest=somebody-else", "is not to be moved here"),
        ("peer=somebody-else", "may not bring guests here"),
    ];
    let state = workplace.file("allow.state").display().to_string();
    let fixed = ["target", "--listen", &listen, "--tls-dir", &dir, "--state-dir", &state];
    for (attempt, (rule, word)) in rules.into_iter().enumerate() {
        let qmp = format!("qmp={named}");
        let also = if rule.starts_with("qmp=") { "peer=*" } else { &qmp };
        let args = [&fixed[..], &["--allow", rule, "--allow", also]].concat();
        let (refused, target) = named_attempt(&scene, attempt, &args, &named)?;
        let summary = refused.summary();
        assert_eq!(refused.code, REFUSED, "{rule}: {summary}");
        assert!(summary["reason"].to_string().contains(word), "{rule}: {summary}");
        assert!(summary["hint"].to_string().contains("--allow"), "{rule}: {summary}");
        drop(target);
    }
    let qmp = format!("qmp={named}");
    let args = [&fixed[..], &["--allow", &qmp, "--guest-max-mib", "64"]].concat();
    let (refused, _) = named_attempt(&scene, 10, &args, &named)?;
    let summary = refused.summary();
    assert!(summary["hint"].to_string().contains("--guest-max-mib"), "{summary}");

    // While one agent moves the guest, a second one is told so; so is a second session.
    let args = [&fixed[..], &["--allow", &qmp, "--once", "--json", "--sessions-max", "1"]].concat();
    let target = Agent::start(&workplace, Some(there), "allowed", &args)?;
    target.wait_text("listening", SOON)?;
    let first = Agent::source_in(
        &workplace,
        Some(here),
        "first",
        &scene.guest,
        Some(there),
        &["--target-qmp", &named],
        Manner { hold: "scanning:4000", ..Manner::default() },
    )?;
    first.wait_error("held in scanning", SOON)?;
    for (pid, of) in [(first.pid(), Role::Source), (target.pid(), Role::Target)] {
        let kept = rights(pid, of)?;
        assert!(kept.iter().all(|(_, bits)| bits & ATTACHING == 0), "{pid}: {kept:x?}");
    }
    // A second session, from who is believed: told at once.
    let caller = Caller { tls_dir: Some(dir.into()), ..Caller::default() };
    let (to_heard, heard) = channel();
    let busy = here.namespace.run(|| Link::connect(&listen, &caller, SOON))??;
    busy.read_with(move |heard| to_heard.send(heard.map(|(it, _)| it)).unwrap_or(()));
    busy.send(&Message::Hello(Hello {
        session: SessionId(7),
        software: "a test".into(),
        host: "here".into(),
        boot_id: String::new(),
        rejoins: false,
    }))?;
    let Message::Abort(abort) = heard.recv_timeout(SOON)?? else { return Err("no abort".into()) };
    assert!(abort.text.contains("taking in another guest"), "{abort:?}");
    // A second agent for the same guest: its monitor and its memory are the first one's.
    let second = Agent::source(&workplace, Some(here), "second", &scene.guest, Some(there), &[])?;
    let second = second.wait(SOON)?;
    assert_eq!(second.code, REFUSED, "{}", second.summary());
    println!("second agent: {}", second.summary()["reason"]);
    let (first, target) = (first.wait(SOON)?, target.wait(SOON)?);
    assert_eq!((first.code, target.code), (DONE, DONE), "{} {}", first.stderr, target.stderr);
    (scene.guest, scene.away) = (waiting, true);
    scene.assert_goes_on()?;
    Ok(())
}

/// CAP_DAC_OVERRIDE, CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_CHECKPOINT_RESTORE.
const ATTACHING: u64 = 1 << 1 | 1 << 12 | 1 << 19 | 1 << 21 | 1 << 40;

/// What each thread of an agent that hears a peer may do, or may come to do.
fn rights(pid: u32, role: Role) -> Result<Vec<(String, u64)>, Box<dyn std::error::Error>> {
    let mut rights = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?;
        // It starts sessions, which need them, and hears none.
        if role == Role::Target && thread.file_name().to_str() == Some(&pid.to_string()) {
            continue;
        }
        // One that has just greeted a lane may be gone.
        let Ok(status) = std::fs::read_to_string(thread.path().join("status")) else { continue };
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim()
        };
        let name = field("Name:").to_owned();
        // They hear signals and new connections, and nothing that is said on those.
        if ["ctrl-c", "pf-accept"].contains(&name.as_str()) {
            continue;
        }
        rights.push((name, u64::from_str_radix(field("CapPrm:"), 16)?));
    }
    assert!(!rights.is_empty(), "an agent has threads");
    Ok(rights)
}

/// A source that names the QEMU, and a target with these arguments that does not let it.
fn named_attempt(
    scene: &Scene,
    attempt: usize,
    args: &[&str],
    named: &str,
) -> Result<(Ended, Ended), Box<dyn std::error::Error>> {
    let (here, there) = (scene.here(), scene.there());
    let workplace = &scene.workplace;
    let target = Agent::start(workplace, Some(there), &format!("allow-{attempt}"), args)?;
    target.wait_text("listening", SOON)?;
    let more = ["--target-qmp", named];
    let name = format!("naming-{attempt}");
    let source = Agent::source(workplace, Some(here), &name, &scene.guest, Some(there), &more)?;
    let source = source.wait(SOON)?;
    target.signal(Signal::SIGINT);
    Ok((source, target.wait(SOON)?))
}

/// What the systemd unit leaves of a target's rights is enough to take in a guest.
#[test]
fn a_target_with_the_unit_s_capabilities_takes_in_a_guest() -> Outcome {
    let name = "a_target_with_the_unit_s_capabilities_takes_in_a_guest";
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/pageferry-target.service");
    let unit = std::fs::read_to_string(unit)?;
    let bounds = unit.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let bounds: Vec<String> = bounds
        .flat_map(str::split_ascii_whitespace)
        .map(|cap| format!("+{}", cap.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    assert!(!bounds.is_empty(), "the unit bounds them");
    if Command::new("setpriv").arg("--version").output().is_err() {
        skip(name, "there is no setpriv");
        return Ok(());
    }
    let Some((_alone, mut scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let waiting = scene.waiting(|_| {})?;
    let (here, there) = (scene.here(), scene.there());
    let dir = certificates(&workplace, &there.address.to_string())?;
    let mut target = there.namespace.command("setpriv");
    target.arg("--no-new-privs").arg(format!("--bounding-set=-all,{}", bounds.join(",")));
    target.arg(program()?).args(["target", "--once", "--listen"]);
    target.arg(format!("{}:{PORT}", there.address)).arg("--tls-dir").arg(dir);
    target.arg("--qmp").arg(waiting.qmp()).arg("--state-dir").arg(workplace.file("unit.state"));
    let out = workplace.file("unit.out");
    let mut target = target.stdout(std::fs::File::create(&out)?).spawn()?;
    while !std::fs::read_to_string(&out)?.contains("listening") {
        assert_eq!(target.try_wait()?, None, "the target ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let source = Agent::source(&workplace, Some(here), "source", &scene.guest, Some(there), &[])?;
    let source = source.wait(SOON)?;
    let code = target.wait()?.code();
    assert_eq!((source.code, code), (DONE, Some(DONE)), "{} {}", source.summary(), source.stderr);
    (scene.guest, scene.away) = (waiting, true);
    scene.assert_goes_on()?;
    Ok(())
}

#[test]
fn the_unit_is_sound() -> Outcome {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/pageferry-target.service");
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        skip("the_unit_is_sound", "there is no systemd-analyze");
        return Ok(());
    }
    let place = tempfile::tempdir()?;
    let copy = place.path().join("pageferry-target.service");
    // It looks for the program, which is installed where the unit says.
    let text = std::fs::read_to_string(unit)?;
    std::fs::write(&copy, text.replace("/usr/bin/pageferry", &program()?.display().to_string()))?;
    let output =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("pageferry-target"), "{said}");
    Ok(())
}

/// Somebody on the network between the two hosts, who repeats what lanes say in the clear.
#[test]
fn a_ticket_seen_on_the_wire_opens_nothing() -> Outcome {
    let name = "a_ticket_seen_on_the_wire_opens_nothing";
    let Some((_alone, scene)) = Scene::alone(name)? else { return Ok(()) };
    let workplace = Arc::clone(&scene.workplace);
    let waiting = scene.waiting(|_| {})?;
    let (here, there) = (scene.here(), scene.there());
    let target = Agent::target(&workplace, Some(there), "target", &waiting, &[])?;
    let (answers, middle) = {
        let (to_answers, answers) = channel();
        let (at, on) = ((here.address, 5777), (there.address, PORT));
        let listening = here.namespace.run(move || in_between(at.into(), on.into(), to_answers))?;
        (answers, listening?)
    };
    let (middle, named) = (middle.to_string(), there.address.to_string());
    let dir = certificates(&workplace, &here.address.to_string())?.display().to_string();
    let (qmp, state) = (scene.guest.qmp().display().to_string(), workplace.file("here.state"));
    let state = state.display().to_string();
    let args = ["migrate", "--qmp", &qmp, "--to", &middle, "--tls-hostname", &named, "--json"];
    let args = [&args[..], &["--tls-dir", &dir, "--state-dir", &state, "--verify"]].concat();
    let source = Agent::start(&workplace, Some(here), "source", &args)?.wait(SOON)?;
    assert_eq!(source.code, DONE, "{} {}", source.summary(), source.stderr);
    assert_eq!(target.wait(SOON)?.code, DONE);
    let answers: Vec<_> = answers.try_iter().collect();
    assert!(!answers.is_empty(), "no lane came by");
    let refused = Reply::Refused(Refusal::Ticket);
    assert!(answers.iter().all(|answer| *answer == Ok(refused)), "{answers:?}");
    Ok(())
}

/// Passes connections on; of lanes, what the target answers to a hello that it has heard before.
fn in_between(
    at: SocketAddr,
    on: SocketAddr,
    answers: Sender<Result<Reply, String>>,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(at)?;
    let address = listener.local_addr()?;
    // It ends with the process: nobody connects any more.
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let answers = answers.clone();
            std::thread::spawn(move || {
                let _either_side_may_end_it = pass_on(near, on, &answers);
            });
        }
    });
    Ok(address)
}

fn pass_on(
    mut near: TcpStream,
    on: SocketAddr,
    answers: &Sender<Result<Reply, String>>,
) -> std::io::Result<()> {
    let mut far = TcpStream::connect(on)?;
    let mut magic = [0; 4];
    while near.peek(&mut magic)? < magic.len() {}
    if Greeting::of(magic) == Some(Greeting::Lane) {
        let mut hello = [0; HELLO_BYTES];
        near.read_exact(&mut hello)?;
        far.write_all(&hello)?;
        let mut reply = [0; REPLY_BYTES];
        far.read_exact(&mut reply)?;
        let again = || -> std::io::Result<_> {
            let mut replayed = TcpStream::connect(on)?;
            replayed.write_all(&hello)?;
            let mut reply = [0; REPLY_BYTES];
            replayed.read_exact(&mut reply)?;
            Ok(Reply::decode(&reply))
        };
        let answer = again().map_err(|error| error.to_string());
        let answer = answer.and_then(|reply| reply.map_err(|error| error.to_string()));
        let _nobody_listens_after_the_end = answers.send(answer);
        near.write_all(&reply)?;
    }
    let (mut from_far, mut to_near) = (far.try_clone()?, near.try_clone()?);
    let back = std::thread::spawn(move || {
        let _either_side_may_end_it = std::io::copy(&mut from_far, &mut to_near);
        let _gone_already = to_near.shutdown(Shutdown::Write);
    });
    let _either_side_may_end_it = std::io::copy(&mut near, &mut far);
    let _gone_already = far.shutdown(Shutdown::Write);
    back.join().unwrap_or(());
    Ok(())
}

/// A migration that ends before a session begins; the target is sent home after it.
fn attempt(scene: &Scene, more: &[&str]) -> Result<(Ended, Ended), Box<dyn std::error::Error>> {
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents(&waiting, more)?;
    let source = source.wait(SOON)?;
    // What it has to say about the stranger comes at once.
    std::thread::sleep(std::time::Duration::from_millis(300));
    target.signal(Signal::SIGINT);
    Ok((source, target.wait(SOON)?))
}
