//! The raw disk of a laboratory guest: every 4 KiB block says which one it is.
//!
//! Written here on the host, read and verified by the guest program past its page cache. The
//! blocks are really there, no holes: a hole would be answered at once, and a test of requests in
//! flight needs them to take their time.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::error::{LabError, io};
use super::guest_program::pages::{fill_word, mix};

/// Bytes of a block that carries its own number.
pub const BLOCK_BYTES: usize = 4096;
const BLOCK_WORDS: usize = BLOCK_BYTES / 8;

/// Writes the pattern of `block` in version `sequence` (0 as the host made it) over `bytes`.
pub fn write_block(bytes: &mut [u8], block: u64, sequence: u64) {
    let key = block_key(block, sequence);
    for (word, cell) in bytes.chunks_exact_mut(8).enumerate() {
        cell.copy_from_slice(&block_word(block, key, word).to_le_bytes());
    }
}

/// True if `bytes` hold `block` in version `sequence`, every word of it.
pub fn block_is(bytes: &[u8], block: u64, sequence: u64) -> bool {
    let key = block_key(block, sequence);
    bytes.len() == BLOCK_BYTES
        && bytes
            .chunks_exact(8)
            .enumerate()
            .all(|(word, cell)| cell == block_word(block, key, word).to_le_bytes())
}

/// Makes a raw image of `pattern_mib` MiB of known blocks and `scratch_mib` MiB of zeros, on disk
/// when it returns.
pub fn create(path: &Path, pattern_mib: u64, scratch_mib: u64) -> Result<(), LabError> {
    let mut file = File::create(path).map_err(io("create", path))?;
    let blocks_per_mib = (1 << 20) / BLOCK_BYTES as u64;
    let mut buffer = vec![0; 1 << 20];
    for mib in 0..pattern_mib {
        for (block, bytes) in (mib * blocks_per_mib..).zip(buffer.chunks_exact_mut(BLOCK_BYTES)) {
            write_block(bytes, block, 0);
        }
        file.write_all(&buffer).map_err(io("write", path))?;
    }
    buffer.fill(0);
    for _ in 0..scratch_mib {
        file.write_all(&buffer).map_err(io("write", path))?;
    }
    file.sync_all().map_err(io("sync", path))
}

fn block_key(block: u64, sequence: u64) -> u64 {
    mix(block ^ mix(sequence ^ 0x6469_736b))
}

fn block_word(block: u64, key: u64, word: usize) -> u64 {
    debug_assert!(word < BLOCK_WORDS);
    if word == 0 { block } else { fill_word(key, word) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_itself_and_no_other() {
        let mut bytes = vec![0; BLOCK_BYTES];
        write_block(&mut bytes, 5, 0);
        assert!(block_is(&bytes, 5, 0));
        assert!(!block_is(&bytes, 6, 0));
        assert!(!block_is(&bytes, 5, 1));
        bytes[BLOCK_BYTES - 1] ^= 1;
        assert!(!block_is(&bytes, 5, 0));
    }

    #[test]
    fn an_image_holds_its_blocks_in_order() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("disk.raw");
        create(&path, 1, 1).expect("an image");
        let bytes = std::fs::read(&path).expect("the image");
        assert_eq!(bytes.len(), 2 << 20);
        assert!(block_is(&bytes[255 * BLOCK_BYTES..256 * BLOCK_BYTES], 255, 0));
        assert!(bytes[1 << 20..].iter().all(|byte| *byte == 0));
    }
}
