//! What is checked of a QEMU before anything is touched, as source and as target.
//!
//! Asks and reads, changes nothing. All reasons are collected, so that they can be put right in
//! one go. What QEMU itself checks when it loads the device state (device by device) is left to
//! it. A disk with direct I/O is no reason to refuse: it asks for a drain point, because pages
//! under direct I/O escape write tracking until that I/O has ended.

use pageferry_datapath::attach::Process;
use pageferry_datapath::control::RegionOffer;
use serde_json::{Value, json};

use super::Execute;
use super::memory::{self, BackendKind, GuestMemoryMap, MemoryError, Place, child_type};
use super::pid::{self, PidError};
use super::refusal::Refusal;
use super::runstate::RunState;
use crate::qmp::{Qmp, QmpError, Version};

/// What is known of a QEMU that passed its checks.
#[derive(Debug)]
pub struct QemuFacts {
    /// QEMU's process.
    pub process: Process,
    /// QEMU's version.
    pub version: Version,
    /// The machine type, as `pc-q35-7.2`.
    pub machine: String,
    /// Guest RAM.
    pub memory: GuestMemoryMap,
    /// Where each block of it lies in the process, in the same order.
    pub places: Vec<Place>,
    /// Block nodes with direct I/O: if there are any, a drain point is needed.
    pub direct_io_nodes: Vec<String>,
    /// Devices by which the guest gives memory back: QEMU punches holes into its file.
    pub balloons: Vec<String>,
}

/// Why a QEMU can't take part.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It can be reached, and is not fit.
    #[error("{}", .refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Refused {
        /// Every reason that was found; not empty.
        refusals: Vec<Refusal>,
    },
    /// The monitor could not be asked.
    #[error("can't inspect QEMU")]
    Qmp(#[from] QmpError),
    /// Its process could not be found.
    #[error("can't find QEMU's process")]
    Pid(#[from] PidError),
    /// Its memory could not be found.
    #[error("can't find the guest's memory")]
    Memory(#[from] MemoryError),
}

impl CheckError {
    /// What the user can do about it: for refusals, about each.
    pub fn hints(&self) -> Vec<String> {
        let one = |hint: Option<&str>| hint.map(String::from).into_iter().collect();
        match self {
            Self::Refused { refusals } => {
                let mut hints: Vec<String> =
                    refusals.iter().map(|refusal| refusal.hint().into_owned()).collect();
                hints.dedup();
                hints
            }
            Self::Qmp(error) => one(error.hint().as_deref()),
            Self::Pid(error) => one(error.hint()),
            Self::Memory(error) => one(error.hint()),
        }
    }
}

/// Checks a QEMU whose guest is to be moved away.
pub fn source(qmp: &Qmp) -> Result<QemuFacts, CheckError> {
    check(qmp, Side::Source)
}

/// Checks a QEMU that is to receive a guest. Whether it fits the guest says [`compare`].
pub fn target(qmp: &Qmp) -> Result<QemuFacts, CheckError> {
    check(qmp, Side::Target)
}

/// Which part a QEMU is to play.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its guest is to be moved away.
    Source,
    /// It is to receive a guest.
    Target,
}

fn check(qmp: &Qmp, side: Side) -> Result<QemuFacts, CheckError> {
    let process = Process::open(pid::find(qmp)?).map_err(MemoryError::from)?;
    let answers = ask(qmp)?;
    let refusals = answers.judge(side, &open_devices(&process)?);
    if !refusals.is_empty() {
        return Err(CheckError::Refused { refusals });
    }
    let places = memory::locate(qmp, &process, &answers.memory.ram)?;
    let balloons = answers.balloons();
    Ok(QemuFacts {
        process,
        version: answers.version,
        machine: answers.machine,
        memory: answers.memory,
        places,
        direct_io_nodes: answers.direct_io_nodes,
        balloons,
    })
}

/// Compares what a source offers with what a target has.
pub fn compare(offered: &[RegionOffer], machine: &str, here: &QemuFacts) -> Vec<Refusal> {
    compare_memory(offered, machine, &here.memory, &here.machine)
}

fn compare_memory(
    offered: &[RegionOffer],
    source_machine: &str,
    here: &GuestMemoryMap,
    target_machine: &str,
) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if source_machine != target_machine {
        refusals.push(Refusal::MachineDiffers {
            source_machine: source_machine.into(),
            target_machine: target_machine.into(),
        });
    }
    for region in offered {
        let name = region.name.clone();
        let Some(ram) = here.ram.iter().find(|ram| ram.name == name) else {
            refusals.push(Refusal::RegionMissing { name });
            continue;
        };
        // Both in whole pages, of their own side's size: 725 MiB are 726 in pages of 2 MiB.
        let rounds_alike = ram.page_bytes == region.page_bytes;
        let here_bytes = if rounds_alike { ram.mapped_bytes() } else { ram.bytes };
        if here_bytes != region.bytes {
            refusals.push(Refusal::SizeDiffers {
                name,
                source_bytes: region.bytes,
                target_bytes: here_bytes,
            });
        } else if ram.page_bytes != region.page_bytes {
            refusals.push(Refusal::PageSizeDiffers {
                name,
                source_bytes: region.page_bytes,
                target_bytes: ram.page_bytes,
            });
        }
    }
    let offers = |name: &str| offered.iter().any(|region| region.name == name);
    let unexpected = here.ram.iter().filter(|ram| !offers(&ram.name));
    refusals.extend(unexpected.map(|ram| Refusal::RegionUnexpected { name: ram.name.clone() }));
    refusals
}

/// What QEMU answered to all that matters here.
#[derive(Clone, Debug)]
pub struct Answers {
    /// QEMU's version.
    pub version: Version,
    /// The machine type.
    pub machine: String,
    /// Guest RAM.
    pub memory: GuestMemoryMap,
    /// Block nodes with direct I/O.
    pub direct_io_nodes: Vec<String>,
    run_state: RunState,
    migration: Value,
    capabilities: Vec<String>,
    devices: Vec<(String, String)>,
    network: String,
    confidential: String,
}

/// Asks QEMU for all of it.
pub fn ask(qemu: &dyn Execute) -> Result<Answers, CheckError> {
    let machine_property = |property: &str| -> Result<String, QmpError> {
        let args = json!({ "path": "/machine", "property": property });
        match qemu.execute("qom-get", args) {
            Ok(value) => Ok(value.as_str().unwrap_or_default().to_owned()),
            // A machine without this property.
            Err(QmpError::Refused { .. }) => Ok(String::new()),
            Err(error) => Err(error),
        }
    };
    let mut devices = Vec::new();
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let children = qemu.execute("qom-list", json!({ "path": path }))?;
        for child in children.as_array().into_iter().flatten() {
            if let (Some(name), Some(qom_type)) = (child["name"].as_str(), child_type(child)) {
                devices.push((name.to_owned(), qom_type.to_owned()));
            }
        }
    }
    let capabilities = qemu.execute("query-migrate-capabilities", json!({}))?;
    let names = capabilities.as_array().into_iter().flatten();
    let machine = machine_property("type")?;
    Ok(Answers {
        version: qemu.version(),
        machine: machine.strip_suffix("-machine").unwrap_or(&machine).to_owned(),
        memory: memory::discover(qemu)?,
        direct_io_nodes: direct_io_nodes(qemu)?,
        run_state: RunState::query(qemu)?,
        migration: qemu.execute("query-migrate", json!({}))?,
        capabilities: names.filter_map(|it| Some(it["capability"].as_str()?.into())).collect(),
        devices,
        network: qemu.human("info network")?,
        confidential: machine_property("confidential-guest-support")?,
    })
}

/// Nodes with direct I/O. Every node counts, not only the topmost one that `query-block` shows:
/// with `-blockdev` the flag stands at the protocol node below it.
fn direct_io_nodes(qemu: &dyn Execute) -> Result<Vec<String>, QmpError> {
    let nodes = qemu.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let nodes = nodes.as_array().into_iter().flatten();
    Ok(nodes
        .filter(|node| node["cache"]["direct"] == true)
        .filter_map(|node| Some(node["node-name"].as_str()?.to_owned()))
        .collect())
}

/// Device files of the kernel's own backends that the process has open.
fn open_devices(process: &Process) -> Result<Vec<String>, MemoryError> {
    let mut devices: Vec<String> = process
        .fds()?
        .into_iter()
        .filter_map(|(_, path)| backend_device(path.to_str()?).map(str::to_owned))
        .collect();
    devices.sort();
    devices.dedup();
    Ok(devices)
}

/// The device of such a backend that a path leads to. It may have something before `/dev`: what a
/// process in a mount namespace of its own has open is named from the root of that namespace, which
/// is not ours where we are below a `chroot`.
///
/// vhost-net is none of those that matter: it copies received packets, and what it says about them,
/// by QEMU's own page tables, where each write is seen, and pins nothing that it writes
/// (`tests/tests/kvm.rs`). Vhost-scsi pins, the others were never tried.
fn backend_device(path: &str) -> Option<&str> {
    let device = &path[path.rfind("/dev/")?..];
    let is_backend = device.starts_with("/dev/vfio/")
        || (device.starts_with("/dev/vhost-") && device != "/dev/vhost-net");
    is_backend.then_some(device)
}

impl Answers {
    /// All that speaks against this QEMU on this side. `open_devices` are the `/dev/vhost-*` and
    /// `/dev/vfio/*` files its process has open: no command tells about all of them.
    pub fn judge(&self, side: Side, open_devices: &[String]) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        self.judge_state(side, &mut refusals);
        self.judge_memory(side, &mut refusals);
        let writers = self.outside_writers().chain(open_devices.iter().cloned());
        refusals.extend(writers.map(|what| Refusal::OutsideWriter { what }));
        if !self.confidential.is_empty() {
            refusals.push(Refusal::Confidential { object: self.confidential.clone() });
        }
        for capability in ["x-ignore-shared", "return-path", "events"] {
            if !self.capabilities.iter().any(|name| name == capability) {
                let version = self.version;
                refusals.push(Refusal::CapabilityMissing { capability, version });
            }
        }
        refusals
    }

    fn judge_state(&self, side: Side, refusals: &mut Vec<Refusal>) {
        let status = self.run_state.status.clone();
        match side {
            Side::Source if !self.run_state.running => {
                refusals.push(Refusal::NotRunning { status });
            }
            Side::Target if status != "inmigrate" => {
                refusals.push(Refusal::NotWaiting { status });
            }
            _ => {}
        }
        let ended = ["none", "completed", "failed", "cancelled"];
        match self.migration["status"].as_str() {
            Some(status) if !ended.contains(&status) => {
                refusals.push(Refusal::MigrationActive { status: status.into() });
            }
            // Old QEMUs have no word for a target that listens already, but tell where it does.
            None if self.migration["socket-address"].is_array() => {
                refusals.push(Refusal::MigrationActive { status: "listening".into() });
            }
            _ => {}
        }
        let reasons = self.migration["blocked-reasons"].as_array().into_iter().flatten();
        let reasons = reasons.filter_map(|reason| Some(reason.as_str()?.trim().to_owned()));
        refusals.extend(reasons.map(|reason| Refusal::Blocked { reason }));
    }

    fn judge_memory(&self, side: Side, refusals: &mut Vec<Refusal>) {
        let ram = &self.memory.ram;
        for block in ram {
            let name = block.name.clone();
            match &block.kind {
                BackendKind::Other { qom_type } => {
                    refusals.push(Refusal::Anonymous { name, qom_type: qom_type.clone() });
                }
                _ if !block.shared => {
                    refusals.push(Refusal::NotShared { name, backend: block.backend.clone() });
                }
                BackendKind::Memfd if side == Side::Source && self.version >= SENDS_MEMFD => {
                    refusals.push(Refusal::NotNamedFile { name, version: self.version });
                }
                _ => {}
            }
        }
        let found_bytes = ram.iter().map(|block| block.bytes).sum();
        let claimed_bytes = self.memory.claimed_bytes;
        if ram.is_empty() {
            refusals.push(Refusal::NoMemory);
        } else if found_bytes < claimed_bytes {
            refusals.push(Refusal::MemoryUnaccounted { claimed_bytes, found_bytes });
        }
    }

    /// Devices by which the guest gives memory back, free page reporting included, which is one of
    /// the balloon's.
    pub fn balloons(&self) -> Vec<String> {
        let gives_back =
            |qom_type: &str| qom_type.contains("virtio-balloon") || qom_type.contains("virtio-mem");
        let devices = self.devices.iter().filter(|(_, qom_type)| gives_back(qom_type));
        devices.map(|(name, qom_type)| format!("{name} ({qom_type})")).collect()
    }

    /// Devices and networks whose backend is another process or the kernel.
    fn outside_writers(&self) -> impl Iterator<Item = String> {
        let devices = self.devices.iter().filter_map(|(name, qom_type)| {
            let outside = qom_type.contains("vfio")
                || qom_type.starts_with("vhost-")
                || qom_type.contains("vdpa");
            outside.then(|| format!("device {name} ({qom_type})"))
        });
        // "net0: index=0,type=vhost-user,…"
        let networks = self.network.lines().filter_map(|line| {
            let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": ")?;
            let kind = rest.split(',').find_map(|field| field.strip_prefix("type="))?;
            kind.starts_with("vhost-").then(|| format!("network {name} ({kind})"))
        });
        devices.chain(networks).collect::<Vec<_>>().into_iter()
    }
}

/// From this version on x-ignore-shared leaves out only RAM in files with a name.
const SENDS_MEMFD: Version = Version { major: 8, minor: 1, micro: 0 };

#[cfg(test)]
mod tests;
