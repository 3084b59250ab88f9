//! What the agents of this world say beside the machines' own words, and messages as numbers.

use std::hash::{Hash, Hasher};

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{
    AbortReason, Choice, Hello, LaneOffer, LaneTicket, Message, Offer, RegionOffer, SourceLimits,
    Ticket, Welcome,
};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::{RegionIndex, SessionId};
use pageferry_datapath::lane::LanePath;
use pageferry_datapath::source::Failure;

use crate::world::PAGES;

/// A set of pages, one bit each.
pub(crate) type Pages = u8;

pub(crate) fn set_of(pages: Pages) -> DirtySet {
    let mut set = DirtySet::new([(PAGES as u64, 4096)]);
    for page in (0..PAGES).filter(|page| pages >> page & 1 == 1) {
        let offset = page as u64 * 4096;
        set.set_extent(Extent { region: RegionIndex(0), offset, len: 4096 }).expect("a page");
    }
    set
}

pub(crate) fn pages_of(set: &DirtySet) -> Pages {
    let bitmap = set.get(RegionIndex(0)).expect("one region");
    (0..PAGES).filter(|page| bitmap.contains(*page as u64)).fold(0, |mask, page| mask | 1 << page)
}

pub(crate) fn hello() -> Hello {
    let name = String::new;
    Hello { session: SessionId(7), software: name(), host: name(), boot_id: name(), rejoins: false }
}

pub(crate) fn welcome() -> Welcome {
    let name = String::new;
    Welcome { software: name(), host: name(), boot_id: name(), rejoin_key: None }
}

pub(crate) fn offer(verify: bool) -> Offer {
    let region = RegionOffer {
        name: String::new(),
        bytes: PAGES as u64 * 4096,
        page_bytes: 4096,
        backing: String::new(),
        populated_bytes: 0,
    };
    Offer {
        regions: vec![region],
        monitor: String::new(),
        machine: String::new(),
        lanes: LaneOffer {
            count: None,
            paths: Vec::new(),
            cpus: 1,
            encrypt: false,
            codecs: Vec::new(),
            nics: 0,
            rss: false,
            holes: false,
        },
        tracker: String::new(),
        target_qmp: None,
        verify,
        limits: SourceLimits { downtime_ms: 50 },
    }
}

pub(crate) fn choice() -> Choice {
    let lane = LaneTicket {
        path: LanePath::TcpPlain,
        ticket: Ticket([0; 32]),
        cpu: None,
        over_tcp: None,
        beside_rdma: None,
    };
    Choice {
        lanes: vec![lane],
        refused: Vec::new(),
        rdma_port: None,
        codecs: Vec::new(),
        addresses: Vec::new(),
        queues: Vec::new(),
        holes: false,
    }
}

pub(crate) fn failure() -> Failure {
    Failure { reason: AbortReason::HostFailed, by_peer: false, text: String::new(), hint: None }
}

/// What of a message makes a difference to who hears it.
pub(crate) fn hash_message(message: &Message, hasher: &mut impl Hasher) {
    message.kind().hash(hasher);
    match message {
        Message::RoundStart(start) => (start.round, start.last, &start.bitmap).hash(hasher),
        Message::RoundEnd(round) | Message::RoundClosed(round) => round.hash(hasher),
        Message::DigestReport(report) => report.digest.hash(hasher),
        Message::DeviceState(bytes) => bytes.hash(hasher),
        _ => {}
    }
}
