//! A lane's own registered memory: where messages come in and go out, and a page to try things on.
//!
//! ```text
//!   | receive 0..4 | send 0..4 | READ sink |        registered for what is posted here
//!   | scratch                              |        registered for the peer too, at the target
//! ```
//!
//! It is a region like guest memory is, so the same leases keep it mapped.

use std::sync::Arc;

use pageferry_datapath::backing::{Backing, BackingError};
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{Region, RegionError};

use crate::error::RdmaError;
use crate::limits::{MESSAGE_BYTES, RECEIVE_SLOTS, SEND_SLOTS};
use crate::message::Message;
use crate::qp_sys::{Part, QueuePair, RemoteAddr};
use crate::sys::{Access, MemoryRegion, ProtectionDomain};

const SEND_AT: usize = RECEIVE_SLOTS;
const SINK_AT: usize = SEND_AT + SEND_SLOTS;
const SCRATCH_AT: usize = SINK_AT + 1;
const SLOTS: usize = SCRATCH_AT + 1;

/// The memory for one lane's messages.
#[derive(Debug)]
pub(crate) struct Mailbox {
    messages: Arc<MemoryRegion>,
    scratch: Arc<MemoryRegion>,
    /// The entry that is sending from each place.
    sending: [Option<u64>; SEND_SLOTS],
}

impl Mailbox {
    pub(crate) fn new(domain: &Arc<ProtectionDomain>) -> Result<Self, RdmaError> {
        let backing = Backing::memfd("lane-messages", at(SLOTS), None).map_err(no_memory)?;
        let region = Region::open(RegionIndex(0), backing).map_err(RdmaError::OutsideMemory)?;
        let lease = |slot, count| region.lease(at(slot), at(count));
        let messages = lease(0, SCRATCH_AT).map_err(RdmaError::OutsideMemory)?;
        let scratch = lease(SCRATCH_AT, 1).map_err(RdmaError::OutsideMemory)?;
        Ok(Self {
            messages: MemoryRegion::register(domain, messages, Access::LocalWrite)?,
            scratch: MemoryRegion::register(domain, scratch, Access::RemoteReadWrite)?,
            sending: [None; SEND_SLOTS],
        })
    }

    /// Posts every receive; before the connection is made, so that none is missed.
    pub(crate) fn open(&self, qp: &mut QueuePair) -> Result<(), RdmaError> {
        qp.receive_into(&self.messages);
        (0..RECEIVE_SLOTS).try_for_each(|slot| post_receive(qp, slot))
    }

    /// Takes a message that has come, and posts its receive again.
    pub(crate) fn receive(
        &self,
        qp: &mut QueuePair,
        slot: usize,
        bytes: usize,
    ) -> Result<Message, RdmaError> {
        let mut copy = [0; MESSAGE_BYTES];
        let copy = &mut copy[..bytes.min(MESSAGE_BYTES)];
        self.messages.lease().copy_out(at(slot), copy).map_err(RdmaError::OutsideMemory)?;
        post_receive(qp, slot)?;
        Message::decode(copy).map_err(RdmaError::Misbehaved)
    }

    /// Whether a message can be sent now.
    pub(crate) fn can_send(&self, qp: &QueuePair) -> bool {
        qp.free() > 0 && self.sending.contains(&None)
    }

    /// Sends a message.
    ///
    /// # Panics
    /// If it [can't](Self::can_send) now.
    pub(crate) fn send(&mut self, qp: &mut QueuePair, message: &Message) -> Result<(), RdmaError> {
        let bytes = message.encode();
        let slot = self.sending.iter().position(Option::is_none).expect("asked before");
        let offset = at(SEND_AT + slot);
        self.messages.lease().copy_in(offset, &bytes).map_err(RdmaError::OutsideMemory)?;
        let part = Part { region: &self.messages, offset, len: bytes.len() as u32 };
        self.sending[slot] = Some(qp.post_send(part)?);
        Ok(())
    }

    /// An entry is done: was it one of these?
    pub(crate) fn sent(&mut self, entry: u64) -> bool {
        let slot = self.sending.iter_mut().find(|sending| **sending == Some(entry));
        slot.map(|slot| *slot = None).is_some()
    }

    /// The page that the peer may WRITE to and READ.
    pub(crate) fn scratch(&self) -> RemoteAddr {
        RemoteAddr { addr: self.scratch.addr(), rkey: self.scratch.rkey() }
    }

    /// This end's scratch page, to WRITE from.
    pub(crate) fn scratch_region(&self) -> &Arc<MemoryRegion> {
        &self.scratch
    }

    /// Where a READ's answer goes.
    pub(crate) fn sink(&self) -> Part<'_> {
        Part { region: &self.messages, offset: at(SINK_AT), len: MESSAGE_BYTES as u32 }
    }

    /// What the READ brought.
    pub(crate) fn sink_bytes(&self) -> Result<[u8; MESSAGE_BYTES], RdmaError> {
        let mut bytes = [0; MESSAGE_BYTES];
        let copied = self.messages.lease().copy_out(at(SINK_AT), &mut bytes);
        copied.map(|()| bytes).map_err(RdmaError::OutsideMemory)
    }
}

fn post_receive(qp: &mut QueuePair, slot: usize) -> Result<(), RdmaError> {
    qp.post_receive(slot, at(slot), MESSAGE_BYTES as u32)
}

fn at(slot: usize) -> u64 {
    (slot * MESSAGE_BYTES) as u64
}

pub(crate) fn no_memory(error: BackingError) -> RdmaError {
    match error {
        BackingError::Host { call, source } => RdmaError::Call { call, source },
        _ => RdmaError::OutsideMemory(RegionError::OutOfRange {
            offset: 0,
            len: at(SLOTS),
            region_bytes: 0,
        }),
    }
}
