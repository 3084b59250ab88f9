//! What stands on a data connection: hello, reply, frame headers, acknowledgements, compressed chunks.
//!
//! Checksums are made right in half of the cases, or nothing behind them would ever be reached.

mod chunks;

use pageferry_datapath::codec::CodecName;
use pageferry_datapath::framing::hello::{HELLO_BYTES, Hello, REPLY_BYTES, Reply};
use pageferry_datapath::framing::{
    ACK_BYTES, Ack, Frame, HEADER_BYTES, HeaderBytes, LaneReader, LaneWriter,
};
use pageferry_datapath::limits::{
    BATCH_BYTES_MAX, BATCH_EXTENTS_MAX, CHUNK_BYTES_MAX, CHUNKS_MAX, HOLE_RUN_BYTES_MAX,
    PAGE_BYTES_MIN,
};
use pageferry_datapath::zero::Sorted;
use xxhash_rust::xxh3::xxh3_64;

/// Sizes of the regions both sides agreed on.
const REGIONS: [u64; 3] = [8 << 20, 4096, 1 << 40];
const CHECKSUM_AT: usize = 12;
const ENTRIES_AT: usize = 16;

pub(super) fn run(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    match first % 8 {
        0 => hello(rest, first & 8 == 0),
        1 => reply(rest, first & 8 == 0),
        2 => ack(rest, first & 8 == 0),
        3 => chunks::run(rest),
        _ => frames(rest, first & 8 == 0),
    }
}

fn hello(bytes: &[u8], seal: bool) {
    let mut hello = [0; HELLO_BYTES];
    fill(&mut hello, bytes);
    if seal {
        sealed(&mut hello);
    }
    if let Ok(decoded) = Hello::decode(&hello) {
        assert_eq!(decoded.encode(), hello, "two forms of one hello");
    }
}

fn reply(bytes: &[u8], seal: bool) {
    let mut reply = [0; REPLY_BYTES];
    fill(&mut reply, bytes);
    if seal {
        sealed(&mut reply);
    }
    if let Ok(decoded) = Reply::decode(&reply) {
        assert_eq!(decoded.encode(), reply, "two forms of one reply");
    }
}

fn ack(bytes: &[u8], seal: bool) {
    let mut ack = [0; ACK_BYTES];
    fill(&mut ack, bytes);
    if seal {
        sealed(&mut ack);
    }
    if let Ok(decoded) = Ack::decode(&ack) {
        assert_eq!(decoded.encode(), ack, "two forms of one acknowledgement");
    }
}

/// The page sizes of those regions, where holes were agreed on.
const PAGES: [u64; 3] = [2 << 20, 4096, 1 << 30];

/// A reader at a lane's first frame, of a target that agreed to every codec and to holes, or to nothing.
fn reader(unpacks: bool) -> LaneReader {
    match unpacks {
        true => LaneReader::new(REGIONS).unpacking(CodecName::ALL).punching(PAGES),
        false => LaneReader::new(REGIONS),
    }
}

/// `flags, length (u16), that many bytes of a header` again and again, read as one lane.
fn frames(mut bytes: &[u8], unpacks: bool) {
    let mut reader = reader(unpacks);
    let mut extents = Sorted::new();
    while let [flags, low, high, rest @ ..] = bytes {
        let len = usize::from(u16::from_le_bytes([*low, *high]));
        let (given, rest) = rest.split_at(rest.len().min(len));
        bytes = rest;
        let mut header = [0; HEADER_BYTES];
        fill(&mut header, given);
        if flags & 1 == 0 {
            header[CHECKSUM_AT..ENTRIES_AT].fill(0);
            let checksum = xxh3_64(&header) as u32;
            header[CHECKSUM_AT..ENTRIES_AT].copy_from_slice(&checksum.to_le_bytes());
        }
        let Ok(frame) = reader.frame(&header, &mut extents) else { return };
        if let Frame::Batch { payload_bytes } = frame {
            batch(&extents, payload_bytes, unpacks);
        }
    }
}

/// What a worker would do with it is sound, and what it allocates is bounded.
fn batch(batch: &Sorted, payload_bytes: u64, unpacks: bool) {
    let extents = || batch.data.iter().chain(&batch.zero).chain(&batch.packed);
    let all = || extents().chain(&batch.hole);
    assert!((1..=BATCH_EXTENTS_MAX).contains(&(all().count() + batch.chunks.len())));
    for hole in &batch.hole {
        let page_bytes = PAGES[usize::from(hole.region.0)];
        assert!(hole.offset.is_multiple_of(page_bytes) && hole.len.is_multiple_of(page_bytes));
        assert!(hole.len <= HOLE_RUN_BYTES_MAX);
    }
    for extent in all() {
        let region_bytes = REGIONS[usize::from(extent.region.0)];
        assert!(extent.len > 0 && extent.offset + extent.len <= region_bytes);
        assert!(extent.len % PAGE_BYTES_MIN == 0 && extent.offset % PAGE_BYTES_MIN == 0);
    }
    assert!(extents().map(|extent| extent.len).sum::<u64>() <= BATCH_BYTES_MAX);
    let is_plain = batch.chunks.is_empty() && batch.packed.is_empty() && batch.hole.is_empty();
    assert!(unpacks || is_plain);
    assert!(batch.chunks.len() <= CHUNKS_MAX);
    assert!(batch.chunks.iter().all(|chunk| chunk.raw_bytes <= CHUNK_BYTES_MAX));
    assert!(batch.chunks.iter().all(|chunk| chunk.packed_bytes <= chunk.raw_bytes));
    let sum = |lengths: &mut dyn Iterator<Item = u64>| lengths.sum::<u64>();
    let raw = sum(&mut batch.chunks.iter().map(|chunk| chunk.raw_bytes));
    assert_eq!(raw, sum(&mut batch.packed.iter().map(|extent| extent.len)));
    let packed = sum(&mut batch.chunks.iter().map(|chunk| chunk.packed_bytes));
    assert_eq!(payload_bytes, packed + sum(&mut batch.data.iter().map(|extent| extent.len)));

    // A batch of chunks alone stands for nothing, and no source makes one.
    if all().next().is_none() {
        return;
    }
    let mut header: HeaderBytes = [0; HEADER_BYTES];
    LaneWriter::new().sorted(batch, &mut header);
    let mut again = Sorted::new();
    assert_eq!(reader(unpacks).frame(&header, &mut again), Ok(Frame::Batch { payload_bytes }));
    assert_eq!((&again.data, &again.zero), (&batch.data, &batch.zero));
    assert_eq!(again.hole, batch.hole);
    assert_eq!((&again.packed, &again.chunks), (&batch.packed, &batch.chunks));
}

fn fill(into: &mut [u8], bytes: &[u8]) {
    let len = into.len().min(bytes.len());
    into[..len].copy_from_slice(&bytes[..len]);
}

/// Sets the checksum that stands in the last four bytes.
fn sealed(bytes: &mut [u8]) {
    let (rest, checksum) = bytes.split_at_mut(bytes.len() - 4);
    checksum.copy_from_slice(&(xxh3_64(rest) as u32).to_le_bytes());
}
