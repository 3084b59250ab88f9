//! Frames taken apart and put together by hand, as somebody else's implementation would.

use pageferry_datapath::control::{
    Decoder, FrameError, MAGIC, Message, MessageKind, VERSION, encode,
};
use serde_json::{Map, Value};

/// Bytes before the header.
pub(crate) const PREFIX_BYTES: usize = 16;

/// A frame of these parts, whatever they are.
pub(crate) fn frame(kind: u8, header: &[u8], body: &[u8]) -> Vec<u8> {
    let mut frame = prefix(kind, header.len() as u32, body.len() as u32);
    frame.extend_from_slice(header);
    frame.extend_from_slice(body);
    frame
}

pub(crate) fn prefix(kind: u8, header_bytes: u32, body_bytes: u32) -> Vec<u8> {
    let mut prefix = MAGIC.to_vec();
    prefix.extend_from_slice(&[VERSION, kind, 0, 0]);
    prefix.extend_from_slice(&header_bytes.to_le_bytes());
    prefix.extend_from_slice(&body_bytes.to_le_bytes());
    prefix
}

/// Kind, header and body of a message's frame.
pub(crate) fn parts(message: &Message) -> (MessageKind, Map<String, Value>, Vec<u8>) {
    let frame = encode(message);
    let length = |at: usize| {
        let bytes = frame[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes) as usize
    };
    let (header, body) = frame[PREFIX_BYTES..].split_at(length(8));
    assert_eq!(body.len(), length(12));
    (message.kind(), serde_json::from_slice(header).expect("an object"), body.to_vec())
}

/// A message with another header.
pub(crate) fn with_header(
    message: &Message,
    change: impl FnOnce(&mut Map<String, Value>),
) -> Vec<u8> {
    let (kind, mut header, body) = parts(message);
    change(&mut header);
    frame(kind as u8, Value::Object(header).to_string().as_bytes(), &body)
}

/// All messages of these bytes, and the error that ended them.
pub(crate) fn decode_all(bytes: &[u8]) -> (Vec<Message>, Option<FrameError>) {
    decode_pieces([bytes])
}

/// As [`decode_all`], of bytes that come in pieces.
pub(crate) fn decode_pieces<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Message>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    for piece in pieces {
        let before = decoder.pending_bytes();
        decoder.push(piece);
        assert_eq!(decoder.pending_bytes(), before + piece.len());
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}
