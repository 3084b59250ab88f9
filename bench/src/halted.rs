//! A guest that runs and does nothing: its firmware is three instructions that halt. Where QEMU is
//! emulated itself, it costs nothing beside what moves it.
//!
//! Its memory is written from outside, by QEMU itself (the protocol of `-qtest`): these writes are
//! in QEMU's own dirty log, and they are tracked as any write of its process.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{QemuBinary, Workplace};

use crate::error::BenchError;
use crate::pause::Monitored;

/// QEMU makes its sockets first; under emulation that takes seconds.
const SOCKETS_MAX: Duration = Duration::from_secs(60);
/// Firmware: `hlt` throughout, and at the reset vector `cli; hlt; jmp` back to it.
const FIRMWARE_BYTES: usize = 64 << 10;
const RESET_VECTOR: usize = FIRMWARE_BYTES - 16;
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
/// The first MiB has firmware and holes.
const MEMORY_FROM: u64 = 1 << 20;

/// Such a guest in its QEMU. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Halted {
    child: Child,
    qmp: PathBuf,
    spare: PathBuf,
    writes: PathBuf,
    mib: u64,
}

impl Halted {
    /// Starts one; `incoming` waits for a migration.
    pub(crate) fn start(
        workplace: &Workplace,
        name: &str,
        mib: u64,
        incoming: bool,
    ) -> Result<Self, BenchError> {
        let firmware = workplace.file("halt.bin");
        let mut image = vec![HALT[1]; FIRMWARE_BYTES];
        image[RESET_VECTOR..][..HALT.len()].copy_from_slice(&HALT);
        std::fs::write(&firmware, image).map_err(BenchError::io("write", firmware.display()))?;
        let file = |what: &str| workplace.file(&format!("{name}.{what}"));
        let (qmp, spare, writes) = (file("qmp"), file("spare"), file("qtest"));
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let mut command: Command = QemuBinary::system()?.command();
        command.args(["-machine", "q35,memory-backend=ram", "-accel", "tcg", "-nodefaults"]);
        command.args(["-display", "none", "-m", &mib.to_string()]).arg("-bios").arg(&firmware);
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={mib}M,share=on")]);
        command.args(["-qmp", &socket(&qmp), "-qmp", &socket(&spare)]);
        command.args(["-qtest", &socket(&writes), "-qtest-log", "/dev/null"]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let log = file("stderr");
        let errors = std::fs::File::create(&log);
        let errors = errors.map_err(BenchError::io("create", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.spawn().map_err(BenchError::io("run", "qemu"))?;
        let this = Self { child, qmp, spare, writes, mib };
        let until = Instant::now() + SOCKETS_MAX;
        while ![&this.qmp, &this.spare, &this.writes].iter().all(|path| path.exists()) {
            if Instant::now() > until {
                let (what, waited_s) = ("QEMU's sockets".into(), SOCKETS_MAX.as_secs());
                return Err(BenchError::Timeout { what, waited_s });
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(this)
    }

    /// Fills all of its memory with what is not zero.
    pub(crate) fn fill(&self) -> Result<(), BenchError> {
        let mut writes = Writes::connect(&self.writes)?;
        writes.set(MEMORY_FROM, (self.mib << 20) - MEMORY_FROM, 0x5a)
    }

    /// Writes over `hot_mib` again and again, at most `mib_per_s`, while `during` runs; what it
    /// returned, and how much was written.
    pub(crate) fn written_during<T>(
        &self,
        hot_mib: u64,
        mib_per_s: f64,
        during: impl FnOnce() -> T,
    ) -> Result<(T, u64), BenchError> {
        const STEP: u64 = 64 << 10;
        let mut writes = Writes::connect(&self.writes)?;
        let (over, written) = (AtomicBool::new(false), AtomicU64::new(0));
        let done = thread::scope(|scope| {
            scope.spawn(|| {
                let (began, mut at, mut byte) = (Instant::now(), 0, 1u8);
                while !over.load(Ordering::Relaxed) {
                    let due = began.elapsed().as_secs_f64() * mib_per_s * f64::from(1 << 20);
                    if written.load(Ordering::Relaxed) as f64 > due {
                        thread::sleep(Duration::from_millis(2));
                        continue;
                    }
                    // A QEMU that has ended takes nothing any more; who moves it will say so.
                    if writes.set(16 * MEMORY_FROM + at, STEP, byte).is_err() {
                        return;
                    }
                    written.fetch_add(STEP, Ordering::Relaxed);
                    at = (at + STEP) % (hot_mib << 20);
                    byte = byte % 250 + 1;
                }
            });
            let done = during();
            over.store(true, Ordering::Relaxed);
            done
        });
        Ok((done, written.into_inner()))
    }
}

impl Monitored for Halted {
    fn qmp(&self) -> &Path {
        &self.qmp
    }

    fn spare_qmp(&self) -> &Path {
        &self.spare
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for path in [&self.qmp, &self.spare, &self.writes] {
            // The next one of this name makes its own.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Writes to guest memory by QEMU.
struct Writes {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Writes {
    fn connect(path: &Path) -> Result<Self, BenchError> {
        let io = || BenchError::io("connect to", path.display());
        let writer = UnixStream::connect(path).map_err(io())?;
        writer.set_read_timeout(Some(SOCKETS_MAX)).map_err(io())?;
        let reader = BufReader::new(writer.try_clone().map_err(io())?);
        Ok(Self { reader, writer })
    }

    fn set(&mut self, addr: u64, bytes: u64, byte: u8) -> Result<(), BenchError> {
        let io = || BenchError::io("write memory by", "qtest");
        let line = format!("memset {addr:#x} {bytes:#x} {byte:#x}\n");
        self.writer.write_all(line.as_bytes()).map_err(io())?;
        let mut said = String::new();
        self.reader.read_line(&mut said).map_err(io())?;
        match said.trim() {
            "OK" => Ok(()),
            _ => Err(BenchError::Unexpected { program: "qtest".into(), said }),
        }
    }
}
