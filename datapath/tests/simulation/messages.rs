//! Messages as the simulated agents send them, and as a hostile peer makes them up.

use pageferry_datapath::control::{
    Abort, AbortReason, Choice, DigestReport, Heard, Hello, LaneOffer, LaneTicket, LanesLost,
    LanesPlaced, Message, MessageKind, NewLanes, Offer, Recover, Recovered, RegionOffer, Rejoin,
    RoundStart, Running, SourceLimits, Ticket, Welcome, Word,
};
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::ids::{RoundIndex, SessionId};
use pageferry_datapath::lane::LanePath;

use crate::pages::{SHAPE, set_of};
use crate::random::Random;

pub(crate) fn hello() -> Hello {
    let name = String::new;
    Hello { session: SessionId(7), software: name(), host: name(), boot_id: name(), rejoins: false }
}

pub(crate) fn welcome() -> Welcome {
    let name = String::new;
    Welcome { software: name(), host: name(), boot_id: name(), rejoin_key: None }
}

pub(crate) fn offer(verify: bool) -> Offer {
    let region = |(pages, page_bytes): (u64, u64)| RegionOffer {
        name: String::new(),
        bytes: pages * page_bytes,
        page_bytes,
        backing: String::new(),
        populated_bytes: 0,
    };
    Offer {
        regions: SHAPE.into_iter().map(region).collect(),
        monitor: String::new(),
        machine: String::new(),
        lanes: LaneOffer {
            count: None,
            paths: vec![LanePath::TcpPlain],
            cpus: 1,
            encrypt: false,
            codecs: vec![],
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

pub(crate) fn choice(lanes: usize) -> Choice {
    let lane = LaneTicket {
        path: LanePath::TcpPlain,
        ticket: Ticket([0; 32]),
        cpu: None,
        over_tcp: None,
        beside_rdma: None,
    };
    Choice {
        lanes: vec![lane; lanes],
        refused: Vec::new(),
        rdma_port: None,
        codecs: vec![],
        addresses: vec![],
        queues: vec![],
        holes: false,
    }
}

/// Any message of this kind that decodes, with numbers that may be wrong.
pub(crate) fn any(kind: MessageKind, random: &mut Random) -> Message {
    let round = RoundIndex(random.pick(&[0, 1, 2, 3, u32::MAX]));
    let bytes = |random: &mut Random| -> Vec<u8> {
        (0..1 + random.below(40)).map(|_| random.number() as u8).collect()
    };
    match kind {
        MessageKind::Hello => Message::Hello(hello()),
        MessageKind::Welcome => Message::Welcome(welcome()),
        MessageKind::Offer => Message::Offer(offer(random.chance(50))),
        MessageKind::Choice => Message::Choice(choice(1 + random.below(4))),
        MessageKind::Prepare => Message::Prepare,
        MessageKind::Prepared => Message::Prepared,
        MessageKind::RoundStart => {
            let bitmap = match random.chance(50) {
                true => set_of([random.below(4)]).encode(),
                false => bytes(random),
            };
            Message::RoundStart(RoundStart { round, last: random.chance(50), bitmap })
        }
        MessageKind::RoundEnd => Message::RoundEnd(round),
        MessageKind::RoundClosed => Message::RoundClosed(round),
        MessageKind::Verify => Message::Verify,
        MessageKind::DigestReport => {
            let digest = match random.chance(50) {
                true => MemoryDigest::new(vec![vec![random.number()]]).encode(),
                false => bytes(random),
            };
            Message::DigestReport(DigestReport { took_us: random.number(), digest })
        }
        MessageKind::DeviceState => Message::DeviceState(bytes(random)),
        MessageKind::DeviceStateEnd => Message::DeviceStateEnd,
        MessageKind::ReturnPath => Message::ReturnPath(bytes(random)),
        MessageKind::Ready => Message::Ready,
        MessageKind::Commit => Message::Commit,
        MessageKind::Running => Message::Running(Running {
            load_us: random.number(),
            resume_us: random.number(),
            late_us: random.number(),
            cpu_us: random.number(),
        }),
        MessageKind::Abort => {
            Message::Abort(Abort { reason: AbortReason::Other, text: String::new(), hint: None })
        }
        // What follows is the agents' own: a peer that sends it where none is due is refused.
        MessageKind::Rejoin => {
            let (session, key) = (hello().session, Ticket([0; 32]));
            Message::Rejoin(Rejoin { session, key, received: random.number() })
        }
        MessageKind::Rejoined => Message::Rejoined(Heard { received: random.number() }),
        MessageKind::Heard => Message::Heard(Heard { received: random.number() }),
        MessageKind::LanesLost => {
            Message::LanesLost(LanesLost { round: Some(round), paths: Vec::new() })
        }
        MessageKind::NewLanes => {
            let (choice, placed) = (choice(1), bytes(random));
            Message::NewLanes(NewLanes { choice, round_placed: random.chance(50), placed })
        }
        MessageKind::Recover => {
            Message::Recover(Recover { session: hello().session, word: Word::None })
        }
        MessageKind::Recovered => Message::Recovered(Recovered { word: Word::None }),
        MessageKind::LanesPlaced => Message::LanesPlaced(LanesPlaced::default()),
    }
}
