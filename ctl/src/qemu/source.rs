//! A running QEMU whose guest is to move: inspected, attached, paused, let go.
//!
//! Owned by the source agent, on its thread. What was changed in QEMU is remembered here, and
//! [`SourceMonitor::unwind`] puts it back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_datapath::attach::{self, Process};
use pageferry_datapath::control::{AbortReason, RegionOffer};
use pageferry_datapath::holes;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{GuestMemory, Region};
use pageferry_datapath::source::Failure;
use pageferry_datapath::tracker::{DirtyTracker, ScanPhases, TrackerKind, UffdTracker, probe};

use super::capabilities::Settings;
use super::checks::{self, QemuFacts, Side};
use super::claim::Claim;
use super::device_state::{DeviceStateError, Outgoing, PausedBy};
use super::guard::Guard;
use super::runstate;
use super::stream::QemuStream;
use crate::agent::failure;
use crate::agent::monitor::{Attached, GuestFacts, SourceMonitor, StateStream};
use crate::cli::Scan;
use crate::limits::{STATE_TIMEOUT, SWITCHOVER_GUESS};
use crate::qmp::Qmp;

/// A QEMU that passed its checks.
#[derive(Debug)]
pub struct QemuSource {
    qmp: Qmp,
    process: Process,
    qemu: QemuFacts,
    facts: GuestFacts,
    scan: ScanPhases,
    settings: Option<Settings>,
    outgoing: Option<Outgoing>,
    stream: Option<Arc<QemuStream>>,
    /// We paused it, and it has to go on if the attempt fails.
    paused: bool,
    guard: Option<Guard>,
    claim: Option<Claim>,
}

impl QemuSource {
    /// Connects to QEMU and looks whether its guest can be moved. Touches nothing.
    pub fn inspect(path: &Path, scan: Scan) -> Result<Self, Failure> {
        let qmp = connect(path)?;
        let qemu = checks::source(&qmp).map_err(|error| check_failure(&error))?;
        let kvm = runs_on_kvm(&qmp);
        let scan = match (scan, kvm) {
            (Scan::OnePhase, _) | (Scan::Auto, false) => ScanPhases::One,
            (Scan::TwoPhase, _) | (Scan::Auto, true) => ScanPhases::Two,
        };
        let facts = facts(&qmp, &qemu, scan, kvm)?;
        let process = Process::open(facts.pid).map_err(|error| attach_failure(&error))?;
        Ok(Self {
            qmp,
            process,
            qemu,
            facts,
            scan,
            settings: None,
            outgoing: None,
            stream: None,
            paused: false,
            guard: None,
            claim: None,
        })
    }
}

impl SourceMonitor for QemuSource {
    fn facts(&self) -> &GuestFacts {
        &self.facts
    }

    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    fn settings(&self) -> Option<Settings> {
        Settings::current(&self.qmp).ok()
    }

    fn guard(&mut self, record: &Path) -> Result<(), Failure> {
        self.guard = Some(Guard::start(&self.qmp, self.facts.pid, record)?);
        Ok(())
    }

    fn map_memory(&mut self) -> Result<GuestMemory, Failure> {
        let memory = map_memory(&self.qemu)?;
        self.claim = Some(Claim::on(&memory)?);
        Ok(memory)
    }

    fn attach(&mut self, memory: &GuestMemory) -> Result<Attached, Failure> {
        let populated = holes::guest_data_extents(memory)
            .map_err(|error| failure::host("attach", &error, None))?;
        // Trusted only once it has reported a write on this kernel and these page sizes.
        probe::probe_guest(memory, &populated, self.scan)
            .map_err(|error| failure::host("dirty tracking", &error, None))?;
        let ranges = attach::tracked_ranges(&self.process, memory)
            .map_err(|error| attach_failure(&error))?;
        let pagemap = self.process.pagemap().map_err(|error| attach_failure(&error))?;
        let taken =
            attach::take_userfaultfd(&self.process).map_err(|error| attach_failure(&error))?;
        if let Some(guard) = &mut self.guard {
            guard.attached();
        }
        let tracker =
            UffdTracker::start(taken.fd, pagemap, memory.regions(), ranges, &populated, self.scan)
                .map_err(|error| failure::host("dirty tracking", &error, None))?;
        let tracker: Box<dyn DirtyTracker> = Box::new(tracker);
        Ok(Attached { tracker, stopped: taken.stopped })
    }

    /// One round trip to the monitor is the least that pausing takes; saving, loading and resuming
    /// are a guess until they have happened.
    fn fixed_cost(&self) -> Duration {
        let ask = || {
            let began = Instant::now();
            let _only_its_time_counts = runstate::RunState::query(&self.qmp);
            began.elapsed()
        };
        let round_trip = (0..5).map(|_| ask()).min().unwrap_or_default();
        round_trip * 3 + SWITCHOVER_GUESS
    }

    fn prepare_switchover(&mut self) -> Result<(), Failure> {
        let settings = Settings::apply(&self.qmp, Side::Source, PausedBy::Agent)
            .map_err(|error| failure::host("QEMU's migration settings", &error, None))?;
        self.settings = Some(settings);
        let (outgoing, channel) =
            Outgoing::prepare(&self.qmp, PausedBy::Agent).map_err(|error| state_failure(&error))?;
        self.outgoing = Some(outgoing);
        self.stream = Some(Arc::new(QemuStream::new(channel)));
        Ok(())
    }

    /// When the switchover has been prepared, QEMU saves its device state from here on, into the
    /// channel, beside the last scan and the last round. (Saving it reads guest memory and writes
    /// none; `--verify` would show if a device did.)
    fn pause(&mut self) -> Result<(), Failure> {
        self.paused = true;
        if let Some(guard) = &mut self.guard {
            guard.paused()?;
        }
        runstate::stop(&self.qmp)
            .map_err(|error| failure::host("pausing the guest", &error, None))?;
        match &mut self.outgoing {
            Some(outgoing) => outgoing.begin(&self.qmp).map_err(|error| state_failure(&error)),
            None => Ok(()),
        }
    }

    fn resume(&mut self) -> Result<(), Failure> {
        match runstate::cont(&self.qmp) {
            Ok(_) => {
                self.paused = false;
                if let Some(guard) = &mut self.guard {
                    guard.running();
                }
                Ok(())
            }
            Err(error) => Err(failure::host("resuming the guest", &error, None)),
        }
    }

    fn save_state(&mut self) -> Result<Arc<dyn StateStream>, Failure> {
        let stream = self.stream.as_ref().expect("the switchover was prepared");
        Ok(Arc::<QemuStream>::clone(stream))
    }

    fn state_saved(&mut self) -> Result<(), Failure> {
        let outgoing = self.outgoing.as_mut().expect("the switchover was prepared");
        outgoing
            .wait_completed(&self.qmp, Instant::now() + STATE_TIMEOUT)
            .map(|_| ())
            .map_err(|error| state_failure(&error))
    }

    fn release(&mut self) {
        // The guest is gone: QEMU stays as it is, paused after its migration, for its owner to end.
        self.stream = None;
        self.outgoing = None;
        if let Some(settings) = self.settings.take()
            && let Err(error) = settings.restore(&self.qmp)
        {
            tracing::debug!(%error, "QEMU's migration settings stay as they are");
        }
    }

    fn unwind(&mut self) -> bool {
        if let Some(stream) = self.stream.take() {
            stream.close();
        }
        if let Some(outgoing) = self.outgoing.take()
            && let Err(error) = outgoing.cancel(&self.qmp, Instant::now() + STATE_TIMEOUT)
        {
            tracing::warn!(%error, "QEMU's migration could not be cancelled");
        }
        if let Some(settings) = self.settings.take()
            && let Err(error) = settings.restore(&self.qmp)
        {
            tracing::warn!(%error, "QEMU's migration settings could not be set back");
        }
        if self.paused
            && let Err(error) = runstate::settle_and_cont(&self.qmp)
        {
            tracing::error!(%error, "the guest could not be resumed");
        }
        runstate::RunState::query(&self.qmp).is_ok_and(|state| state.running)
    }
}

/// Connects to a monitor.
pub(super) fn connect(path: &Path) -> Result<Qmp, Failure> {
    Qmp::connect(path).map_err(|error| {
        let hint = error.hint().map(std::borrow::Cow::into_owned);
        failure::refused(&error, hint)
    })
}

/// Opens and maps each block of guest RAM, in their order.
pub(super) fn map_memory(qemu: &QemuFacts) -> Result<GuestMemory, Failure> {
    let mut regions = Vec::new();
    for (index, place) in qemu.places.iter().enumerate() {
        let backing = place.open(&qemu.process).map_err(|error| {
            let hint = error.hint().map(String::from);
            failure::host("guest memory", &error, hint)
        })?;
        let region = Region::open(RegionIndex(index as u16), backing)
            .map_err(|error| failure::host("guest memory", &error, None))?;
        regions.push(region);
    }
    Ok(GuestMemory::new(regions))
}

pub(super) fn check_failure(error: &checks::CheckError) -> Failure {
    let hints = error.hints();
    let hint = (!hints.is_empty()).then(|| hints.join("; "));
    Failure { reason: AbortReason::Refused, ..failure::host("QEMU", error, hint) }
}

fn state_failure(error: &DeviceStateError) -> Failure {
    failure::host("device state", error, error.hint().map(String::from))
}

fn attach_failure(error: &attach::AttachError) -> Failure {
    let hint = "run as root, or with CAP_SYS_PTRACE and CAP_SYS_ADMIN; `pageferry probe` tells";
    failure::host("attach", error, Some(hint.into()))
}

fn runs_on_kvm(qmp: &Qmp) -> bool {
    let answer = qmp.execute("query-kvm", serde_json::json!({}));
    answer.is_ok_and(|kvm| kvm["enabled"].as_bool().unwrap_or(false))
}

fn facts(qmp: &Qmp, qemu: &QemuFacts, scan: ScanPhases, kvm: bool) -> Result<GuestFacts, Failure> {
    let memory = map_memory(qemu)?;
    let mut regions = Vec::new();
    for (ram, region) in qemu.memory.ram.iter().zip(memory.regions()) {
        let data = holes::data_extents(region)
            .map_err(|error| failure::host("guest memory", &error, None))?;
        regions.push(RegionOffer {
            name: ram.name.clone(),
            bytes: region.len(),
            page_bytes: region.page_bytes(),
            backing: ram.kind.to_string(),
            populated_bytes: data.iter().map(|extent| extent.len).sum(),
        });
    }
    let drain = (!qemu.direct_io_nodes.is_empty()).then(|| {
        format!("direct I/O of {} escapes write tracking", qemu.direct_io_nodes.join(", "))
    });
    let kind = match scan {
        ScanPhases::One => TrackerKind::UffdOnePhase,
        ScanPhases::Two => TrackerKind::UffdTwoPhase,
    };
    let why = match (scan, kvm) {
        (ScanPhases::Two, true) => "two-phase scans: KVM's MMU listens",
        (ScanPhases::Two, false) => "two-phase scans: asked for",
        (ScanPhases::One, _) => "one-phase scans: cheapest without KVM's MMU",
    };
    Ok(GuestFacts {
        monitor: format!("QEMU {}", qmp.version()),
        machine: qemu.machine.clone(),
        pid: qemu.process.pid(),
        vcpus: super::vcpu_threads(qmp),
        regions,
        drain,
        gives_memory_back: qemu.balloons.first().map(|device| format!("device {device}")),
        tracker: (kind.to_string(), why.into()),
    })
}
