//! Messages and numbers that the fuzzers of both state machines are made of.

use arbitrary::Unstructured;
use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{
    Abort, AbortReason, Choice, DigestReport, Hello, Message, Offer, RoundStart, Running, Welcome,
};
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::{RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::source::Failure;
use serde::de::DeserializeOwned;
use serde_json::json;

/// Pages of the guest, all in one region.
pub(super) const PAGES: u64 = 10;

/// Less than this many bytes left count as none: the machines see every event of what came before.
pub(super) fn one_of(bytes: &mut Unstructured<'_>, count: u8) -> u8 {
    bytes.arbitrary::<u8>().unwrap_or(0) % count
}

pub(super) fn failure() -> Failure {
    Failure { reason: AbortReason::HostFailed, by_peer: false, text: String::new(), hint: None }
}

/// From what it would be on the wire: fields that may be left out are.
fn from_wire<T: DeserializeOwned>(fields: serde_json::Value) -> T {
    serde_json::from_value(fields).expect("as the protocol has it")
}

pub(super) fn hello() -> Hello {
    let session = SessionId(7);
    from_wire(json!({ "session": session, "software": "", "host": "", "boot_id": "" }))
}

pub(super) fn welcome() -> Welcome {
    from_wire(json!({ "software": "", "host": "", "boot_id": "" }))
}

pub(super) fn offer(verify: bool) -> Offer {
    let region = json!({
        "name": "", "bytes": PAGES * 4096, "page_bytes": 4096, "backing": "", "populated_bytes": 0,
    });
    from_wire(json!({
        "regions": [region],
        "monitor": "",
        "machine": "",
        "lanes": { "count": null, "paths": ["tcp-plain"], "cpus": 1 },
        "tracker": "",
        "target_qmp": null,
        "verify": verify,
        "limits": { "downtime_ms": 50 },
    }))
}

pub(super) fn choice() -> Choice {
    let lane = json!({ "path": "tcp-plain", "ticket": "0".repeat(64), "cpu": null });
    from_wire(json!({ "lanes": [lane], "refused": [] }))
}

pub(super) fn running() -> Running {
    Running { load_us: 0, resume_us: 0, late_us: 0, cpu_us: 0 }
}

pub(super) fn digest(number: u8) -> MemoryDigest {
    MemoryDigest::new(vec![vec![number.into()]])
}

pub(super) fn report(number: u8) -> DigestReport {
    DigestReport { took_us: 0, digest: digest(number).encode() }
}

/// Any pages.
pub(super) fn pages(bytes: &mut Unstructured<'_>) -> DirtySet {
    let mask = bytes.arbitrary::<u16>().unwrap_or(0);
    let mut set = DirtySet::new([(PAGES, 4096)]);
    for page in (0..PAGES).filter(|page| mask >> page & 1 == 1) {
        set.set_extent(Extent { region: RegionIndex(0), offset: page * 4096, len: 4096 })
            .expect("a page of the region");
    }
    set
}

pub(super) fn round(bytes: &mut Unstructured<'_>) -> RoundIndex {
    RoundIndex([0, 1, 2, 3, u32::MAX][usize::from(one_of(bytes, 5))])
}

/// Any message that decodes, with numbers that may be wrong.
pub(super) fn message(bytes: &mut Unstructured<'_>) -> Message {
    match one_of(bytes, 18) {
        0 => Message::Hello(hello()),
        1 => Message::Welcome(welcome()),
        2 => Message::Offer(offer(one_of(bytes, 2) == 0)),
        3 => Message::Choice(choice()),
        4 => Message::Prepare,
        5 => Message::Prepared,
        6 => {
            let round = round(bytes);
            let last = one_of(bytes, 2) == 0;
            let bitmap = match one_of(bytes, 4) {
                0 => some_bytes(bytes),
                _ => pages(bytes).encode(),
            };
            Message::RoundStart(RoundStart { round, last, bitmap })
        }
        7 => Message::RoundEnd(round(bytes)),
        8 => Message::RoundClosed(round(bytes)),
        9 => Message::Verify,
        10 => Message::DigestReport(match one_of(bytes, 3) {
            0 => DigestReport { took_us: u64::MAX, digest: some_bytes(bytes) },
            number => report(number),
        }),
        11 => Message::DeviceState(some_bytes(bytes)),
        12 => Message::DeviceStateEnd,
        13 => Message::ReturnPath(some_bytes(bytes)),
        14 => Message::Ready,
        15 => Message::Commit,
        16 => Message::Running(running()),
        _ => Message::Abort(Abort { reason: AbortReason::Other, text: String::new(), hint: None }),
    }
}

fn some_bytes(bytes: &mut Unstructured<'_>) -> Vec<u8> {
    let len = 1 + usize::from(one_of(bytes, 12));
    bytes.bytes(len.min(bytes.len())).unwrap_or_default().to_vec()
}
