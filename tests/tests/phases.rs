//! Ctrl-C, or the death of the source agent, in every phase before the hand-over: the guest runs
//! on at the source, nothing of ours is left in its QEMU, and its settings are as they were.
#![forbid(unsafe_code)]

use nix::sys::signal::Signal;
use pageferry_ctl::lab::{Disk, Workplace, disk_image, is_root, one_at_a_time, skip};
use pageferry_ctl::qemu::capabilities::Settings;
use pageferry_ctl::qemu::runstate::{self, RunState};
use pageferry_ctl::qmp::Qmp;
use pageferry_tests::scene::{SOON, Scene};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// As [`Phase`](pageferry_datapath::source::Phase) writes them; a guest with a disk that bypasses
/// the page cache goes through all of them.
const BEFORE_HANDOVER: [&str; 17] = [
    "greeting",
    "offering",
    "opening",
    "attaching",
    "drainpausing",
    "drainresuming",
    "moving",
    "closing",
    "scanning",
    "drainscanning",
    "preparing",
    "pausing",
    "lastscanning",
    "last-moving",
    "last-closing",
    "verifying",
    "saving",
];
/// Until then nothing in the guest's QEMU was touched.
const UNTOUCHED: [&str; 3] = ["greeting", "offering", "opening"];

fn scene(workplace: &std::sync::Arc<Workplace>) -> Result<Scene, Box<dyn std::error::Error>> {
    let mut spec = Scene::spec()?;
    let image = workplace.file("disk.img");
    disk_image::create(&image, 32, 0)?;
    spec.disk = Some(Disk { image, aio: "native" });
    spec.params.disk_readers = 1;
    Ok(Scene::boot(workplace, spec)?)
}

fn interrupted_in_every_phase(name: &str, signal: Signal) -> Outcome {
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let scene = scene(&workplace)?;
    let settings = || -> Result<_, Box<dyn std::error::Error>> {
        Ok(Settings::current(&Qmp::connect(scene.guest.qmp())?)?)
    };
    let before = settings()?;
    for phase in BEFORE_HANDOVER {
        let waiting = scene.waiting(|_| {})?;
        let held = format!("{phase}:30000");
        let (source, target) = scene.agents_held(&waiting, &["--verify"], &held)?;
        source.wait_error("held in", SOON)?;
        source.signal(signal);
        if signal == Signal::SIGKILL {
            source.wait_error("the guest runs on here", SOON)?;
        }
        let (source, target) = (source.wait(SOON)?, target.wait(SOON)?);
        let told = &source.summary()["guest_running_on"];
        println!("{phase}: source {} {told}, target {}", source.code, target.code);
        if signal == Signal::SIGINT {
            let code = if UNTOUCHED.contains(&phase) { 3 } else { 1 };
            assert_eq!(source.code, code, "{phase}: {}", source.stderr);
            assert_eq!(told, "source", "{phase}");
        }
        // Of a source that was killed the target hears by its guard.
        assert_eq!(target.code, 1, "{phase}: {}", target.stderr);
        scene.assert_goes_on()?;
        scene.assert_clean()?;
        assert_eq!(settings()?, before, "{phase}");
    }
    Ok(())
}

#[test]
fn ctrl_c_in_every_phase_leaves_the_guest_running() -> Outcome {
    interrupted_in_every_phase("ctrl_c_in_every_phase_leaves_the_guest_running", Signal::SIGINT)
}

#[test]
fn a_killed_source_agent_in_every_phase_leaves_the_guest_running() -> Outcome {
    let name = "a_killed_source_agent_in_every_phase_leaves_the_guest_running";
    interrupted_in_every_phase(name, Signal::SIGKILL)
}

#[test]
fn an_agent_killed_once_the_hand_over_is_on_record_leaves_the_guest_paused() -> Outcome {
    if !is_root() {
        let name = "an_agent_killed_once_the_hand_over_is_on_record_leaves_the_guest_paused";
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let scene = scene(&workplace)?;
    let waiting = scene.waiting(|_| {})?;
    let (source, target) = scene.agents_held(&waiting, &[], "deciding:30000")?;
    source.wait_error("held in", SOON)?;
    source.signal(Signal::SIGKILL);
    source.wait_error("its record says HandedOver: the guest stays as it is", SOON)?;
    source.wait(SOON)?;
    // The commit never left: the guest runs nowhere, and not twice.
    let target = target.wait(SOON)?;
    assert_eq!(target.code, 4, "{}", target.stderr);
    let mut monitors = Vec::new();
    for qemu in [&scene.guest, &waiting] {
        let qmp = Qmp::connect(qemu.qmp())?;
        let state = RunState::query(&qmp)?;
        assert!(!state.running, "{state:?}");
        monitors.push(qmp);
    }
    scene.assert_clean()?;
    // It is whole: an operator who knows that the target is out of it lets it go on.
    runstate::settle_and_cont(&monitors[0])?;
    drop(monitors);
    scene.assert_goes_on()?;
    Ok(())
}
