//! What no bytes may do: make the decoder panic, or have it hold more than has come.

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::control::{
    Decoder, FrameError, MAGIC, Message, MessageKind, VERSION, encode,
};
use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::limits;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::frames::{decode_all, decode_pieces, frame, parts, prefix, with_header};
use crate::messages::{any_message, examples};

/// What the machines do with a body once it has been decoded.
fn use_bodies(messages: &[Message]) {
    for message in messages {
        match message {
            Message::RoundStart(start) => {
                let _ = DirtySet::decode(&start.bitmap, [(100, 4096), (7, 2 << 20)]);
            }
            Message::DigestReport(report) => {
                let _ = MemoryDigest::decode(&report.digest);
            }
            Message::Offer(offer) => assert!(offer.bitmap_fits()),
            _ => {}
        }
    }
}

#[derive(Clone, Debug)]
enum Harm {
    Flip(u8),
    Insert(Vec<u8>),
    Remove(usize),
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        (0..8u8).prop_map(Harm::Flip),
        vec(any::<u8>(), 1..20).prop_map(Harm::Insert),
        (1..20usize).prop_map(Harm::Remove),
    ]
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(pieces in vec(vec(any::<u8>(), 0..60), 0..6)) {
        use_bodies(&decode_pieces(pieces.iter().map(Vec::as_slice)).0);
    }

    #[test]
    fn no_bytes_after_a_sound_prefix_make_the_decoder_panic(
        kind: u8,
        header in vec(any::<u8>(), 0..200),
        body in vec(any::<u8>(), 0..200),
    ) {
        let (messages, error) = decode_all(&frame(kind, &header, &body));
        use_bodies(&messages);
        let known = MessageKind::from_number(kind).is_some();
        match error {
            Some(FrameError::UnknownKind { .. }) => prop_assert!(!known && kind < 128),
            Some(FrameError::Malformed { .. } | FrameError::UnknownRequiredField { .. }) => {
                prop_assert!(known);
            }
            Some(other) => return Err(TestCaseError::fail(other.to_string())),
            None => prop_assert_eq!(messages.len(), usize::from(known)),
        }
    }

    #[test]
    fn no_harm_to_honest_messages_makes_the_decoder_panic(
        messages in vec(any_message(), 1..4),
        harms in vec((any::<prop::sample::Index>(), harm()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes: Vec<u8> = messages.iter().flat_map(encode).collect();
        for (at, harm) in harms {
            let at = at.index(bytes.len());
            match harm {
                Harm::Flip(bit) => bytes[at] ^= 1 << bit,
                Harm::Insert(more) => drop(bytes.splice(at..at, more)),
                Harm::Remove(count) => drop(bytes.drain(at..bytes.len().min(at + count))),
            }
            bytes.push(0);
        }
        let (start, rest) = bytes.split_at(cut.index(bytes.len()));
        use_bodies(&decode_pieces([start, rest]).0);
    }

    #[test]
    fn a_header_with_any_value_in_any_field_is_taken_or_refused(
        message in any_message(),
        which in any::<prop::sample::Index>(),
        value in prop_oneof![
            Just(json!(null)), Just(json!(-1)), Just(json!(1e300)), Just(json!(u64::MAX)),
            Just(json!("")), Just(json!([])), Just(json!({})), Just(json!([[[[]]]])),
            any::<u64>().prop_map(Value::from), any::<String>().prop_map(Value::from),
        ],
    ) {
        let (_, header, _) = parts(&message);
        let mut names: Vec<String> = header.keys().cloned().collect();
        names.push("required".into());
        let name = which.get(&names).clone();
        let frame = with_header(&message, |header| {
            header.insert(name, value);
        });
        let (messages, error) = decode_all(&frame);
        use_bodies(&messages);
        prop_assert!(messages.len() == usize::from(error.is_none()));
    }

    #[test]
    fn lengths_beyond_the_limits_are_refused_before_anything_of_them_comes(
        kind in prop::sample::select(MessageKind::ALL.to_vec()),
        over in 1..1_000_000u32,
    ) {
        let header = limits::CONTROL_HEADER_BYTES_MAX as u32 + over;
        let body = limits::CONTROL_BODY_BYTES_MAX as u32 + over;
        for (frame, part) in [(prefix(kind as u8, header, 0), "header"),
                              (prefix(kind as u8, 2, body), "body")] {
            let (_, error) = decode_all(&frame);
            let refused = matches!(error, Some(FrameError::TooLarge { part: at, .. }) if at == part);
            prop_assert!(refused, "{error:?}");
        }
    }
}

#[test]
fn the_largest_lengths_are_waited_for_and_take_no_room() {
    let header = limits::CONTROL_HEADER_BYTES_MAX as u32;
    let body = limits::CONTROL_BODY_BYTES_MAX as u32;
    // `decode_pieces` sees to it that only what came is held.
    assert_eq!(decode_all(&prefix(6, header, body)), (vec![], None));
}

#[test]
fn strangers_are_refused_at_the_first_byte_that_differs() {
    let strangers: [(&[u8], _); 3] =
        [(b"G", *b"G\0\0\0"), (b"PFRX", *b"PFRX"), (b"SSH-2.0-x", *b"SSH-")];
    for (bytes, found) in strangers {
        assert_eq!(decode_all(bytes), (vec![], Some(FrameError::NotPageferry { found })));
    }
    let newer = [&MAGIC[..], &[VERSION + 1]].concat();
    let unknown = FrameError::UnknownVersion { peer: VERSION + 1, ours: VERSION };
    assert_eq!(decode_all(&newer), (vec![], Some(unknown)));
    let mut flagged = prefix(5, 2, 0);
    flagged[6] = 1;
    assert_eq!(decode_all(&flagged), (vec![], Some(FrameError::UnknownFlags { flags: 1 })));
}

#[test]
fn a_body_where_none_belongs_and_one_missing_where_one_does_are_refused() {
    for message in examples() {
        let (kind, header, body) = parts(&message);
        let header = Value::Object(header).to_string();
        let may_be_empty = !matches!(kind, MessageKind::DeviceState | MessageKind::ReturnPath);
        let other: &[u8] = if body.is_empty() { &[1] } else { &[] };
        let (_, error) = decode_all(&frame(kind as u8, header.as_bytes(), other));
        // An empty bitmap or digest is a body; that it is none is found when it is decoded.
        assert_eq!(error.is_none(), !body.is_empty() && may_be_empty, "{kind:?}");
    }
    let large = vec![0; limits::STATE_CHUNK_BYTES_MAX + 1];
    let (_, error) = decode_all(&frame(MessageKind::DeviceState as u8, b"{}", &large));
    assert!(matches!(error, Some(FrameError::Malformed { .. })), "{error:?}");
}

/// Before it is known who is there, no more is held for him than an introduction takes.
#[test]
fn a_strangers_first_frame_is_short() {
    let first = |bytes: &[u8]| {
        let mut decoder = Decoder::of_stranger();
        decoder.push(bytes);
        decoder.next_message()
    };
    for message in examples() {
        let taken = matches!(first(&encode(&message)), Ok(Some(_)));
        let has_body = !parts(&message).2.is_empty();
        assert_eq!(taken, !has_body, "{:?}", message.kind());
    }
    let hello = MessageKind::Hello as u8;
    let max = limits::CONTROL_INTRODUCTION_BYTES_MAX as u32;
    for (header, body, taken) in [(max, 0, true), (max + 1, 0, false), (20, 1, false)] {
        let announced = first(&prefix(hello, header, body));
        assert_eq!(matches!(announced, Ok(None)), taken, "{header} {body}: {announced:?}");
    }
    let mut decoder = Decoder::of_stranger();
    let [hello, .., round] = &examples()[..6] else { unreachable!("there are more") };
    decoder.push(&[encode(hello), encode(round)].concat());
    assert_eq!(decoder.next_message(), Ok(Some(hello.clone())));
    assert_eq!(decoder.next_message(), Ok(Some(round.clone())), "what comes then may be long");
}

/// Sizes of an offer that would be multiplied, divided by, or allocated for.
#[test]
fn an_offer_of_impossible_sizes_is_refused() {
    let offer = examples().swap_remove(2);
    let changes: &[(&str, Value)] = &[
        ("bytes", json!(0)),
        ("bytes", json!(4095)),
        ("bytes", json!(u64::MAX)),
        ("bytes", json!(1u64 << 51)),
        ("page_bytes", json!(0)),
        ("page_bytes", json!(512)),
        ("page_bytes", json!(12288)),
        ("page_bytes", json!(1u64 << 31)),
        ("populated_bytes", json!(u64::MAX)),
    ];
    for (name, value) in changes {
        let frame = with_header(&offer, |header| {
            header["regions"][0][*name] = value.clone();
        });
        let (messages, error) = decode_all(&frame);
        assert!(messages.is_empty(), "{name}: {value}");
        assert!(matches!(error, Some(FrameError::Malformed { .. })), "{name}: {value}: {error:?}");
    }
    let refused = |change: &dyn Fn(&mut Map<String, Value>)| {
        matches!(decode_all(&with_header(&offer, change)).1, Some(FrameError::Malformed { .. }))
    };
    assert!(refused(&|header| header["regions"] = json!([])));
    assert!(refused(&|header| {
        let region = header["regions"][1].clone();
        header["regions"] = Value::from(vec![region; limits::REGIONS_MAX + 1]);
    }));
}

#[test]
fn a_choice_of_no_lanes_or_too_many_is_refused() {
    let choice = examples().swap_remove(3);
    for count in [0, limits::LANES_MAX + 1] {
        let frame = with_header(&choice, |header| {
            let lane = header["lanes"][0].clone();
            header["lanes"] = Value::from(vec![lane; count]);
        });
        assert!(matches!(decode_all(&frame).1, Some(FrameError::Malformed { .. })), "{count}");
    }
    for ticket in ["", "00", &"0".repeat(63), &"0".repeat(66), &"+f".repeat(32), &"ä".repeat(32)] {
        let frame = with_header(&choice, |header| header["lanes"][0]["ticket"] = json!(ticket));
        assert!(matches!(decode_all(&frame).1, Some(FrameError::Malformed { .. })), "{ticket}");
    }
}
