//! The laboratory itself: guests of each kind boot and prove their memory, and one of them is
//! moved by QEMU's own migration, so that a later failure is ours and not the instruments'.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::console::{longest_gap, missing_ticks, ticks_across};
use pageferry_ctl::lab::{
    GUEST_ADDRESS, GUEST_PREFIX, GuestAssets, HugePages, HugetlbMount, Memory, Pinger, Qemu,
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

/// Moves a guest of `spec` from the installed QEMU to `to` by QEMU's own migration.
fn move_by_qemu(mut spec: QemuSpec, to: QemuBinary) -> Outcome {
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let hosts = TwoHosts::new(&workplace)?;
    hosts.shape(4000)?;
    spec = spec.with_network(TAP, GUEST_ADDRESS, GUEST_PREFIX);
    spec.memory_mib = 256;
    spec.params.pages_per_second = 4000;
    spec.namespace = Some(hosts.source.namespace.name().into());
    let mut source = Qemu::launch(&workplace, "source", &spec)?;
    spec.binary = to;
    spec.namespace = Some(hosts.target.namespace.name().into());
    let target = Qemu::launch(&workplace, "target", &spec.to_target())?;
    source.wait_ready(BOOT)?;
    source.console().wait_tick_where("five ticks", SOON, |tick| tick.n >= 5)?;

    let pinger = Pinger::start(&hosts.lan, GUEST_ADDRESS, Duration::from_millis(20))?;
    let (from, to) = (Qmp::connect(source.qmp())?, Qmp::connect(target.qmp())?);
    let started = Instant::now();
    let downtime_ms = migrate(&from, &to, &format!("tcp:{}:4444", hosts.target.address))?;
    let here = target.console().wait_tick(SOON)?;
    let verified = target.console().verify(SOON)?;
    target.console().wait_tick_where("ten ticks", SOON, |tick| tick.n >= here.n + 10)?;
    let pings = pinger.stop();

    let ticks = ticks_across(source.console(), target.console());
    println!(
        "moved from {} to {} in {:?}, downtime {downtime_ms} ms, gap {:?}, {pings:?}, {verified:?}",
        from.version(),
        to.version(),
        started.elapsed(),
        longest_gap(&ticks)
    );
    assert_eq!(missing_ticks(&ticks), 0);
    assert!(ticks.is_sorted_by_key(|tick| tick.writes));
    assert_eq!((verified.bad, ticks.last().map(|tick| tick.bad)), (0, Some(0)));
    // Nobody is answered while the guest is paused, and only then.
    let paused = pings.silence_max.as_millis() / 20 + 2;
    assert!(pings.answered > 0 && u128::from(pings.lost()) <= paused, "{pings:?}");
    Ok(())
}

/// Runs the migration to its end; the pause that QEMU reports, in milliseconds.
fn migrate(from: &Qmp, to: &Qmp, uri: &str) -> Result<u64, Box<dyn std::error::Error>> {
    to.execute("migrate-incoming", json!({ "uri": uri }))?;
    from.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }))?;
    from.execute("migrate", json!({ "uri": uri }))?;
    let started = Instant::now();
    loop {
        let answer = from.execute("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(answer["downtime"].as_u64().unwrap_or(0)),
            Some("failed" | "cancelled") => return Err(answer.to_string().into()),
            _ if started.elapsed() > SOON => return Err(format!("too slow: {answer}").into()),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[test]
fn qemus_own_migration_keeps_a_guest_whole_and_reachable() -> Outcome {
    if !is_root() {
        skip("qemus_own_migration_keeps_a_guest_whole_and_reachable", "needs root");
        return Ok(());
    }
    move_by_qemu(QemuSpec::new(GuestAssets::prepare()?)?, QemuBinary::system()?)
}

#[test]
fn a_guest_can_move_from_the_older_qemu_to_the_newer() -> Outcome {
    const NAME: &str = "a_guest_can_move_from_the_older_qemu_to_the_newer";
    if !is_root() {
        skip(NAME, "needs root");
        return Ok(());
    }
    let other = match QemuBinary::other() {
        Ok(other) => other,
        Err(error) => {
            skip(NAME, error);
            return Ok(());
        }
    };
    let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
    if spec.binary.version > other.version {
        skip(NAME, "the installed QEMU is the newer one");
        return Ok(());
    }
    // `q35` and `max` mean something else in each version.
    let version = spec.binary.version;
    spec.machine = format!("pc-q35-{}.{}", version.major, version.minor);
    spec.cpu = "qemu64".into();
    move_by_qemu(spec, other)
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
