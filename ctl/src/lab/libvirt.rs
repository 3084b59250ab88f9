//! A libvirt of our own: a daemon that no other on this machine hears of, and its domains.
//!
//! It lives in mount and process namespaces of its own, with empty folders where libvirt keeps its
//! state, so that two of them are two hosts, and everything that they start ends with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::assets::GuestAssets;
use super::command::{output, tail};
use super::console::Console;
use super::error::{LabError, io};
use super::guest_params::GuestParams;
use super::workplace::{Undo, Workplace};
use crate::host::start_time;

/// The daemon asks QEMU what it can do before it serves anybody.
const START_MAX: Duration = Duration::from_secs(60);
/// What of it is needed, by the file that shows it and the Debian package that brings it.
const NEEDED: [(&str, &str); 3] = [
    ("/usr/sbin/libvirtd", "libvirt-daemon"),
    ("/usr/bin/virsh", "libvirt-clients"),
    (
        "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
        "libvirt-daemon-driver-qemu",
    ),
];
/// The same on both hosts: firmware shows it to the guest.
const UUID: &str = "5c0f5b4e-6c0a-4bb1-9d6e-1f4b0b7f4d01";
/// The user that libvirt looks up before it reads that QEMU is to run as another.
const USER: &str = "libvirt-qemu";

/// A running daemon. Dropped, it ends with all its guests.
#[derive(Debug)]
pub struct Libvirt {
    daemon: Child,
    folder: PathBuf,
    _workplace: Arc<Workplace>,
}

/// A guest of a daemon.
#[derive(Debug)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// The QMP socket beside libvirt's own.
    pub qmp: PathBuf,
    /// Its console.
    pub console: Console,
}

impl Libvirt {
    /// What this machine lacks for it.
    pub fn missing() -> Option<String> {
        let packages: Vec<&str> =
            NEEDED.iter().filter(|it| !Path::new(it.0).exists()).map(|it| it.1).collect();
        (!packages.is_empty()).then(|| format!("not installed: {}", packages.join(" ")))
    }

    /// Starts a daemon called `name`.
    pub fn start(workplace: &Arc<Workplace>, name: &str) -> Result<Self, LabError> {
        let folder = workplace.file(name);
        let put = |file: &str, text: &str| {
            let path = folder.join(file);
            fs::write(&path, text).map_err(io("write", &path))
        };
        for part in ["etc", "run", "memory"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(io("create", &path))?;
        }
        put("daemon.conf", &daemon_settings(&folder))?;
        put("etc/qemu.conf", &qemu_settings(&folder))?;
        put("passwd", &with_user("/etc/passwd", &format!("{USER}:x:64055:64055::/:/bin/false"))?)?;
        put("group", &with_user("/etc/group", &format!("{USER}:x:64055:\nkvm:x:64056:"))?)?;
        put("start", START)?;
        let log = folder.join("log");
        let errors = fs::File::create(&log).map_err(io("create", &log))?;
        let daemon = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"])
            .arg(folder.join("start"))
            .arg(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(io("run", Path::new("unshare")))?;
        let mut libvirt = Self { daemon, folder, _workplace: Arc::clone(workplace) };
        let pid = libvirt.daemon.id();
        if let Some(start_time) = start_time(pid) {
            workplace.promise(&Undo::Kill { pid, start_time })?;
        }
        libvirt.wait_until_it_serves()?;
        Ok(libvirt)
    }

    /// How `virsh -c` names it.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.folder.join("run/libvirt-sock").display())
    }

    /// Starts a guest of so many MiB, or, `incoming`, what waits for it.
    pub fn create(
        &self,
        name: &str,
        memory_mib: u64,
        params: &GuestParams,
        incoming: bool,
    ) -> Result<Domain, LabError> {
        let console_path = self.folder.join(format!("{name}.console"));
        let console = Console::listen(&console_path)?;
        let qmp = self.folder.join(format!("{name}.qmp"));
        let xml = domain_xml(name, memory_mib, params, &console_path, &qmp, incoming)?;
        let path = self.folder.join(format!("{name}.xml"));
        fs::write(&path, xml).map_err(io("write", &path))?;
        let path = path.display().to_string();
        let paused = if incoming { vec!["--paused"] } else { vec![] };
        self.virsh(&[&["create", &path][..], &paused].concat())?;
        Ok(Domain { name: name.to_owned(), qmp, console })
    }

    /// What libvirt believes of a guest: `running`, `paused`, …
    pub fn state(&self, domain: &Domain) -> Result<String, LabError> {
        Ok(self.virsh(&["domstate", &domain.name])?.trim().to_owned())
    }

    /// Ends a guest as an operator would.
    pub fn destroy(&self, domain: &Domain) -> Result<(), LabError> {
        self.virsh(&["destroy", &domain.name]).map(drop)
    }

    fn virsh(&self, words: &[&str]) -> Result<String, LabError> {
        output(Command::new("virsh").arg("-c").arg(self.uri()).args(words))
    }

    fn wait_until_it_serves(&mut self) -> Result<(), LabError> {
        let started = Instant::now();
        while let Err(error) = self.virsh(&["list", "--all"]) {
            let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            let ended = !matches!(self.daemon.try_wait(), Ok(None));
            if ended || started.elapsed() > START_MAX {
                return Err(LabError::Timeout {
                    what: format!("libvirtd ({error})"),
                    waited_ms: started.elapsed().as_millis() as u64,
                    last_seen: tail(&log, 600),
                });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // The first process of the namespace is killed with the one that waits for it, and the
        // kernel kills the rest with the first.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Guest memory lies on a tmpfs that goes with the namespace. The shell stays, as the namespace's first
/// process: somebody has to wait for the orphans, or libvirt waits 40 s for each QEMU it asked what it
/// can do.
const START: &str = r#"set -e
mount --make-rprivate /
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
mkdir -p /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt
mount --bind "$1/etc" /etc/libvirt
for state in /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt "$1/memory"; do
  mount -t tmpfs none "$state"
done
/usr/sbin/libvirtd -f "$1/daemon.conf" -p /run/libvirt/pid
exit $?
"#;

fn daemon_settings(folder: &Path) -> String {
    format!(
        "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n",
        folder.join("run").display()
    )
}

/// As root, without what a namespace in a container may not have.
fn qemu_settings(folder: &Path) -> String {
    format!(
        "user = \"root\"\ngroup = \"root\"\nnamespaces = [ ]\ncgroup_controllers = [ ]\n\
         security_driver = \"none\"\nseccomp_sandbox = 0\nstdio_handler = \"file\"\n\
         remember_owner = 0\nmemory_backing_dir = \"{}\"\n",
        folder.join("memory").display()
    )
}

fn with_user(path: &str, line: &str) -> Result<String, LabError> {
    let mut text = fs::read_to_string(path).map_err(io("read", Path::new(path)))?;
    if !text.contains(USER) {
        text.push_str(&format!("{line}\n"));
    }
    Ok(text)
}

fn domain_xml(
    name: &str,
    memory_mib: u64,
    params: &GuestParams,
    console: &Path,
    qmp: &Path,
    incoming: bool,
) -> Result<String, LabError> {
    let assets = GuestAssets::prepare()?;
    let wait = if incoming { "<qemu:arg value='-incoming'/><qemu:arg value='defer'/>" } else { "" };
    Ok(format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>{UUID}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'>
      <source mode='connect' path='{console}'/>
      <target port='0'/>
    </serial>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{qmp},server=on,wait=off'/>{wait}
  </qemu:commandline>
</domain>
",
        kernel = assets.kernel.display(),
        initrd = assets.initramfs.display(),
        command_line = GuestAssets::command_line(params),
        console = console.display(),
        qmp = qmp.display(),
    ))
}
