//! Rails: lanes spread over several links between the two hosts, of which some are slow, some die,
//! and some come back.
#![forbid(unsafe_code)]

use std::thread;
use std::time::Duration;

use pageferry_ctl::lab::{Workplace, is_root, one_at_a_time, skip};
use pageferry_tests::agents::{Ended, PORT};
use pageferry_tests::scene::{SOON, Scene};
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Zero pages and what compresses would hide what a link carries.
const PLAIN: [&str; 5] = ["--verify", "--downtime-ms", "2000", "--compress", "off"];

fn everywhere() -> [String; 2] {
    ["--listen".into(), format!("0.0.0.0:{PORT}")]
}

fn assert_moved(source: &Ended, target: &Ended) {
    assert_eq!(source.code, 0, "{}\n{:#}", source.stderr, source.summary());
    assert_eq!(target.code, 0, "{}", target.stderr);
    assert_eq!(source.summary()["verified"], true);
}

/// Bytes that went over the rail of a NIC.
fn over(summary: &Value, device: &str) -> u64 {
    let rails = summary["rails"].as_array().expect("a list");
    let of = rails.iter().filter(|rail| rail["device"] == device);
    of.map(|rail| rail["moved_bytes"].as_u64().unwrap_or(0)).sum()
}

/// A guest on two hosts with more links than one, each of so many Mbit/s.
fn scene(
    workplace: &std::sync::Arc<Workplace>,
    links: &[u64],
) -> Result<Scene, Box<dyn std::error::Error>> {
    let mut spec = Scene::spec()?;
    spec.params.fill_mib = 160;
    spec.params.hot_mib = 2;
    spec.params.pages_per_second = 200;
    let scene = Scene::boot(workplace, spec)?;
    for (number, mbit) in links.iter().enumerate() {
        if number > 0 {
            scene.hosts.add_rail(number as u8)?;
        }
        scene.hosts.shape_rail(number as u8, *mbit)?;
    }
    Ok(scene)
}

/// Moves the guest, with something done meanwhile.
fn migrate(
    scene: &mut Scene,
    more: &[&str],
    meanwhile: impl FnOnce(&Scene) -> Outcome,
) -> Result<Ended, Box<dyn std::error::Error>> {
    let waiting = scene.waiting(|_| {})?;
    let listen = everywhere();
    let listen = [listen[0].as_str(), listen[1].as_str()];
    let more = [&PLAIN[..], more].concat();
    let (source, target) = scene.agents_told(&waiting, &more, &listen)?;
    source.wait_text("\"event\":\"start\"", SOON)?;
    meanwhile(scene)?;
    let (source, target) = (source.wait(SOON)?, target.wait(SOON)?);
    assert_moved(&source, &target);
    scene.moved_to(waiting);
    scene.assert_goes_on()?;
    Ok(source)
}

#[test]
fn unequal_rails_both_fill_and_networks_choose() -> Outcome {
    if !is_root() {
        skip("unequal_rails_both_fill_and_networks_choose", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = scene(&workplace, &[100, 400])?;
    let both = migrate(&mut scene, &[], |_| Ok(()))?;
    let summary = both.summary();
    let (slow, fast) = (over(summary, "link0"), over(summary, "rail1"));
    println!("{:#}", summary["rails"]);
    let share = fast as f64 / (slow + fast) as f64;
    assert!((0.7..0.9).contains(&share), "{share} of the bytes on 4 of 5 parts of the wire");
    let one = migrate(&mut scene, &["--network", "10.201.0.0/16"], |_| Ok(()))?;
    assert_eq!(over(one.summary(), "rail1"), 0);
    assert!(over(one.summary(), "link0") > 160 << 20);
    Ok(())
}

#[test]
fn a_rail_that_dies_takes_nothing_with_it_and_is_used_when_it_is_back() -> Outcome {
    let name = "a_rail_that_dies_takes_nothing_with_it_and_is_used_when_it_is_back";
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = scene(&workplace, &[200, 200])?;
    for dies in ["without its carrier", "without a word"] {
        let ended = migrate(&mut scene, &[], |scene| {
            thread::sleep(Duration::from_secs(1));
            match dies {
                "without a word" => scene.hosts.swallow_rail(1)?,
                _ => scene.hosts.cut_rail(1, true)?,
            }
            Ok(())
        })?;
        let summary = ended.summary();
        println!("{dies}: {:#} {}", summary["rails"], summary["total_ms"]);
        assert!(summary["lanes_renewed"].as_u64() >= Some(1), "{dies}: {summary:#}");
        assert!(
            over(summary, "rail1") > 1 << 20 && over(summary, "link0") > over(summary, "rail1")
        );
        assert_eq!(summary["cuts_ms"], serde_json::json!([]), "the target was there all the time");
        scene.hosts.cut_rail(1, false)?;
        scene.hosts.shape_rail(1, 200)?;
        // A link that was down passes packets again a second after it has its carrier back.
        thread::sleep(Duration::from_secs(2));
    }

    // Away from the start; back soon after.
    scene.hosts.cut_rail(1, true)?;
    let ended = migrate(&mut scene, &[], |scene| {
        thread::sleep(Duration::from_millis(500));
        Ok(scene.hosts.cut_rail(1, false)?)
    })?;
    let summary = ended.summary();
    println!("back: {:#} {}", summary["rails"], summary["total_ms"]);
    assert!(over(summary, "rail1") > 16 << 20, "{summary:#}");
    Ok(())
}

#[test]
fn the_control_connection_goes_on_over_another_rail() -> Outcome {
    if !is_root() {
        skip("the_control_connection_goes_on_over_another_rail", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut scene = scene(&workplace, &[100, 100])?;
    let ended = migrate(&mut scene, &[], |scene| {
        thread::sleep(Duration::from_secs(1));
        Ok(scene.hosts.cut(true)?)
    })?;
    let summary = ended.summary();
    println!("{:#} {} ms, cut {}", summary["rails"], summary["total_ms"], summary["cuts_ms"]);
    assert_eq!(summary["cuts_ms"].as_array().map(Vec::len), Some(1));
    assert!(over(summary, "rail1") > 80 << 20, "{summary:#}");
    Ok(())
}
