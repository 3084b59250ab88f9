//! The greeting of a data connection: hello from the source, reply from the target.
//!
//! The same port takes control connections; the first four bytes tell which it is
//! ([`Greeting::of`]). The ticket is a secret that the target gave out on the authenticated control
//! connection, one per lane: it binds this connection to that session.

use xxhash_rust::xxh3::xxh3_64;

use super::{FramingError, VERSION, u16_at, u32_at};
pub use crate::control::Ticket;
use crate::ids::{LaneId, SessionId};

/// Size of the source's hello.
pub const HELLO_BYTES: usize = 64;
/// Size of the target's reply.
pub const REPLY_BYTES: usize = 16;
/// Bytes that tell a data connection from a control connection.
pub const MAGIC_BYTES: usize = 4;

const LANE_MAGIC: [u8; MAGIC_BYTES] = *b"PFLN";
const CONTROL_MAGIC: [u8; MAGIC_BYTES] = *b"PFRY";
const REPLY_MAGIC: [u8; 4] = *b"PFLR";

/// What kind of connection a peer opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// A data connection: a [`Hello`] follows, beginning with these bytes.
    Lane,
    /// A control connection.
    Control,
    /// A TLS handshake; what is inside says which of the two it is.
    Tls,
}

impl Greeting {
    /// Tells by a connection's first bytes; `None` if it is neither.
    pub fn of(magic: [u8; MAGIC_BYTES]) -> Option<Self> {
        match magic {
            LANE_MAGIC => Some(Self::Lane),
            CONTROL_MAGIC => Some(Self::Control),
            // A handshake record of any version, as ClientHello comes in one.
            [22, 3, ..] => Some(Self::Tls),
            _ => None,
        }
    }
}

/// The first bytes on a data connection, from the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The session the lane belongs to.
    pub session: SessionId,
    /// Its number in the session.
    pub lane: LaneId,
    /// What the target gave out for this lane.
    pub ticket: Ticket,
}

impl Hello {
    /// `"PFLN" | version u16 | lane u16 | session u128 | ticket 32 bytes | 0 u32 | checksum u32`.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..4].copy_from_slice(&LANE_MAGIC);
        bytes[4..6].copy_from_slice(&u16::from(VERSION).to_le_bytes());
        bytes[6..8].copy_from_slice(&self.lane.0.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.session.0.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.ticket.0);
        let checksum = xxh3_64(&bytes[..60]) as u32;
        bytes[60..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The inverse of [`Hello::encode`]. The ticket is only carried over, not judged.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, FramingError> {
        if bytes[0..4] != LANE_MAGIC {
            return Err(FramingError::Magic);
        }
        let version = u16_at(bytes, 4);
        if version != u16::from(VERSION) {
            return Err(FramingError::Version { version });
        }
        if xxh3_64(&bytes[..60]) as u32 != u32_at(bytes, 60) {
            return Err(FramingError::Checksum);
        }
        if bytes[56..60] != [0; 4] {
            return Err(FramingError::Reserved);
        }
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[8..24]);
        let mut ticket = [0; 32];
        ticket.copy_from_slice(&bytes[24..56]);
        Ok(Self {
            session: SessionId(u128::from_le_bytes(session)),
            lane: LaneId(u16_at(bytes, 6)),
            ticket: Ticket(ticket),
        })
    }
}

/// Why a target refuses a data connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u16)]
pub enum Refusal {
    /// The framing version is another; the reply's version field says which is spoken.
    #[error("another framing version")]
    Version = 1,
    /// No session of that id, or the ticket is not this lane's. One code for both, so that a
    /// stranger learns nothing.
    #[error("unknown session or ticket")]
    Ticket = 2,
    /// A lane of that number is connected already.
    #[error("lane is connected already")]
    Duplicate = 3,
    /// The target takes no more lanes.
    #[error("too many lanes")]
    Busy = 4,
    /// The target could not set the lane up.
    #[error("the target could not set the lane up")]
    Host = 5,
}

/// The target's answer to a [`Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Frames may follow.
    Accepted,
    /// The target closes the connection.
    Refused(Refusal),
}

impl Reply {
    /// `"PFLR" | version u16 | code u16 | 0 u32 | checksum u32`; code 0 accepts.
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        let code = match self {
            Self::Accepted => 0,
            Self::Refused(refusal) => *refusal as u16,
        };
        let mut bytes = [0; REPLY_BYTES];
        bytes[0..4].copy_from_slice(&REPLY_MAGIC);
        bytes[4..6].copy_from_slice(&u16::from(VERSION).to_le_bytes());
        bytes[6..8].copy_from_slice(&code.to_le_bytes());
        let checksum = xxh3_64(&bytes[..12]) as u32;
        bytes[12..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The inverse of [`Reply::encode`].
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<Self, FramingError> {
        if bytes[0..4] != REPLY_MAGIC {
            return Err(FramingError::Magic);
        }
        if xxh3_64(&bytes[..12]) as u32 != u32_at(bytes, 12) {
            return Err(FramingError::Checksum);
        }
        let version = u16_at(bytes, 4);
        if version != u16::from(VERSION) {
            return Err(FramingError::Version { version });
        }
        if bytes[8..12] != [0; 4] {
            return Err(FramingError::Reserved);
        }
        match u16_at(bytes, 6) {
            0 => Ok(Self::Accepted),
            1 => Ok(Self::Refused(Refusal::Version)),
            2 => Ok(Self::Refused(Refusal::Ticket)),
            3 => Ok(Self::Refused(Refusal::Duplicate)),
            4 => Ok(Self::Refused(Refusal::Busy)),
            5 => Ok(Self::Refused(Refusal::Host)),
            kind => Err(FramingError::Kind { kind }),
        }
    }
}
