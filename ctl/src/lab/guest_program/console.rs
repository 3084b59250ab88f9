//! The serial console as seen from inside: lines of counters out, commands in.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::termios::{LocalFlags, OutputFlags, SetArg, tcgetattr, tcsetattr};

use super::GuestError;
use super::disk::DiskLoad;
use super::writers::MemoryLoad;

const PATH: &str = "/dev/ttyS0";

/// The first serial port; every thread says whole lines.
pub(super) struct GuestConsole {
    port: Mutex<File>,
}

impl GuestConsole {
    pub(super) fn open() -> Result<Arc<Self>, GuestError> {
        let port = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(PATH)
            .map_err(GuestError::file("open", PATH))?;
        // Commands from the host are not to come back to it between two ticks.
        let mut settings = tcgetattr(&port).map_err(GuestError::call("tcgetattr", PATH))?;
        settings.local_flags.remove(LocalFlags::ECHO | LocalFlags::ISIG);
        settings.output_flags.remove(OutputFlags::OPOST);
        tcsetattr(&port, SetArg::TCSANOW, &settings)
            .map_err(GuestError::call("tcsetattr", PATH))?;
        Ok(Arc::new(Self { port: Mutex::new(port) }))
    }

    /// Writes one line. A console that fails is not worth stopping the guest's work for.
    pub(super) fn say(&self, line: &str) {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = port.write_all(format!("{line}\n").as_bytes());
    }
}

/// Obeys the host's commands on a thread of its own.
pub(super) fn serve_commands(
    console: Arc<GuestConsole>,
    memory: Arc<MemoryLoad>,
    disk: Option<Arc<DiskLoad>>,
) {
    std::thread::spawn(move || {
        let Ok(port) = File::open(PATH) else { return };
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            let mut words = line.split_ascii_whitespace();
            match (words.next(), words.next().map(str::parse)) {
                (Some("verify"), None) => verify(&console, &memory, disk.as_deref()),
                (Some("rate"), Some(Ok(pages_per_second))) => memory.set_rate(pages_per_second),
                (Some("poweroff"), None) => super::power_off(),
                (None, _) => {}
                _ => console.say(&format!("unknown command {line}")),
            }
        }
    });
}

fn verify(console: &GuestConsole, memory: &MemoryLoad, disk: Option<&DiskLoad>) {
    let started = std::time::Instant::now();
    let bad = memory.verify_everything();
    let (slots, disk_bad) = disk.map_or((0, 0), DiskLoad::verify_everything);
    console.say(&format!(
        "verified pages={} bad={bad} slots={slots} disk_bad={disk_bad} ms={}",
        memory.page_count(),
        started.elapsed().as_millis(),
    ));
}
