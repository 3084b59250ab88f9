//! The client against a scripted monitor: no QEMU here (see `tests/qemu_qmp.rs` for real ones).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Qmp, QmpError};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}"#;

/// Runs `script` as the other end, once the handshake is done.
fn monitor(
    script: impl FnOnce(&mut BufReader<UnixStream>, &mut UnixStream) + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("bind");
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let mut lines = BufReader::new(stream.try_clone().expect("clone"));
        writeln!(stream, "{GREETING}\r").expect("greet");
        let command = next(&mut lines);
        assert_eq!(command["execute"], "qmp_capabilities");
        writeln!(stream, "{}\r", json!({"return": {}, "id": command["id"]})).expect("answer");
        script(&mut lines, &mut stream);
    });
    (dir, path, thread)
}

fn next(lines: &mut BufReader<UnixStream>) -> serde_json::Value {
    let mut line = String::new();
    lines.read_line(&mut line).expect("read");
    serde_json::from_str(&line).expect("json")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(100)
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

#[test]
fn events_of_newer_qemus_are_queued_beside_a_reply() {
    let (_dir, path, thread) = monitor(|lines, stream| {
        let command = next(lines);
        let event = r#"{"timestamp": {"seconds": 10, "microseconds": 5}, "event": "NEVER_HEARD_OF", "data": {"x": "new-enum"}}"#;
        writeln!(stream, "{event}").expect("event");
        writeln!(stream, "{}", json!({"return": {"status": "brand-new"}, "id": command["id"]}))
            .expect("answer");
    });
    let qmp = Qmp::connect(&path).expect("connect");
    assert_eq!(qmp.version().to_string(), "7.2.22");
    let status = qmp.execute("query-status", json!({})).expect("execute");
    assert_eq!(status["status"], "brand-new");
    let event = qmp.wait_event("NEVER_HEARD_OF", soon()).expect("event");
    assert_eq!(event.at, Duration::from_micros(10_000_005));
    assert_eq!(event.data["x"], "new-enum");
    thread.join().expect("monitor");
}

#[test]
fn refusal_keeps_class_and_words() {
    let (_dir, path, thread) = monitor(|lines, stream| {
        let command = next(lines);
        let error = json!({"class": "GenericError", "desc": "no"});
        writeln!(stream, "{}", json!({"error": error, "id": command["id"]})).expect("answer");
    });
    let qmp = Qmp::connect(&path).expect("connect");
    let error = qmp.execute("cont", json!({})).expect_err("refused");
    assert!(
        matches!(&error, QmpError::Refused { command, class, desc }
            if command == "cont" && class == "GenericError" && desc == "no"),
        "{error:?}"
    );
    thread.join().expect("monitor");
}

#[test]
fn late_reply_to_a_timed_out_command_is_not_taken_for_the_next() {
    let (_dir, path, thread) = monitor(|lines, stream| {
        let first = next(lines);
        let second = next(lines);
        writeln!(stream, "{}", json!({"return": "first", "id": first["id"]})).expect("late");
        writeln!(stream, "{}", json!({"return": "second", "id": second["id"]})).expect("answer");
    });
    let qmp = Qmp::connect(&path).expect("connect");
    let error = qmp.execute_by("slow", json!({}), soon()).expect_err("timeout");
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    assert_eq!(qmp.execute("quick", json!({})).expect("execute"), "second");
    thread.join().expect("monitor");
}

#[test]
fn closed_and_timeout_say_what_was_waited_for() {
    let (_dir, path, thread) = monitor(|lines, _| {
        next(lines);
    });
    let qmp = Qmp::connect(&path).expect("connect");
    let error = qmp.wait_event("STOP", soon()).expect_err("timeout");
    assert_eq!(error.to_string(), "no answer from QEMU in time while waiting for the event STOP");
    let error = qmp.execute("quit", json!({})).expect_err("closed");
    assert_eq!(error.to_string(), "QEMU closed its QMP connection while running quit");
    thread.join().expect("monitor");
}

#[test]
fn nothing_listening_hints_at_qemus_option() {
    let error = Qmp::connect("/nonexistent/qmp").expect_err("nothing there");
    assert!(matches!(error, QmpError::Connect { .. }), "{error:?}");
    assert!(error.hint().expect("hint").contains("-qmp unix:/nonexistent/qmp,server=on"));
}

#[test]
fn socket_left_behind_is_told_from_one_not_listening_yet() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("qmp");
    drop(UnixListener::bind(&path).expect("bind"));
    let began = Instant::now();
    let error = Qmp::connect(&path).expect_err("nobody listens");
    assert!(matches!(error, QmpError::Connect { .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[test]
fn silent_listener_is_busy() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("qmp");
    let _listener = UnixListener::bind(&path).expect("bind");
    let error = Qmp::connect_by(&path, soon()).expect_err("busy");
    assert!(matches!(error, QmpError::Busy { .. }), "{error:?}");
}

#[test]
fn other_protocols_are_not_taken_for_qmp() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("monitor");
    let listener = UnixListener::bind(&path).expect("bind");
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        writeln!(stream, "QEMU 7.2.22 monitor - type 'help' for more information").expect("write");
    });
    let error = Qmp::connect(&path).expect_err("not QMP");
    assert!(matches!(error, QmpError::NotQmp { .. }), "{error:?}");
    thread.join().expect("monitor");
}

/// Adding its parts up once panicked.
#[test]
fn an_event_at_the_end_of_time_is_an_event() {
    let (_dir, path, thread) = monitor(|_, stream| {
        let event = r#"{"event": "STOP", "timestamp": {"seconds": 18446744073709551615, "microseconds": 1000000}}"#;
        writeln!(stream, "{event}").expect("event");
    });
    let qmp = Qmp::connect(&path).expect("connect");
    assert_eq!(qmp.wait_event("STOP", soon()).expect("event").at, Duration::MAX);
    thread.join().expect("monitor");
}

#[test]
fn endless_line_is_bounded() {
    let (_dir, path, thread) = monitor(|lines, stream| {
        next(lines);
        let chunk = vec![b'x'; 1 << 20];
        while stream.write_all(&chunk).is_ok() {}
    });
    let qmp = Qmp::connect(&path).expect("connect");
    let error = qmp.execute("query-status", json!({})).expect_err("too long");
    assert!(matches!(error, QmpError::LineTooLong { .. }), "{error:?}");
    drop(qmp);
    thread.join().expect("monitor");
}

#[test]
fn event_ends_the_wait_before_the_answer_and_the_answer_is_not_mistaken() {
    let (_dir, path, thread) = monitor(|lines, stream| {
        let cont = next(lines);
        let event = r#"{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "RESUME"}"#;
        writeln!(stream, "{event}").expect("event");
        let status = next(lines);
        writeln!(stream, "{}", json!({"return": {}, "id": cont["id"]})).expect("late answer");
        writeln!(stream, "{}", json!({"return": "status", "id": status["id"]})).expect("answer");
        let again = next(lines);
        let error = json!({"class": "GenericError", "desc": "not finalized yet"});
        writeln!(stream, "{}", json!({"error": error, "id": again["id"]})).expect("answer");
    });
    let qmp = Qmp::connect(&path).expect("connect");
    let event = qmp.execute_until_event("cont", json!({}), "RESUME", later()).expect("event");
    assert_eq!(event.expect("it came").at, Duration::from_secs(1));
    assert_eq!(qmp.execute("query-status", json!({})).expect("execute"), "status");
    let error = qmp.execute_until_event("cont", json!({}), "RESUME", later()).expect_err("refused");
    assert!(matches!(error, QmpError::Refused { .. }), "{error:?}");
    thread.join().expect("monitor");
}

#[test]
fn posted_command_is_answered_whenever_it_is_asked() {
    let (_dir, path, thread) = monitor(|lines, stream| {
        let migrate = next(lines);
        let status = next(lines);
        writeln!(stream, "{}", json!({"return": "begun", "id": migrate["id"]})).expect("answer");
        writeln!(stream, "{}", json!({"return": "status", "id": status["id"]})).expect("answer");
    });
    let qmp = Qmp::connect(&path).expect("connect");
    let posted = qmp.post("migrate", json!({})).expect("post");
    assert_eq!(qmp.execute("query-status", json!({})).expect("execute"), "status");
    assert_eq!(qmp.answer(posted, soon()).expect("answer"), "begun");
    thread.join().expect("monitor");
}
