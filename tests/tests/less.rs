//! Less on the way: memory that travels compressed, and lanes that are held to a rate.
#![forbid(unsafe_code)]

use pageferry_ctl::agent::admin::{self, Limit, Request, Settings};
use pageferry_ctl::lab::{Workplace, is_root, one_at_a_time, skip};
use pageferry_tests::agents::Ended;
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn assert_moved(source: &Ended) {
    assert_eq!(source.code, 0, "{}\n{:#}", source.stderr, source.summary());
    assert_eq!(source.summary()["verified"], true);
}

#[test]
fn a_guest_moves_compressed_and_held_to_a_rate() -> Outcome {
    if !is_root() {
        skip("a_guest_moves_compressed_and_held_to_a_rate", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = Scene::boot(&workplace, Scene::spec()?)?;
    // Verifying while the guest writes a lot takes longer than the default pause.
    let always = ["--verify", "--downtime-ms", "1000", "--not-converging", "switch-over"];
    for codec in ["lz4", "zstd:3"] {
        let (source, _) = scene.migrate(&[&always[..], &["--compress", codec]].concat())?;
        assert_moved(&source);
        let compression = &source.summary()["compression"];
        assert_eq!(compression["codec"], codec);
        // The guest's own pages are noise; its kernel's are not.
        assert!(compression["raw_bytes"].as_u64() > Some(8 << 20), "{compression:#}");
        assert!(compression["ratio"].as_f64() > Some(1.5), "{compression:#}");
        scene.assert_goes_on()?;
    }

    let rate = ["--compress", "off", "--max-bandwidth", "200M"];
    let (source, _) = scene.migrate(&[&always[..], &rate].concat())?;
    assert_moved(&source);
    let brownout = source.event("brownout").expect("it had one");
    let seconds = brownout["brownout_ms"].as_f64().unwrap_or(0.0) / 1e3;
    let moved = brownout["moved_bytes"].as_f64().unwrap_or(0.0);
    println!("held to 25 MB/s: {:.1} MB in {seconds:.2} s", moved / 1e6);
    assert!(moved / seconds < 25e6 * 1.02, "{moved} bytes in {seconds} s");
    let compression = &source.summary()["compression"];
    assert_eq!(
        (&compression["codec"], &compression["reason"]),
        (&serde_json::Value::Null, &"asked for".into())
    );
    scene.assert_goes_on()?;
    // Held so tightly that it would take minutes, and then let go.
    let run = workplace.file("run");
    let run_dir = run.display().to_string();
    let tight = ["--compress", "off", "--max-bandwidth", "8M", "--runtime-dir", &run_dir];
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents(&waiting, &[&always[..], &tight].concat())?;
    source.wait_text("\"event\":\"start\"", SOON)?;
    assert_eq!(admin::ask(&run, "", &Request::Status)?["max_bandwidth"], "8Mbit");
    let lift = Settings { max_bandwidth: Some(Limit(None)), ..Settings::default() };
    let status = admin::ask(&run, "", &Request::Set(lift))?;
    assert_eq!(status["max_bandwidth"], serde_json::Value::Null);
    let source = source.wait(SOON)?;
    assert_moved(&source);
    assert_eq!(target.wait(SOON)?.code, 0);
    assert!(admin::sessions(&run).is_empty(), "an agent that has ended is still asked");
    (scene.guest, scene.away) = (waiting, !scene.away);
    scene.assert_goes_on()?;
    let verified = scene.guest.console().verify(SOON)?;
    assert_eq!((verified.bad, verified.disk_bad), (0, 0), "the guest found bad memory");
    Ok(())
}
