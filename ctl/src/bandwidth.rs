//! Bandwidths as people write them.
//!
//! As links are sold: a plain number is bits a second, and K, M, G and T are powers of 1000. `1G`
//! and `1Gbit` are the same; `125MB` (a capital B) counts bytes. Counted is what lanes hand to their
//! connections, our own headers included; what TCP, IP and Ethernet put around it (4 to 6 %) is not.

use std::fmt;
use std::str::FromStr;

use pageferry_datapath::pace::BYTES_PER_SECOND_MIN;
use serde::{Deserialize, Serialize};

/// A limit to how much is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bandwidth {
    /// In bytes, as lanes are held to it.
    pub bytes_per_second: u64,
}

/// Not a bandwidth.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a bandwidth looks like 1G, 500M or 2.5Gbit (bits a second), or 125MB (bytes); at least 1M"
)]
pub struct BandwidthError;

impl FromStr for Bandwidth {
    type Err = BandwidthError;

    fn from_str(text: &str) -> Result<Self, BandwidthError> {
        let text = text.trim().trim_end_matches("/s").trim_end_matches("ps");
        let (text, bits) = match text.strip_suffix('B') {
            Some(number) => (number, 8.0),
            None => (text.trim_end_matches("bit").trim_end_matches('b'), 1.0),
        };
        let last = text.chars().next_back().ok_or(BandwidthError)?;
        let factor = match last.to_ascii_uppercase() {
            'K' => 1e3,
            'M' => 1e6,
            'G' => 1e9,
            'T' => 1e12,
            _ => 1.0,
        };
        let number = if factor > 1.0 { &text[..text.len() - 1] } else { text };
        let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let number: f64 = number.parse().ok().filter(|_| plain).ok_or(BandwidthError)?;
        let bytes_per_second = number * factor * bits / 8.0;
        // Up to a petabyte: no link of today, and every sum fits.
        if !(BYTES_PER_SECOND_MIN as f64..=1e15).contains(&bytes_per_second) {
            return Err(BandwidthError);
        }
        Ok(Self { bytes_per_second: bytes_per_second as u64 })
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bytes_per_second * 8;
        let units =
            [(1_000_000_000_000, "T"), (1_000_000_000, "G"), (1_000_000, "M"), (1_000, "K")];
        match units.into_iter().find(|(unit, _)| bits.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}bit", bits / unit),
            None => write!(f, "{bits}bit"),
        }
    }
}

impl TryFrom<String> for Bandwidth {
    type Error = BandwidthError;

    fn try_from(text: String) -> Result<Self, BandwidthError> {
        text.parse()
    }
}

impl From<Bandwidth> for String {
    fn from(bandwidth: Bandwidth) -> Self {
        bandwidth.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_as_links_are_sold_and_bytes_where_told() {
        for (text, bytes) in [
            ("1G", 125_000_000),
            ("1Gbit", 125_000_000),
            ("1gbps", 125_000_000),
            ("2.5G", 312_500_000),
            ("500M", 62_500_000),
            ("500Mbit/s", 62_500_000),
            ("125MB", 125_000_000),
            ("125MB/s", 125_000_000),
            ("1000000", 125_000),
        ] {
            let parsed = text.parse::<Bandwidth>();
            assert_eq!(parsed.map(|it| it.bytes_per_second), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "-1G", "1X", "0", "999K", "1e9", "NaN", "infG", "1.2.3M", "9999999T"] {
            assert_eq!(bad.parse::<Bandwidth>(), Err(BandwidthError), "{bad}");
        }
    }

    #[test]
    fn what_is_said_is_understood() {
        for text in ["1Gbit", "2500Mbit", "62500Kbit", "1000008bit"] {
            assert_eq!(text.parse::<Bandwidth>().unwrap().to_string(), text);
        }
    }
}
