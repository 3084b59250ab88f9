//! The wire of blocking `sendmsg` and `recvmsg`: works on every host, and copies.
//!
//! Owned by one lane's worker. One system call moves a whole batch, unless the kernel interrupts
//! it: the call returns early after the socket's timeout, which is the tick at which a lane without
//! progress is noticed.

use std::os::fd::AsFd;

use crate::sys::{self, Order, Parcel};
use crate::wire::{Line, Stall, WireError};

/// A connection moved by plain system calls.
#[derive(Debug)]
pub(crate) struct PlainWire {
    syscalls: u64,
    spare: Option<Box<Parcel>>,
}

impl PlainWire {
    pub(crate) fn new() -> Self {
        Self { syscalls: 0, spare: None }
    }

    pub(crate) fn syscalls(&self) -> u64 {
        self.syscalls
    }

    pub(crate) fn blank(&mut self) -> Box<Parcel> {
        self.spare.take().unwrap_or_else(Parcel::new)
    }

    /// Sends all of a parcel.
    pub(crate) fn send(&mut self, line: &Line, mut parcel: Box<Parcel>) -> Result<(), WireError> {
        let mut stall = Stall::new(line.progress_wait());
        if let Some(mut sealed) = line.sealed() {
            while !parcel.is_done() {
                sealed.seal(&mut parcel).map_err(|error| WireError::of("TLS", error))?;
                line.flush(&mut sealed, &mut stall)?;
            }
        }
        while !parcel.is_done() {
            line.check_stop()?;
            self.syscalls += 1;
            match sys::send_parcel(line.socket().as_fd(), &mut parcel) {
                Ok(_) => stall.moved(),
                Err(error) => stall.forgive("sendmsg", error)?,
            }
        }
        parcel.clear(Order::HeaderFirst);
        self.spare = Some(parcel);
        Ok(())
    }

    /// Receives all of a parcel. An `idle` line may be silent until its first byte.
    pub(crate) fn receive(
        &mut self,
        line: &Line,
        mut parcel: Box<Parcel>,
        idle: bool,
    ) -> Result<Box<Parcel>, WireError> {
        let mut stall = Stall::new(line.progress_wait());
        while let Some(mut sealed) = line.sealed() {
            line.check_stop()?;
            sealed.open(&mut parcel).map_err(|error| WireError::of("TLS", error))?;
            if parcel.is_done() {
                return Ok(parcel);
            }
            if idle && parcel.done() == 0 {
                stall.moved();
            }
            line.take_in(&mut sealed, &mut stall)?;
        }
        while !parcel.is_done() {
            line.check_stop()?;
            self.syscalls += 1;
            match sys::receive_parcel(line.socket().as_fd(), &mut parcel) {
                Ok(0) => return Err(WireError::PeerClosed),
                Ok(_) => stall.moved(),
                Err(error) => {
                    if idle && parcel.done() == 0 {
                        stall.moved();
                    }
                    stall.forgive("recvmsg", error)?;
                }
            }
        }
        Ok(parcel)
    }
}
