//! The control protocol: what both agents say to each other beside the guest's memory.
//!
//! ```text
//!  0       4   5    6     8           12          16
//! +-------+---+----+-----+-----------+-----------+--------------+-----------+
//! | PFRY  | v |kind|flags| header len| body len  | header: JSON | body: raw |
//! +-------+---+----+-----+-----------+-----------+--------------+-----------+
//!   magic   1   u8   u16   u32 LE      u32 LE      one object     bitmap, state
//! ```
//!
//! Sans-IO: bytes in, messages out. Versioned from its first byte; kinds of 128 and above may be
//! ignored by who does not know them; header fields nobody here knows are ignored too, unless the
//! header's `required` names them. Guest memory never travels here.

mod cut;
mod frame;
mod message;
mod offer;
mod queues;
mod recover;
mod ticket;

pub use cut::{Heard, LanesLost, NewLanes, Rejoin};
pub use frame::{Decoder, FrameError, MAGIC, VERSION, encode};
pub use message::{
    Abort, AbortReason, DigestReport, Hello, Message, MessageKind, RoundStart, Running, Welcome,
};
pub use offer::{
    Choice, LaneAddress, LaneOffer, LaneTicket, Offer, Refused, RegionOffer, SourceLimits,
};
pub use queues::{CoreUse, LanePlaced, LanesPlaced, NicQueues, QueueCore};
pub use recover::{Recover, Recovered, Word};
pub use ticket::Ticket;
