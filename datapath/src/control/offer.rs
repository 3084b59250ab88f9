//! What the source offers and the target chooses of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::frame::MalformedWhat;
use super::queues::NicQueues;
use super::ticket::Ticket;
use crate::bitmap::DirtySet;
use crate::codec::CodecName;
use crate::lane::LanePath;
use crate::limits;

/// What the source has and asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Regions, in the order that numbers them.
    pub regions: Vec<RegionOffer>,
    /// The monitor's name and version.
    pub monitor: String,
    /// The machine type, which both sides must share.
    pub machine: String,
    /// The lanes the source would open.
    pub lanes: LaneOffer,
    /// How writes are tracked at the source, for the report.
    pub tracker: String,
    /// QMP socket at the target, when the target was not started with one.
    pub target_qmp: Option<String>,
    /// Digests will be compared inside the pause.
    pub verify: bool,
    /// What the source was told about time.
    pub limits: SourceLimits,
}

impl Offer {
    /// Whether a dirty bitmap of all regions fits into one message, whatever is dirty.
    pub fn bitmap_fits(&self) -> bool {
        let pages = |region: &RegionOffer| region.bytes / region.page_bytes.max(1);
        let bytes = self.regions.iter().map(|region| DirtySet::encoded_max_bytes(pages(region)));
        bytes.fold(0, u64::saturating_add) <= limits::CONTROL_BODY_BYTES_MAX
    }
}

/// One region of the offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionOffer {
    /// The monitor's name of it (RAMBlock id), equal on both sides.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Tracking granule in bytes: a power of two from 4096.
    pub page_bytes: u64,
    /// `tmpfs`, `memfd`, `hugetlbfs`: for people and for refusals.
    pub backing: String,
    /// Bytes that are not holes, when the offer was made.
    pub populated_bytes: u64,
}

/// The lanes the source would open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneOffer {
    /// How many; `None` leaves it to the target.
    pub count: Option<u16>,
    /// Transports the source can speak, best first.
    pub paths: Vec<LanePath>,
    /// Cores the source may use.
    pub cpus: u16,
    /// They are encrypted, or not opened.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypt: bool,
    /// Codecs the source would pack chunks with; none of a source that packs nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub codecs: Vec<CodecName>,
    /// NICs that the source could spread them over; 0 of one that does not.
    #[serde(default, skip_serializing_if = "is_none_or_one")]
    pub nics: u16,
    /// The source puts each on a receive queue of its own, and wants to be told where they arrived.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rss: bool,
    /// The source tells of holes, where the target takes them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holes: bool,
}

fn is_none_or_one(nics: &u16) -> bool {
    *nics <= 1
}

/// Times the target should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceLimits {
    /// Downtime target in milliseconds.
    pub downtime_ms: u64,
}

/// What will be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// One ticket for each lane to open.
    pub lanes: Vec<LaneTicket>,
    /// For everything of the offer that is not used, the reason.
    pub refused: Vec<Refused>,
    /// Where lanes over RDMA are taken, beside those over TCP: a port at the address that the
    /// control connection leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_port: Option<u16>,
    /// Of the codecs offered, those the target unpacks; none of a target that knows none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub codecs: Vec<CodecName>,
    /// Where lanes over TCP are taken, all at the port that the control connection leads to; none
    /// of a target that takes them nowhere but there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<LaneAddress>,
    /// How the NICs that take lanes spread them over queues, for a source that asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<NicQueues>,
    /// Lanes over TCP may carry holes, which the target frees.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holes: bool,
}

/// An address of the target that takes lanes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneAddress {
    /// Its NIC, by the target's name.
    pub device: String,
    /// The address.
    pub address: IpAddr,
    /// What the NIC's link carries, if it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_second: Option<u64>,
    /// Receive queues that flows are spread over; 1 without RSS.
    pub queues: u32,
    /// The NIC has an RDMA device, and lanes over RDMA are taken here too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rdma: bool,
}

/// The right to open one lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneTicket {
    /// Transport of this lane.
    pub path: LanePath,
    /// Shown by the data connection.
    pub ticket: Ticket,
    /// Core of the lane's worker at the target, if pinned.
    pub cpu: Option<u16>,
    /// The right to open the same lane over TCP, should RDMA not come about: each is good once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_tcp: Option<Ticket>,
    /// The right to open it over TCP while other lanes of the same choice are over RDMA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside_rdma: Option<Ticket>,
}

/// Something of the offer that is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// What.
    pub what: String,
    /// Why.
    pub reason: String,
}

/// Sizes that later code multiplies and allocates by are right from here on.
pub(super) fn checked_offer(offer: Offer) -> Result<Offer, MalformedWhat> {
    let mut guest_bytes = 0u64;
    for region in &offer.regions {
        let page_bytes = region.page_bytes;
        let sound = page_bytes.is_power_of_two()
            && (4096..=1 << 30).contains(&page_bytes)
            && region.bytes > 0
            && region.bytes % page_bytes == 0
            && region.populated_bytes <= region.bytes;
        guest_bytes = guest_bytes.saturating_add(region.bytes);
        if !sound {
            return Err(MalformedWhat::Fields);
        }
    }
    let regions = offer.regions.len();
    if regions == 0
        || regions > limits::REGIONS_MAX
        || guest_bytes > limits::GUEST_BYTES_MAX
        || !offer.bitmap_fits()
    {
        return Err(MalformedWhat::Fields);
    }
    Ok(offer)
}

pub(super) fn checked_choice(choice: Choice) -> Result<Choice, MalformedWhat> {
    let sound = (1..=limits::LANES_MAX).contains(&choice.lanes.len())
        && choice.queues.len() <= limits::RSS_NICS_MAX
        && choice.queues.iter().all(NicQueues::is_sound);
    if sound { Ok(choice) } else { Err(MalformedWhat::Fields) }
}
