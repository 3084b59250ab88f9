//! The bytes of each message as they are kept in `frames.golden`: what a peer of another version,
//! or written by somebody else, has to send and will get.
//!
//! One line each: kind, the 16 bytes of the prefix, the header as it stands in the frame, the body
//! or `-`.

use std::fmt::Write;
use std::path::Path;

use pageferry_datapath::codec::CodecName;
use pageferry_datapath::control::{Choice, Message, MessageKind, QueueCore, encode};
use pageferry_datapath::limits;

use crate::frames::{PREFIX_BYTES, decode_all, frame};
use crate::messages::examples;

const HINT: &str = "a change of these bytes shuts out peers of other versions; if that is meant: \
                    PAGEFERRY_BLESS=1 cargo test -p pageferry-datapath --test control";

fn file() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/control/frames.golden")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).map(|two| std::str::from_utf8(two).expect("ASCII"));
    digits.map(|two| u8::from_str_radix(two, 16).expect("two digits")).collect()
}

fn line(message: &Message) -> String {
    let frame = encode(message);
    let header_bytes = u32::from_le_bytes(frame[8..12].try_into().expect("four bytes"));
    let (prefix, rest) = frame.split_at(PREFIX_BYTES);
    let (header, body) = rest.split_at(header_bytes as usize);
    let header = std::str::from_utf8(header).expect("JSON");
    let body = if body.is_empty() { "-".into() } else { hex(body) };
    format!("{:?} {} {header} {body}", message.kind(), hex(prefix))
}

/// The frame that a line stands for.
fn bytes_of(line: &str) -> Vec<u8> {
    let (start, body) = line.rsplit_once(' ').expect("a body");
    let body = if body == "-" { Vec::new() } else { unhex(body) };
    let mut fields = start.splitn(3, ' ').skip(1);
    let prefix = unhex(fields.next().expect("a prefix"));
    let header = fields.next().expect("a header");
    [&prefix[..], header.as_bytes(), &body].concat()
}

#[test]
fn every_message_has_the_bytes_it_always_had() {
    let mut text = String::new();
    for message in examples() {
        writeln!(text, "{}", line(&message)).expect("a string");
    }
    if std::env::var_os("PAGEFERRY_BLESS").is_some() {
        std::fs::write(file(), &text).expect("the file can be written");
    }
    let kept = std::fs::read_to_string(file()).expect("the file is there");
    for (kept, now) in kept.lines().zip(text.lines()) {
        assert_eq!(kept, now, "{HINT}");
    }
    assert_eq!(kept.lines().count(), MessageKind::ALL.len(), "one line for each kind; {HINT}");
}

#[test]
fn the_bytes_that_are_kept_decode_to_what_they_were_made_of() {
    let kept = std::fs::read_to_string(file()).expect("the file is there");
    let bytes: Vec<u8> = kept.lines().flat_map(bytes_of).collect();
    assert_eq!(decode_all(&bytes), (examples(), None));
}

#[test]
fn what_older_peers_leave_out_is_taken_as_they_meant_it() {
    let header = br#"{"cpu_us":4,"load_us":1,"resume_us":2}"#;
    let (messages, error) = decode_all(&frame(MessageKind::Running as u8, header, b""));
    assert_eq!(error, None);
    assert!(matches!(messages[..], [Message::Running(running)] if running.late_us == 0));
}

#[test]
fn codecs_stand_in_offer_and_choice_where_there_are_any() {
    let choice = br#"{"codecs":["lz4","zstd","brotli"],"lanes":[{"cpu":null,"path":"tcp-plain","ticket":"TICKET"}],"refused":[]}"#;
    let choice = String::from_utf8_lossy(choice).replace("TICKET", &"00".repeat(32));
    let (messages, error) = decode_all(&frame(MessageKind::Choice as u8, choice.as_bytes(), b""));
    assert_eq!(error, None);
    let [Message::Choice(got)] = &messages[..] else { panic!("{messages:?}") };
    assert_eq!(got.codecs, [CodecName::Lz4, CodecName::Zstd, CodecName::Unknown]);
    let known = Choice { codecs: vec![CodecName::Lz4, CodecName::Zstd], ..got.clone() };
    let line = line(&Message::Choice(known));
    assert!(line.contains(r#"{"codecs":["lz4","zstd"],"lanes":"#), "{line}");
}

#[test]
fn holes_stand_in_offer_and_choice_where_they_are_taken() {
    let choice = r#"{"holes":true,"lanes":[{"cpu":null,"path":"tcp-plain","ticket":"TICKET"}],"refused":[]}"#;
    let choice = choice.replace("TICKET", &"00".repeat(32));
    let (messages, error) = decode_all(&frame(MessageKind::Choice as u8, choice.as_bytes(), b""));
    assert_eq!(error, None);
    let [Message::Choice(got)] = &messages[..] else { panic!("{messages:?}") };
    assert!(got.holes);
    let line = line(&messages[0]);
    assert!(line.contains(&choice), "{line}");
}

const CHOICE: &str = r#"{"lanes":[{"cpu":null,"path":"tcp-plain","ticket":"TICKET"}],"queues":[{"addresses":["10.0.0.2"],"device":"eth0","key":"6d5a56da","queues":[{"cpu":1,"queue":2},{"queue":0}],"table":[0,2]},{"addresses":["10.1.0.2"],"device":"br0","why_not":"no RSS"}],"refused":[]}"#;

fn choice_with(old: &str, new: &str) -> Vec<u8> {
    let header = CHOICE.replace("TICKET", &"00".repeat(32)).replace(old, new);
    frame(MessageKind::Choice as u8, header.as_bytes(), b"")
}

#[test]
fn queues_stand_in_the_choice_where_they_were_asked_for() {
    let (messages, error) = decode_all(&choice_with("", ""));
    assert_eq!(error, None);
    let [Message::Choice(choice)] = &messages[..] else { panic!("{messages:?}") };
    assert_eq!(choice.queues[0].key, [0x6d, 0x5a, 0x56, 0xda]);
    assert_eq!(choice.queues[0].table, [0, 2]);
    assert_eq!(choice.queues[0].queues[0], QueueCore { queue: 2, cpu: Some(1) });
    assert_eq!(choice.queues[1].why_not.as_deref(), Some("no RSS"));
    let line = line(&messages[0]);
    assert!(line.contains(&CHOICE.replace("TICKET", &"00".repeat(32))), "{line}");
}

#[test]
fn queues_that_later_code_could_not_bear_are_refused() {
    let long = |length: usize| format!("\"table\":[{}]", vec!["2"; length].join(","));
    for (old, new) in [
        // Of a NIC that has no such queue: no port leads there.
        (r#""queue":2}"#, r#""queue":9}"#.to_owned()),
        (r#""table":[0,2]"#, r#""table":[0,2,0]"#.to_owned()),
        (r#""table":[0,2]"#, r#""table":[]"#.to_owned()),
        (r#""table":[0,2]"#, long(2 * limits::RSS_TABLE_MAX)),
        (r#""table":[0,2]"#, r#""table":[0,65536]"#.to_owned()),
        ("6d5a56da", "6d".repeat(limits::RSS_KEY_BYTES_MAX + 1)),
        ("6d5a56da", "6d5".to_owned()),
        ("6d5a56da", "+d5a".to_owned()),
        ("6d5a56da", "no".to_owned()),
    ] {
        let (messages, error) = decode_all(&choice_with(old, &new));
        assert!(messages.is_empty() && error.is_some(), "{old} -> {}", &new[..20.min(new.len())]);
    }
}

#[test]
fn a_reason_of_a_newer_peer_is_still_a_reason() {
    let header = br#"{"reason":"solar-flare","text":"it flared","hint":null}"#;
    let (messages, error) = decode_all(&frame(MessageKind::Abort as u8, header, b""));
    assert_eq!(error, None);
    assert!(matches!(&messages[..], [Message::Abort(abort)] if abort.text == "it flared"));
}
