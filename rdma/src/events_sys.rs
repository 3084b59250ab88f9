//! What a device tells outside of completions: libibverbs's asynchronous events.
//!
//! Nobody waits for them. They are read when something has gone wrong, to name its cause: a port
//! that went down shows only as retries exceeded, or as silence; what a peer did that it may not
//! shows on iWARP only as a closed connection. Events that one lane reads are kept for the others
//! of the same device.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdma_sys::{ibv_ack_async_event, ibv_async_event, ibv_context, ibv_get_async_event, ibv_qp};

use crate::error::{QueuePairEvent, RdmaError};
use crate::limits::EVENTS_MAX;
use crate::sys::set_nonblocking;

/// Numbers of `enum ibv_event_type`; rdma-sys has it as a Rust enum, which must not hold a number
/// it does not know.
const QP_FATAL: u32 = 1;
const QP_REQ_ERR: u32 = 2;
const QP_ACCESS_ERR: u32 = 3;
const DEVICE_FATAL: u32 = 8;
const PORT_ERR: u32 = 10;

const _: () = {
    assert!(size_of::<ibv_async_event>() == 16);
    assert!(std::mem::offset_of!(ibv_async_event, event_type) == 8);
};

/// Something that explains a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Of the queue pair at this address, which is only compared.
    QueuePair(usize, QueuePairEvent),
    Port(u32),
    Device,
}

/// The events of one device since it was opened.
#[derive(Debug, Default)]
pub(crate) struct DeviceEvents {
    troubles: Mutex<VecDeque<(u64, Trouble)>>,
}

impl DeviceEvents {
    /// Makes reading them not wait.
    ///
    /// # Safety
    /// The context is open.
    pub(crate) unsafe fn prepare(context: NonNull<ibv_context>) -> Result<Self, RdmaError> {
        // SAFETY: the caller's promise; the descriptor is open for as long.
        let fd = unsafe { BorrowedFd::borrow_raw((*context.as_ptr()).async_fd) };
        set_nonblocking(fd, "a device's events")?;
        Ok(Self::default())
    }

    /// The number of the next event; what came before it is not about who asks now.
    ///
    /// # Safety
    /// The context is open.
    pub(crate) unsafe fn mark(&self, context: NonNull<ibv_context>) -> u64 {
        // SAFETY: the caller's promise.
        let troubles = unsafe { self.read(context) };
        troubles.back().map_or(0, |(number, _)| number + 1)
    }

    /// What explains the failure of this queue pair; events since `mark` count.
    ///
    /// # Safety
    /// The context is open.
    pub(crate) unsafe fn explain(
        &self,
        context: NonNull<ibv_context>,
        device: &str,
        qp: *mut ibv_qp,
        mark: u64,
    ) -> Option<RdmaError> {
        // SAFETY: the caller's promise.
        let troubles = unsafe { self.read(context) };
        let since = troubles.iter().filter(|(number, _)| *number >= mark);
        let mut found = None;
        for (_, trouble) in since {
            found = match *trouble {
                Trouble::QueuePair(of, reason) if of == qp.addr() => {
                    Some(RdmaError::QueuePair { reason })
                }
                Trouble::QueuePair(..) => found,
                Trouble::Port(port) => Some(RdmaError::PortDown { device: device.into(), port }),
                Trouble::Device => return Some(RdmaError::DeviceFatal { device: device.into() }),
            };
        }
        found
    }

    /// Reads what has come, without waiting.
    ///
    /// # Safety
    /// The context is open.
    unsafe fn read(
        &self,
        context: NonNull<ibv_context>,
    ) -> MutexGuard<'_, VecDeque<(u64, Trouble)>> {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut event = MaybeUninit::<ibv_async_event>::zeroed();
            // SAFETY: the context is open, its descriptor does not block, `event` is writable.
            if unsafe { ibv_get_async_event(context.as_ptr(), event.as_mut_ptr()) } != 0 {
                return troubles;
            }
            let raw = event.as_mut_ptr();
            // SAFETY:
            // - the call has filled it in; the number is read as one, whatever it is, at the offset
            //   checked above.
            // - all variants of the element are plain numbers or pointers, of which those not set
            //   are zero.
            // - it is acknowledged once, and its queue pair is only compared afterwards.
            let (kind, qp, port) = unsafe {
                let kind = raw.cast::<u32>().add(2).read();
                let (qp, port) = ((*raw).element.qp.addr(), (*raw).element.port_num);
                ibv_ack_async_event(raw);
                (kind, qp, port.unsigned_abs())
            };
            let trouble = match kind {
                QP_FATAL => Trouble::QueuePair(qp, QueuePairEvent::Fatal),
                QP_REQ_ERR => Trouble::QueuePair(qp, QueuePairEvent::Request),
                QP_ACCESS_ERR => Trouble::QueuePair(qp, QueuePairEvent::Access),
                DEVICE_FATAL => Trouble::Device,
                PORT_ERR => Trouble::Port(port),
                _ => continue,
            };
            tracing::debug!(?trouble, "a device's event");
            let number = troubles.back().map_or(0, |(number, _)| number + 1);
            if troubles.len() == EVENTS_MAX {
                troubles.pop_front();
            }
            troubles.push_back((number, trouble));
        }
    }
}
