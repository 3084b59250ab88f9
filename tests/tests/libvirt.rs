//! Guests of a real libvirt, found by `virsh` and moved into domains of another one.
#![forbid(unsafe_code)]

use std::time::Instant;

use pageferry_ctl::lab::{
    Domain, GuestParams, Libvirt, Tick, Workplace, is_root, one_at_a_time, skip,
};
use pageferry_tests::agents::{Agent, MIGRATION_MAX};
use pageferry_tests::scene::{BOOT_MAX, SOON};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MEMORY_MIB: u64 = 192;

#[test]
fn a_domain_is_drained_into_a_domain_of_another_libvirt() -> Outcome {
    const NAME: &str = "a_domain_is_drained_into_a_domain_of_another_libvirt";
    if !is_root() {
        skip(NAME, "needs root");
        return Ok(());
    }
    if let Some(what) = Libvirt::missing() {
        skip(NAME, what);
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let began = Instant::now();
    let (here, there) = (Libvirt::start(&workplace, "here")?, Libvirt::start(&workplace, "there")?);
    let params = GuestParams {
        fill_mib: 24,
        hot_mib: 4,
        writers: 1,
        pages_per_second: 500,
        ..GuestParams::default()
    };
    let guest = here.create("web", MEMORY_MIB, &params, false)?;
    guest.console.wait_ready(BOOT_MAX)?;
    let waiting = there.create("web", MEMORY_MIB, &params, true)?;
    assert_eq!(there.state(&waiting)?, "paused");
    println!("two libvirts and the guest are up after {:.1} s", began.elapsed().as_secs_f64());

    let state = |name: &str| workplace.file(name).display().to_string();
    let (source_state, target_state) = (state("source.state"), state("target.state"));
    let run = state("run");
    let waiting_qmp = waiting.qmp.display().to_string();
    let target = Agent::start(
        &workplace,
        None,
        "target",
        &["target", "--listen", LISTEN, "--qmp", &waiting_qmp, "--state-dir", &target_state],
    )?;
    target.wait_text("listening", SOON)?;
    let libvirt = format!("--libvirt={}", here.uri());
    let drained = Agent::start(
        &workplace,
        None,
        "drain",
        &[
            "drain",
            &libvirt,
            "--to",
            LISTEN,
            "--state-dir",
            &source_state,
            "--runtime-dir",
            &run,
            "--json",
            "--",
            "--downtime-ms",
            "1000",
            "--not-converging",
            "switch-over",
        ],
    )?
    .wait(MIGRATION_MAX)?;
    println!("drained after {:.1} s", began.elapsed().as_secs_f64());
    assert_eq!(drained.code, 0, "{}", drained.stderr);
    let summary = drained.event("drain-summary").ok_or("no summary")?;
    assert_eq!(summary["guests"][0]["guest"], "web", "{summary}");
    assert_eq!(summary["guests"][0]["outcome"], "moved", "{summary}");

    assert_goes_on(&waiting)?;
    assert_eq!((here.state(&guest)?, there.state(&waiting)?), ("paused".into(), "running".into()));
    here.destroy(&guest)?;
    assert_goes_on(&waiting)
}

/// Where the target listens: loopback, where agents need no certificates.
const LISTEN: &str = "127.0.0.1:4791";

fn assert_goes_on(domain: &Domain) -> Outcome {
    let before = domain.console.wait_tick(SOON)?;
    let more = |tick: &Tick| tick.n >= before.n + 2;
    domain.console.wait_tick_where("two more ticks", SOON, more)?;
    assert_eq!(domain.console.verify(SOON)?.bad, 0, "the guest found bad memory");
    Ok(())
}
