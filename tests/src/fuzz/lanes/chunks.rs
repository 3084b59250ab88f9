//! Compressed chunks of a peer: any bytes, and chunks of our own of which a few bytes were changed.
//!
//! ```text
//!   kind, pages, length (u16), bytes         kind & 4: the bytes are packed first, and then spoiled
//!                                            by (place u16, value)* as kind >> 3 says how many
//! ```

use std::cell::RefCell;

use pageferry_datapath::backing::Backing;
use pageferry_datapath::codec::{Chunk, Codec, Coding, PAYLOAD_BYTES_MAX, Packer, Unpacker};
use pageferry_datapath::extent::Extent;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{GuestMemory, Region};

const PAGE: u64 = 4096;
/// Batches of one input: more cost time, and show nothing new.
const BATCHES_MAX: usize = 3;
/// Pages that a batch may be for; one before them and one behind belong to nobody here.
const PAGES: u64 = 5;
const NOBODYS: u8 = 0xa5;

/// Made once for each thread: only its contents change, and all that is read was written before.
struct Bench {
    memory: GuestMemory,
    unpacker: Unpacker,
    /// Has seen other chunks before.
    other: Unpacker,
    packer: Packer,
    payload: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let backing = Backing::memfd("fuzz-chunks", (PAGES + 2) * PAGE, None).expect("memory");
        let memory =
            GuestMemory::new(vec![Region::open(RegionIndex(0), backing).expect("it is mapped")]);
        let bench = Self {
            memory,
            unpacker: Unpacker::new(),
            other: Unpacker::new(),
            packer: Packer::new(),
            payload: vec![0; PAYLOAD_BYTES_MAX],
        };
        bench.write(0, &[NOBODYS; PAGE as usize]);
        bench.write(PAGES + 1, &[NOBODYS; PAGE as usize]);
        bench
    }

    fn write(&self, page: u64, bytes: &[u8]) {
        let lease = self.memory.lease(pages(page, 1)).expect("inside");
        lease.copy_in(0, bytes).expect("a page");
    }

    fn read(&self, extent: Extent) -> Vec<u8> {
        let mut bytes = vec![0; extent.len as usize];
        let lease = self.memory.lease(extent).expect("inside");
        lease.copy_out(0, &mut bytes).expect("as long as it is");
        bytes
    }
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

fn pages(first: u64, count: u64) -> Extent {
    Extent { region: RegionIndex(0), offset: first * PAGE, len: count * PAGE }
}

pub(super) fn run(mut bytes: &[u8]) {
    BENCH.with_borrow_mut(|bench| {
        for _ in 0..BATCHES_MAX {
            let [kind, count, low, high, rest @ ..] = bytes else { break };
            let len = usize::from(u16::from_le_bytes([*low, *high]));
            let (given, rest) = rest.split_at(rest.len().min(len));
            let extent = pages(1, 1 + u64::from(*count) % PAGES);
            bytes = match kind & 4 {
                0 => foreign(bench, *kind, extent, given, rest),
                _ => spoiled(bench, *kind, extent, given, rest),
            };
        }
        for page in [0, PAGES + 1] {
            assert!(
                bench.read(pages(page, 1)) == [NOBODYS; PAGE as usize],
                "it wrote outside of its extents"
            );
        }
    });
}

/// The bytes are the chunk.
fn foreign<'a>(
    bench: &mut Bench,
    kind: u8,
    extent: Extent,
    given: &[u8],
    rest: &'a [u8],
) -> &'a [u8] {
    let coding = [Coding::Stored, Coding::Lz4, Coding::Zstd, Coding::Zstd][usize::from(kind % 4)];
    let chunk = Chunk { coding, packed_bytes: given.len() as u64, raw_bytes: extent.len };
    let unpacked = bench.unpacker.unpack(given, &[chunk], &bench.memory, &[extent]);
    if unpacked.is_ok() {
        let before = bench.read(extent);
        let again = bench.other.unpack(given, &[chunk], &bench.memory, &[extent]);
        assert!(again.is_ok() && bench.read(extent) == before, "one chunk, two contents");
    }
    rest
}

/// The bytes, over and over, are the memory; the chunk is made of them.
fn spoiled<'a>(
    bench: &mut Bench,
    kind: u8,
    extent: Extent,
    given: &[u8],
    mut rest: &'a [u8],
) -> &'a [u8] {
    let codec = if kind.is_multiple_of(2) { Codec::Lz4 } else { Codec::Zstd { level: 1 } };
    // Not byte by byte: with every comparison traced, that took as long as all the rest.
    let mut page = [given, &[0]].concat();
    page = page.repeat((PAGE as usize).div_ceil(page.len()));
    page.truncate(PAGE as usize);
    (1..=extent.len / PAGE).for_each(|at| bench.write(at, &page));
    let before = bench.read(extent);
    let mut chunks = Vec::new();
    let used = bench
        .packer
        .pack(codec, &bench.memory, &[extent], &mut bench.payload, &mut chunks)
        .expect("inside");
    let mut whole = true;
    for _ in 0..kind >> 3 {
        let [low, high, value, more @ ..] = rest else { break };
        let at = usize::from(u16::from_le_bytes([*low, *high])) % used;
        whole &= *value == 0;
        bench.payload[at] ^= value;
        rest = more;
    }
    let payload = &bench.payload[..used];
    let unpacked = bench.unpacker.unpack(payload, &chunks, &bench.memory, &[extent]);
    if whole {
        assert!(unpacked.is_ok() && bench.read(extent) == before, "what was packed is lost");
    }
    rest
}
