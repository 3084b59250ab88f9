//! How fast guests write, by QEMU's own sample (`calc-dirty-rate`, since 5.2).
//!
//! Of its ways the one by page samples: it hashes some pages now and once more later, touches
//! nothing in the guest and leaves nothing to put back. It counts a page written twice once, and
//! passes over blocks below 128 MiB: good enough to tell a busy guest from an idle one.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::survey::Surveyed;
use crate::limits::{DIRTY_SAMPLE_LATE, DIRTY_SAMPLE_S};
use crate::qmp::Qmp;

/// The smallest block that QEMU samples.
const BLOCK_BYTES_MIN: u64 = 128 << 20;
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// Samples all guests that are here, at the same time. What is not known stays so.
pub(super) fn sample(surveyed: &mut [Surveyed]) {
    let begun: Vec<_> = surveyed.iter().map(begin).collect();
    if begun.iter().all(Option::is_none) {
        return;
    }
    thread::sleep(Duration::from_secs(DIRTY_SAMPLE_S));
    let until = Instant::now() + DIRTY_SAMPLE_LATE;
    for ((_, found), qmp) in surveyed.iter_mut().zip(&begun) {
        if let (Ok(facts), Some(qmp)) = (found, qmp) {
            facts.dirty_bytes_per_second = measured(qmp, until);
        }
    }
}

fn begin((guest, found): &Surveyed) -> Option<Qmp> {
    let sampled = |facts: &super::survey::Facts| {
        facts.offered.regions.iter().any(|region| region.bytes >= BLOCK_BYTES_MIN)
    };
    if !found.as_ref().is_ok_and(sampled) {
        return None;
    }
    let qmp = Qmp::connect(&guest.qmp).ok()?;
    match qmp.execute("calc-dirty-rate", json!({ "calc-time": DIRTY_SAMPLE_S })) {
        Ok(_) => Some(qmp),
        Err(error) => {
            tracing::debug!(guest = %guest.name, %error, "no sample of how fast it writes");
            None
        }
    }
}

/// QEMU tells it in MiB a second.
fn measured(qmp: &Qmp, until: Instant) -> Option<u64> {
    loop {
        let answer = qmp.execute("query-dirty-rate", json!({})).ok()?;
        if answer["status"] == "measured" {
            return Some(answer["dirty-rate"].as_u64()? << 20);
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(LOOK);
    }
}
