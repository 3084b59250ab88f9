//! A live guest moved over RDMA, on the devices that `tests/rdma-vm/run` makes: everything runs in
//! its machine, the guest's QEMUs too.
#![forbid(unsafe_code)]

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pageferry_ctl::lab::{GuestAssets, LabError, Qemu, QemuSpec, Workplace, skip};
use pageferry_tests::agents::{Agent, Ended, Manner};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// An emulated machine in an emulated machine boots slowly.
const BOOT_MAX: Duration = Duration::from_secs(300);
const MIGRATION_MAX: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(120);
const PORT: u16 = 4777;
/// An agent that may lock so little memory, and has no right to lock more. As services are started
/// that nobody has given a `LimitMEMLOCK`.
const LOCKS: &str = "--memlock=1048576:1048576";
const LOCKS_LITTLE: [&str; 5] =
    ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", LOCKS];
const GUEST_MIB: u64 = 192;

/// A guest and its two agents on this machine.
struct Scene {
    guest: Qemu,
    spec: QemuSpec,
    workplace: Arc<Workplace>,
    /// Where the target listens: an address of an RDMA device.
    to: String,
}

impl Scene {
    /// A small guest; `None`, said, where there is no RDMA device.
    fn boot(test: &str, extra: &[&str]) -> Result<Option<Self>, LabError> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        if variable("PF_RDMA_DEV").is_empty() || variable("PF_PEER_ADDR").is_empty() {
            skip(test, "needs an RDMA device (make test-rdma)");
            return Ok(None);
        }
        let workplace = Workplace::new()?;
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        if std::path::Path::new("/dev/kvm").exists() && !variable("PF_DRIVER").is_empty() {
            (spec.accel, spec.cpu) = ("kvm".into(), "host".into());
        }
        (spec.smp, spec.memory_mib) = (1, GUEST_MIB);
        (spec.params.fill_mib, spec.params.hot_mib) = (16, 4);
        spec.params.pages_per_second = 200;
        spec.extra = extra.iter().map(|word| (*word).to_owned()).collect();
        let mut guest = Qemu::launch(&workplace, "source", &spec)?;
        guest.wait_ready(BOOT_MAX)?;
        let to = format!("{}:{PORT}", variable("PF_PEER_ADDR"));
        Ok(Some(Self { guest, spec, workplace, to }))
    }

    /// Starts both agents; what happens `meanwhile` is told the source's.
    fn migrate(
        &mut self,
        attempt: &str,
        more: &[&str],
        meanwhile: impl FnOnce(&Agent) -> Result<(), LabError>,
    ) -> Result<(Ended, Ended), LabError> {
        self.migrate_under(attempt, more, (&[], &[]), meanwhile)
    }

    /// The same with the source's and the target's agent started by other programs.
    fn migrate_under(
        &mut self,
        attempt: &str,
        more: &[&str],
        under: (&[&str], &[&str]),
        meanwhile: impl FnOnce(&Agent) -> Result<(), LabError>,
    ) -> Result<(Ended, Ended), LabError> {
        let waiting = Qemu::launch(&self.workplace, attempt, &self.spec.to_target())?;
        let state = |role: &str| {
            self.workplace.file(&format!("{attempt}.{role}.state")).display().to_string()
        };
        let (here, there) = (state("source"), state("target"));
        let qmp = waiting.qmp().display().to_string();
        let name = |role: &str| format!("{attempt}.{role}.agent");
        let args =
            ["target", "--listen", &self.to, "--qmp", &qmp, "--once", "--json", "--insecure"];
        let args = [&args[..], &["--state-dir", &there]].concat();
        let manner = |under| Manner { under, ..Manner::default() };
        let start = |role: &str, args: &[&str], under| {
            Agent::start_in(&self.workplace, None, &name(role), args, manner(under))
        };
        let target = start("target", &args, under.1)?;
        target.wait_text("listening", SOON)?;
        let qmp = self.guest.qmp().display().to_string();
        let args = ["migrate", "--qmp", &qmp, "--to", &self.to, "--json", "--verify", "--insecure"];
        let args = [&args[..], &["--state-dir", &here, "--downtime-ms", "2000"], more].concat();
        let source = start("source", &args, under.0)?;
        meanwhile(&source)?;
        let source = source.wait(MIGRATION_MAX)?;
        if source.code != 0 {
            target.signal(nix::sys::signal::Signal::SIGINT);
        }
        let target = target.wait(SOON)?;
        if source.code == 0 {
            self.guest = waiting;
        }
        Ok((source, target))
    }

    fn assert_goes_on(&self) -> Outcome {
        let before = self.guest.console().wait_tick(SOON);
        let before = before.map_err(|error| format!("{error}: {}", self.guest.stderr()))?;
        let goes_on = self.guest.console().wait_tick_where("more ticks", SOON, |tick| {
            tick.n >= before.n + 2 && tick.writes > before.writes
        })?;
        assert_eq!(goes_on.bad, 0, "the guest found bad memory: {goes_on:?}");
        Ok(())
    }
}

fn assert_migrated(source: &Ended, target: &Ended, transport: &str) {
    let summary = source.summary();
    println!(
        "{}: {} ({}), {} rounds, {} MiB, blackout {} ms",
        summary["outcome"],
        summary["transport"],
        summary["transport_reason"],
        summary["rounds"],
        summary["moved_bytes"].as_u64().unwrap_or(0) >> 20,
        summary["blackout_ms"],
    );
    assert_eq!(source.code, 0, "{}\n{summary:#}", source.stderr);
    assert_eq!(target.code, 0, "{}", target.stderr);
    assert_eq!(summary["verified"], true);
    assert_eq!(summary["transport"], transport, "{summary:#}\n{}", source.stderr);
}

#[test]
fn rdma_a_guest_moves_by_the_way_that_the_agents_choose() -> Outcome {
    let name = "rdma_a_guest_moves_by_the_way_that_the_agents_choose";
    let Some(mut scene) = Scene::boot(name, &[])? else { return Ok(()) };
    let (source, target) = scene.migrate("by-rdma", &[], |_| Ok(()))?;
    assert_migrated(&source, &target, "rdma");
    scene.assert_goes_on()?;
    let (source, target) = scene.migrate("by-tcp", &["--transport", "tcp"], |_| Ok(()))?;
    assert_migrated(&source, &target, "tcp-uring");
    scene.assert_goes_on()
}

#[test]
fn rdma_that_may_lock_too_little_memory_says_how_much_it_needs_or_leaves_it_to_tcp() -> Outcome {
    let name = "rdma_that_may_lock_too_little_memory_says_how_much_it_needs_or_leaves_it_to_tcp";
    let Some(mut scene) = Scene::boot(name, &[])? else { return Ok(()) };
    let only = ["--transport", "rdma"];
    let (little, as_ever) = (&LOCKS_LITTLE[..], &[][..]);
    let (source, target) =
        scene.migrate_under("source-only", &only, (little, as_ever), |_| Ok(()))?;
    // What is filled, in whole slices.
    let needed = refused_for(&source, &target);
    assert!((16 << 20..=(GUEST_MIB + 1) << 20).contains(&needed), "{needed}");
    scene.assert_goes_on()?;
    // A limit of what it said is enough, unless the guest has begun another slice meanwhile.
    let needed = needed + (16 << 20);
    let limit = format!("--memlock={needed}:{needed}");
    let enough = [&LOCKS_LITTLE[..4], &[limit.as_str()]].concat();
    let (source, target) = scene.migrate_under("enough", &only, (&enough, as_ever), |_| Ok(()))?;
    assert_migrated(&source, &target, "rdma");
    scene.assert_goes_on()?;
    let (source, target) =
        scene.migrate_under("target-only", &only, (as_ever, little), |_| Ok(()))?;
    // How much of it will be filled the target can't know.
    assert_eq!(refused_for(&source, &target), (GUEST_MIB + 1) << 20);
    for (attempt, under) in [("source-any", (little, as_ever)), ("target-any", (as_ever, little))] {
        let (source, target) = scene.migrate_under(attempt, &[], under, |_| Ok(()))?;
        assert_migrated(&source, &target, "tcp-uring");
        let reason = source.summary()["transport_reason"].as_str().unwrap_or_default();
        assert_eq!(reason.contains("at the target"), attempt == "target-any", "{reason}");
        assert!(needed_bytes(reason) >= 16 << 20, "{reason}");
        scene.assert_goes_on()?;
    }
    Ok(())
}

/// Bytes that have to be locked, said by a source that was refused before the guest was touched.
fn refused_for(source: &Ended, target: &Ended) -> u64 {
    let said = source.summary()["reason"].as_str().unwrap_or_default();
    println!("source: exit code {}: {said}", source.code);
    assert_eq!(source.code, 3, "{}\ntarget: {}", source.stderr, target.stderr);
    assert!(said.contains("LimitMEMLOCK"), "{said}\ntarget: {}", target.stderr);
    needed_bytes(said)
}

/// The number before "bytes have to be locked", where the limit is the one that was set.
fn needed_bytes(said: &str) -> u64 {
    let before = said.split(" bytes have to be locked in memory, the limit is 1048576").next();
    let number = before.and_then(|text| text.rsplit(' ').next()).and_then(|it| it.parse().ok());
    number.unwrap_or_else(|| panic!("no number in {said:?}"))
}

/// RDMA's own way is shut in the middle of a round, the control connection's is not.
#[test]
fn rdma_that_goes_in_the_middle_of_a_round_is_followed_by_tcp() -> Outcome {
    let name = "rdma_that_goes_in_the_middle_of_a_round_is_followed_by_tcp";
    let Some(mut scene) = Scene::boot(name, &[])? else { return Ok(()) };
    let device = std::env::var("PF_RDMA_DEV")?;
    let (source, target) = scene.migrate("cut", &["--rounds-max", "40"], |source| {
        source.wait_text("\"start\"", SOON)?;
        // Removing the device ends its connections; the network under it stays.
        let removed = Command::new("rdma").args(["link", "delete", &device]).status();
        println!("rdma link delete {device}: {removed:?}");
        Ok(())
    })?;
    assert_migrated(&source, &target, "tcp-uring");
    let reason = source.summary()["transport_reason"].as_str().unwrap_or_default();
    assert!(reason.contains("RDMA"), "{reason}");
    scene.assert_goes_on()
}

#[test]
fn rdma_is_not_taken_for_a_guest_with_a_balloon() -> Outcome {
    let name = "rdma_is_not_taken_for_a_guest_with_a_balloon";
    let Some(mut scene) = Scene::boot(name, &["-device", "virtio-balloon-pci"])? else {
        return Ok(());
    };
    let (source, _target) = scene.migrate("only-rdma", &["--transport", "rdma"], |_| Ok(()))?;
    assert_eq!(source.code, 3, "{}", source.stderr);
    let (source, target) = scene.migrate("balloon", &[], |_| Ok(()))?;
    assert_migrated(&source, &target, "tcp-uring");
    let reason = source.summary()["transport_reason"].as_str().unwrap_or_default();
    assert!(reason.contains("balloon"), "{reason}");
    scene.assert_goes_on()
}
