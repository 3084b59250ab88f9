//! What a migration took of a shaped link: how long, and how much of what the link could carry.

use serde_json::{Value, json};

use crate::args::{Common, MemoryKind, NetKind};
use crate::goals::{Goal, Ratio};
use crate::recorder::Recorded;
use crate::rig::Hop;
use crate::series::{Reading, Series};
use crate::turns::Taken;

/// Of an Ethernet link with an MTU of 1500, as `tc tbf` counts it (with the Ethernet header): payload
/// of a TCP segment with timestamps.
const PAYLOAD_SHARE: f64 = 1448.0 / 1514.0;
/// A migration is to use this much of a link while it moves memory.
const LINK_AT_LEAST: f64 = 0.98;

/// What TCP can carry over links shaped to this in all.
pub(crate) fn payload_bytes_per_s(mbit: u64) -> f64 {
    mbit as f64 * 1e6 / 8.0 * PAYLOAD_SHARE
}

/// Memory of guests on shaped links, unless told: on huge pages a guest that does nothing writes to some
/// twenty MiB of them all the time, which a slow link never gets done with.
pub(crate) const MEMORY: MemoryKind = MemoryKind::Tmpfs;

/// What all of them take: two hosts, and an end also for a guest that writes faster than a link carries.
pub(crate) fn common(asked: &Common) -> Common {
    let mut common = asked.clone();
    common.net = NetKind::Veth;
    common.memory = Some(asked.memory.unwrap_or(MEMORY));
    common.migrate_args.push_str(" --not-converging switch-over");
    common
}

/// A hop of a guest that filled `mib`, over links of `mbit` in all.
pub(crate) fn taken(hop: &Hop, mib: u64, mbit: u64) -> Taken {
    let moved = &hop.moved;
    let mut said = json!(moved);
    said["tick_gap_ms"] = json!(hop.tick_gap_ms);
    said["guest_lost"] = json!(hop.lost);
    said["machine_cpu_s"] = json!(moved.cpu.machine_s);
    said["brownout_s"] = json!(moved.span_s - moved.pause_ms / 1e3);
    let rate = moved.moving_bytes_per_s * sent_of_moved(&moved.account);
    said["link_percent"] = json!(rate / payload_bytes_per_s(mbit) * 100.0);
    let recorded = Recorded { bytes: mib << 20, seconds: moved.span_s, ..Recorded::default() };
    Taken { recorded, said }
}

/// Bytes on the link for each byte of memory, by our own account. What QEMU says it has moved is
/// what it has sent.
fn sent_of_moved(account: &Value) -> f64 {
    let (sent, moved) = (account["wire_bytes"].as_f64(), account["moved_bytes"].as_f64());
    sent.zip(moved).map_or(1.0, |(sent, moved)| sent / moved.max(1.0))
}

/// How much of the link ours used while memory moved.
pub(crate) fn share(ours: &Series) -> Ratio {
    let medians = crate::stats::median(ours.readings(Reading::Said("link_percent")));
    Ratio::new(
        format!("{}: share of the link while moving", ours.group),
        format!("{} to the link's payload rate", ours.by),
        Some(medians / 100.0).filter(|share| share.is_finite()),
        Some(1.0),
        Some(Goal::AtLeast(LINK_AT_LEAST)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_compressed_is_less_on_the_link() {
        let account = json!({ "wire_bytes": 50, "moved_bytes": 100 });
        assert_eq!(sent_of_moved(&account), 0.5);
        assert_eq!(sent_of_moved(&json!({ "ram": {} })), 1.0);
        assert!((payload_bytes_per_s(1000) - 119.55e6).abs() < 1e4);
    }
}
