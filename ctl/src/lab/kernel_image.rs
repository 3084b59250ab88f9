//! Takes the ELF kernel out of a bzImage, so that QEMU can enter it directly (PVH).
//!
//! That saves the emulator the real-mode set-up and the decompression. The layout is the kernel's
//! boot protocol (Documentation/arch/x86/boot.rst): the payload is a compressed vmlinux, and its
//! last four bytes hold the size that it unpacks to.

use std::io::Write;
use std::process::{Command, Stdio};

use super::error::LabError;

const SETUP_SECTORS_AT: usize = 0x1f1;
const PAYLOAD_OFFSET_AT: usize = 0x248;
const PAYLOAD_LENGTH_AT: usize = 0x24c;
const SECTOR_BYTES: usize = 512;
/// No kernel unpacks to more; a size from a file is not believed without a bound.
const VMLINUX_BYTES_MAX: usize = 256 << 20;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// The uncompressed kernel inside `image`, or why it can't be had.
pub(super) fn vmlinux(image: &[u8]) -> Result<Vec<u8>, LabError> {
    let setup_sectors = match image.get(SETUP_SECTORS_AT) {
        Some(0) => 4,
        Some(count) => usize::from(*count),
        None => return Err(unexpected(image)),
    };
    let start = (setup_sectors + 1) * SECTOR_BYTES + word(image, PAYLOAD_OFFSET_AT)?;
    let payload = start
        .checked_add(word(image, PAYLOAD_LENGTH_AT)?)
        .and_then(|end| image.get(start..end))
        .filter(|payload| payload.len() > 8)
        .ok_or_else(|| unexpected(image))?;
    // The compressed stream ends where the size word begins.
    let (packed, size) = payload.split_at(payload.len() - 4);
    let size = word(size, 0)?.min(VMLINUX_BYTES_MAX);

    let unpacked = match packed {
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(&packed[LZ4_LEGACY.len()..], size)?,
        [0xfd, b'7', b'z', ..] => filter("xz", packed)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", packed)?,
        [0x1f, 0x8b, ..] => filter("gzip", packed)?,
        _ => return Err(unexpected(packed)),
    };
    if unpacked.starts_with(b"\x7fELF") { Ok(unpacked) } else { Err(unexpected(&unpacked)) }
}

/// lz4's old frame: blocks of a 32-bit length and that many bytes, 8 MiB each when unpacked.
fn lz4_legacy(mut rest: &[u8], size: usize) -> Result<Vec<u8>, LabError> {
    const BLOCK_BYTES: usize = 8 << 20;
    let mut unpacked = Vec::with_capacity(size);
    while unpacked.len() < size {
        let length = word(rest, 0)?;
        let block = rest.get(4..4 + length).ok_or_else(|| unexpected(rest))?;
        let bytes = lz4_flex::block::decompress(block, BLOCK_BYTES.min(size - unpacked.len()))
            .map_err(|error| LabError::Unexpected {
                what: "the kernel's lz4 block",
                found: error.to_string(),
            })?;
        if bytes.is_empty() {
            return Err(unexpected(block));
        }
        unpacked.extend(bytes);
        rest = &rest[4 + length..];
    }
    Ok(unpacked)
}

/// Pipes `bytes` through `program -dc`.
pub(super) fn filter(program: &str, bytes: &[u8]) -> Result<Vec<u8>, LabError> {
    let missing = |source| LabError::Io { action: "run", path: program.into(), source };
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(missing)?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // A program that ends early (it found the end of the stream) is not an error.
                let _ = stdin.write_all(bytes);
            }
        });
        child.wait_with_output()
    });
    output.map(|output| output.stdout).map_err(missing)
}

fn word(bytes: &[u8], at: usize) -> Result<usize, LabError> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(|| unexpected(bytes))?;
    Ok(u32::from_le_bytes(*word) as usize)
}

fn unexpected(bytes: &[u8]) -> LabError {
    let start = &bytes[..bytes.len().min(8)];
    LabError::Unexpected { what: "a kernel image", found: format!("{start:02x?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR_BYTES + 16];
        image[SETUP_SECTORS_AT] = 1;
        image[PAYLOAD_OFFSET_AT] = 16;
        image[PAYLOAD_LENGTH_AT..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn an_lz4_kernel_comes_out_whole() {
        let kernel: Vec<u8> =
            b"\x7fELF".iter().copied().chain((0..9000).map(|n| n as u8)).collect();
        let block = lz4_flex::block::compress(&kernel);
        let mut payload = LZ4_LEGACY.to_vec();
        payload.extend((block.len() as u32).to_le_bytes());
        payload.extend(block);
        payload.extend((kernel.len() as u32).to_le_bytes());
        assert_eq!(vmlinux(&image(&payload)).expect("unpacked"), kernel);
    }

    #[test]
    fn nonsense_is_refused() {
        for bytes in [vec![], vec![0; 600], image(b"no such compression"), image(&LZ4_LEGACY)] {
            assert!(vmlinux(&bytes).is_err());
        }
    }
}
