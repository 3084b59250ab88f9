//! The fuzzer without coverage: inputs of the corpus, changed a little. For where there is no
//! nightly compiler, and for a few seconds in CI.

use std::path::{Path, PathBuf};

/// Numbers at which decoders decide.
const TELLING: [u64; 10] =
    [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];

/// The inputs kept for this target, and the empty one.
pub fn corpus(name: &str) -> Vec<Vec<u8>> {
    let dir = repository().join("fuzz/corpus").join(name);
    let files = std::fs::read_dir(&dir).map(|entries| entries.flatten().map(|it| it.path()));
    let mut files: Vec<PathBuf> = files.into_iter().flatten().collect();
    files.sort();
    let read = |path: &PathBuf| std::fs::read(path).ok();
    std::iter::once(Vec::new()).chain(files.iter().filter_map(read)).collect()
}

/// Where an input that broke something is put.
pub fn crash_file(name: &str) -> PathBuf {
    repository().join("target").join(format!("fuzz-crash-{name}"))
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("it lies in the repository")
}

/// Makes inputs out of inputs; everything follows from the seed.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    bytes_max: usize,
}

impl Mutator {
    /// Of inputs of at most `bytes_max` bytes.
    pub fn new(seed: u64, bytes_max: usize) -> Self {
        Self { state: seed, bytes_max }
    }

    /// A changed copy of one of `corpus`.
    pub fn next(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(6) {
            self.change(&mut bytes, corpus);
        }
        bytes.truncate(self.bytes_max);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        match self.below(8) {
            0 => bytes.insert(at, self.number() as u8),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 => bytes.truncate(at),
            3 => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            4 => {
                let number = TELLING[self.below(TELLING.len())].to_le_bytes();
                let width = 1 << self.below(4);
                for (byte, new) in bytes[at..].iter_mut().zip(&number[..width]) {
                    *byte = *new;
                }
            }
            5 => {
                let end = at + self.below(bytes.len() - at + 1).min(64);
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            6 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = self.number() as u8;
                }
            }
        }
    }

    fn below(&mut self, end: usize) -> usize {
        (self.number() % end.max(1) as u64) as usize
    }

    /// SplitMix64.
    fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
