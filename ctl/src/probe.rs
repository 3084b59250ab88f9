//! `pageferry probe`: what this host can do for a migration, and how to mend what it can't.
//!
//! ```text
//! facts (files below a root, a few tried calls)  ->  findings (data)  ->  text or JSON
//! ```
//!
//! Facts are only read: nothing here changes a setting, and a fix is a command for the operator.
//! Each group of facts stands in a module of its own, with a `read` from a root directory that
//! tests fill as they like and `findings` that judge it. What has to be tried rather than read
//! (rings, write tracking) is done once and handed in.
//!
//! The JSON object's keys are a contract, as those of the events are: they are added to, never
//! renamed. `findings[]` has `group`, `name` (unique, dotted), `state` (`ok`, `warn`, `missing`),
//! `required`, `value`, `why` and `fix` (both null where the state is `ok`).

pub mod cpu;
pub mod finding;
pub mod kernel;
pub mod memory;
pub mod network;
pub mod privileges;
pub mod qemu;
pub mod rdma;
mod text;
pub mod tracking;
pub mod uring;
pub mod verdict;

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use pageferry_rdma::RdmaProbe;
use pageferry_uring::nic::Nic;
use serde::{Deserialize, Serialize};

use crate::cli::ProbeArgs;
use crate::host;
use crate::report::exit::Exit;
use finding::Finding;
use verdict::Verdict;

/// Everything that was found out, before anybody judges it.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The kernel.
    pub kernel: kernel::Kernel,
    /// What it lets this process do.
    pub privileges: privileges::Privileges,
    /// io_uring, tried.
    pub uring: uring::Uring,
    /// Write tracking, tried for each page size.
    pub tracking: Vec<tracking::Tried>,
    /// Huge pages and limits.
    pub memory: memory::Memory,
    /// Cores.
    pub cpu: cpu::Cpu,
    /// NICs; empty where they could not be listed.
    pub nics: Vec<Nic>,
    /// Socket limits.
    pub sockets: network::Sockets,
    /// RDMA.
    pub rdma: Option<RdmaProbe>,
    /// QEMUs.
    pub qemu: qemu::Qemus,
}

impl Facts {
    /// This host's. Takes a fraction of a second, and some more for a free 1 GiB page if there is
    /// one: the kernel has to zero it.
    pub fn here() -> Self {
        let root = Path::new("/");
        let memory = memory::Memory::read(root).with_limits_of_this_process();
        Self {
            kernel: kernel::Kernel::read(root),
            privileges: privileges::Privileges::read(root),
            uring: uring::Uring::try_here(root),
            tracking: tracking::try_here(&memory),
            cpu: cpu::Cpu::read(root, host::cpus_allowed()),
            // A host without a list of NICs has none that a finding could praise.
            nics: Nic::all().unwrap_or_default(),
            sockets: network::Sockets::read(root),
            rdma: Some(pageferry_rdma::probe_host()),
            qemu: qemu::Qemus::here(),
            memory,
        }
    }

    /// What they mean for a migration, in the order they are shown.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = self.kernel.findings();
        findings.extend(self.privileges.findings());
        findings.extend(tracking::findings(&self.tracking, &self.kernel));
        findings.extend(self.uring.findings(&self.kernel));
        findings.extend(self.memory.findings(&self.privileges));
        findings.extend(self.cpu.findings());
        findings.extend(network::findings(&self.nics));
        findings.extend(self.sockets.findings());
        findings.extend(rdma::findings(self.rdma.as_ref(), &self.nics));
        findings.extend(self.qemu.findings());
        findings
    }
}

/// What `--json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Name and version of this software.
    pub software: String,
    /// The host's name.
    pub host: String,
    /// The running kernel.
    pub kernel: String,
    /// A migration from this host could work: nothing required is missing.
    pub can_migrate: bool,
    /// What a migration would use, and why.
    pub would_use: Verdict,
    /// Everything looked at.
    pub findings: Vec<Finding>,
    /// The NICs in detail: RSS key, indirection table, each queue's interrupt and cores.
    pub nics: Vec<Nic>,
    /// The RDMA devices in detail.
    pub rdma: Option<RdmaProbe>,
}

impl Report {
    /// Judges `facts`.
    pub fn of(facts: Facts) -> Self {
        let findings = facts.findings();
        Self {
            software: host::software(),
            host: host::name(),
            kernel: facts.kernel.release.clone(),
            can_migrate: !findings.iter().any(Finding::blocks),
            would_use: Verdict::of(&facts),
            findings,
            nics: facts.nics,
            rdma: facts.rdma,
        }
    }

    /// 0 when a migration from here could work.
    pub fn exit(&self) -> Exit {
        match self.can_migrate {
            true => Exit::Done,
            false => Exit::Refused,
        }
    }
}

/// Runs the subcommand.
pub fn run(args: &ProbeArgs) -> Exit {
    let report = Report::of(Facts::here());
    let text = match args.json {
        true => serde_json::to_string(&report).map(|json| json + "\n").unwrap_or_default(),
        false => {
            let colour = io::stdout().is_terminal() && console::colors_enabled();
            text::report(&report, colour)
        }
    };
    // `pageferry probe | head` is no error; the exit code still tells.
    let _reader_may_be_gone = io::stdout().lock().write_all(text.as_bytes());
    report.exit()
}

#[cfg(test)]
mod tests;
