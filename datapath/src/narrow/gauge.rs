//! Whether narrowing pays: hashing costs time, and what is left out saves it.
//!
//! One for all lanes of a pool, behind a lock taken once a batch. It knows what a byte takes to be
//! hashed, and what to be sent (packed, waited for under a rate, taken by the kernel): on a link
//! that lanes wait for that is the link's time. In the first pass nothing can be left out yet, and
//! tags are taken where sending takes so long that hashing goes on beside it. Later the part of the
//! pages that the target held is known, and what it saves is weighed against the hashing.
//!
//! Where it does not pay, one block of [`SAMPLED`] is narrowed all the same: always the same ones, so
//! that something is known of them when the guest does something else, or the link.
//!
//! Deliberately not here: clocks, and the bytes.

use std::time::Duration;

use super::Narrowed;
use crate::extent::Extent;
use crate::ids::RoundIndex;
use crate::narrow::BLOCK_BYTES;

/// One block of so many is always narrowed: where it does not pay that costs 1 % at most, as
/// hashing a byte takes no longer than the fastest way to send it.
const SAMPLED: u64 = 64;
/// To begin it has to pay so many times over; to go on it must not lose.
const BEGIN: f64 = 1.5;
/// In the first pass hashing may take so much of the time of sending: the link goes on meanwhile.
const FIRST_PASS: f64 = 0.5;
/// What is sent in smaller pieces tells of system calls, not of the link.
const SENT_BYTES_MIN: u64 = 64 << 10;
/// Weight of a new measurement against those before it.
const WEIGHT: f64 = 0.2;
/// Before anything was measured: what a processor of today takes to copy a byte and hash it, in ns.
const HASH_NS: f64 = 0.2;

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub struct Gauge {
    /// A byte, in ns.
    hash_ns: Option<f64>,
    send_ns: Option<f64>,
    /// Of the bytes of which something was known, the part that the target held.
    spared: Option<f64>,
    active: bool,
}

impl Gauge {
    /// Whether to narrow a batch that begins with this extent.
    pub fn wants(&mut self, round: RoundIndex, first: Extent) -> bool {
        let hash = self.hash_ns.unwrap_or(HASH_NS);
        let gain = match (round, self.send_ns) {
            (_, None) => 0.0,
            (RoundIndex(0), Some(send)) => send * FIRST_PASS,
            (_, Some(send)) => send * self.spared.unwrap_or(1.0),
        };
        let needed = if self.active { hash } else { hash * BEGIN };
        self.active = gain > needed;
        self.active || (first.offset / BLOCK_BYTES).is_multiple_of(SAMPLED)
    }

    /// What narrowing did, and how long that took.
    pub fn narrowed(&mut self, narrowed: &Narrowed, took: Duration) {
        if narrowed.hashed_bytes > 0 {
            learn(&mut self.hash_ns, took.as_nanos() as f64 / narrowed.hashed_bytes as f64);
        }
        if narrowed.known_bytes > 0 {
            let spared = narrowed.spared_bytes as f64 / narrowed.known_bytes as f64;
            learn(&mut self.spared, spared);
        }
    }

    /// So many bytes of guest memory were sent, and that took so long.
    pub fn sent(&mut self, bytes: u64, took: Duration) {
        if bytes >= SENT_BYTES_MIN {
            learn(&mut self.send_ns, took.as_nanos() as f64 / bytes as f64);
        }
    }

    /// How it stands, in words.
    pub fn reason(&self) -> String {
        let Some(send) = self.send_ns else { return "nothing was measured yet".into() };
        let hash = self.hash_ns.unwrap_or(HASH_NS);
        let spared = match self.spared {
            Some(spared) => format!("{:.0} % of what is sent again is spared", spared * 100.0),
            None => "nothing was sent again".into(),
        };
        format!("a MiB takes {} us to send and {} to hash, {spared}", per_mib(send), per_mib(hash))
    }
}

fn per_mib(ns_per_byte: f64) -> u64 {
    (ns_per_byte * f64::from(1 << 20) / 1000.0) as u64
}

fn learn(known: &mut Option<f64>, new: f64) {
    *known = Some(known.map_or(new, |before| before + (new - before) * WEIGHT));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RegionIndex;

    const MIB: u64 = 1 << 20;

    fn at(block: u64) -> Extent {
        Extent { region: RegionIndex(0), offset: block * BLOCK_BYTES, len: MIB }
    }

    /// Over a link where a MiB takes so many microseconds to send, and 150 to hash.
    fn gauge(send_us: u64) -> Gauge {
        let mut gauge = Gauge::default();
        let hashed = Narrowed { hashed_bytes: MIB, ..Narrowed::default() };
        gauge.narrowed(&hashed, Duration::from_micros(150));
        gauge.sent(MIB, Duration::from_micros(send_us));
        gauge
    }

    fn spared(gauge: &mut Gauge, percent: u64) {
        let narrowed = Narrowed {
            hashed_bytes: 100 * MIB,
            known_bytes: 100 * MIB,
            spared_bytes: percent * MIB,
            used: 0,
        };
        gauge.narrowed(&narrowed, Duration::from_micros(15_000));
    }

    #[test]
    fn over_a_slow_link_tags_are_taken_from_the_first_pass_on() {
        let (mut gigabit, mut memory) = (gauge(8900), gauge(200));
        assert!(gigabit.wants(RoundIndex(0), at(1)) && gigabit.wants(RoundIndex(1), at(1)));
        assert!(!memory.wants(RoundIndex(0), at(1)));
        assert!(gigabit.reason().starts_with("a MiB takes 8900 us to send and 150 to hash"));
    }

    #[test]
    fn what_is_written_all_over_is_sent_whole_but_for_samples() {
        let mut gauge = gauge(300);
        assert!(gauge.wants(RoundIndex(1), at(1)), "it is worth a try");
        spared(&mut gauge, 2);
        assert!(!gauge.wants(RoundIndex(2), at(1)) && gauge.wants(RoundIndex(2), at(128)));
        for _ in 0..20 {
            spared(&mut gauge, 95);
        }
        assert!(gauge.wants(RoundIndex(3), at(1)), "the samples say that it pays again");
        // Little is saved, but over a link where that takes longer than all the hashing.
        let mut slow = self::gauge(8900);
        spared(&mut slow, 3);
        assert!(slow.wants(RoundIndex(2), at(1)));
    }

    #[test]
    fn small_pieces_do_not_tell_how_fast_the_link_is() {
        let mut gauge = gauge(100);
        for _ in 0..100 {
            gauge.sent(4096, Duration::from_millis(1));
        }
        spared(&mut gauge, 50);
        assert!(!gauge.wants(RoundIndex(4), at(1)));
    }
}
