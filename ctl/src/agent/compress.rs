//! `--compress`, and what both agents make of it.

use std::str::FromStr;

use pageferry_datapath::codec::{Codec, CodecError, CodecName};
use pageferry_datapath::control::LaneOffer;
use pageferry_uring::plan::PackingWish;

/// Whether memory is compressed on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compress {
    /// While it makes the migration faster, and guests leave the processor to it.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, with this codec.
    Always(Codec),
}

impl FromStr for Compress {
    type Err = CompressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            codec => Ok(Self::Always(codec.parse()?)),
        }
    }
}

/// Not a way to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("auto, off or a codec: {source}")]
pub struct CompressError {
    /// What is wrong with the codec.
    #[from]
    source: CodecError,
}

impl Compress {
    /// What the source offers to pack with.
    pub fn offered(self) -> Vec<CodecName> {
        match self {
            Self::Auto => CodecName::ALL.to_vec(),
            Self::Off => Vec::new(),
            Self::Always(codec) => vec![codec.name()],
        }
    }

    /// What the source's lanes do, given what the target takes.
    pub(super) fn wish(self, accepted: &[CodecName]) -> PackingWish {
        let takes = |codec: &Codec| accepted.contains(&codec.name());
        match self {
            Self::Off => PackingWish::Not("asked for".into()),
            Self::Always(codec) if takes(&codec) => PackingWish::Always(codec),
            Self::Always(codec) => PackingWish::Not(format!("the target does not take {codec}")),
            Self::Auto => {
                let codecs = [Codec::Lz4, Codec::Zstd { level: Codec::ZSTD_LEVEL }];
                match codecs.into_iter().filter(takes).collect::<Vec<_>>() {
                    none if none.is_empty() => PackingWish::Not("the target takes no codec".into()),
                    codecs => PackingWish::Auto(codecs),
                }
            }
        }
    }
}

/// Target: of the codecs offered, those it unpacks.
pub fn accepted_codecs(offer: &LaneOffer) -> Vec<CodecName> {
    CodecName::ALL.into_iter().filter(|codec| offer.codecs.contains(codec)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_what_may_be_used() {
        let zstd = Codec::Zstd { level: 3 };
        assert_eq!("auto".parse(), Ok(Compress::Auto));
        assert_eq!("off".parse(), Ok(Compress::Off));
        assert_eq!("zstd:3".parse(), Ok(Compress::Always(zstd)));
        let error = "gzip".parse::<Compress>().unwrap_err().to_string();
        assert!(error.starts_with("auto, off or a codec: "), "{error}");
        for (wanted, accepted, packs) in [
            (Compress::Auto, &CodecName::ALL[..], true),
            (Compress::Auto, &[], false),
            (Compress::Off, &CodecName::ALL, false),
            (Compress::Always(zstd), &[CodecName::Lz4], false),
            (Compress::Always(zstd), &CodecName::ALL, true),
        ] {
            let wish = wanted.wish(accepted);
            assert_eq!(!matches!(wish, PackingWish::Not(_)), packs, "{wish:?}");
        }
        let offer = |codecs| LaneOffer {
            count: None,
            paths: vec![],
            cpus: 1,
            encrypt: false,
            codecs,
            nics: 0,
            rss: false,
            holes: false,
        };
        let unknown = vec![CodecName::Unknown, CodecName::Zstd, CodecName::Zstd];
        assert_eq!(accepted_codecs(&offer(unknown)), [CodecName::Zstd]);
        assert!(accepted_codecs(&offer(Compress::Off.offered())).is_empty());
    }
}
