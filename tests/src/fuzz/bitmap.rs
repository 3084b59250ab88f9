//! The wire form of dirty bitmaps, and that of memory digests.

use pageferry_datapath::bitmap::DirtySet;
use pageferry_datapath::digest::MemoryDigest;

/// Sizes of a page that a region may have.
const PAGE_BYTES: [u64; 3] = [4096, 64 << 10, 2 << 20];

/// `regions, pages of each (u16) ..., the wire form`.
pub(super) fn run(bytes: &[u8]) {
    if let Ok(digest) = MemoryDigest::decode(bytes) {
        assert_eq!(digest.encode(), bytes, "two wire forms of one digest");
    }
    let Some((regions, mut rest)) = bytes.split_first() else { return };
    let mut shape = Vec::new();
    for region in 0..usize::from(regions % 4) {
        let Some((pages, more)) = rest.split_first_chunk::<2>() else { return };
        shape.push((u64::from(u16::from_le_bytes(*pages)) % 700, PAGE_BYTES[region % 3]));
        rest = more;
    }
    let Ok(set) = DirtySet::decode(rest, shape.iter().copied()) else { return };
    assert!(set.shape().eq(shape.iter().copied()), "the bytes changed the shape");
    for (bitmap, (pages, _)) in set.bitmaps().iter().zip(&shape) {
        assert!(bitmap.runs().all(|run| run.start < run.end && run.end <= *pages));
        assert_eq!(bitmap.count(), bitmap.runs().map(|run| run.end - run.start).sum::<u64>());
    }
    let encoded = set.encode();
    let max: u64 = shape.iter().map(|(pages, _)| DirtySet::encoded_max_bytes(*pages)).sum();
    assert!(encoded.len() as u64 <= max, "longer than announced");
    assert_eq!(DirtySet::decode(&encoded, shape), Ok(set), "it does not survive being sent on");
}
