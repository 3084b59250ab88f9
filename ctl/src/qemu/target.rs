//! A QEMU that waits for a guest (`-incoming defer`).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_datapath::control::{AbortReason, Offer};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;

use super::capabilities::Settings;
use super::checks::{self, CheckError, QemuFacts, Side};
use super::claim::Claim;
use super::device_state::{Incoming, PausedBy};
use super::runstate;
use super::source::{check_failure, connect, map_memory};
use super::stream::QemuStream;
use crate::agent::failure;
use crate::agent::monitor::{StateStream, TargetMonitor};
use crate::limits::{QMP_COMMAND_TIMEOUT, STATE_TIMEOUT};
use crate::qmp::{Posted, Qmp, QmpError};

/// A waiting QEMU that passed its own checks.
#[derive(Debug)]
pub struct QemuTarget {
    qmp: Qmp,
    qemu: QemuFacts,
    settings: Option<Settings>,
    incoming: Option<Incoming>,
    stream: Option<Arc<QemuStream>>,
    announced: Option<Posted>,
    claim: Option<Claim>,
}

impl QemuTarget {
    /// Connects to QEMU and looks whether it can take in a guest. Touches nothing.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let qmp = connect(path)?;
        let qemu = checks::target(&qmp).map_err(|error| check_failure(&error))?;
        let (settings, incoming, stream) = (None, None, None);
        Ok(Self { qmp, qemu, settings, incoming, stream, announced: None, claim: None })
    }

    /// QEMU's `-name`.
    pub fn name(&self) -> Option<String> {
        let answer = self.qmp.execute("query-name", serde_json::json!({})).ok()?;
        Some(answer["name"].as_str()?.to_owned())
    }

    /// The files of its guest memory, as it has them mapped.
    pub fn files(&self) -> Vec<String> {
        self.qemu.places.iter().map(|place| place.file().to_owned()).collect()
    }
}

impl TargetMonitor for QemuTarget {
    fn pid(&self) -> i32 {
        self.qemu.process.pid()
    }

    fn vcpus(&self) -> Vec<i32> {
        super::vcpu_threads(&self.qmp)
    }

    fn is_alive(&self) -> bool {
        self.qemu.process.is_alive()
    }

    fn settings(&self) -> Option<Settings> {
        Settings::current(&self.qmp).ok()
    }

    fn inspect(&mut self, offer: &Offer) -> Result<GuestMemory, Failure> {
        let refusals = checks::compare(&offer.regions, &offer.machine, &self.qemu);
        if !refusals.is_empty() {
            return Err(check_failure(&CheckError::Refused { refusals }));
        }
        // In the order of the offer: that is what numbers them.
        let order = |name: &str| offer.regions.iter().position(|region| region.name == name);
        let mut blocks: Vec<_> =
            self.qemu.memory.ram.drain(..).zip(self.qemu.places.drain(..)).collect();
        blocks.sort_by_key(|(ram, _)| order(&ram.name));
        (self.qemu.memory.ram, self.qemu.places) = blocks.into_iter().unzip();
        let memory = map_memory(&self.qemu)?;
        // Before a byte of it is written.
        self.claim = Some(Claim::on(&memory)?);
        Ok(memory)
    }

    fn prepare_incoming(&mut self) -> Result<Arc<dyn StateStream>, Failure> {
        let settings = Settings::apply(&self.qmp, Side::Target, PausedBy::Agent)
            .map_err(|error| failure::host("QEMU's migration settings", &error, None))?;
        self.settings = Some(settings);
        let (incoming, channel) = Incoming::begin(&self.qmp).map_err(|error| {
            failure::host("device state", &error, error.hint().map(String::from))
        })?;
        self.incoming = Some(incoming);
        let stream = Arc::new(QemuStream::new(channel));
        self.stream = Some(Arc::clone(&stream));
        Ok(stream)
    }

    fn state_loaded(&mut self) -> Result<(), Failure> {
        let incoming = self.incoming.as_ref().expect("prepared before");
        incoming.wait_loaded(&self.qmp, Instant::now() + STATE_TIMEOUT).map_err(|error| {
            let hint = error.hint().map(String::from);
            Failure {
                reason: AbortReason::HostFailed,
                ..failure::host("device state at the target", &error, hint)
            }
        })
    }

    fn resume(&mut self) -> Result<Duration, Failure> {
        match runstate::cont_for_certain(&self.qmp) {
            Ok(changed) => {
                self.announce();
                Ok(changed.effective())
            }
            Err(error) => {
                // A monitor that talks nonsense may still do as it is told.
                let _may_be_gone = runstate::stop(&self.qmp);
                Err(failure::host("starting the guest at the target", &error, None))
            }
        }
    }

    fn unwind(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.close();
        }
        self.incoming = None;
        if let Some(settings) = self.settings.take() {
            set_back(settings, &self.qmp);
        }
    }
}

impl QemuTarget {
    /// Has QEMU tell the network where the guest's addresses are now: what it announced by itself
    /// when the state was loaded went out before the guest ran here. The guest runs whether or not
    /// this works, and the source waits to hear that it does: so nobody waits for the answer yet.
    fn announce(&mut self) {
        let times = serde_json::json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        match self.qmp.post("announce-self", times) {
            Ok(posted) => self.announced = Some(posted),
            Err(error) => not_announced(&error),
        }
    }
}

impl Drop for QemuTarget {
    fn drop(&mut self) {
        // QEMU drops what it has not yet run when its client goes.
        let deadline = Instant::now() + QMP_COMMAND_TIMEOUT;
        if let Some(announced) = self.announced.take()
            && let Err(error) = self.qmp.answer(announced, deadline)
        {
            not_announced(&error);
        }
        // A guest that runs here is its owner's: the next migration may be somebody else's, and one
        // that does not ignore shared memory.
        if let Some(settings) = self.settings.take() {
            set_back(settings, &self.qmp);
        }
    }
}

fn set_back(settings: Settings, qmp: &Qmp) {
    if let Err(error) = settings.restore(qmp) {
        tracing::debug!(%error, "the target QEMU's migration settings stay as they are");
    }
}

fn not_announced(error: &QmpError) {
    tracing::debug!(%error, "the guest's addresses were not announced");
}
