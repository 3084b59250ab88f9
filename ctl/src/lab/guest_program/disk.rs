//! Readers of the disk past the page cache, and the proof that what they read stays in memory.
//!
//! A device writes into guest memory without the processor's help. If a migration misses such a
//! write, the target holds what the buffer held *before*, and the next read into it would hide
//! that. So a reader walks through many buffers, remembers (in memory written by the processor)
//! which blocks each must hold, and a buffer is verified after the read, again and again while it
//! is kept, and once more right before it is read into anew: whatever was lost is found, at the
//! latest then.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::GuestError;
use super::boot::read_number;
use super::console::GuestConsole;
use super::counters::Counters;
use super::pages::mix;
use crate::lab::disk_image::{BLOCK_BYTES, block_is, write_block};
use crate::lab::guest_params::GuestParams;

const PATH: &str = "/dev/vda";
const SECTORS: &str = "/sys/block/vda/size";
/// The checker rests after each buffer, so that it stays a few per cent of one vCPU.
const CHECK_REST: Duration = Duration::from_millis(4);
const DESCRIBED_FAULTS: u64 = 20;

/// The disk under load.
pub(super) struct DiskLoad {
    device: File,
    pattern_block_count: u64,
    readers: Vec<Vec<Mutex<Slot>>>,
    console: Arc<GuestConsole>,
    counters: Arc<Counters>,
}

/// A buffer and the blocks that it must hold; `None` until it was read into once.
struct Slot {
    buffer: AlignedBuffer,
    first_block: Option<u64>,
}

/// Memory that the device can write to directly: it starts on a page.
struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK_BYTES];
        let start = (BLOCK_BYTES - bytes.as_ptr().addr() % BLOCK_BYTES) % BLOCK_BYTES;
        Self { bytes, start, length }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

impl DiskLoad {
    /// Starts what `params` ask for; `None` if that is nothing.
    pub(super) fn start(
        params: &GuestParams,
        console: &Arc<GuestConsole>,
        counters: &Arc<Counters>,
    ) -> Result<Option<Arc<Self>>, GuestError> {
        if params.disk_readers == 0 && params.disk_scratch_mib == 0 {
            return Ok(None);
        }
        let device = OpenOptions::new()
            .read(true)
            .write(params.disk_scratch_mib > 0)
            .custom_flags(libc::O_DIRECT)
            .open(PATH)
            .map_err(GuestError::file("open", PATH))?;
        let request_bytes = params.disk_request_kib as usize * 1024;
        let scratch_bytes = u64::from(params.disk_scratch_mib) << 20;
        let disk_bytes = read_number(SECTORS)? * 512;
        let pattern_bytes = disk_bytes
            .checked_sub(scratch_bytes)
            .filter(|bytes| *bytes >= request_bytes as u64)
            .ok_or(GuestError::DiskTooSmall {
                disk_bytes,
                wanted_bytes: scratch_bytes + request_bytes as u64,
            })?;

        let kept_bytes = (params.disk_keep_mib as usize) << 20;
        let slot_count = (kept_bytes / request_bytes / params.disk_readers.max(1) as usize).max(1);
        let slot = || Slot { buffer: AlignedBuffer::new(request_bytes), first_block: None };
        let slots = |_| (0..slot_count).map(|_| Mutex::new(slot())).collect();
        let load = Arc::new(Self {
            device,
            pattern_block_count: pattern_bytes / BLOCK_BYTES as u64,
            readers: (0..params.disk_readers).map(slots).collect(),
            console: Arc::clone(console),
            counters: Arc::clone(counters),
        });
        for reader in 0..load.readers.len() {
            let load = Arc::clone(&load);
            std::thread::spawn(move || load.read_for_ever(reader));
        }
        if params.disk_readers > 0 {
            let load = Arc::clone(&load);
            std::thread::spawn(move || load.check_for_ever());
        }
        if scratch_bytes > 0 {
            let load = Arc::clone(&load);
            let blocks = load.pattern_block_count..disk_bytes / BLOCK_BYTES as u64;
            std::thread::spawn(move || load.write_scratch_for_ever(blocks));
        }
        Ok(Some(load))
    }

    /// Checks every buffer; returns how many there were and how many were bad.
    pub(super) fn verify_everything(&self) -> (usize, usize) {
        let slots = self.readers.iter().flatten();
        let (mut count, mut bad) = (0, 0);
        for slot in slots {
            let slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            count += usize::from(slot.first_block.is_some());
            bad += usize::from(!self.check(&slot, "kept"));
        }
        (count, bad)
    }

    fn read_for_ever(&self, reader: usize) {
        let slots = &self.readers[reader];
        let mut draw = mix(reader as u64);
        for slot in slots.iter().cycle() {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            self.check(&slot, "reused");
            let blocks = (slot.buffer.length / BLOCK_BYTES) as u64;
            let requests = self.pattern_block_count / blocks;
            draw = mix(draw);
            let mut first = draw % requests * blocks;
            if slot.first_block == Some(first) {
                // The same content again would hide that the read was lost.
                first = (draw + 1) % requests * blocks;
            }
            // Until the read is done and checked the buffer promises nothing.
            slot.first_block = None;
            let offset = first * BLOCK_BYTES as u64;
            match self.device.read_exact_at(slot.buffer.get_mut(), offset) {
                Ok(()) => {
                    slot.first_block = Some(first);
                    self.check(&slot, "read");
                    self.counters.disk_reads.fetch_add(1, Relaxed);
                }
                Err(error) => self.fault(&format!("read block={first} error={error}")),
            }
        }
    }

    fn check_for_ever(&self) {
        loop {
            for slot in self.readers.iter().flatten() {
                // A locked slot is being read into; the reader verifies it itself.
                if let Ok(slot) = slot.try_lock() {
                    self.check(&slot, "kept");
                }
                std::thread::sleep(CHECK_REST);
            }
            self.counters.disk_passes.fetch_add(1, Relaxed);
        }
    }

    /// Each block of the scratch area is read and compared with what was last written there, then
    /// written anew and read back.
    fn write_scratch_for_ever(&self, blocks: std::ops::Range<u64>) {
        let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
        for sequence in 1.. {
            for block in blocks.clone() {
                let offset = block * BLOCK_BYTES as u64;
                if sequence > 1 {
                    self.read_back(&mut buffer, block, sequence - 1);
                }
                write_block(buffer.get_mut(), block, sequence);
                if let Err(error) = self.device.write_all_at(buffer.get(), offset) {
                    self.fault(&format!("write block={block} error={error}"));
                }
                self.read_back(&mut buffer, block, sequence);
                self.counters.disk_writes.fetch_add(1, Relaxed);
            }
        }
    }

    fn read_back(&self, buffer: &mut AlignedBuffer, block: u64, sequence: u64) {
        buffer.get_mut().fill(0); // so that a read that did nothing can't pass
        match self.device.read_exact_at(buffer.get_mut(), block * BLOCK_BYTES as u64) {
            Ok(()) if block_is(buffer.get(), block, sequence) => {}
            Ok(()) => self.fault(&format!("scratch block={block} sequence={sequence}")),
            Err(error) => self.fault(&format!("scratch block={block} error={error}")),
        }
    }

    /// True if the slot holds what was read into it, or nothing yet.
    fn check(&self, slot: &Slot, when: &str) -> bool {
        let Some(first) = slot.first_block else { return true };
        let blocks = slot.buffer.get().chunks_exact(BLOCK_BYTES);
        let bad = (first..).zip(blocks).find(|(block, bytes)| !block_is(bytes, *block, 0));
        if let Some((block, bytes)) = bad {
            let found = bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
            self.fault(&format!("{when} block={block} found={found:#x}"));
        }
        bad.is_none()
    }

    fn fault(&self, text: &str) {
        if self.counters.disk_bad.fetch_add(1, Relaxed) < DESCRIBED_FAULTS {
            self.console.say(&format!("disk bad {text}"));
        }
    }
}
