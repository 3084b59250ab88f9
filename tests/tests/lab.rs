//! The laboratory itself: guests of each kind boot and prove their memory, and one of them is
//! moved by QEMU's own migration, so that a later failure is ours and not the instruments'.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::console::{longest_gap, missing_ticks, ticks_across};
use pageferry_ctl::lab::disk_image;
use pageferry_ctl::lab::{
    Disk, GUEST_ADDRESS, GUEST_PREFIX, GuestAssets, HugePages, HugetlbMount, Memory, Pinger, Qemu,
    QemuBinary, QemuSpec, TAP, TwoHosts, Workplace, is_root, left_behind, one_at_a_time, skip,
};
use pageferry_ctl::qmp::Qmp;
use serde_json::json;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A guest boots in two to four seconds here; other work may share the machine.
const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(60);

fn boot_and_verify(workplace: &Arc<Workplace>, name: &str, spec: &QemuSpec) -> Outcome {
    let started = Instant::now();
    let mut guest = Qemu::launch(workplace, name, spec)?;
    let uptime = guest.wait_ready(BOOT)?;
    println!(
        "{name} on QEMU {}: ready after {:?}, uptime {uptime:?}",
        spec.binary.version,
        started.elapsed()
    );
    let first = guest.console().wait_tick(SOON)?;
    let later =
        guest.console().wait_tick_where("ten ticks", SOON, |tick| tick.n >= first.n + 10)?;
    assert!(later.writes > first.writes && later.bad == 0, "{later:?}");
    println!("{name}: {} pages rewritten per 100 ms", (later.writes - first.writes) / 10);
    let verified = guest.console().verify(SOON)?;
    assert_eq!((verified.pages, verified.bad), (spec.params.fill_mib * 256, 0));
    assert!(left_behind(guest.pid())?.is_empty());
    Ok(())
}

fn boot_each_kind(binary: QemuBinary) -> Outcome {
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
    spec.binary = binary;
    spec.memory_mib = 256;
    boot_and_verify(&workplace, "tmpfs", &spec)?;
    spec.memory = Memory::Memfd { hugetlb: false, share: true };
    boot_and_verify(&workplace, "memfd", &spec)?;
    if is_root() {
        let _pages = HugePages::reserve(&workplace, spec.memory_mib << 20)?;
        let mount = HugetlbMount::new(&workplace)?;
        spec.memory = Memory::hugetlbfs(mount.path());
        boot_and_verify(&workplace, "hugetlbfs", &spec)?;
    }
    Ok(())
}

#[test]
fn guests_of_each_kind_boot_on_the_installed_qemu() -> Outcome {
    boot_each_kind(QemuBinary::system()?)
}

#[test]
fn guests_of_each_kind_boot_on_the_other_qemu() -> Outcome {
    match QemuBinary::other() {
        Ok(binary) => boot_each_kind(binary),
        Err(error) => {
            skip("guests_of_each_kind_boot_on_the_other_qemu", error);
            Ok(())
        }
    }
}

/// Moves a guest of `spec` from one QEMU to another by QEMU's own migration.
fn move_by_qemu(mut spec: QemuSpec, from: &QemuBinary, to: &QemuBinary) -> Outcome {
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let hosts = TwoHosts::new(&workplace)?;
    hosts.shape(4000)?;
    let image = workplace.file("disk.raw");
    disk_image::create(&image, 32, 1)?;
    spec = spec.with_network(TAP, GUEST_ADDRESS, GUEST_PREFIX);
    spec.disk = Some(Disk { image, aio: "native" });
    spec.memory_mib = 256;
    spec.params.pages_per_second = 4000;
    spec.params.disk_readers = 2;
    spec.params.disk_scratch_mib = 1;
    spec.binary = from.clone();
    spec.namespace = Some(hosts.source.namespace.name().into());
    let mut source = Qemu::launch(&workplace, "source", &spec)?;
    spec.binary = to.clone();
    spec.namespace = Some(hosts.target.namespace.name().into());
    let target = Qemu::launch(&workplace, "target", &spec.to_target())?;
    source.wait_ready(BOOT)?;
    source.console().wait_tick_where("five ticks", SOON, |tick| tick.n >= 5)?;

    let pinger = Pinger::start(&hosts.lan, GUEST_ADDRESS, Duration::from_millis(20))?;
    let (source_qmp, target_qmp) = (Qmp::connect(source.qmp())?, Qmp::connect(target.qmp())?);
    let started = Instant::now();
    migrate(&source_qmp, &target_qmp, &format!("tcp:{}:4444", hosts.target.address))?;
    let here = target.console().wait_tick(SOON)?;
    source.kill();
    let verified = target.console().verify(SOON)?;
    target.console().wait_tick_where("ten ticks", SOON, |tick| tick.n >= here.n + 10)?;
    let pings = pinger.stop();

    let ticks = ticks_across(source.console(), target.console());
    println!(
        "moved from {} to {} in {:?}, gap {:?}, {pings:?}, {verified:?}",
        from.version,
        to.version,
        started.elapsed(),
        longest_gap(&ticks)
    );
    assert_eq!(missing_ticks(&ticks), 0);
    assert!(ticks.is_sorted_by_key(|tick| tick.writes));
    let last = ticks.last().ok_or("no ticks")?;
    assert_eq!((verified.bad, verified.disk_bad, last.bad, last.disk_bad), (0, 0, 0, 0));
    assert!(verified.slots > 0 && last.disk_reads > here.disk_reads, "{last:?}");
    assert!(last.disk_writes > here.disk_writes, "{last:?}");
    // Nobody is answered while the guest is paused, and only then.
    let paused = pings.silence_max.as_millis() / 20 + 2;
    assert!(pings.answered > 0 && u128::from(pings.lost()) <= paused, "{pings:?}");
    Ok(())
}

/// Runs the migration to its end, with the guest running at the target.
fn migrate(from: &Qmp, to: &Qmp, uri: &str) -> Outcome {
    // QEMU 7.2 loses writes of an emulated guest while it sends the guest's memory: on a busy host
    // every second guest panicked after its move, none of those that were paused before it.
    let pause_first = from.version().major < 9;
    to.execute("migrate-incoming", json!({ "uri": uri }))?;
    from.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }))?;
    if pause_first {
        from.execute("stop", json!({}))?;
    }
    from.execute("migrate", json!({ "uri": uri }))?;
    wait_completed(from)?;
    if pause_first {
        wait_completed(to)?;
        to.execute("cont", json!({}))?;
    }
    Ok(())
}

fn wait_completed(qmp: &Qmp) -> Outcome {
    let started = Instant::now();
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => return Err(answer.to_string().into()),
            _ if started.elapsed() > SOON => return Err(format!("too slow: {answer}").into()),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[test]
fn a_guest_moved_by_the_installed_qemu_stays_whole_and_reachable() -> Outcome {
    if !is_root() {
        skip("a_guest_moved_by_the_installed_qemu_stays_whole_and_reachable", "needs root");
        return Ok(());
    }
    let installed = QemuBinary::system()?;
    move_by_qemu(QemuSpec::new(GuestAssets::prepare()?)?, &installed, &installed)
}

#[test]
fn a_guest_moved_by_the_other_qemu_stays_whole_and_reachable() -> Outcome {
    let Some(other) =
        other_qemu_for_root("a_guest_moved_by_the_other_qemu_stays_whole_and_reachable")
    else {
        return Ok(());
    };
    move_by_qemu(QemuSpec::new(GuestAssets::prepare()?)?, &other, &other)
}

#[test]
fn a_guest_can_move_from_the_older_qemu_to_the_newer() -> Outcome {
    let Some(other) = other_qemu_for_root("a_guest_can_move_from_the_older_qemu_to_the_newer")
    else {
        return Ok(());
    };
    let mut versions = [QemuBinary::system()?, other];
    versions.sort_by_key(|binary| binary.version);
    let [older, newer] = &versions;
    let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
    // `q35` and `max` mean something else in each version.
    spec.machine = format!("pc-q35-{}.{}", older.version.major, older.version.minor);
    spec.cpu = "qemu64".into();
    move_by_qemu(spec, older, newer)
}

/// The other QEMU; `None`, having said why, where it or the right to move a guest is missing.
fn other_qemu_for_root(test: &str) -> Option<QemuBinary> {
    if !is_root() {
        skip(test, "needs root");
        return None;
    }
    QemuBinary::other().inspect_err(|error| skip(test, error)).ok()
}

#[test]
fn the_link_between_the_hosts_can_be_made_slow() -> Outcome {
    const BYTES: usize = 8 << 20;
    const MBIT_PER_SECOND: u64 = 100;
    if !is_root() {
        skip("the_link_between_the_hosts_can_be_made_slow", "needs root");
        return Ok(());
    }
    let workplace = Workplace::new()?;
    let hosts = TwoHosts::new(&workplace)?;
    hosts.shape(MBIT_PER_SECOND)?;
    let listener =
        hosts.target.namespace.run(|| TcpListener::bind((hosts.target.address, 0)))??;
    let address = listener.local_addr()?;
    let mut stream = hosts.source.namespace.run(|| TcpStream::connect(address))??;
    let (mut accepted, _) = listener.accept()?;
    let started = Instant::now();
    let sender = std::thread::spawn(move || stream.write_all(&vec![7; BYTES]));
    let mut received = Vec::new();
    accepted.read_to_end(&mut received)?;
    sender.join().expect("the sender")?;
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(received.len(), BYTES);
    let mbit_per_second = (BYTES * 8) as f64 / seconds / 1e6;
    println!("{mbit_per_second:.0} Mbit/s");
    assert!((40.0..=115.0).contains(&mbit_per_second), "{mbit_per_second} Mbit/s");
    Ok(())
}
