//! One QEMU of the laboratory: how it is started, where to talk to it, and that it is gone again.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

use super::assets::GuestAssets;
use super::command::tail;
use super::console::Console;
use super::error::{LabError, call, io};
use super::guest_params::GuestParams;
use super::qemu_binaries::QemuBinary;
use super::workplace::{Undo, Workplace};
use crate::host::start_time;

/// QEMU makes its sockets before it does anything slow; on a busy emulated machine that took 20 s.
const SOCKETS_TIMEOUT: Duration = Duration::from_secs(60);
/// The guest's network card, the same wherever it runs.
const MAC: &str = "52:54:00:70:66:01";

/// What guest memory is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A named file in this folder, which is a tmpfs or a hugetlbfs.
    File {
        /// The folder; the file's name is the guest's.
        folder: PathBuf,
        /// `share=on`; off is for tests of refusals.
        share: bool,
        /// `reserve=on`, QEMU's default; off lets QEMU start where there are too few huge pages.
        reserve: bool,
    },
    /// A memfd.
    Memfd {
        /// Of 2 MiB pages.
        hugetlb: bool,
        /// `share=on`; off is for tests of refusals.
        share: bool,
    },
    /// QEMU's default: private memory that nobody else can map.
    Anonymous,
}

impl Memory {
    /// A named file on the machine's tmpfs.
    pub fn tmpfs() -> Self {
        Self::File { folder: "/dev/shm".into(), share: true, reserve: true }
    }

    /// A named file on a hugetlbfs that is mounted at `folder`.
    pub fn hugetlbfs(folder: &Path) -> Self {
        Self::File { folder: folder.to_owned(), share: true, reserve: true }
    }
}

/// The guest's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// A raw image, opened with `cache=none`.
    pub image: PathBuf,
    /// QEMU's `aio=`: `threads`, `native` or `io_uring`.
    pub aio: &'static str,
}

/// The guest's network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// An existing tap device in QEMU's namespace.
    pub tap: String,
    /// The kernel's own backend (`vhost=on`) rather than QEMU's.
    pub vhost: bool,
}

/// A QEMU to be started. Source and target of one guest differ in a few fields only.
#[derive(Clone, Debug)]
pub struct QemuSpec {
    /// Which QEMU.
    pub binary: QemuBinary,
    /// What the guest boots from.
    pub assets: GuestAssets,
    /// What the guest does.
    pub params: GuestParams,
    /// `-machine`: `q35` or `pc`, or a versioned one for moves between QEMU versions.
    pub machine: String,
    /// `-accel`.
    pub accel: String,
    /// `-cpu`.
    pub cpu: String,
    /// Virtual processors.
    pub smp: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// And so many bytes more: a multiple of 8 KiB, to which QEMU rounds.
    pub memory_odd_bytes: u64,
    /// What it is made of.
    pub memory: Memory,
    /// Wait for a migration (`-incoming defer`) instead of booting.
    pub incoming: bool,
    /// Network namespace to run in.
    pub namespace: Option<String>,
    /// Network card.
    pub nic: Option<Nic>,
    /// Disk.
    pub disk: Option<Disk>,
    /// Further arguments.
    pub extra: Vec<String>,
}

impl QemuSpec {
    /// A small guest with 512 MiB on tmpfs and two processors, on the installed QEMU. Emulated, but
    /// where `PAGEFERRY_LAB_KVM=1` says that KVM is to be used.
    pub fn new(assets: GuestAssets) -> Result<Self, LabError> {
        let kvm = std::env::var("PAGEFERRY_LAB_KVM").is_ok_and(|value| value == "1");
        let (accel, cpu, smp) =
            if kvm { ("kvm", "host", 1) } else { ("tcg,thread=multi", "max", 2) };
        Ok(Self {
            binary: QemuBinary::system()?,
            assets,
            params: GuestParams::default(),
            machine: "q35".into(),
            accel: accel.into(),
            cpu: cpu.into(),
            smp,
            memory_mib: 512,
            memory_odd_bytes: 0,
            memory: Memory::tmpfs(),
            incoming: false,
            namespace: None,
            nic: None,
            disk: None,
            extra: Vec::new(),
        })
    }

    /// Has the guest answer at `address`, on a network card at `tap`.
    pub fn with_network(mut self, tap: &str, address: Ipv4Addr, prefix: u8) -> Self {
        self.nic = Some(Nic { tap: tap.to_owned(), vhost: false });
        self.params.ipv4 = Some((address, prefix));
        self
    }

    /// The same machine, waiting for a migration.
    pub fn to_target(&self) -> Self {
        Self { incoming: true, ..self.clone() }
    }
}

/// A running QEMU. Dropped, it is killed and its files are removed.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    console: Console,
    qmp: PathBuf,
    spare_qmp: PathBuf,
    stderr: PathBuf,
    memory_file: Option<PathBuf>,
    _workplace: Arc<Workplace>,
}

impl Qemu {
    /// Starts `spec`. `name` tells it from the other QEMUs of this workplace. Returns when its
    /// monitors can be connected to; the guest has hardly begun to boot then.
    pub fn launch(
        workplace: &Arc<Workplace>,
        name: &str,
        spec: &QemuSpec,
    ) -> Result<Self, LabError> {
        let qmp = workplace.file(&format!("{name}.qmp"));
        let spare_qmp = workplace.file(&format!("{name}.spare.qmp"));
        let console_path = workplace.file(&format!("{name}.console"));
        let stderr = workplace.file(&format!("{name}.stderr"));
        let memory_file = spec.memory_file(workplace, name);
        if let Some(path) = &memory_file {
            spec.check_room_for(path)?;
            workplace.promise(&Undo::File { path: path.clone() })?;
        }
        let console = Console::listen(&console_path)?;

        let mut command = spec.program();
        command.args(spec.arguments(memory_file.as_deref()));
        command.arg("-chardev").arg(format!("socket,id=console,path={}", console_path.display()));
        command.args(["-serial", "chardev:console"]);
        for path in [&qmp, &spare_qmp] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        let errors = fs::File::create(&stderr).map_err(io("create", &stderr))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.spawn().map_err(io("run", &spec.binary.program))?;
        let mut qemu = Self {
            child,
            console,
            qmp,
            spare_qmp,
            stderr,
            memory_file,
            _workplace: Arc::clone(workplace),
        };
        let pid = qemu.pid();
        if let Some(start_time) = start_time(pid) {
            workplace.promise(&Undo::Kill { pid, start_time })?;
        }
        qemu.wait_for_sockets()?;
        Ok(qemu)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The monitor that a mover uses.
    pub fn qmp(&self) -> &Path {
        &self.qmp
    }

    /// A second monitor, for tests that look on: QEMU serves one client per monitor.
    pub fn spare_qmp(&self) -> &Path {
        &self.spare_qmp
    }

    /// The guest's console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The file that guest memory lies in, if it has a name.
    pub fn memory_file(&self) -> Option<&Path> {
        self.memory_file.as_deref()
    }

    /// How it ended, if it did by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The end of what it wrote to its standard error.
    pub fn stderr(&self) -> String {
        tail(&fs::read_to_string(&self.stderr).unwrap_or_default(), 1000)
    }

    /// Waits until the guest has filled its memory and begins its work; how long that took since
    /// it was powered on, by the guest's clock.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Duration, LabError> {
        self.console.wait_ready(timeout).map_err(|error| self.explain(error))
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn wait_for_sockets(&mut self) -> Result<(), LabError> {
        let started = Instant::now();
        while !(self.qmp.exists() && self.spare_qmp.exists()) {
            if self.ended().is_some() || started.elapsed() > SOCKETS_TIMEOUT {
                return Err(self.explain(LabError::Timeout {
                    what: "QEMU's monitor sockets".into(),
                    waited_ms: started.elapsed().as_millis() as u64,
                    last_seen: self.stderr(),
                }));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// A QEMU that ended says more than a wait that ran out.
    fn explain(&mut self, error: LabError) -> LabError {
        match self.ended() {
            Some(status) => LabError::QemuEnded { status, stderr: self.stderr() },
            None => error,
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
        if let Some(path) = &self.memory_file {
            let _ = fs::remove_file(path);
        }
    }
}

impl QemuSpec {
    fn program(&self) -> Command {
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                // exec without a fork: the process we get is QEMU itself.
                command.args(["netns", "exec", namespace]).arg(&self.binary.program);
                command
            }
            None => Command::new(&self.binary.program),
        };
        self.binary.prepare(&mut command);
        command
    }

    fn memory_file(&self, workplace: &Workplace, name: &str) -> Option<PathBuf> {
        match &self.memory {
            Memory::File { folder, .. } => {
                Some(folder.join(format!("{}-{name}.ram", workplace.unique_word())))
            }
            _ => None,
        }
    }

    /// A guest whose tmpfs is full is killed by SIGBUS, which explains nothing: containers have
    /// as little as 64 MiB. What is never touched takes no room, so a large guest may be fine.
    fn check_room_for(&self, memory_file: &Path) -> Result<(), LabError> {
        /// Kernel, initramfs and page tables of a guest.
        const BESIDE_PAGES_MIB: u64 = 128;
        let folder = memory_file.parent().unwrap_or(memory_file);
        let room = statvfs(folder).map_err(call("statvfs"))?;
        let room_mib = (room.blocks_available() * room.fragment_size()) >> 20;
        let needed_mib = self.memory_mib.min(self.params.fill_mib + BESIDE_PAGES_MIB);
        // A hugetlbfs without a limit of its own says that it has no blocks at all.
        if room.blocks() > 0 && room_mib < needed_mib {
            return Err(LabError::Missing {
                what: format!("room for {needed_mib} MiB on {}", folder.display()),
                hint: "mount -o remount,size=2G /dev/shm",
            });
        }
        Ok(())
    }

    fn arguments(&self, memory_file: Option<&Path>) -> Vec<String> {
        let mut arguments = self.binary.data_arguments();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).into()));
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        add(&["-accel", &self.accel, "-cpu", &self.cpu, "-smp", &self.smp.to_string()]);
        add(&["-m", &format!("{}B", self.memory_bytes())]);
        match self.memory_object(memory_file) {
            Some(object) => {
                add(&["-object", &object]);
                add(&["-machine", &format!("{},memory-backend=ram", self.machine)]);
            }
            None => add(&["-machine", &self.machine]),
        }
        add(&["-kernel", &self.assets.kernel.to_string_lossy()]);
        add(&["-initrd", &self.assets.initramfs.to_string_lossy()]);
        add(&["-append", &GuestAssets::command_line(&self.params)]);
        if let Some(Nic { tap, vhost }) = &self.nic {
            let vhost = if *vhost { "on" } else { "off" };
            let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}");
            add(&["-netdev", &netdev]);
            // Without an option ROM: nothing boots from this card.
            add(&["-device", &format!("virtio-net-pci,netdev=net,mac={MAC},romfile=")]);
        }
        if let Some(Disk { image, aio }) = &self.disk {
            let image = image.display();
            let drive = format!("file={image},if=none,id=disk,format=raw,cache=none,aio={aio}");
            add(&["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"]);
        }
        if self.incoming {
            add(&["-incoming", "defer"]);
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }

    fn memory_bytes(&self) -> u64 {
        (self.memory_mib << 20) + self.memory_odd_bytes
    }

    fn memory_object(&self, memory_file: Option<&Path>) -> Option<String> {
        let size = format!("id=ram,size={}B", self.memory_bytes());
        let on = |share: bool| if share { "on" } else { "off" };
        match &self.memory {
            Memory::File { share, reserve, .. } => {
                let path = memory_file.unwrap_or(Path::new("")).display();
                let (share, reserve) = (on(*share), if *reserve { "" } else { ",reserve=off" });
                Some(format!("memory-backend-file,{size},mem-path={path},share={share}{reserve}"))
            }
            Memory::Memfd { hugetlb, share } => {
                let pages = if *hugetlb { ",hugetlb=on,hugetlbsize=2M" } else { "" };
                Some(format!("memory-backend-memfd,{size},share={}{pages}", on(*share)))
            }
            Memory::Anonymous => None,
        }
    }
}
