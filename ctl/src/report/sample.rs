//! A summary for tests, with every field filled in.

use pageferry_datapath::lane::{LanePath, ZeroCopy};

use super::compression::Compression;
use super::events::*;

/// A guest of 2 GiB that was moved.
pub(super) fn summary() -> Summary {
    let lane = |lane: u16| LaneDetail {
        lane,
        path: LanePath::TcpUring,
        path_reason: "tried at start".into(),
        cpu: Some(usize::from(lane)),
        zero_copy: ZeroCopy::Copied,
        moved_bytes: 600 << 20,
        zero_bytes: 0,
        wire_bytes: 601 << 20,
        syscalls: 1234,
        cpu_seconds: 0.2,
    };
    Summary {
        outcome: MigrationOutcome::Migrated,
        guest_running_on: RunningOn::Target,
        session: "00000000000000000000000000c0ffee".into(),
        transport: Some(LanePath::TcpUring),
        transport_reason: Some("no RDMA device on either side".into()),
        security: Some(Secured {
            control: "tls-1.3".into(),
            cipher_suite: Some("TLS13_AES_256_GCM_SHA384".into()),
            peer: Some("host-b (host-b, 10.0.0.2)".into()),
            lanes: "clear".into(),
            lanes_reason: None,
            sealing_seconds: None,
            warning: None,
        }),
        tracker: Some("uffd-one-phase".into()),
        tracker_reason: Some("writes to a test mapping were reported".into()),
        lanes: 2,
        rounds: 4,
        guest_bytes: 2 << 30,
        populated_bytes: 1100 << 20,
        moved_bytes: 1200 << 20,
        zero_bytes: 0,
        wire_bytes: 1202 << 20,
        zero_copy: ZeroCopy::Copied,
        zero_copy_reason: None,
        compression: Some(Compression {
            codec: Some("lz4".into()),
            reason: "300 MiB/s against 110 MiB/s before".into(),
            raw_bytes: 900 << 20,
            packed_bytes: 300 << 20,
            ratio: Some(3.0),
            seconds: 1.25,
        }),
        brownout_ms: Some(512.25),
        blackout_ms: Some(31.25),
        blackout_predicted_ms: Some(29.0),
        blackout_parts_ms: Some(BlackoutParts {
            pause: 0.5,
            last_scan: 1.25,
            last_extents: 8.0,
            barrier: 0.4,
            verify: 0.0,
            device_state_save: 3.1,
            transfer: 0.2,
            load: 15.0,
            commit: 0.8,
            resume: 2.0,
        }),
        drain_pause_ms: Some(3.1),
        total_ms: 810.0,
        bytes_per_second: 3 << 30,
        cpu_seconds_source: 0.41,
        cpu_seconds_target: Some(0.52),
        verified: true,
        lane_details: vec![lane(0), lane(1)],
        latencies: vec![
            Latency {
                of: "batches".into(),
                count: 1200,
                p50_us: 201.5,
                p90_us: 300.0,
                p99_us: 950.0,
                p999_us: 1800.0,
                max_us: 2000.0,
            },
            Latency {
                of: "barriers".into(),
                count: 0,
                p50_us: 0.0,
                p90_us: 0.0,
                p99_us: 0.0,
                p999_us: 0.0,
                max_us: 0.0,
            },
        ],
        exit_code: 0,
        reason: None,
        hint: None,
    }
}

/// The same, refused at once.
pub(super) fn refused() -> Summary {
    Summary {
        outcome: MigrationOutcome::Failed,
        guest_running_on: RunningOn::Source,
        transport: None,
        transport_reason: None,
        security: None,
        tracker: None,
        tracker_reason: None,
        lanes: 0,
        rounds: 0,
        populated_bytes: 0,
        moved_bytes: 0,
        zero_bytes: 0,
        wire_bytes: 0,
        zero_copy: ZeroCopy::Off,
        compression: None,
        brownout_ms: None,
        blackout_ms: None,
        blackout_predicted_ms: None,
        blackout_parts_ms: None,
        drain_pause_ms: None,
        total_ms: 12.0,
        bytes_per_second: 0,
        cpu_seconds_source: 0.01,
        cpu_seconds_target: None,
        verified: false,
        lane_details: vec![],
        latencies: vec![],
        exit_code: 3,
        reason: Some("target refused: region sizes differ".into()),
        hint: Some("start it with -m 512M".into()),
        ..summary()
    }
}
