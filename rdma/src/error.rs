//! Why something over RDMA failed: every status and event by name, unknown ones by number.

use std::fmt;
use std::io;

use pageferry_datapath::framing::FramingError;
use pageferry_datapath::framing::hello::Refusal;
use pageferry_datapath::ids::LaneId;
use pageferry_datapath::lane::{LaneError, LanePath};
use pageferry_datapath::region::RegionError;

/// What a completion says (`enum ibv_wc_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// A message was longer than the buffer for it.
    LocalLength,
    /// A work request that the queue pair can't do.
    LocalOperation,
    /// Local memory is not registered for it.
    LocalProtection,
    /// Given back undone: the queue pair was in error before.
    Flushed,
    /// An answer made no sense.
    BadResponse,
    /// Local memory may not be written.
    LocalAccess,
    /// The peer can't do this request.
    RemoteInvalidRequest,
    /// The peer's memory is not registered, or not for this.
    RemoteAccess,
    /// The peer failed while doing it.
    RemoteOperation,
    /// No acknowledgement, however often it was sent.
    RetryExceeded,
    /// The peer never had a receive ready.
    ReceiverNotReady,
    /// The peer aborted the operation.
    RemoteAborted,
    /// The device is in a state it does not come out of.
    Fatal,
    /// No response in time.
    ResponseTimeout,
    /// Something the device has no other word for.
    General,
    /// Another number.
    Other(u32),
}

impl Status {
    /// By its number; 0 is success and no `Status`.
    pub fn from_number(number: u32) -> Self {
        match number {
            1 => Self::LocalLength,
            2 => Self::LocalOperation,
            4 => Self::LocalProtection,
            5 => Self::Flushed,
            7 => Self::BadResponse,
            8 => Self::LocalAccess,
            9 => Self::RemoteInvalidRequest,
            10 => Self::RemoteAccess,
            11 => Self::RemoteOperation,
            12 => Self::RetryExceeded,
            13 => Self::ReceiverNotReady,
            16 => Self::RemoteAborted,
            19 => Self::Fatal,
            20 => Self::ResponseTimeout,
            21 => Self::General,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LocalLength => "local length error",
            Self::LocalOperation => "local queue pair operation error",
            Self::LocalProtection => "local protection error",
            Self::Flushed => "flushed",
            Self::BadResponse => "bad response",
            Self::LocalAccess => "local access error",
            Self::RemoteInvalidRequest => "remote invalid request",
            Self::RemoteAccess => "remote access error",
            Self::RemoteOperation => "remote operation error",
            Self::RetryExceeded => "retries exceeded",
            Self::ReceiverNotReady => "receiver not ready",
            Self::RemoteAborted => "aborted by the peer",
            Self::Fatal => "fatal device error",
            Self::ResponseTimeout => "response timed out",
            Self::General => "general error",
            Self::Other(number) => return write!(f, "status {number}"),
        })
    }
}

/// What was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// An RDMA WRITE, RDMA READ or SEND: the status of one in error does not say which.
    Request,
    /// A receive.
    Receive,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "a request",
            Self::Receive => "a receive",
        })
    }
}

/// What the connection manager tells (`enum rdma_cm_event_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the manual, rdma_get_cm_event(3).
pub enum CmEventKind {
    AddressResolved,
    AddressError,
    RouteResolved,
    RouteError,
    ConnectRequest,
    ConnectError,
    Unreachable,
    Rejected,
    Established,
    Disconnected,
    DeviceRemoval,
    AddressChange,
    TimeWaitExit,
    Other(u32),
}

impl CmEventKind {
    /// By its number.
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Self::AddressResolved,
            1 => Self::AddressError,
            2 => Self::RouteResolved,
            3 => Self::RouteError,
            4 => Self::ConnectRequest,
            6 => Self::ConnectError,
            7 => Self::Unreachable,
            8 => Self::Rejected,
            9 => Self::Established,
            10 => Self::Disconnected,
            11 => Self::DeviceRemoval,
            14 => Self::AddressChange,
            15 => Self::TimeWaitExit,
            other => Self::Other(other),
        }
    }
}

/// Why a device ended a queue pair by itself, as its asynchronous event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueuePairEvent {
    /// `IBV_EVENT_QP_FATAL`.
    Fatal,
    /// `IBV_EVENT_QP_REQ_ERR`: the peer asked for what can't be.
    Request,
    /// `IBV_EVENT_QP_ACCESS_ERR`: the peer reached for memory that it has no key for.
    Access,
}

impl fmt::Display for QueuePairEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fatal => "it can't go on",
            Self::Request => "the peer's request was invalid",
            Self::Access => "the peer reached for memory that it has no key for",
        })
    }
}

/// Why something over RDMA failed.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// A call of libibverbs or librdmacm failed.
    #[error("{call} failed")]
    Call {
        /// The call's name.
        call: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// Something posted ended badly.
    #[error("{operation} ended with {status} (vendor code {vendor:#x})")]
    Completion {
        /// What was posted.
        operation: Operation,
        /// How it ended.
        status: Status,
        /// The provider's own number.
        vendor: u32,
    },
    /// No RDMA device leads to that address.
    #[error("no RDMA device here leads to {to}")]
    NoDevice {
        /// The address.
        to: std::net::SocketAddr,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The address has no route that RDMA could take.
    #[error("no RDMA route to {to}")]
    NoRoute {
        /// The address.
        to: std::net::SocketAddr,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// Nothing answered.
    #[error("the peer can't be reached by RDMA (status {status})")]
    Unreachable {
        /// An errno or the connection manager's reason.
        status: i32,
    },
    /// The peer's connection manager refused, not our program: nobody listens there.
    #[error("the peer's host rejected the RDMA connection (status {status})")]
    Rejected {
        /// An errno or the connection manager's reason.
        status: i32,
    },
    /// Our program at the peer refused.
    #[error("refused by the target: {refusal}")]
    Refused {
        /// Its reason.
        refusal: Refusal,
    },
    /// The connection manager told what is not expected here.
    #[error("the connection manager reports {event:?} (status {status})")]
    Event {
        /// What it told.
        event: CmEventKind,
        /// Its status.
        status: i32,
    },
    /// The peer closed the connection, or died.
    #[error("the peer closed the RDMA connection")]
    PeerClosed,
    /// A port of the device went down, and what was under way did not get through.
    #[error("port {port} of RDMA device {device} went down")]
    PortDown {
        /// The device.
        device: String,
        /// Its port.
        port: u32,
    },
    /// The device does not work any more.
    #[error("RDMA device {device} reports a fatal error")]
    DeviceFatal {
        /// The device.
        device: String,
    },
    /// The device ended the queue pair.
    #[error("the device ended the queue pair: {reason}")]
    QueuePair {
        /// What it said.
        reason: QueuePairEvent,
    },
    /// The target can't register the memory that was to be written.
    #[error("the target can't register slice {slice} of guest memory")]
    KeyRefused {
        /// Which slice.
        slice: u32,
        /// Its errno.
        #[source]
        source: io::Error,
    },
    /// The device is being taken away.
    #[error("the RDMA device was removed")]
    DeviceRemoved,
    /// The address the connection was made with has moved to another interface.
    #[error("the address of the RDMA connection has moved")]
    AddressChanged,
    /// More memory would be locked than allowed.
    #[error("{needed_bytes} bytes have to be locked in memory, the limit is {limit_bytes}")]
    Memlock {
        /// What is needed.
        needed_bytes: u64,
        /// `RLIMIT_MEMLOCK`.
        limit_bytes: u64,
    },
    /// Memory could not be registered.
    #[error("registering {len} bytes of guest memory failed")]
    Register {
        /// Size of the slice.
        len: u64,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A page written to the peer and read back was not the same.
    #[error("a scratch page came back changed")]
    Probe,
    /// No progress.
    #[error("no progress for {waited_ms} ms")]
    Stalled {
        /// For how long.
        waited_ms: u64,
    },
    /// This side was told to stop.
    #[error("stopped")]
    Stopped,
    /// The peer sent what is not ours.
    #[error("the peer broke the lane's protocol")]
    Misbehaved(#[source] FramingError),
    /// Another barrier was acknowledged than the one under way, or another key given.
    #[error("the peer answered what was not asked")]
    WrongAnswer,
    /// The target cuts guest memory into slices of a size that can't be.
    #[error("the target registers guest memory in slices of {bytes} bytes")]
    SliceBytes {
        /// Its number.
        bytes: u64,
    },
    /// A range outside guest memory.
    #[error("work outside guest memory")]
    OutsideMemory(#[source] RegionError),
}

impl RdmaError {
    /// The calling thread's `errno` of a call that has just failed.
    pub(crate) fn last(call: &'static str) -> Self {
        Self::Call { call, source: io::Error::last_os_error() }
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Memlock { needed_bytes, .. } => {
                format!("prlimit --pid $$ --memlock={needed_bytes}:{needed_bytes}, or LimitMEMLOCK=infinity in the unit")
            }
            Self::NoDevice { .. } | Self::NoRoute { .. } => {
                "give the target an address of a network interface with an RDMA device; `rdma link` lists them".into()
            }
            Self::Rejected { .. } => "is `pageferry target` running there, with RDMA?".into(),
            Self::Unreachable { .. } => {
                "RoCE v2 needs UDP port 4791 open on the way; check the GIDs' address family".into()
            }
            Self::Completion { status: Status::RetryExceeded, .. } => {
                "the link lost packets or went down; RoCE wants priority flow control or ECN".into()
            }
            Self::Completion { status: Status::RemoteAccess, .. } => {
                "look at the target agent's output: its memory is not registered any more".into()
            }
            Self::Completion { status: Status::ReceiverNotReady, .. } => {
                "the target agent does not answer: is its host out of CPU or memory?".into()
            }
            Self::Completion { status: Status::Fatal, .. } | Self::DeviceFatal { .. } => {
                "look at dmesg; the device may need a reset (devlink dev reload)".into()
            }
            Self::QueuePair { .. } | Self::Completion { .. } => "look at dmesg, and at the other agent's output".into(),
            Self::PortDown { device, .. } => {
                format!("rdma link show {device}; look at the cable, the switch, `ip link`")
            }
            Self::DeviceRemoved => {
                "`rdma link` lists the devices left; was a driver unloaded or reloaded?".into()
            }
            Self::AddressChanged => {
                "the address moved to another interface (a bond's failover?): start again".into()
            }
            Self::Event { .. } | Self::Probe => {
                "leave RDMA out with --transport tcp; dmesg and `rdma link` on both hosts tell more"
                    .into()
            }
            Self::KeyRefused { source, .. } if source.raw_os_error() == Some(libc::ENOMEM) => {
                "at the target: raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity in the unit)".into()
            }
            Self::KeyRefused { .. } => "look at the target agent's output".into(),
            Self::Register { source, .. } if source.raw_os_error() == Some(libc::ENOMEM) => {
                "raise RLIMIT_MEMLOCK, or use --pin touched".into()
            }
            _ => return None,
        })
    }

    /// As a lane reports it; `None` where it was told to stop.
    pub fn into_lane_error(self, lane: LaneId) -> Option<LaneError> {
        Some(match self {
            Self::Stopped => return None,
            Self::PeerClosed => LaneError::PeerClosed { lane },
            Self::Refused { refusal } => LaneError::Refused { lane, refusal },
            Self::WrongAnswer => LaneError::WrongAck { lane },
            Self::Misbehaved(source) => LaneError::PeerMisbehaved { lane, source },
            Self::OutsideMemory(source) => LaneError::OutsideMemory { lane, source },
            Self::Stalled { waited_ms } => LaneError::Timeout { lane, waited_ms },
            Self::Call { call, source } => LaneError::Host { lane, call, source },
            other => {
                let hint = other.hint();
                LaneError::Transport { lane, path: LanePath::Rdma, hint, source: Box::new(other) }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_numbers_are_kept() {
        assert_eq!(Status::from_number(99).to_string(), "status 99");
        assert_eq!(CmEventKind::from_number(77), CmEventKind::Other(77));
        assert_eq!(Status::from_number(10), Status::RemoteAccess);
    }
}
