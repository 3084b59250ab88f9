//! Frames: the outer shape of every control message, and the checks before anything is trusted.

use serde_json::{Map, Value};

use super::message::{Message, MessageKind};
use crate::limits;

/// First bytes of every control frame, and so of every control connection.
pub const MAGIC: [u8; 4] = *b"PFRY";
/// The frame layout above. Messages evolve by optional fields; this changes only with the layout.
pub const VERSION: u8 = 1;
/// Bytes before the header.
const PREFIX_BYTES: usize = 16;
/// Kinds from here on are optional: who does not know one skips it.
const OPTIONAL_KINDS_FROM: u8 = 128;

/// What can be wrong with bytes from the peer. Every case ends the connection.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The peer is not a Pageferry agent.
    #[error("not a pageferry control connection (it began with {found:02x?})")]
    NotPageferry {
        /// The four bytes in place of the magic.
        found: [u8; 4],
    },
    /// The peer speaks a frame layout this build does not.
    #[error("the peer speaks control version {peer}, this build speaks {ours}")]
    UnknownVersion {
        /// The peer's.
        peer: u8,
        /// Ours.
        ours: u8,
    },
    /// Flag bits without a meaning.
    #[error("control frame with unknown flags {flags:#06x}")]
    UnknownFlags {
        /// The whole flag word.
        flags: u16,
    },
    /// A message this build does not know and may not skip.
    #[error("the peer sent message kind {kind}, which this build does not know")]
    UnknownKind {
        /// Its number.
        kind: u8,
    },
    /// Header or body larger than any honest one.
    #[error("control frame {part} of {bytes} bytes, at most {bytes_max} are taken")]
    TooLarge {
        /// `header` or `body`.
        part: &'static str,
        /// Announced size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// The header is not the JSON object this kind has.
    #[error("malformed {kind:?} message: {what}")]
    Malformed {
        /// Which message.
        kind: MessageKind,
        /// What was wrong with it.
        what: MalformedWhat,
    },
    /// A field the peer requires us to understand, and we do not.
    #[error("the peer requires field `{field}` of {kind:?}, which this build does not know")]
    UnknownRequiredField {
        /// Which message.
        kind: MessageKind,
        /// The field's name, shortened to 64 characters.
        field: FieldName,
    },
}

/// How a header or body was malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MalformedWhat {
    /// Not UTF-8 JSON, or not an object.
    NotAnObject,
    /// A field is missing or of another type or out of its range.
    Fields,
    /// A body where none belongs, or one that does not decode.
    Body,
}

impl std::fmt::Display for MalformedWhat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotAnObject => "its header is not a JSON object",
            Self::Fields => "a field is missing or out of range",
            Self::Body => "its body does not belong or does not decode",
        })
    }
}

/// A field's name as the peer wrote it, bounded and printable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldName(String);

impl FieldName {
    fn from_peer(name: &str) -> Self {
        Self(name.chars().filter(|c| c.is_ascii_graphic()).take(64).collect())
    }
}

impl std::fmt::Display for FieldName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Encodes one message as one frame.
pub fn encode(message: &Message) -> Vec<u8> {
    let (header, body) = message.to_parts();
    let header = Value::Object(header).to_string();
    assert!(header.len() as u64 <= limits::CONTROL_HEADER_BYTES_MAX);
    assert!(body.len() as u64 <= limits::CONTROL_BODY_BYTES_MAX);
    let mut frame = Vec::with_capacity(PREFIX_BYTES + header.len() + body.len());
    frame.extend_from_slice(&MAGIC);
    frame.push(VERSION);
    frame.push(message.kind() as u8);
    frame.extend_from_slice(&0u16.to_le_bytes());
    frame.extend_from_slice(&(header.len() as u32).to_le_bytes());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(header.as_bytes());
    frame.extend_from_slice(&body);
    frame
}

/// Turns a stream of bytes, however cut, into messages.
///
/// Holds at most what has arrived: an announced length never allocates by itself.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
    /// The next frame is a stranger's first.
    introduction: bool,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty decoder for a new connection. Whoever is at its other end introduces himself first,
    /// which is short: until then no more is held for him than that takes.
    pub fn of_stranger() -> Self {
        Self { introduction: true, ..Self::default() }
    }

    /// Adds bytes as they came from the connection.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that have arrived and are not yet part of a message.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.taken
    }

    /// The next whole message, `None` until more bytes arrive. After an error the connection is
    /// of no more use.
    pub fn next_message(&mut self) -> Result<Option<Message>, FrameError> {
        loop {
            let bytes = &self.buffer[self.taken..];
            let Some(prefix) = Prefix::parse(bytes)? else { return Ok(None) };
            if self.introduction {
                prefix.check_introduction()?;
            }
            let Some(frame) = bytes.get(..prefix.frame_bytes()) else { return Ok(None) };
            self.taken += frame.len();
            self.introduction = false;
            let (header, body) = frame[PREFIX_BYTES..].split_at(prefix.header_bytes);
            match MessageKind::from_number(prefix.kind) {
                Some(kind) => return parse(kind, header, body).map(Some),
                None => continue, // `Prefix::parse` let only optional kinds through.
            }
        }
    }
}

/// The first 16 bytes, checked.
struct Prefix {
    kind: u8,
    header_bytes: usize,
    body_bytes: usize,
}

impl Prefix {
    fn parse(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        // Refuse a stranger at the first bytes that differ, not after sixteen of them came.
        let seen = bytes.len().min(MAGIC.len());
        if bytes[..seen] != MAGIC[..seen] {
            let mut found = [0; 4];
            found[..seen].copy_from_slice(&bytes[..seen]);
            return Err(FrameError::NotPageferry { found });
        }
        // Nor wait for what another version's layout may never bring.
        if let Some(&version) = bytes.get(MAGIC.len()).filter(|version| **version != VERSION) {
            return Err(FrameError::UnknownVersion { peer: version, ours: VERSION });
        }
        let Some(prefix) = bytes.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let [.., kind, f0, f1, h0, h1, h2, h3, b0, b1, b2, b3] = *prefix;
        let flags = u16::from_le_bytes([f0, f1]);
        if flags != 0 {
            return Err(FrameError::UnknownFlags { flags });
        }
        if MessageKind::from_number(kind).is_none() && kind < OPTIONAL_KINDS_FROM {
            return Err(FrameError::UnknownKind { kind });
        }
        let header_bytes = u32::from_le_bytes([h0, h1, h2, h3]);
        let body_bytes = u32::from_le_bytes([b0, b1, b2, b3]);
        for (part, bytes, bytes_max) in [
            ("header", u64::from(header_bytes), limits::CONTROL_HEADER_BYTES_MAX),
            ("body", u64::from(body_bytes), limits::CONTROL_BODY_BYTES_MAX),
        ] {
            if bytes > bytes_max {
                return Err(FrameError::TooLarge { part, bytes, bytes_max });
            }
        }
        Ok(Some(Self {
            kind,
            header_bytes: header_bytes as usize,
            body_bytes: body_bytes as usize,
        }))
    }

    fn check_introduction(&self) -> Result<(), FrameError> {
        let header_max = limits::CONTROL_INTRODUCTION_BYTES_MAX;
        for (part, bytes, bytes_max) in
            [("header", self.header_bytes as u64, header_max), ("body", self.body_bytes as u64, 0)]
        {
            if bytes > bytes_max {
                return Err(FrameError::TooLarge { part, bytes, bytes_max });
            }
        }
        Ok(())
    }

    fn frame_bytes(&self) -> usize {
        PREFIX_BYTES + self.header_bytes + self.body_bytes
    }
}

fn parse(kind: MessageKind, header: &[u8], body: &[u8]) -> Result<Message, FrameError> {
    let malformed = |what| FrameError::Malformed { kind, what };
    let mut header: Map<String, Value> =
        serde_json::from_slice(header).map_err(|_| malformed(MalformedWhat::NotAnObject))?;
    let required = header.remove("required");
    let message = Message::from_parts(kind, header, body).map_err(malformed)?;
    check_required(kind, required, &message)?;
    Ok(message)
}

/// Refuses, by name, what the peer requires and this build has no field for.
fn check_required(
    kind: MessageKind,
    required: Option<Value>,
    message: &Message,
) -> Result<(), FrameError> {
    let Some(required) = required else { return Ok(()) };
    let fields = FrameError::Malformed { kind, what: MalformedWhat::Fields };
    let Value::Array(names) = required else { return Err(fields) };
    let known = message.to_parts().0;
    for name in &names {
        let Value::String(name) = name else { return Err(fields) };
        if !known.contains_key(name) {
            let field = FieldName::from_peer(name);
            return Err(FrameError::UnknownRequiredField { kind, field });
        }
    }
    Ok(())
}
