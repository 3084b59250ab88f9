//! A bare connection, to measure what lanes are made of beside other tools' programs. No lane uses
//! it.
//!
//! ```text
//!   own memory:  | out: what is sent, and READ by the peer | in: the peer's WRITEs, receives, READs |
//! ```
//!
//! Both ends tell each other where their memory is while they connect. Owned by one thread, which
//! polls; nothing here sleeps but connecting.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_datapath::backing::Backing;
use pageferry_datapath::framing::FramingError;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::Region;

use crate::cm_sys::{CmEvent, CmId, ConnectionTerms};
use crate::connection::{refused_at_once, resolve, terms, unexpected, wait_event};
use crate::error::{CmEventKind, RdmaError};
use crate::mailbox::no_memory;
use crate::qp_sys::{Completion, Part, QueuePair, RemoteAddr, Write};
use crate::stop::Stop;
use crate::sys::{Access, Context, MemoryRegion, ProtectionDomain};

const MAGIC: [u8; 4] = *b"PFRB";
const TOLD_BYTES: usize = 24;

/// What both ends have.
#[derive(Clone, Copy, Debug)]
pub struct BareTerms {
    /// Size of either part of the memory.
    pub bytes: u64,
    /// Requests that may be posted; the device may have fewer.
    pub depth: u32,
    /// Of 2 MiB pages.
    pub huge: bool,
    /// For connecting.
    pub wait: Duration,
}

/// What has completed since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Posts.
    pub done: u32,
    /// Receives.
    pub received: u32,
}

/// A device without a connection, to measure what registering memory with it costs.
#[derive(Debug)]
pub struct BareDevice {
    domain: Arc<ProtectionDomain>,
}

impl BareDevice {
    /// The device that has this address.
    pub fn at(address: SocketAddr) -> Result<Self, RdmaError> {
        let id = CmId::new()?;
        id.listen(address)?;
        let context = Context::open(id.verbs())?;
        // The context stays when the identifier that found it goes.
        Ok(Self { domain: ProtectionDomain::new(context)? })
    }

    /// Registers part of a region as a target does, for the peer to write to.
    pub fn register(
        &self,
        region: &Arc<Region>,
        offset: u64,
        len: u64,
    ) -> Result<BareMemory, RdmaError> {
        let lease = region.lease(offset, len).map_err(RdmaError::OutsideMemory)?;
        let registered = MemoryRegion::register(&self.domain, lease, Access::RemoteWrite)?;
        Ok(BareMemory { _registered: registered })
    }
}

/// Registered until it is dropped.
#[derive(Debug)]
pub struct BareMemory {
    _registered: Arc<MemoryRegion>,
}

/// Takes bare connections.
#[derive(Debug)]
pub struct BareListener {
    id: CmId,
    port: u16,
    stop: Stop,
}

impl BareListener {
    /// Listens at an address of an RDMA device; port 0 lets the kernel choose one.
    pub fn at(address: SocketAddr) -> Result<Self, RdmaError> {
        let id = CmId::new()?;
        let port = id.listen(address)?;
        Ok(Self { id, port, stop: Stop::new()? })
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Takes the next one.
    pub fn accept(&self, bare: BareTerms) -> Result<Bare, RdmaError> {
        let deadline = Instant::now() + bare.wait;
        let mut event = wait_event(&self.id, deadline, &self.stop, || self.id.event())?;
        let Some(id) = event.requested.take() else { return Err(unexpected(&event)) };
        let peer = told(&event.private_data)?;
        let (mut this, context) = Bare::new(id, bare)?;
        this.peer = peer;
        let own = terms(context.limits());
        let (answered, started) = (event.reads.1, event.reads.0);
        let terms = ConnectionTerms {
            reads_answered: answered.min(own.reads_answered),
            reads_started: started.min(own.reads_started),
        };
        this.qp.accept(terms, &this.tell())?;
        this.established(deadline, &self.stop)?;
        Ok(this)
    }
}

/// One end of a bare connection.
#[derive(Debug)]
pub struct Bare {
    qp: QueuePair,
    memory: Arc<MemoryRegion>,
    bytes: u64,
    peer: RemoteAddr,
    completions: Vec<Completion>,
    chain: Vec<Write>,
}

impl Bare {
    /// Connects.
    pub fn connect(
        from: Option<IpAddr>,
        to: SocketAddr,
        bare: BareTerms,
    ) -> Result<Self, RdmaError> {
        let (deadline, stop) = (Instant::now() + bare.wait, Stop::new()?);
        let id = CmId::new()?;
        id.set_ack_timeout(crate::limits::ACK_TIMEOUT_EXPONENT);
        resolve(&id, from, to, deadline, &stop)?;
        let (mut this, context) = Self::new(id, bare)?;
        this.qp.connect(terms(context.limits()), &this.tell()).map_err(refused_at_once)?;
        let event = this.established(deadline, &stop)?;
        this.peer = told(&event.private_data)?;
        Ok(this)
    }

    fn new(id: CmId, bare: BareTerms) -> Result<(Self, Arc<Context>), RdmaError> {
        let context = Context::open(id.verbs())?;
        let domain = ProtectionDomain::new(Arc::clone(&context))?;
        let mut qp = QueuePair::new(id, &domain, bare.depth, 0)?;
        let huge = bare.huge.then_some(2 << 20);
        let whole = (2 * bare.bytes).next_multiple_of(huge.unwrap_or(4096));
        let backing = Backing::memfd("bare", whole, huge).map_err(no_memory)?;
        let region = Region::open(RegionIndex(0), backing).map_err(RdmaError::OutsideMemory)?;
        let lease = region.lease(0, whole).map_err(RdmaError::OutsideMemory)?;
        let memory = MemoryRegion::register(&domain, lease, Access::RemoteReadWrite)?;
        qp.receive_into(&memory);
        let peer = RemoteAddr { addr: 0, rkey: 0 };
        let (completions, chain) = (Vec::new(), Vec::new());
        Ok((Self { qp, memory, bytes: bare.bytes, peer, completions, chain }, context))
    }

    fn established(&self, deadline: Instant, stop: &Stop) -> Result<CmEvent, RdmaError> {
        let take = || self.qp.connection_event();
        let event = wait_event(&self.qp.connection_fd(), deadline, stop, take)?;
        match event.kind {
            CmEventKind::Established => Ok(event),
            _ => Err(unexpected(&event)),
        }
    }

    /// `"PFRB" | rkey u32 | addr u64 | bytes u64`.
    fn tell(&self) -> [u8; TOLD_BYTES] {
        let mut told = [0; TOLD_BYTES];
        told[..4].copy_from_slice(&MAGIC);
        told[4..8].copy_from_slice(&self.memory.rkey().to_le_bytes());
        told[8..16].copy_from_slice(&self.memory.addr().to_le_bytes());
        told[16..].copy_from_slice(&self.bytes.to_le_bytes());
        told
    }

    /// Requests that still fit.
    pub fn free(&self) -> u32 {
        self.qp.free()
    }

    /// The send queue's length.
    pub fn depth(&self) -> u32 {
        self.qp.depth()
    }

    /// Posts `count` WRITEs of `len` bytes in one call, all from the beginning of `out` to the
    /// beginning of the peer's `in`. Without a signal they complete with a later post that has one.
    ///
    /// # Panics
    /// If they don't [fit](Self::free), or `len` is more than the memory.
    pub fn write(&mut self, len: u32, count: u32, signalled: bool) -> Result<(), RdmaError> {
        let to = RemoteAddr { addr: self.peer.addr.wrapping_add(self.bytes), ..self.peer };
        // The same as the last time, mostly.
        if self.chain.len() != count as usize || self.chain[0].len != len {
            let write = Write { from: Arc::clone(&self.memory), offset: 0, len, to };
            self.chain = vec![write; count as usize];
        }
        self.qp.post_chain(&self.chain, signalled).map(drop)
    }

    /// Posts a READ of part of the peer's `out` into the same part of `in`.
    ///
    /// # Panics
    /// If that is more than the memory.
    pub fn read_at(&mut self, at: u64, len: u32) -> Result<(), RdmaError> {
        assert!(at + u64::from(len) <= self.bytes, "inside the memory");
        let part = Part { region: &self.memory, offset: self.bytes + at, len };
        let from = RemoteAddr { addr: self.peer.addr.wrapping_add(at), ..self.peer };
        self.qp.post_read(part, from).map(drop)
    }

    /// Posts a SEND from the beginning of `out`.
    pub fn send(&mut self, len: u32) -> Result<(), RdmaError> {
        self.qp.post_send(Part { region: &self.memory, offset: 0, len }).map(drop)
    }

    /// Posts a receive into the beginning of `in`.
    pub fn receive(&mut self, len: u32) -> Result<(), RdmaError> {
        self.qp.post_receive(0, self.bytes, len)
    }

    /// Looks for completions, without waiting.
    pub fn poll(&mut self) -> Result<Progress, RdmaError> {
        self.completions.clear();
        self.qp.poll(&mut self.completions)?;
        let mut progress = Progress::default();
        for completion in &self.completions {
            match completion {
                Completion::Done { .. } => progress.done += 1,
                Completion::Received { .. } => progress.received += 1,
            }
        }
        Ok(progress)
    }

    /// Writes the last byte of the first `len` in `out`.
    pub fn stamp(&self, len: u32, byte: u8) -> Result<(), RdmaError> {
        let at = u64::from(len) - 1;
        self.memory.lease().copy_in(at, &[byte]).map_err(RdmaError::OutsideMemory)
    }

    /// The last byte of the first `len` in `in`: that of the peer's WRITE, once it is there.
    pub fn arrived(&self, len: u32) -> Result<u8, RdmaError> {
        let (at, mut byte) = (self.bytes + u64::from(len) - 1, [0]);
        self.memory.lease().copy_out(at, &mut byte).map_err(RdmaError::OutsideMemory)?;
        Ok(byte[0])
    }

    /// Whether the peer still holds the connection; costs a system call.
    pub fn check(&self) -> Result<(), RdmaError> {
        match self.qp.connection_event()? {
            Some(event) if event.kind != CmEventKind::Established => Err(unexpected(&event)),
            _ => Ok(()),
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.qp.hang_up();
    }
}

fn told(bytes: &[u8]) -> Result<RemoteAddr, RdmaError> {
    let misbehaved = || RdmaError::Misbehaved(FramingError::Magic);
    let bytes = bytes.first_chunk::<TOLD_BYTES>().ok_or_else(misbehaved)?;
    if bytes[..4] != MAGIC {
        return Err(misbehaved());
    }
    let rkey = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let mut addr = [0; 8];
    addr.copy_from_slice(&bytes[8..16]);
    Ok(RemoteAddr { addr: u64::from_le_bytes(addr), rkey })
}
