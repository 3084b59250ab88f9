//! The wire form of a dirty bitmap: runs or raw bits, whichever is smaller.
//!
//! ```text
//!   00 | gap, length, gap, length, …     LEB128; pages since the end of the last run, pages set
//!   01 | bits                            ⌈pages / 8⌉ bytes, bit n of the whole = page n
//! ```
//!
//! The receiver knows the number of pages from the offer; nothing in the bytes can change what is
//! allocated. Each bitmap has one run form: empty runs, runs that touch, numbers with needless
//! bytes and set bits past the end are refused, so that what was decoded is what was meant.

use super::DirtyBitmap;

const FORM_RUNS: u8 = 0;
const FORM_BITS: u8 = 1;

/// Bytes of a 64-bit LEB128 number at most.
pub(super) const VARINT_BYTES_MAX: usize = 10;

/// Bytes that decode to no bitmap of the agreed shape.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes end within something.
    #[error("bitmap ends early")]
    Truncated,
    /// More bytes than the bitmap needs.
    #[error("{extra_bytes} bytes after the end of the bitmap")]
    TrailingBytes {
        /// How many.
        extra_bytes: usize,
    },
    /// A first byte of no known form.
    #[error("bitmap of unknown form {form}")]
    UnknownForm {
        /// The byte.
        form: u8,
    },
    /// A number of more than 64 bits or with needless bytes.
    #[error("bitmap holds a malformed number")]
    MalformedNumber,
    /// A run that is empty, or not separated from the one before.
    #[error("bitmap holds a malformed run at page {page}")]
    MalformedRun {
        /// Where it starts.
        page: u64,
    },
    /// A set page past the last one.
    #[error("bitmap reaches past its {pages} pages")]
    OutOfRange {
        /// Pages of the agreed shape.
        pages: u64,
    },
}

/// The longest wire form of a bitmap of `pages` pages, in bytes.
pub fn encoded_max_bytes(pages: u64) -> u64 {
    1 + pages.div_ceil(8)
}

impl DirtyBitmap {
    /// The wire form, at most [`encoded_max_bytes`] long.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_runs().unwrap_or_else(|| self.encode_bits())
    }

    /// Reads the wire form of a bitmap of `pages` pages of `page_bytes`, as agreed before.
    /// Allocates one bit per page and nothing more.
    pub fn decode(bytes: &[u8], pages: u64, page_bytes: u64) -> Result<Self, DecodeError> {
        let (form, body) = bytes.split_first().ok_or(DecodeError::Truncated)?;
        let mut bitmap = Self::new(pages, page_bytes);
        match *form {
            FORM_RUNS => bitmap.decode_runs(body)?,
            FORM_BITS => bitmap.decode_bits(body)?,
            form => return Err(DecodeError::UnknownForm { form }),
        }
        Ok(bitmap)
    }

    /// `None` as soon as it gets longer than the raw bits.
    fn encode_runs(&self) -> Option<Vec<u8>> {
        let limit = encoded_max_bytes(self.pages) as usize;
        let mut bytes = vec![FORM_RUNS];
        let mut end = 0;
        for run in self.runs() {
            put_varint(&mut bytes, run.start - end);
            put_varint(&mut bytes, run.end - run.start);
            end = run.end;
            if bytes.len() > limit {
                return None;
            }
        }
        Some(bytes)
    }

    fn encode_bits(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(1 + self.words.len() * 8);
        bytes.push(FORM_BITS);
        bytes.extend(self.words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.truncate(encoded_max_bytes(self.pages) as usize);
        bytes
    }

    fn decode_runs(&mut self, mut body: &[u8]) -> Result<(), DecodeError> {
        let mut end = 0u64;
        let mut first = true;
        while !body.is_empty() {
            let gap = take_varint(&mut body)?;
            let len = take_varint(&mut body)?;
            if len == 0 || (gap == 0 && !first) {
                return Err(DecodeError::MalformedRun { page: end });
            }
            let past_the_end = DecodeError::OutOfRange { pages: self.pages };
            let start = end.checked_add(gap).ok_or(past_the_end)?;
            end = start.checked_add(len).ok_or(past_the_end)?;
            if end > self.pages {
                return Err(past_the_end);
            }
            self.set_range(start..end);
            first = false;
        }
        Ok(())
    }

    fn decode_bits(&mut self, body: &[u8]) -> Result<(), DecodeError> {
        let expected = encoded_max_bytes(self.pages) as usize - 1;
        if body.len() < expected {
            return Err(DecodeError::Truncated);
        }
        if body.len() > expected {
            return Err(DecodeError::TrailingBytes { extra_bytes: body.len() - expected });
        }
        for (word, bytes) in self.words.iter_mut().zip(body.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(padded);
        }
        let last = self.words.last().copied();
        self.trim();
        match self.words.last().copied() == last {
            true => Ok(()),
            false => Err(DecodeError::OutOfRange { pages: self.pages }),
        }
    }
}

pub(super) fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

pub(super) fn take_varint(bytes: &mut &[u8]) -> Result<u64, DecodeError> {
    let mut value = 0u64;
    for index in 0..VARINT_BYTES_MAX {
        let (byte, rest) = bytes.split_first().ok_or(DecodeError::Truncated)?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        let shifted = bits << (7 * index);
        if shifted >> (7 * index) != bits {
            return Err(DecodeError::MalformedNumber);
        }
        value |= shifted;
        if byte & 0x80 == 0 {
            let needless = *byte == 0 && index > 0;
            return if needless { Err(DecodeError::MalformedNumber) } else { Ok(value) };
        }
    }
    Err(DecodeError::MalformedNumber)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::tests::{bitmap, flags};
    use super::*;

    proptest! {
        #[test]
        fn decode_of_encode_is_the_identity_and_bounded(flags in flags()) {
            let bitmap = bitmap(&flags);
            let bytes = bitmap.encode();
            prop_assert!(bytes.len() as u64 <= encoded_max_bytes(bitmap.pages()));
            prop_assert_eq!(DirtyBitmap::decode(&bytes, bitmap.pages(), 4096), Ok(bitmap));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_and_what_it_takes_is_within_shape(
            form in 0..3u8, body in vec(any::<u8>(), 0..48), pages in 0..300u64,
        ) {
            let bytes = [&[form][..], &body].concat();
            if let Ok(bitmap) = DirtyBitmap::decode(&bytes, pages, 4096) {
                prop_assert_eq!(bitmap.pages(), pages);
                prop_assert!(bitmap.runs().all(|run| run.end <= pages));
                let again = DirtyBitmap::decode(&bitmap.encode(), pages, 4096);
                prop_assert_eq!(again, Ok(bitmap));
            }
        }

        /// Or a peer could say one thing to who compares bytes and another to who compares sets.
        #[test]
        fn no_two_run_forms_mean_the_same(body in vec(0..5u8, 0..12), pages in 0..40u64) {
            let bytes = [&[FORM_RUNS][..], &body].concat();
            if let Ok(bitmap) = DirtyBitmap::decode(&bytes, pages, 4096) {
                let mut runs = vec![FORM_RUNS];
                let mut end = 0;
                for run in bitmap.runs() {
                    put_varint(&mut runs, run.start - end);
                    put_varint(&mut runs, run.end - run.start);
                    end = run.end;
                }
                prop_assert_eq!(runs, bytes);
            }
        }

        #[test]
        fn numbers_survive(value: u64) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut rest = &bytes[..];
            prop_assert_eq!(take_varint(&mut rest), Ok(value));
            prop_assert!(rest.is_empty());
        }
    }

    #[test]
    fn each_malformed_form_is_named() {
        let decode = |bytes: &[u8]| DirtyBitmap::decode(bytes, 10, 4096).unwrap_err();
        assert_eq!(decode(&[]), DecodeError::Truncated);
        assert_eq!(decode(&[7]), DecodeError::UnknownForm { form: 7 });
        assert_eq!(decode(&[0, 1]), DecodeError::Truncated);
        assert_eq!(decode(&[0, 1, 0]), DecodeError::MalformedRun { page: 0 });
        assert_eq!(decode(&[0, 0, 1, 0, 1]), DecodeError::MalformedRun { page: 1 });
        assert_eq!(decode(&[0, 9, 2]), DecodeError::OutOfRange { pages: 10 });
        assert_eq!(decode(&[0, 0x81, 0, 1]), DecodeError::MalformedNumber);
        assert_eq!(decode(&[&[0][..], &[0xff; 11]].concat()), DecodeError::MalformedNumber);
        let max = [&[0][..], &[0xff; 9], &[1], &[1]].concat();
        assert_eq!(decode(&max), DecodeError::OutOfRange { pages: 10 });
        assert_eq!(decode(&[1, 0]), DecodeError::Truncated);
        assert_eq!(decode(&[1, 0, 0, 0]), DecodeError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(decode(&[1, 0, 4]), DecodeError::OutOfRange { pages: 10 });
        assert_eq!(DirtyBitmap::decode(&[1, 0, 3], 10, 4096).unwrap().count(), 2);
    }

    #[test]
    fn sparse_takes_runs_and_scattered_takes_bits() {
        let mut bitmap = DirtyBitmap::new(1 << 18, 4096);
        bitmap.set_range(1000..200_000);
        assert_eq!(bitmap.encode().len(), 6);
        for page in 0..1 << 17 {
            bitmap.clear_range(2 * page..2 * page + 1);
        }
        bitmap.clear_range(0..1000);
        bitmap.set_range(0..1);
        let bytes = bitmap.encode();
        assert_eq!((bytes[0], bytes.len()), (FORM_BITS, 1 + (1 << 15)));
    }
}
