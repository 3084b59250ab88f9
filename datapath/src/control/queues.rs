//! What is said of receive queues: how the target's NICs spread flows over them, and where its lanes
//! really arrived.
//!
//! The target tells (in [`Choice`](super::Choice)) because it receives; the source, which can choose
//! nothing but its own ports, chooses those. What became of it is told by the target too
//! ([`LanesPlaced`]), from its sockets: a table that was read is no proof of what a NIC does.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::limits;

/// How one NIC of the target spreads what it receives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicQueues {
    /// Its name, by the target.
    pub device: String,
    /// The addresses that this is true of.
    pub addresses: Vec<IpAddr>,
    /// Why it can't be told which queue a flow lands on; then there is nothing below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
    /// The key of the Toeplitz hash over addresses and ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "hex")]
    pub key: Vec<u8>,
    /// Queue by the hash's lowest bits: a power of two of entries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub table: Vec<u16>,
    /// The queues that lanes should land on, the best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<QueueCore>,
}

impl NicQueues {
    /// Whether later code may hash, look up and loop by it.
    pub(super) fn is_sound(&self) -> bool {
        let sizes = self.key.len() <= limits::RSS_KEY_BYTES_MAX
            && self.table.len() <= limits::RSS_TABLE_MAX
            && (self.table.is_empty() || self.table.len().is_power_of_two())
            && self.queues.len() <= limits::RSS_QUEUES_MAX
            && self.addresses.len() <= limits::RSS_ADDRESSES_MAX;
        // A queue that is in no entry is one that no port leads to: all of them would be tried.
        sizes && self.queues.iter().all(|it| self.table.contains(&it.queue))
    }
}

/// A receive queue and the core that it interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueCore {
    /// The queue.
    pub queue: u16,
    /// The core, where it is known and one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u16>,
}

/// Target, to a source that asked for it: where the lanes arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanesPlaced {
    /// Lanes over TCP that are open.
    pub lanes: Vec<LanePlaced>,
    /// How busy each core of the target was since the first lane was taken in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cores: Vec<CoreUse>,
}

impl LanesPlaced {
    pub(super) fn is_sound(&self) -> bool {
        self.lanes.len() <= limits::LANES_MAX && self.cores.len() <= limits::CORES_MAX
    }
}

/// One lane at the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanePlaced {
    /// Which.
    pub lane: u16,
    /// The NIC that has the address it came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The queue that key and table say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u16>,
    /// The kernel's number for the queue that its packets came from; `None` where it gives none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub napi: Option<u32>,
    /// The core that took its packets from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming_cpu: Option<u16>,
    /// The core of its worker, if that is pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u16>,
}

/// How busy a core was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreUse {
    /// The core.
    pub cpu: u16,
    /// Of its time, with everybody's work on it.
    pub percent: u8,
}

/// Bytes as hexadecimal digits.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let bad = || serde::de::Error::custom("a key is pairs of hexadecimal digits");
        let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
        // `from_str_radix` would take a sign.
        if text.len() % 2 != 0 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let pairs = text.as_bytes().chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            u8::from_str_radix(pair, 16).map_err(|_| bad())
        });
        pairs.collect()
    }
}
