//! The control decoder: frames as they come from a stranger, in pieces of any size.

use pageferry_datapath::control::{Decoder, FrameError, MAGIC, Message, VERSION, encode};
use pageferry_datapath::limits;

/// Below this, the first byte asks for frames whose lengths are right, or most inputs would end at
/// their prefix.
const FRAMED_BELOW: u8 = 128;

pub(super) fn run(bytes: &[u8]) {
    match bytes.split_first() {
        Some((first, rest)) if *first < FRAMED_BELOW => decode(&framed(rest)),
        Some((_, rest)) => decode(rest),
        None => {}
    }
}

fn decode(bytes: &[u8]) {
    let whole = decode_in_pieces(bytes, usize::MAX);
    let piece = 1 + bytes.len() % 37;
    assert_eq!(whole, decode_in_pieces(bytes, piece), "how it is cut makes a difference");
    for message in whole.0 {
        let again = decode_in_pieces(&encode(&message), usize::MAX);
        assert_eq!(again, (vec![message], None), "it does not survive being sent on");
    }
}

fn decode_in_pieces(bytes: &[u8], piece: usize) -> (Vec<Message>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    for bytes in bytes.chunks(piece) {
        decoder.push(bytes);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                // Its first bytes may be all there was when it was refused.
                Err(FrameError::NotPageferry { .. }) => {
                    return (messages, Some(FrameError::NotPageferry { found: [0; 4] }));
                }
                Err(error) => return (messages, Some(error)),
            }
        }
        assert!(decoder.pending_bytes() <= bytes_max(), "it holds more than a frame");
    }
    (messages, None)
}

fn bytes_max() -> usize {
    16 + (limits::CONTROL_HEADER_BYTES_MAX + limits::CONTROL_BODY_BYTES_MAX) as usize
}

/// `kind, header length, body length (u8 each), header, body` again and again, as frames.
fn framed(mut bytes: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    while let [kind, header_len, body_len, rest @ ..] = bytes {
        let header_len = rest.len().min(usize::from(*header_len));
        let (header, rest) = rest.split_at(header_len);
        let (body, rest) = rest.split_at(rest.len().min(usize::from(*body_len)));
        frames.extend(MAGIC);
        frames.extend([VERSION, *kind, 0, 0]);
        frames.extend((header.len() as u32).to_le_bytes());
        frames.extend((body.len() as u32).to_le_bytes());
        frames.extend(header);
        frames.extend(body);
        bytes = rest;
    }
    frames
}
