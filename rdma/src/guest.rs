//! One guest's memory with every device that lanes use: domains and registrations, one of each per
//! device, shared by its lanes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_datapath::extent::Extent;
use pageferry_datapath::holes;
use pageferry_datapath::region::GuestMemory;

use crate::error::RdmaError;
use crate::memlock;
use crate::plan::Pin;
use crate::registration::RegisteredMemory;
use crate::slices::Slices;
use crate::sys::{Access, Context, ProtectionDomain};

/// Guest memory as lanes of one session use it.
#[derive(Debug)]
pub struct RdmaMemory {
    memory: GuestMemory,
    pin: Pin,
    access: Access,
    threads: usize,
    devices: Mutex<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    domains: HashMap<String, Arc<ProtectionDomain>>,
    registered: HashMap<String, Arc<RegisteredMemory>>,
    /// What will be needed, once that is known.
    ahead: Option<Vec<Extent>>,
}

impl RdmaMemory {
    /// A target's memory, which its peer will write to. Nothing is registered before
    /// [`Self::begin`]: where the guest has holes it is still to be cleared.
    pub fn target(memory: GuestMemory, pin: Pin, threads: usize) -> Result<Self, RdmaError> {
        let this = Self::new(memory, pin, Access::RemoteWrite, threads);
        // How much of it will hold something is not known yet; and said now, TCP can still be taken
        // instead.
        this.may_be_pinned_by(1)?;
        Ok(this)
    }

    /// Whether so many devices may pin all of it; each counts on its own.
    pub fn may_be_pinned_by(&self, devices: u64) -> Result<(), RdmaError> {
        let bytes: u64 = self.memory.regions().iter().map(|region| region.len()).sum();
        memlock::allow(bytes.saturating_mul(devices))
    }

    /// A source's memory, which is only read. Unless all of it is pinned, none is before the
    /// first round ([`Self::begin`]): registering populates what of a slice is a hole, and the
    /// first pass would take that for the guest's. Each of `devices` pins it on its own account.
    pub(crate) fn source(
        memory: GuestMemory,
        pin: Pin,
        threads: usize,
        devices: u64,
    ) -> Result<Self, RdmaError> {
        let this = Self::new(memory, pin, Access::LocalRead, threads);
        if pin == Pin::All {
            this.may_be_pinned_by(devices)?;
            this.begin(Vec::new())?;
            return Ok(this);
        }
        let extents = holes::guest_data_extents(&this.memory).map_err(|error| RdmaError::Call {
            call: "looking for holes",
            source: std::io::Error::other(error),
        })?;
        // Said now, while TCP can still be taken instead. Whole slices are pinned; the target may
        // cut larger ones than we would, and then it is said when they are.
        let slices = Slices::choose(&this.memory, pin, u64::MAX);
        memlock::allow(slices.bytes_of(&extents).saturating_mul(devices))?;
        Ok(this)
    }

    fn new(memory: GuestMemory, pin: Pin, access: Access, threads: usize) -> Self {
        Self { memory, pin, access, threads, devices: Mutex::default() }
    }

    /// These extents will be needed: register them ahead.
    pub fn begin(&self, extents: Vec<Extent>) -> Result<(), RdmaError> {
        let mut shared = self.lock();
        for registered in shared.registered.values() {
            registered.ahead(&extents, self.threads)?;
        }
        shared.ahead = Some(extents);
        Ok(())
    }

    /// Lets go of devices that are being removed. Lanes on them that have not ended yet have their
    /// share until they do.
    pub(crate) fn let_go_of_removed(&self) {
        let mut gone = Vec::new();
        {
            let mut shared = self.lock();
            let removed = shared.domains.iter().filter(|(_, it)| it.context().is_removed());
            for name in removed.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
                gone.push((shared.registered.remove(&name), shared.domains.remove(&name)));
            }
        }
        // Deregistering takes its time: not under the lock.
        drop(gone);
    }

    /// Bytes registered so far, on all devices together.
    pub fn registered_bytes(&self) -> u64 {
        self.lock().registered.values().map(|registered| registered.registered_bytes()).sum()
    }

    /// The domain of a device.
    pub(crate) fn domain(
        &self,
        context: &Arc<Context>,
    ) -> Result<Arc<ProtectionDomain>, RdmaError> {
        let mut shared = self.lock();
        let name = &context.limits().name;
        if let Some(domain) = shared.domains.get(name) {
            return Ok(Arc::clone(domain));
        }
        let domain = ProtectionDomain::new(Arc::clone(context))?;
        shared.domains.insert(name.clone(), Arc::clone(&domain));
        Ok(domain)
    }

    /// The registration with a device; in slices of the size told, or as this side chooses.
    pub(crate) fn registered(
        &self,
        domain: &Arc<ProtectionDomain>,
        slice_bytes: Option<u64>,
    ) -> Result<Arc<RegisteredMemory>, RdmaError> {
        let mut shared = self.lock();
        let limits = domain.context().limits();
        if let Some(registered) = shared.registered.get(&limits.name) {
            let cut = registered.slices().slice_bytes();
            return match slice_bytes.is_none_or(|bytes| bytes == cut) {
                true => Ok(Arc::clone(registered)),
                // Lanes to one target have one cut.
                false => Err(RdmaError::WrongAnswer),
            };
        }
        let slices = match slice_bytes {
            Some(bytes) => Slices::cut(&self.memory, bytes)?,
            None => Slices::choose(&self.memory, self.pin, limits.region_bytes_max),
        };
        let (domain, memory) = (Arc::clone(domain), self.memory.clone());
        let registered =
            Arc::new(RegisteredMemory::new(domain, memory, slices, self.access, self.pin));
        if let Some(extents) = &shared.ahead {
            registered.ahead(extents, self.threads)?;
        }
        shared.registered.insert(limits.name.clone(), Arc::clone(&registered));
        Ok(registered)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
