//! Who may move a guest where, on real guests: certificates, `--insecure`, what each side is told.
#![forbid(unsafe_code)]

use nix::sys::signal::Signal;
use pageferry_ctl::lab::{Workplace, certificates, is_root, one_at_a_time, skip};
use pageferry_ctl::pki::authority::{self, Validity};
use pageferry_tests::agents::{Agent, Ended};
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const DONE: i32 = 0;
const REFUSED: i32 = 3;

#[test]
fn a_guest_moves_under_tls_and_the_report_says_to_whom() -> Outcome {
    let name = "a_guest_moves_under_tls_and_the_report_says_to_whom";
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = Scene::boot(&workplace, Scene::spec()?)?;
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
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = Scene::boot(&workplace, Scene::spec()?)?;
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
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = Scene::boot(&workplace, Scene::spec()?)?;
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
