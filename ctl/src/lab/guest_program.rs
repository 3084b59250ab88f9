//! The program that runs as PID 1 inside a laboratory guest: `pageferry guest-init`.
//!
//! It fills memory with pages that prove themselves, rewrites part of them, reads a disk past the
//! page cache, answers pings, and prints a line of counters about every 100 ms on the serial
//! console, so that whoever moves the guest sees that nothing was lost and that it never stood
//! still for long. Each job has its own threads and file; this one starts them. It knows nothing
//! of migrations: to the guest nothing happens.
//!
//! Console, guest to host:
//! ```text
//! ready pages=16384 hot=4096 fill_ms=103 uptime_ms=1820
//! tick n=1 uptime_ms=1921 writes=8192 bad=0 disk_reads=0 disk_bad=0 …
//! bad page=17 word=2 expected=… found=…
//! verified pages=16384 bad=0 slots=256 disk_bad=0 ms=310
//! ```
//! Host to guest, one command a line: `verify` (stop the writers, check everything, say
//! `verified`), `rate N` (pages per second from now on, 0 for no limit), `poweroff`.

mod boot;
mod console;
mod counters;
mod disk;
mod network;
pub mod pages;
mod writers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::reboot::{RebootMode, reboot};

use super::guest_params::{BadParam, GuestParams};
use console::GuestConsole;
use counters::Counters;
use disk::DiskLoad;
use pages::{PAGE_BYTES, PageStore};
use writers::MemoryLoad;

/// Why the guest program gave up.
#[derive(Debug, thiserror::Error)]
enum GuestError {
    #[error("{action} {path}")]
    File { action: &'static str, path: String, source: std::io::Error },
    #[error("{call} {on}")]
    Call { call: &'static str, on: String, source: nix::Error },
    #[error("netlink refused to {action}: errno {errno}")]
    Netlink { action: &'static str, errno: i32 },
    #[error("{path} does not hold a number")]
    NotANumber { path: String },
    #[error("the disk has {disk_bytes} bytes, too few for {wanted_bytes}")]
    DiskTooSmall { disk_bytes: u64, wanted_bytes: u64 },
    #[error(transparent)]
    Param(#[from] BadParam),
}

impl GuestError {
    fn file(action: &'static str, path: &str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    fn call(call: &'static str, on: &str) -> impl FnOnce(nix::Error) -> Self {
        let on = on.to_owned();
        move |source| Self::Call { call, on, source }
    }
}

/// Runs the guest program and never comes back. Anything but PID 1 is sent away at once: it mounts
/// file systems and powers the machine off.
pub fn run() -> ! {
    if std::process::id() != 1 {
        eprintln!("error: guest-init runs only as PID 1 of a laboratory guest");
        std::process::exit(2);
    }
    let outcome = boot::mount_kernel_file_systems().and_then(|()| GuestConsole::open());
    if let Ok(console) = outcome {
        if let Err(error) = serve(&console) {
            let mut text = format!("guest error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(source) = cause {
                text += &format!(": {source}");
                cause = source.source();
            }
            console.say(&text);
        }
        std::thread::sleep(Duration::from_millis(50)); // the line still has to leave the UART
    }
    power_off()
}

fn serve(console: &Arc<GuestConsole>) -> Result<(), GuestError> {
    let params = GuestParams::from_command_line(&boot::kernel_command_line()?)?;
    boot::load_modules()?;
    if let Some((address, prefix)) = params.ipv4 {
        network::configure(address, prefix)?;
    }
    if let Some(port) = params.udp_echo_port {
        network::echo_udp(port)?;
    }

    let counters = Arc::new(Counters::default());
    let memory = fill(&params, console, &counters)?;
    let disk = DiskLoad::start(&params, console, &counters)?;
    memory.start_writers();
    console::serve_commands(Arc::clone(console), memory, disk);
    tick(&params, console, &counters)
}

fn fill(
    params: &GuestParams,
    console: &Arc<GuestConsole>,
    counters: &Arc<Counters>,
) -> Result<Arc<MemoryLoad>, GuestError> {
    let started = Instant::now();
    let filled = |mib: u64| {
        let page_count = (mib << 20) as usize / PAGE_BYTES;
        let store = PageStore::new(page_count, params.stride_words as usize)
            .packing(params.packing_percent as usize);
        (0..page_count).for_each(|page| store.fill(page));
        (page_count, store)
    };
    // Both are there at once, so that nothing of the one lies where the other was.
    let spare = filled(params.spare_mib);
    let (page_count, store) = filled(params.fill_mib);
    drop(spare);
    let memory = MemoryLoad::new(params, store, Arc::clone(console), Arc::clone(counters));
    console.say(&format!(
        "ready pages={page_count} hot={} fill_ms={} uptime_ms={}",
        memory.hot_page_count(),
        started.elapsed().as_millis(),
        boot::uptime_ms()?,
    ));
    Ok(memory)
}

/// Prints the counters for ever, at steady intervals of the guest's own clock.
fn tick(
    params: &GuestParams,
    console: &GuestConsole,
    counters: &Counters,
) -> Result<(), GuestError> {
    let interval = Duration::from_millis(params.tick_ms.into());
    let (started, uptime_ms) = (Instant::now(), u128::from(boot::uptime_ms()?));
    let (mut due, mut writes_before) = (started, 0);
    for n in 1_u64.. {
        due = (due + interval).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let counted = counters.read();
        let delta = counted.writes - writes_before;
        writes_before = counted.writes;
        let uptime_ms = uptime_ms + started.elapsed().as_millis();
        console.say(&format!("tick n={n} uptime_ms={uptime_ms} {counted} delta={delta}"));
    }
    Ok(())
}

fn power_off() -> ! {
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // Leaving PID 1 makes the kernel panic, which ends a QEMU that was started with -no-reboot.
    std::process::exit(1)
}
