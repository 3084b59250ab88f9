//! Messages: one well-filled example of each kind, and any that an honest peer could send.

use std::net::IpAddr;

use pageferry_datapath::codec::CodecName;
use pageferry_datapath::control::{
    Abort, AbortReason, Choice, CoreUse, DigestReport, Heard, Hello, LaneAddress, LaneOffer,
    LanePlaced, LaneTicket, LanesLost, LanesPlaced, Message, MessageKind, NewLanes, NicQueues,
    Offer, QueueCore, Recover, Recovered, Refused, RegionOffer, Rejoin, RoundStart, Running,
    SourceLimits, Ticket, Welcome, Word,
};
use pageferry_datapath::ids::{RoundIndex, SessionId};
use pageferry_datapath::lane::LanePath;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// One of each kind, in the order of their numbers.
pub(crate) fn examples() -> Vec<Message> {
    MessageKind::ALL.iter().map(|kind| example(*kind)).collect()
}

fn example(kind: MessageKind) -> Message {
    let (software, host, boot_id) = ("pageferry 0.1.0".into(), "blue".into(), "5f1c".into());
    match kind {
        MessageKind::Hello => {
            let session = SessionId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
            Message::Hello(Hello { session, software, host, boot_id, rejoins: false })
        }
        MessageKind::Welcome => {
            Message::Welcome(Welcome { software, host, boot_id, rejoin_key: None })
        }
        MessageKind::Offer => Message::Offer(offer()),
        MessageKind::Choice => Message::Choice(choice()),
        MessageKind::Prepare => Message::Prepare,
        MessageKind::RoundStart => Message::RoundStart(RoundStart {
            round: RoundIndex(3),
            last: true,
            bitmap: vec![0, 5, 1, 2, 3],
        }),
        MessageKind::RoundEnd => Message::RoundEnd(RoundIndex(3)),
        MessageKind::RoundClosed => Message::RoundClosed(RoundIndex(3)),
        MessageKind::Verify => Message::Verify,
        MessageKind::DigestReport => {
            Message::DigestReport(DigestReport { took_us: 1500, digest: (1..=16).collect() })
        }
        MessageKind::DeviceState => Message::DeviceState(vec![0xde, 0xad, 0xbe, 0xef]),
        MessageKind::DeviceStateEnd => Message::DeviceStateEnd,
        MessageKind::ReturnPath => Message::ReturnPath(vec![0x00, 0x04, 0x00, 0x04]),
        MessageKind::Ready => Message::Ready,
        MessageKind::Commit => Message::Commit,
        MessageKind::Running => Message::Running(Running {
            load_us: 3000,
            resume_us: 1000,
            late_us: 200,
            cpu_us: 250_000,
        }),
        MessageKind::Abort => Message::Abort(Abort {
            reason: AbortReason::VerificationFailed,
            text: "the memory at the target differs".into(),
            hint: Some("`pageferry probe` may tell what".into()),
        }),
        MessageKind::Prepared => Message::Prepared,
        MessageKind::Rejoin => {
            Message::Rejoin(Rejoin { session: SessionId(7), key: Ticket([0xa5; 32]), received: 12 })
        }
        MessageKind::Rejoined => Message::Rejoined(Heard { received: 9 }),
        MessageKind::LanesLost => Message::LanesLost(LanesLost {
            round: Some(RoundIndex(3)),
            paths: vec![LanePath::TcpUring],
        }),
        MessageKind::NewLanes => Message::NewLanes(NewLanes {
            choice: choice(),
            round_placed: false,
            placed: vec![0, 5, 1, 2, 3],
        }),
        MessageKind::Recover => {
            Message::Recover(Recover { session: SessionId(7), word: Word::HandedOver })
        }
        MessageKind::Recovered => Message::Recovered(Recovered { word: Word::Aborted }),
        MessageKind::LanesPlaced => Message::LanesPlaced(LanesPlaced {
            lanes: vec![LanePlaced {
                lane: 1,
                device: Some("eth0".into()),
                queue: Some(3),
                napi: Some(8196),
                incoming_cpu: Some(3),
                cpu: Some(2),
            }],
            cores: vec![CoreUse { cpu: 0, percent: 40 }],
        }),
        MessageKind::Heard => Message::Heard(Heard { received: 9 }),
    }
}

fn offer() -> Offer {
    let region = |name: &str, bytes, page_bytes, backing: &str| RegionOffer {
        name: name.into(),
        bytes,
        page_bytes,
        backing: backing.into(),
        populated_bytes: page_bytes,
    };
    Offer {
        regions: vec![
            region("pc.ram", 1 << 30, 2 << 20, "hugetlbfs"),
            region("vga.vram", 16 << 20, 4096, "tmpfs"),
        ],
        monitor: "QEMU 7.2.22".into(),
        machine: "pc-q35-7.2".into(),
        lanes: LaneOffer {
            count: None,
            paths: vec![LanePath::TcpUring, LanePath::TcpPlain],
            cpus: 2,
            encrypt: false,
            codecs: vec![],
            nics: 0,
            rss: false,
            holes: false,
        },
        tracker: "uffd-two-phase".into(),
        target_qmp: Some("/run/target.qmp".into()),
        verify: true,
        limits: SourceLimits { downtime_ms: 50 },
    }
}

fn choice() -> Choice {
    let ticket = Ticket(std::array::from_fn(|index| index as u8));
    Choice {
        lanes: vec![
            LaneTicket {
                path: LanePath::TcpUring,
                ticket,
                cpu: Some(1),
                over_tcp: None,
                beside_rdma: None,
            },
            LaneTicket {
                path: LanePath::TcpUring,
                ticket: Ticket([0xff; 32]),
                cpu: None,
                over_tcp: None,
                beside_rdma: None,
            },
        ],
        refused: vec![Refused { what: "rdma".into(), reason: "no device at the target".into() }],
        rdma_port: None,
        codecs: vec![],
        addresses: vec![],
        queues: vec![],
        holes: false,
    }
}

/// Any message that an honest peer could send.
pub(crate) fn any_message() -> impl Strategy<Value = Message> {
    let round = || any::<u32>().prop_map(RoundIndex);
    let bytes = || vec(any::<u8>(), 0..300);
    let state = || vec(any::<u8>(), 1..300);
    prop_oneof![
        (session(), text(), text(), text(), any::<bool>()).prop_map(
            |(session, software, host, boot_id, rejoins)| {
                Message::Hello(Hello { session, software, host, boot_id, rejoins })
            }
        ),
        (text(), text(), text(), option::of(key())).prop_map(
            |(software, host, boot_id, rejoin_key)| {
                Message::Welcome(Welcome { software, host, boot_id, rejoin_key })
            }
        ),
        (session(), key(), any::<u64>()).prop_map(|(session, key, received)| {
            Message::Rejoin(Rejoin { session, key, received })
        }),
        any::<u64>().prop_map(|received| Message::Rejoined(Heard { received })),
        any::<u64>().prop_map(|received| Message::Heard(Heard { received })),
        (option::of(round()), vec(any_path(), 0..4))
            .prop_map(|(round, paths)| Message::LanesLost(LanesLost { round, paths })),
        (any_choice(), any::<bool>(), bytes()).prop_map(|(choice, round_placed, placed)| {
            Message::NewLanes(NewLanes { choice, round_placed, placed })
        }),
        (session(), any_word())
            .prop_map(|(session, word)| Message::Recover(Recover { session, word })),
        any_word().prop_map(|word| Message::Recovered(Recovered { word })),
        (vec(any_lane_placed(), 0..4), vec(any_core(), 0..4))
            .prop_map(|(lanes, cores)| Message::LanesPlaced(LanesPlaced { lanes, cores })),
        any_offer().prop_map(Message::Offer),
        any_choice().prop_map(Message::Choice),
        (round(), any::<bool>(), bytes()).prop_map(|(round, last, bitmap)| {
            Message::RoundStart(RoundStart { round, last, bitmap })
        }),
        round().prop_map(Message::RoundEnd),
        round().prop_map(Message::RoundClosed),
        (any::<u64>(), bytes()).prop_map(|(took_us, digest)| {
            Message::DigestReport(DigestReport { took_us, digest })
        }),
        state().prop_map(Message::DeviceState),
        state().prop_map(Message::ReturnPath),
        any::<[u64; 4]>().prop_map(|[load_us, resume_us, late_us, cpu_us]| {
            Message::Running(Running { load_us, resume_us, late_us, cpu_us })
        }),
        (any_reason(), text(), option::of(text()))
            .prop_map(|(reason, text, hint)| { Message::Abort(Abort { reason, text, hint }) }),
        prop::sample::select(vec![
            Message::Prepare,
            Message::Prepared,
            Message::Verify,
            Message::DeviceStateEnd,
            Message::Ready,
            Message::Commit,
        ]),
    ]
}

fn session() -> impl Strategy<Value = SessionId> {
    any::<u128>().prop_map(SessionId)
}

fn key() -> impl Strategy<Value = Ticket> {
    any::<[u8; 32]>().prop_map(Ticket)
}

fn any_word() -> impl Strategy<Value = Word> {
    prop::sample::select(vec![
        Word::None,
        Word::Attempting,
        Word::HandedOver,
        Word::Ready,
        Word::Running,
        Word::Aborted,
    ])
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[ -~]{0,20}", any::<String>()]
}

fn any_reason() -> impl Strategy<Value = AbortReason> {
    prop::sample::select(vec![
        AbortReason::Cancelled,
        AbortReason::Refused,
        AbortReason::HostFailed,
        AbortReason::PeerMisbehaved,
        AbortReason::Timeout,
        AbortReason::VerificationFailed,
        AbortReason::NotConverging,
        AbortReason::Other,
    ])
}

fn any_path() -> impl Strategy<Value = LanePath> {
    prop::sample::select(vec![LanePath::TcpUring, LanePath::TcpPlain, LanePath::Rdma])
}

fn any_region() -> impl Strategy<Value = RegionOffer> {
    (text(), 1..5000u64, 12..=30u32, 0..=100u64, text()).prop_map(
        |(name, pages, page_shift, percent, backing)| {
            let page_bytes = 1 << page_shift;
            let bytes = pages * page_bytes;
            RegionOffer { name, bytes, page_bytes, backing, populated_bytes: bytes / 100 * percent }
        },
    )
}

fn any_offer() -> impl Strategy<Value = Offer> {
    let lanes =
        (
            option::of(any::<u16>()),
            vec(any_path(), 0..4),
            any::<u16>(),
            any::<bool>(),
            any_codecs(),
            any::<u16>().prop_map(|nics| if nics == 1 { 0 } else { nics }),
            any::<[bool; 2]>(),
        )
            .prop_map(|(count, paths, cpus, encrypt, codecs, nics, [rss, holes])| {
                LaneOffer { count, paths, cpus, encrypt, codecs, nics, rss, holes }
            });
    let names = (text(), text(), text(), option::of(text()));
    (vec(any_region(), 1..6), names, lanes, any::<bool>(), any::<u64>()).prop_map(
        |(regions, (monitor, machine, tracker, target_qmp), lanes, verify, downtime_ms)| Offer {
            regions,
            monitor,
            machine,
            lanes,
            tracker,
            target_qmp,
            verify,
            limits: SourceLimits { downtime_ms },
        },
    )
}

fn any_codecs() -> impl Strategy<Value = Vec<CodecName>> {
    vec(prop_oneof![Just(CodecName::Lz4), Just(CodecName::Zstd)], 0..3)
}

fn any_choice() -> impl Strategy<Value = Choice> {
    let others = option::of(any::<([u8; 32], Option<[u8; 32]>)>());
    let tickets = (any::<[u8; 32]>(), others);
    let lane = (any_path(), tickets, option::of(any::<u16>())).prop_map(
        |(path, (ticket, others), cpu)| LaneTicket {
            path,
            ticket: Ticket(ticket),
            cpu,
            over_tcp: others.map(|(over_tcp, _)| Ticket(over_tcp)),
            beside_rdma: others.and_then(|(_, beside)| beside.map(Ticket)),
        },
    );
    let refused = (text(), text()).prop_map(|(what, reason)| Refused { what, reason });
    let lanes = (vec(lane, 1..9), vec(refused, 0..4));
    let nics = (vec(any_address(), 0..4), vec(any_queues(), 0..3));
    (lanes, option::of(any::<u16>()), any_codecs(), nics, any::<bool>()).prop_map(
        |((lanes, refused), rdma_port, codecs, (addresses, queues), holes)| Choice {
            lanes,
            refused,
            rdma_port,
            codecs,
            addresses,
            queues,
            holes,
        },
    )
}

/// Queues that are in the table, of a NIC whose table is a power of two of entries.
fn any_queues() -> impl Strategy<Value = NicQueues> {
    let table = (0..7u32).prop_flat_map(|bits| vec(any::<u16>(), 1 << bits));
    let cores = vec((any::<prop::sample::Index>(), option::of(any::<u16>())), 0..4);
    let rest = (vec(any::<IpAddr>(), 0..3), option::of(text()), vec(any::<u8>(), 0..60));
    (text(), rest, table, cores).prop_map(|(device, (addresses, why_not, key), table, cores)| {
        let queue = |(at, cpu): (prop::sample::Index, _)| QueueCore { queue: *at.get(&table), cpu };
        let queues = cores.into_iter().map(queue).collect();
        NicQueues { device, addresses, why_not, key, table, queues }
    })
}

fn any_lane_placed() -> impl Strategy<Value = LanePlaced> {
    let number = || option::of(any::<u16>());
    (any::<u16>(), option::of(text()), number(), option::of(any::<u32>()), number(), number())
        .prop_map(|(lane, device, queue, napi, incoming_cpu, cpu)| LanePlaced {
            lane,
            device,
            queue,
            napi,
            incoming_cpu,
            cpu,
        })
}

fn any_core() -> impl Strategy<Value = CoreUse> {
    any::<(u16, u8)>().prop_map(|(cpu, percent)| CoreUse { cpu, percent })
}

fn any_address() -> impl Strategy<Value = LaneAddress> {
    (text(), any::<IpAddr>(), option::of(any::<u64>()), any::<u32>(), any::<bool>()).prop_map(
        |(device, address, bits_per_second, queues, rdma)| LaneAddress {
            device,
            address,
            bits_per_second,
            queues,
            rdma,
        },
    )
}
