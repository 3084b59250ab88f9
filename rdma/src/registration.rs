//! Guest memory registered with a device, slice by slice, ahead of the WRITEs and beside them.
//!
//! ```text
//!  ahead(extents) ─▶ queue ─▶ threads ─▶ ibv_reg_mr ─▶ cell of each slice
//!  slice(n): a lane that needs one now registers it itself, or waits for who is at it
//! ```
//!
//! Shared by all lanes of one device. Nothing is registered before [`RegisteredMemory::ahead`] is
//! called: a target first frees what its memory held where the guest has holes, and pages freed
//! after they were pinned would still be written to, in nobody's memory.
//!
//! Registering pins whole slices and populates their holes. Deregistering happens when the last
//! holder goes, which is after the guest runs on the other side.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry_datapath::extent::Extent;
use pageferry_datapath::region::GuestMemory;

use crate::error::RdmaError;
use crate::limits::{REGISTER_THREADS_MAX, REGISTER_WAIT_MAX, TICK};
use crate::memlock;
use crate::message::{KEYS_MAX, SliceKey};
use crate::plan::Pin;
use crate::qp_sys::RemoteAddr;
use crate::slices::Slices;
use crate::stop::Stop;
use crate::sys::{Access, MemoryRegion, ProtectionDomain};

/// One guest's memory as one device knows it.
#[derive(Debug)]
pub(crate) struct RegisteredMemory {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    pin: Pin,
}

#[derive(Debug)]
struct Shared {
    domain: Arc<ProtectionDomain>,
    memory: GuestMemory,
    slices: Slices,
    access: Access,
    cells: Vec<OnceLock<Arc<MemoryRegion>>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing may be registered before.
    begun: bool,
    /// To be registered by the threads, in this order.
    queue: VecDeque<u32>,
    /// Being registered by somebody.
    busy: HashSet<u32>,
    ended: bool,
}

impl RegisteredMemory {
    pub(crate) fn new(
        domain: Arc<ProtectionDomain>,
        memory: GuestMemory,
        slices: Slices,
        access: Access,
        pin: Pin,
    ) -> Self {
        let cells = (0..slices.count()).map(|_| OnceLock::new()).collect();
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Shared { domain, memory, slices, access, cells, state, changed };
        Self { shared: Arc::new(shared), threads: Mutex::default(), pin }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    pub(crate) fn slices(&self) -> &Slices {
        &self.shared.slices
    }

    /// Allows registering, and has threads begin with what these extents need; with [`Pin::All`]
    /// they go on with everything else.
    pub(crate) fn ahead(&self, extents: &[Extent], threads: usize) -> Result<(), RdmaError> {
        let slices = &self.shared.slices;
        let mut queued = vec![false; slices.count() as usize];
        let mut queue = VecDeque::new();
        let needed = extents.iter().flat_map(|extent| slices.of_extent(extent));
        let all = match self.pin {
            Pin::All => 0..slices.count(),
            Pin::Touched => 0..0,
        };
        for slice in needed.chain(all) {
            if !std::mem::replace(&mut queued[slice as usize], true) {
                queue.push_back(slice);
            }
        }
        let needed_bytes = queue.iter().map(|slice| slices.extent(*slice).len).sum();
        self.shared.lock().begun = true;
        self.shared.changed.notify_all();
        memlock::allow(needed_bytes)?;
        self.shared.lock().queue.extend(queue);
        self.shared.changed.notify_all();
        let mut started = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        while started.len() < threads.clamp(1, REGISTER_THREADS_MAX) {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new()
                .name("pf-register".into())
                .spawn(move || shared.register_queued())
                .map_err(|source| RdmaError::Call { call: "clone", source })?;
            started.push(thread);
        }
        Ok(())
    }

    /// The region of one slice; registers it if nobody has, waits if somebody is at it.
    pub(crate) fn slice(&self, slice: u32, stop: &Stop) -> Result<Arc<MemoryRegion>, RdmaError> {
        let region = self.slice_within(slice, stop, REGISTER_WAIT_MAX)?;
        let waited_ms = REGISTER_WAIT_MAX.as_millis() as u64;
        region.ok_or(RdmaError::Stalled { waited_ms })
    }

    /// The same, or `None` if it was waited for this long.
    pub(crate) fn slice_within(
        &self,
        slice: u32,
        stop: &Stop,
        wait: Duration,
    ) -> Result<Option<Arc<MemoryRegion>>, RdmaError> {
        match self.shared.cells[slice as usize].get() {
            Some(region) => Ok(Some(Arc::clone(region))),
            None => self.shared.register_or_wait(slice, stop, wait),
        }
    }

    /// The keys that are there, from this slice on.
    pub(crate) fn keys_from(&self, slice: u32) -> Vec<SliceKey> {
        let from = slice as usize..;
        let cells = self.shared.cells[from].iter().zip(slice..);
        cells
            .filter_map(|(cell, slice)| {
                let region = cell.get()?;
                let at = RemoteAddr { addr: region.addr(), rkey: region.rkey() };
                Some(SliceKey { slice, at })
            })
            .take(KEYS_MAX)
            .collect()
    }

    /// Bytes registered so far.
    pub(crate) fn registered_bytes(&self) -> u64 {
        self.shared.cells.iter().filter_map(OnceLock::get).map(|region| region.len()).sum()
    }
}

impl Drop for RegisteredMemory {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A panic there was printed there; the regions are let go of all the same.
            let _ended = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The body of a thread.
    fn register_queued(&self) {
        loop {
            let slice = {
                let mut state = self.lock();
                loop {
                    if state.ended {
                        return;
                    }
                    match state.queue.pop_front() {
                        Some(slice) if self.is_taken(&state, slice) => {}
                        Some(slice) => {
                            state.busy.insert(slice);
                            break slice;
                        }
                        None => {
                            state =
                                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                }
            };
            if let Err(error) = self.register(slice) {
                // A lane that needs it tries again, and reports.
                tracing::warn!(slice, %error, "registering ahead failed");
                return;
            }
        }
    }

    fn is_taken(&self, state: &State, slice: u32) -> bool {
        self.cells[slice as usize].get().is_some() || state.busy.contains(&slice)
    }

    fn register_or_wait(
        &self,
        slice: u32,
        stop: &Stop,
        wait: Duration,
    ) -> Result<Option<Arc<MemoryRegion>>, RdmaError> {
        let since = Instant::now();
        {
            let mut state = self.lock();
            while !state.begun || state.busy.contains(&slice) {
                stop.check()?;
                if since.elapsed() > wait {
                    return Ok(None);
                }
                let woken = self.changed.wait_timeout(state, TICK.min(Duration::from_millis(50)));
                state = woken.unwrap_or_else(PoisonError::into_inner).0;
            }
            if let Some(region) = self.cells[slice as usize].get() {
                return Ok(Some(Arc::clone(region)));
            }
            state.busy.insert(slice);
        }
        self.register(slice).map(Some)
    }

    /// Registers a slice that the caller has marked busy.
    fn register(&self, slice: u32) -> Result<Arc<MemoryRegion>, RdmaError> {
        let registered = self
            .memory
            .lease(self.slices.extent(slice))
            .map_err(RdmaError::OutsideMemory)
            .and_then(|lease| MemoryRegion::register(&self.domain, lease, self.access));
        let mut state = self.lock();
        if let Ok(region) = &registered {
            let first = self.cells[slice as usize].set(Arc::clone(region)).is_ok();
            assert!(first, "only who marked it busy registers it");
        }
        state.busy.remove(&slice);
        drop(state);
        self.changed.notify_all();
        registered
    }
}

impl Drop for Shared {
    /// Deregisters with several threads: a large guest has taken seconds to pin.
    fn drop(&mut self) {
        let mut regions: Vec<_> = self.cells.drain(..).filter_map(OnceLock::into_inner).collect();
        let share = regions.len().div_ceil(REGISTER_THREADS_MAX).max(1);
        thread::scope(|scope| {
            while regions.len() > share {
                let part = regions.split_off(regions.len() - share);
                scope.spawn(move || drop(part));
            }
            regions.clear();
        });
    }
}
