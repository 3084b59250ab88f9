//! What holds for every message: it arrives as it was sent, however the bytes are cut.

use pageferry_datapath::control::{FrameError, Message, encode};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::frames::{decode_all, decode_pieces, parts, with_header};
use crate::messages::any_message;

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn decode_of_encode_is_the_identity_however_it_is_cut(
        messages in vec(any_message(), 1..5),
        cuts in vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(encode).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]);
        prop_assert_eq!(decode_pieces(pieces), (messages, None));
    }

    #[test]
    fn a_message_that_has_not_come_whole_is_waited_for(
        message in any_message(), cut in any::<prop::sample::Index>(),
    ) {
        let bytes = encode(&message);
        prop_assert_eq!(decode_all(&bytes[..cut.index(bytes.len())]), (vec![], None));
    }

    #[test]
    fn fields_that_nobody_here_knows_are_ignored(
        message in any_message(), name in "x-[a-z]{1,12}", value in any_value(),
    ) {
        let frame = with_header(&message, |header| {
            header.insert(name, value);
        });
        prop_assert_eq!(decode_all(&frame), (vec![message], None));
    }

    #[test]
    fn a_required_field_that_nobody_here_knows_is_refused_by_name(
        message in any_message(), name in "x-[a-z]{1,100}", value in any_value(),
    ) {
        let frame = with_header(&message, |header| {
            header.insert(name.clone(), value);
            header.insert("required".into(), json!([name]));
        });
        let (messages, error) = decode_all(&frame);
        prop_assert!(messages.is_empty());
        let Some(FrameError::UnknownRequiredField { kind, field }) = error else {
            return Err(TestCaseError::fail(format!("{error:?}")));
        };
        prop_assert_eq!(kind, message.kind());
        let shown = field.to_string();
        prop_assert!(name.starts_with(&shown) && shown.len() == name.len().min(64));
    }

    #[test]
    fn a_required_field_that_is_known_is_taken(
        message in any_message(), which in any::<prop::sample::Index>(),
    ) {
        let (_, header, _) = parts(&message);
        let names: Vec<String> = header.keys().cloned().collect();
        prop_assume!(!names.is_empty());
        let frame = with_header(&message, |header| {
            header.insert("required".into(), json!([which.get(&names)]));
        });
        prop_assert_eq!(decode_all(&frame), (vec![message], None));
    }

    #[test]
    fn a_message_of_an_optional_kind_is_skipped_whole(
        kind in 129..=255u8,
        header in vec(any::<u8>(), 0..100),
        body in vec(any::<u8>(), 0..100),
        after in any_message(),
    ) {
        let mut bytes = crate::frames::frame(kind, &header, &body);
        bytes.extend(encode(&after));
        prop_assert_eq!(decode_all(&bytes), (vec![after], None));
    }

    #[test]
    fn what_is_printed_of_a_ticket_tells_nothing(message in any_message()) {
        if let Message::Choice(choice) = &message {
            let printed = format!("{message:?}");
            for lane in &choice.lanes {
                let digits: String = lane.ticket.0.iter().map(|b| format!("{b:02x}")).collect();
                prop_assert!(!printed.contains(&digits));
            }
        }
    }
}
