//! Lane framing from outside: golden bytes, round trips, and hostile bytes.

use pageferry_datapath::codec::{Chunk, CodecName, Coding};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::framing::hello::{Greeting, Hello, Refusal, Reply, Ticket};
use pageferry_datapath::framing::{Ack, Frame, FramingError, HEADER_BYTES, LaneReader, LaneWriter};
use pageferry_datapath::ids::{LaneId, RegionIndex, RoundIndex, SessionId};
use pageferry_datapath::limits::{BATCH_BYTES_MAX, BATCH_EXTENTS_MAX, CHUNK_BYTES_MAX, CHUNKS_MAX};
use pageferry_datapath::zero::Sorted;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

const REGIONS: [u64; 3] = [1 << 30, 2 << 20, 4096];

fn extent(region: u16, offset: u64, len: u64) -> Extent {
    Extent { region: RegionIndex(region), offset, len }
}

/// Makes a tampered header pass the checksum, so that the check behind it is what is tested.
fn reseal(header: &mut [u8; HEADER_BYTES]) {
    header[12..16].fill(0);
    let checksum = xxh3_64(header) as u32;
    header[12..16].copy_from_slice(&checksum.to_le_bytes());
}

fn read(header: &[u8; HEADER_BYTES]) -> Result<Frame, FramingError> {
    LaneReader::new(REGIONS).frame(header, &mut Sorted::new())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn golden_bytes_stay_what_they_are() {
    let hello = Hello {
        session: SessionId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
        lane: LaneId(3),
        ticket: Ticket([0x5a; 32]),
    };
    assert_eq!(
        hex(&hello.encode()),
        "50464c4e01000300ffeeddccbbaa99887766554433221100\
         5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a00000000f9217049"
    );
    assert_eq!(hex(&Reply::Accepted.encode()), "50464c520100000000000000a4d5091b");
    let ack = Ack { lane: LaneId(3), round: RoundIndex(7), seq: 9 };
    assert_eq!(
        hex(&ack.encode()),
        "50464c41010003000700000009000000000000000000000000000000efc76e26"
    );
    let (mut writer, mut header) = (LaneWriter::new(), [0xff; HEADER_BYTES]);
    writer.batch(&[extent(0, 0x12_3000, 0x2000)], &[extent(1, 0, 0x1000)], &mut header);
    assert_eq!(
        hex(&header[..48]),
        "504c01010000000002000000ad566be700000000002000000030120000000000\
         01000100001000000000000000000000"
    );
    writer.barrier(RoundIndex(7), &mut header);
    assert_eq!(hex(&header[..20]), "504c0102010000000000000026742e1507000000");
    writer.close(&mut header);
    assert_eq!(hex(&header[..16]), "504c01030200000000000000411e979f");
}

#[test]
fn greeting_is_told_by_four_bytes() {
    assert_eq!(Greeting::of(*b"PFLN"), Some(Greeting::Lane));
    assert_eq!(Greeting::of(*b"PFRY"), Some(Greeting::Control));
    assert_eq!(Greeting::of(*b"GET "), None);
}

#[test]
fn extents_outside_what_was_agreed_are_refused() {
    let bad: [(Extent, &str); 6] = [
        (extent(3, 0, 4096), "unknown region"),
        (extent(2, 4096, 4096), "past the end"),
        (extent(0, u64::MAX - 4095, 4096), "wraps"),
        (extent(0, 1, 4096), "unaligned offset"),
        (extent(0, 0, 4097), "unaligned length"),
        (extent(0, 0, 0), "empty"),
    ];
    for (bad, why) in bad {
        let (mut writer, mut header) = (LaneWriter::new(), [0; HEADER_BYTES]);
        writer.batch(&[extent(0, 0, 4096), bad], &[], &mut header);
        assert!(matches!(read(&header), Err(FramingError::Extent { .. })), "{why}");
    }
}

#[test]
fn counts_kinds_sizes_and_order_are_checked() {
    let mut header = [0; HEADER_BYTES];
    LaneWriter::new().batch(&[extent(0, 0, 4096)], &[], &mut header);
    let tampered = |change: &dyn Fn(&mut [u8; HEADER_BYTES])| {
        let mut copy = header;
        change(&mut copy);
        reseal(&mut copy);
        read(&copy).expect_err("tampered header was taken")
    };
    assert_eq!(tampered(&|h| h[0] = b'X'), FramingError::Magic);
    assert_eq!(tampered(&|h| h[2] = 2), FramingError::Version { version: 2 });
    assert_eq!(tampered(&|h| h[3] = 9), FramingError::Kind { kind: 9 });
    assert_eq!(tampered(&|h| h[4] = 1), FramingError::Sequence { seq: 1, expected: 0 });
    assert_eq!(tampered(&|h| h[8] = 0), FramingError::Count { count: 0 });
    assert_eq!(tampered(&|h| h[9] = 1), FramingError::Count { count: 257 });
    assert_eq!(tampered(&|h| h[9] = 0xff), FramingError::Count { count: 0xff01 });
    assert_eq!(tampered(&|h| h[10] = 1), FramingError::Reserved);
    assert_eq!(tampered(&|h| h[HEADER_BYTES - 1] = 1), FramingError::Reserved);
    assert_eq!(tampered(&|h| h[18] = 2), FramingError::ExtentKind { kind: 2 });
    let large = BATCH_BYTES_MAX as u32 + 4096;
    assert_eq!(
        tampered(&|h| h[20..24].copy_from_slice(&large.to_le_bytes())),
        FramingError::BatchBytes { bytes: large.into() }
    );
    let mut flipped = header;
    flipped[24] ^= 0x10;
    assert_eq!(read(&flipped), Err(FramingError::Checksum));
}

#[test]
fn a_refusal_says_why() {
    for refusal in
        [Refusal::Version, Refusal::Ticket, Refusal::Duplicate, Refusal::Busy, Refusal::Host]
    {
        let reply = Reply::Refused(refusal);
        assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
    }
}

fn any_extent() -> impl Strategy<Value = Extent> {
    (0..REGIONS.len(), any::<u32>(), 1..=8u64).prop_map(|(region, at, pages)| {
        let pages_max = REGIONS[region] / 4096;
        let len = pages.min(pages_max);
        extent(region as u16, u64::from(at) % (pages_max - len + 1) * 4096, len * 4096)
    })
}

/// As many extents as a batch may have, and no more bytes.
fn any_batch() -> impl Strategy<Value = Vec<Extent>> {
    prop::collection::vec(any_extent(), 1..=BATCH_EXTENTS_MAX).prop_map(|mut batch| {
        let mut bytes = 0;
        batch.retain(|e| {
            bytes += e.len;
            bytes <= BATCH_BYTES_MAX
        });
        batch
    })
}

proptest! {
    #[test]
    fn frames_come_back_as_they_went(
        batches in prop::collection::vec(
            (any_batch(), any::<prop::sample::Index>()), 1..8),
        round: u32,
    ) {
        let (mut writer, mut reader) = (LaneWriter::new(), LaneReader::new(REGIONS));
        let (mut header, mut got) = ([0; HEADER_BYTES], Sorted::new());
        for (batch, zero) in &batches {
            let (data, zero) = batch.split_at(zero.index(batch.len() + 1));
            writer.batch(data, zero, &mut header);
            let payload_bytes = data.iter().map(|e| e.len).sum();
            prop_assert_eq!(reader.frame(&header, &mut got), Ok(Frame::Batch { payload_bytes }));
            prop_assert_eq!((&got.data[..], &got.zero[..]), (data, zero));
        }
        let round = RoundIndex(round);
        let seq = writer.barrier(round, &mut header);
        prop_assert_eq!(reader.frame(&header, &mut got), Ok(Frame::Barrier { round, seq }));
        writer.close(&mut header);
        prop_assert_eq!(reader.frame(&header, &mut got), Ok(Frame::Close));
    }

    #[test]
    fn no_header_makes_the_reader_panic_or_leave_the_regions(
        mut header in prop::array::uniform32(any::<u8>())
            .prop_flat_map(|head| prop::collection::vec(any::<u8>(), HEADER_BYTES - 32)
                .prop_map(move |tail| {
                    let mut header = [0; HEADER_BYTES];
                    header[..32].copy_from_slice(&head);
                    header[32..].copy_from_slice(&tail);
                    header
                })),
        kind in 0..5u8,
        count in prop_oneof![0..4u8, 250..=255u8],
        plausible: bool,
    ) {
        if plausible {
            header[..12].copy_from_slice(&[b'P', b'L', 1, kind, 0, 0, 0, 0, count, 0, 0, 0]);
            for entry in header[16..].chunks_exact_mut(16) {
                entry[1] = 0;
                entry[2] &= 1;
                entry[3] = 0;
                entry[0] %= 4;
                entry[4] = 0;
                entry[5] &= 0xf0;
                entry[7] = 0;
                entry[11..].fill(0);
            }
            let used = (16 + usize::from(count) * 16).min(HEADER_BYTES);
            header[used..].fill(0);
            reseal(&mut header);
        }
        let mut extents = Sorted::new();
        if let Ok(Frame::Batch { payload_bytes }) =
            LaneReader::new(REGIONS).frame(&header, &mut extents)
        {
            prop_assert!(payload_bytes <= BATCH_BYTES_MAX);
            let bytes = |extents: &[Extent]| extents.iter().map(|e| e.len).sum::<u64>();
            prop_assert_eq!(payload_bytes, bytes(&extents.data));
            prop_assert!(payload_bytes + bytes(&extents.zero) <= BATCH_BYTES_MAX);
            for e in extents.data.iter().chain(&extents.zero) {
                prop_assert!(e.len > 0 && e.end() <= REGIONS[usize::from(e.region.0)]);
            }
        }
    }

    #[test]
    fn hello_reply_and_ack_come_back_or_are_refused(
        session: u128, lane: u16, ticket: [u8; 32], round: u32, seq: u32,
        junk64 in prop::collection::vec(any::<u8>(), 64), flip in 0..512usize,
    ) {
        let hello = Hello { session: SessionId(session), lane: LaneId(lane), ticket: Ticket(ticket) };
        let mut bytes = hello.encode();
        prop_assert_eq!(Hello::decode(&bytes), Ok(hello));
        bytes[flip / 8] ^= 1 << (flip % 8);
        prop_assert!(Hello::decode(&bytes).is_err());
        let ack = Ack { lane: LaneId(lane), round: RoundIndex(round), seq };
        let mut bytes = ack.encode();
        prop_assert_eq!(Ack::decode(&bytes), Ok(ack));
        bytes[flip / 8 % 32] ^= 1 << (flip % 8);
        prop_assert!(Ack::decode(&bytes).is_err());
        prop_assert!(Hello::decode(junk64[..64].try_into().unwrap()).is_err());
        prop_assert!(Ack::decode(junk64[..32].try_into().unwrap()).is_err());
        prop_assert!(Reply::decode(junk64[..16].try_into().unwrap()).is_err());
    }
}

/// A header of chunks, as a source makes it: these extents packed, in these chunks.
fn packed(extents: &[Extent], chunks: &[Chunk]) -> [u8; HEADER_BYTES] {
    let mut batch = Sorted::new();
    batch.packed.extend_from_slice(extents);
    batch.chunks.extend_from_slice(chunks);
    let mut header = [0; HEADER_BYTES];
    LaneWriter::new().sorted(&batch, &mut header);
    header
}

fn read_packed(header: &[u8; HEADER_BYTES]) -> Result<(Frame, Sorted), FramingError> {
    let mut batch = Sorted::new();
    let mut reader = LaneReader::new(REGIONS).unpacking(CodecName::ALL);
    let frame = reader.frame(header, &mut batch)?;
    Ok((frame, batch))
}

fn chunk(coding: Coding, packed_bytes: u64, raw_bytes: u64) -> Chunk {
    Chunk { coding, packed_bytes, raw_bytes }
}

#[test]
fn packed_extents_come_with_their_chunks() {
    let extents = [extent(0, 8192, 128 << 10), extent(1, 0, 4096)];
    let chunks = [chunk(Coding::Lz4, 700, 128 << 10), chunk(Coding::Stored, 4096, 4096)];
    let header = packed(&extents, &chunks);
    assert_eq!(
        hex(&header[..80]),
        "504c01010000000004000000eada1afb\
         00000200000002000020000000000000\
         01000200001000000000000000000000\
         00001100bc0200000000020000000000\
         00001000001000000010000000000000"
    );
    let (frame, batch) = read_packed(&header).unwrap();
    assert_eq!(frame, Frame::Batch { payload_bytes: 700 + 4096 });
    assert_eq!((&batch.packed[..], &batch.chunks[..]), (&extents[..], &chunks[..]));
    assert!(batch.data.is_empty() && batch.zero.is_empty());
}

#[test]
fn holes_are_whole_pages_and_taken_where_they_were_agreed_on() {
    let hole = extent(0, 8192, 1 << 20);
    let mut batch = Sorted::new();
    batch.hole.push(hole);
    batch.data.push(extent(1, 0, 4096));
    let mut header = [0; HEADER_BYTES];
    LaneWriter::new().sorted(&batch, &mut header);
    assert_eq!(
        hex(&header[16..48]),
        "01000000001000000000000000000000\
         00000300000010000020000000000000"
    );
    assert_eq!(read(&header), Err(FramingError::ExtentKind { kind: 3 }));
    let with_pages = |page_bytes| {
        let mut got = Sorted::new();
        let mut reader = LaneReader::new(REGIONS).punching([page_bytes; REGIONS.len()]);
        reader.frame(&header, &mut got).map(|frame| (frame, got))
    };
    let (frame, got) = with_pages(4096).unwrap();
    assert_eq!(frame, Frame::Batch { payload_bytes: 4096 });
    assert_eq!((&got.hole[..], &got.data[..]), (&[hole][..], &[extent(1, 0, 4096)][..]));
    assert!(matches!(with_pages(2 << 20), Err(FramingError::Extent { region: 0, .. })));
}

#[test]
fn chunks_are_refused_where_no_codec_was_agreed_on() {
    let extents = [extent(0, 0, 8192)];
    let header = packed(&extents, &[chunk(Coding::Zstd, 100, 8192)]);
    assert_eq!(read(&header), Err(FramingError::ExtentKind { kind: 2 }));
    let mut reader = LaneReader::new(REGIONS).unpacking([CodecName::Lz4]);
    let refused = reader.frame(&header, &mut Sorted::new());
    assert_eq!(refused, Err(FramingError::ExtentKind { kind: 18 }));
}

#[test]
fn chunks_that_say_more_than_they_may_are_refused() {
    let header = packed(&[extent(0, 0, 8192)], &[chunk(Coding::Lz4, 100, 8192)]);
    let entry = HEADER_BYTES - BATCH_EXTENTS_MAX * 16 + 16;
    let tampered = |at: usize, bytes: &[u8]| {
        let mut header = header;
        header[entry + at..entry + at + bytes.len()].copy_from_slice(bytes);
        reseal(&mut header);
        read_packed(&header).map(|_| ())
    };
    assert!(tampered(0, &[0, 0]).is_ok());
    // A region; no bytes; as many as it stands for; more than it may stand for; a part of a page.
    for (at, bytes) in [
        (0, 1u16.to_le_bytes().to_vec()),
        (4, 0u32.to_le_bytes().to_vec()),
        (4, 8192u32.to_le_bytes().to_vec()),
        (4, u32::MAX.to_le_bytes().to_vec()),
        (8, u64::MAX.to_le_bytes().to_vec()),
        (8, (CHUNK_BYTES_MAX + 4096).to_le_bytes().to_vec()),
        (8, 8191u64.to_le_bytes().to_vec()),
        (8, 0u64.to_le_bytes().to_vec()),
        // Not what the extents are.
        (8, 4096u64.to_le_bytes().to_vec()),
        (8, 12288u64.to_le_bytes().to_vec()),
    ] {
        let refused = tampered(at, &bytes);
        assert!(matches!(refused, Err(FramingError::Chunk { .. })), "{at} {bytes:?} {refused:?}");
    }
    // Stored, but not as long as what it stands for.
    assert!(matches!(tampered(2, &16u16.to_le_bytes()), Err(FramingError::Chunk { .. })));
    // Packed extents alone, and more chunks than there are.
    let mut lone = [0; HEADER_BYTES];
    LaneWriter::new().batch(&[extent(0, 0, 8192)], &[], &mut lone);
    lone[18] = 2;
    reseal(&mut lone);
    assert!(matches!(read_packed(&lone), Err(FramingError::Chunk { .. })));
    let many = vec![chunk(Coding::Lz4, 100, 4096); CHUNKS_MAX + 1];
    let header = packed(&[extent(0, 0, 4096 * many.len() as u64)], &many);
    assert!(matches!(read_packed(&header), Err(FramingError::Chunk { .. })));
}
