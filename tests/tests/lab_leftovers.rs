//! A laboratory that is killed leaves a QEMU, namespaces, huge pages and mounts behind; the next
//! one takes them away. Alone in its file: the clean-up runs once per process.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{
    GuestAssets, HugePages, HugetlbMount, Memory, Namespace, Qemu, QemuSpec, Workplace, is_root,
    one_at_a_time, skip,
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const VICTIM: &str = "PAGEFERRY_TEST_VICTIM";
const NAME: &str = "a_killed_laboratory_is_cleaned_up_by_the_next";
const PAGES: u64 = 128;

/// What the killed process does: it says what it made, then ends without dropping anything.
fn be_the_victim() -> Outcome {
    let workplace = Workplace::new()?;
    let namespace = Namespace::new(&workplace, "v")?;
    let _pages = HugePages::reserve(&workplace, PAGES << 21)?;
    let mount = HugetlbMount::new(&workplace)?;
    let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
    spec.memory_mib = 256;
    spec.memory = Memory::hugetlbfs(mount.path());
    spec.namespace = Some(namespace.name().into());
    let guest = Qemu::launch(&workplace, "guest", &spec)?;
    let (folder, name) = (workplace.path().display(), namespace.name());
    println!("made {} {name} {folder} made", guest.pid());
    std::process::abort()
}

#[test]
fn a_killed_laboratory_is_cleaned_up_by_the_next() -> Outcome {
    if std::env::var_os(VICTIM).is_some() {
        return be_the_victim();
    }
    if !is_root() {
        skip(NAME, "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let pool = || std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    let pool_before = pool();
    let victim = Command::new(std::env::current_exe()?)
        .args(["--exact", NAME, "--nocapture"])
        .env(VICTIM, "1")
        .output()?;
    let said = String::from_utf8_lossy(&victim.stdout).into_owned();
    let made: Vec<&str> = said.split("made").nth(1).unwrap_or("").split_whitespace().collect();
    let [pid, namespace, folder] = made[..] else { panic!("{victim:?}") };
    let namespace = Path::new("/run/netns").join(namespace);
    let process = Path::new("/proc").join(pid);
    assert!(process.exists() && namespace.exists() && Path::new(folder).exists());

    let workplace = Workplace::new()?;
    let started = Instant::now();
    // The QEMU belongs to init now, which waits for it when it likes.
    let gone = || pageferry_ctl::host::start_time(pid.parse().unwrap_or(0)).is_none();
    while !gone() && started.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(gone(), "QEMU {pid} still runs");
    assert!(!namespace.exists() && !Path::new(folder).exists());
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    assert!(!mounts.contains(folder), "{mounts}");
    assert_eq!(pool(), pool_before);
    drop(workplace);
    Ok(())
}
