//! Against HdrHistogram's Java original (2.1.11): `squares.hgrm` is its output for these values.
//! Their number is prime: where a count meets a percentile exactly, the original's percent and the
//! crate's fractions round to different sides, and may show neighbouring values.

use std::fs;

use pageferry_datapath::lane::{LanePath, Narrowing, Packing, ZeroCopy};
use tempfile::TempDir;

use super::*;

const GOLDEN: &str = include_str!("squares.hgrm");

fn squares() -> Histogram<u64> {
    let mut histogram = Latencies::default().scans;
    for i in 1..=23_u64 {
        histogram.record(i * i * 1000).unwrap();
    }
    histogram
}

#[test]
fn the_text_is_the_original_s() {
    let mut out = Vec::new();
    percentile_distribution(&squares(), &mut out).unwrap();
    assert_eq!(String::from_utf8(out).unwrap(), GOLDEN);
}

#[test]
fn an_empty_distribution_is_a_header_and_zeros() {
    let mut out = Vec::new();
    percentile_distribution(&Latencies::default().scans, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(text.contains("#[Max     =        0.000, Total count    =            0]"));
}

#[test]
fn lines_are_in_microseconds_and_empty_ones_are_zeros() {
    let latencies = Latencies { scans: squares(), ..Latencies::default() };
    let [batches, barriers, scans] = &latencies.lines()[..] else { panic!("three") };
    assert_eq!((batches.count, barriers.max_us), (0, 0.0));
    assert_eq!((scans.of.as_str(), scans.count), ("scans", 23));
    assert_eq!((scans.p50_us, scans.max_us), (144.127, 529.407));
    assert!(scans.p90_us <= scans.p99_us && scans.p99_us <= scans.p999_us);
}

#[test]
fn what_lanes_and_scans_counted_is_all_there() {
    let mut batch_ns = Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap();
    batch_ns.record(200_000).unwrap();
    let lane = LaneStats {
        path: LanePath::TcpPlain,
        path_reason: "asked for".into(),
        zero_copy: ZeroCopy::Off,
        zero_copy_reason: String::new(),
        cpu: None,
        moved_bytes: 1,
        zero_bytes: 0,
        hole_bytes: 0,
        wire_bytes: 1,
        sealing: None,
        packing: Packing::default(),
        narrowing: Narrowing::default(),
        syscalls: 1,
        cpu_ns: 1,
        barrier_ns: batch_ns.clone(),
        batch_ns,
    };
    let scans = [Duration::from_micros(580), Duration::from_secs(90)];
    let latencies = Latencies::collect(&[lane.clone(), lane], &scans);
    let counts = latencies.named().map(|(_, histogram)| histogram.len());
    assert_eq!(counts, [2, 2, 2]);
    assert!(latencies.scans.min() >= 579_000 && latencies.scans.max() >= 89_900_000_000);
}

#[test]
fn one_file_each_beside_the_one_asked_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("run.1.hgrm");
    let latencies = Latencies { batches: squares(), ..Latencies::default() };
    let written = latencies.write_hgrm(&path).unwrap();
    assert_eq!(written[1], dir.path().join("run.1.barriers.hgrm"));
    assert_eq!(written[2], dir.path().join("run.1.scans.hgrm"));
    assert_eq!(fs::read_to_string(&path).unwrap(), GOLDEN);

    let error = latencies.write_hgrm(&dir.path().join("none/run.hgrm")).unwrap_err();
    assert!(error.to_string().contains("none/run.hgrm"), "{error}");
}
