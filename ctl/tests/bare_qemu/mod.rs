//! A QEMU without a guest system, for tests of what is said over QMP: started in milliseconds,
//! paused or running its firmware, killed when dropped.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{QemuBinary, qemu_binaries, skip};
use pageferry_ctl::qmp::Qmp;
use serde_json::json;

/// The machine that both versions of QEMU know.
pub(crate) const MACHINE: &str = "pc-q35-7.2";

/// See the module.
pub(crate) struct BareQemu {
    child: Child,
    folder: tempfile::TempDir,
}

impl BareQemu {
    /// Starts `binary` with `args`; in each, `{}` is replaced by a private folder on tmpfs.
    pub(crate) fn start(binary: &QemuBinary, args: &[&str]) -> Self {
        Self::start_with_stdin(binary, args, None)
    }

    /// As [`BareQemu::start`], with a descriptor as its standard input.
    pub(crate) fn start_with_stdin(
        binary: &QemuBinary,
        args: &[&str],
        stdin: Option<OwnedFd>,
    ) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").expect("tempdir");
        let path = folder.path().to_str().expect("UTF-8").to_owned();
        let mut command = binary.command();
        command.args(binary.data_arguments());
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]);
        command.args(args.iter().map(|arg| arg.replace("{}", &path)));
        if stdin.is_none() {
            command.arg("-qmp").arg(format!("unix:{path}/qmp,server=on,wait=off"));
        }
        command.stdin(stdin.map_or_else(Stdio::null, Stdio::from));
        let errors = std::fs::File::create(folder.path().join("stderr")).expect("create");
        let child = command.stderr(errors).spawn().expect("QEMU starts");
        Self { child, folder }
    }

    /// One with `mib` of guest memory named `ram0` in a file of the folder.
    pub(crate) fn with_memory_file(binary: &QemuBinary, mib: u64, args: &[&str]) -> Self {
        let object = format!("memory-backend-file,id=ram0,mem-path={{}}/ram,size={mib}M,share=on");
        let machine = format!("{MACHINE},memory-backend=ram0");
        let size = mib.to_string();
        let memory = ["-m", size.as_str(), "-object", &object, "-machine", &machine];
        Self::start(binary, &[&memory[..], args].concat())
    }

    /// Connects to its monitor.
    pub(crate) fn qmp(&mut self) -> Qmp {
        let path = self.path("qmp");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !path.exists() {
            assert!(self.ended().is_none(), "QEMU ended: {}", self.stderr());
            assert!(Instant::now() < deadline, "no monitor: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
        Qmp::connect(&path).expect("connect")
    }

    /// Its process.
    #[allow(dead_code, reason = "not every test needs it")]
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// A file of its folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    /// What it said.
    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for BareQemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs `test` with each QEMU that can be run here; those that can't are skipped by name.
pub(crate) fn with_each_qemu(name: &str, test: impl Fn(&QemuBinary)) {
    let (binaries, missing) = qemu_binaries();
    for error in missing {
        skip(name, error);
    }
    for binary in binaries {
        eprintln!("{name}: QEMU {}", binary.version);
        test(&binary);
    }
}

/// Makes an empty disk image.
#[allow(dead_code, reason = "not every test needs one")]
pub(crate) fn make_disk(path: &Path) {
    let file = std::fs::File::create(path).expect("create");
    file.set_len(1 << 20).expect("truncate");
}

/// QEMU's run state.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn status(qmp: &Qmp) -> String {
    let answer = qmp.execute("query-status", json!({})).expect("query-status");
    answer["status"].as_str().expect("status").to_owned()
}
