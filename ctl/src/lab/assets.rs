//! What a guest boots from: Debian's kernel and an initramfs around our own program.
//!
//! The kernel is the one that `linux-image-cloud-amd64` stands for: it starts in about two
//! seconds under emulation, and its few modules are the ones that a virtual machine needs. It is
//! downloaded once; the initramfs is made anew for each build of the program and for each kernel.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::cache::cached_among;
use super::command::output;
use super::debian::Apt;
use super::error::{LabError, io};
use super::guest_params::GuestParams;
use super::{initramfs, kernel_image};

/// Kernel packages, the fastest to boot first.
const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-amd64"];
/// Kernels that are kept: one, and one of a worktree that takes other modules.
const KERNELS_KEPT: usize = 2;
/// Initramfs files that are kept beside those in use: a few builds, of 20 MB or so each.
const INITRAMFS_KEPT: usize = 6;

/// The files that a guest boots from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestAssets {
    /// An ELF kernel that QEMU enters directly.
    pub kernel: PathBuf,
    /// The root file system.
    pub initramfs: PathBuf,
}

impl GuestAssets {
    /// Finds or makes them, with [`program`] as what runs in the guest.
    pub fn prepare() -> Result<Self, LabError> {
        Self::prepare_for(&program()?)
    }

    /// Finds or makes them; `program` understands `guest-init`.
    pub fn prepare_for(program: &Path) -> Result<Self, LabError> {
        let key = key_of((KERNELS, initramfs::MODULES));
        let kernel = cached_among("kernels", &key, KERNELS_KEPT, fetch_kernel)?;
        // All that goes in: the program, and the modules, which are those of this kernel.
        let vmlinux = kernel.join("vmlinux");
        let key = key_of((program, stamp(program)?, &kernel, stamp(&vmlinux)?));
        let initramfs = cached_among("initramfs", &key, INITRAMFS_KEPT, |folder| {
            let path = folder.join("initramfs.cpio");
            let archive = initramfs::build(program, &kernel.join("modules"))?;
            fs::write(&path, archive).map_err(io("write", &path))
        })?;
        Ok(Self { kernel: vmlinux, initramfs: initramfs.join("initramfs.cpio") })
    }

    /// The kernel command line for a guest that does `params`. What it switches off costs an
    /// emulated processor seconds and proves nothing here. The clock is the HPET, because the
    /// kernel measures the TSC against it while it boots, and on a busy host that goes wrong by a
    /// factor of five, for good.
    pub fn command_line(params: &GuestParams) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 clocksource=hpet tsc=reliable no_timer_check nokaslr \
             mitigations=off cryptomgr.notests random.trust_cpu=on rdinit={} {} -- guest-init",
            initramfs::PROGRAM,
            params.to_command_line()
        )
    }
}

/// The `pageferry` program, up to date: `$PAGEFERRY_EXE`; or this process itself; or, in a test or
/// benchmark run by cargo, built now by the same cargo in the same profile.
pub fn program() -> Result<PathBuf, LabError> {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program.clone());
    }
    let program = find_program()?;
    Ok(PROGRAM.get_or_init(|| program).clone())
}

fn find_program() -> Result<PathBuf, LabError> {
    if let Some(named) = std::env::var_os("PAGEFERRY_EXE") {
        return Ok(named.into());
    }
    let itself = std::env::current_exe().map_err(io("find", Path::new("/proc/self/exe")))?;
    if itself.file_stem().is_some_and(|name| name == "pageferry") {
        return Ok(itself);
    }
    // target/PROFILE/deps/test-0123, target/PROFILE/bench or target/PROFILE/examples/x
    let profile = itself
        .ancestors()
        .skip(1)
        .find(|folder| !folder.ends_with("deps") && !folder.ends_with("examples"))
        .unwrap_or(Path::new("."));
    let built = profile.join("pageferry");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let name = match profile.file_name().unwrap_or_default().to_string_lossy() {
            name if name == "debug" => "dev".into(),
            name => name,
        };
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let mut command = Command::new(cargo);
        command.args(["build", "--quiet", "--bin", "pageferry", "--profile", &*name]);
        output(command.arg("--manifest-path").arg(manifest))?;
    }
    if built.exists() {
        return Ok(built);
    }
    Err(LabError::Missing {
        what: format!("the program {}", built.display()),
        hint: "cargo build -p pageferry",
    })
}

/// Leaves `vmlinux` and `modules/NN-name.ko` in `folder`.
fn fetch_kernel(folder: &Path) -> Result<(), LabError> {
    let unpacked = tempfile::tempdir().map_err(io("create", &std::env::temp_dir()))?;
    let apt = Apt::new(&unpacked.path().join("apt"), None)?;
    let mut package = apt.dependency(KERNELS[0], "linux-image-");
    if package.is_err() {
        package = apt.dependency(KERNELS[1], "linux-image-");
    }
    apt.unpack(&[package?], unpacked.path())?;

    let boot = unpacked.path().join("boot");
    let image = first_entry(&boot, "vmlinuz-")?;
    let image = fs::read(&image).map_err(io("read", &image))?;
    let path = folder.join("vmlinux");
    fs::write(&path, kernel_image::vmlinux(&image)?).map_err(io("write", &path))?;

    let modules = ["lib/modules", "usr/lib/modules"].map(|name| unpacked.path().join(name));
    let modules = modules.iter().find(|folder| folder.exists()).unwrap_or(&modules[0]);
    let chosen = folder.join("modules");
    fs::create_dir(&chosen).map_err(io("create", &chosen))?;
    for (position, (name, bytes)) in initramfs::modules_in_order(modules)?.iter().enumerate() {
        let path = chosen.join(format!("{position:02}-{name}.ko"));
        fs::write(&path, bytes).map_err(io("write", &path))?;
    }
    Ok(())
}

fn first_entry(folder: &Path, prefix: &str) -> Result<PathBuf, LabError> {
    fs::read_dir(folder)
        .map_err(io("list", folder))?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .ok_or_else(|| LabError::Unexpected {
            what: "the kernel package",
            found: folder.display().to_string(),
        })
}

/// What changes when a file is made anew.
fn stamp(path: &Path) -> Result<impl Hash + use<>, LabError> {
    let file = fs::metadata(path).map_err(io("look at", path))?;
    Ok((file.len(), file.modified().ok()))
}

fn key_of(made_of: impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    made_of.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
