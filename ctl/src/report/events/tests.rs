//! The keys are a contract: each event against its golden line.

use super::*;
use crate::report::sample::{refused, summary};

fn line(event: &Event) -> String {
    let mut out = Vec::new();
    event.write_line(&mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert!(text.ends_with('\n') && !text[..text.len() - 1].contains('\n'));
    assert_eq!(&serde_json::from_str::<Event>(&text).unwrap(), event, "reads back");
    text.trim_end().to_owned()
}

#[test]
fn brownout_and_blackout_lines_are_golden() {
    let brownout = Event::Brownout(Brownout {
        at_ms: 11.0,
        brownout_ms: 10.5,
        rounds: 1,
        moved_bytes: 4096,
        wire_bytes: 4352,
        bytes_per_second: 390_095,
        dirty_pages: 1,
        scans: 1,
        drain_pause_ms: 0.0,
    });
    assert_eq!(
        line(&brownout),
        r#"{"event":"brownout","at_ms":11.0,"brownout_ms":10.5,"rounds":1,"moved_bytes":4096,"wire_bytes":4352,"bytes_per_second":390095,"dirty_pages":1,"scans":1,"drain_pause_ms":0.0}"#
    );
    let parts_ms = BlackoutParts { pause: 0.5, load: 0.25, ..BlackoutParts::default() };
    assert_eq!(parts_ms.total(), 0.75);
    let blackout = Event::Blackout(Blackout {
        at_ms: 20.0,
        blackout_ms: 0.8,
        blackout_predicted_ms: None,
        parts_ms,
        dirty_pages: 1,
        moved_bytes: 4096,
        device_state_bytes: 335_000,
    });
    assert_eq!(
        line(&blackout),
        concat!(
            r#"{"event":"blackout","at_ms":20.0,"blackout_ms":0.8,"blackout_predicted_ms":null,"#,
            r#""parts_ms":{"pause":0.5,"last_scan":0.0,"last_extents":0.0,"barrier":0.0,"#,
            r#""verify":0.0,"device_state_save":0.0,"transfer":0.0,"load":0.25,"commit":0.0,"#,
            r#""resume":0.0},"dirty_pages":1,"moved_bytes":4096,"device_state_bytes":335000}"#
        )
    );
}

#[test]
fn a_summary_has_every_promised_key_and_no_reason_unless_it_failed() {
    let value: serde_json::Value =
        serde_json::from_str(&line(&Event::Summary(Box::new(summary())))).unwrap();
    for key in [
        "event",
        "outcome",
        "guest_running_on",
        "transport",
        "tracker",
        "lanes",
        "rounds",
        "guest_bytes",
        "populated_bytes",
        "moved_bytes",
        "wire_bytes",
        "zero_copy",
        "brownout_ms",
        "blackout_ms",
        "blackout_predicted_ms",
        "total_ms",
        "bytes_per_second",
        "cpu_seconds_source",
        "cpu_seconds_target",
        "verified",
    ] {
        assert!(value.get(key).is_some(), "{key} is missing");
    }
    assert_eq!(value["outcome"], "migrated");
    assert_eq!(value["guest_running_on"], "target");
    assert_eq!(value["zero_copy"], "copied");
    assert_eq!(value["transport"], "tcp-uring");
    assert!(value.get("reason").is_none() && value.get("hint").is_none());

    let text = line(&Event::Summary(Box::new(refused())));
    assert!(
        text.starts_with(r#"{"event":"summary","outcome":"failed","guest_running_on":"source""#)
    );
    assert!(text.contains(r#""transport":null"#));
    assert!(text.ends_with(
        r#""exit_code":3,"reason":"target refused: region sizes differ","hint":"start it with -m 512M"}"#
    ));
}
