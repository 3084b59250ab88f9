//! One guest that hops from QEMU to QEMU: each migration's target is the next one's source.
//!
//! So everyone moves the very same guest with the very same memory, and its program is started and
//! its memory filled once. The source's memory is always all there; the target's is warm (touched
//! by its QEMU before the clock starts) or fresh.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{GuestAssets, GuestParams, Qemu, QemuBinary, QemuSpec, Tick, Workplace};
use pageferry_ctl::qmp::Qmp;
use pageferry_datapath::backing::Backing;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::{GuestMemory, Region};

use crate::args::{Common, MemoryKind, WhichQemu};
use crate::error::BenchError;
use crate::memory::{MemoryPool, ScratchMemory};
use crate::moved::Moved;
use crate::net::{End, Net};
use crate::qemu::QemuWay;
use crate::{ours, output, pause, qemu};

/// Booting and filling 2 GiB takes 20 s here when nobody else uses the machine.
const READY_MAX: Duration = Duration::from_secs(600);
/// A QEMU that touches all its memory first answers after this at the latest.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// A guest that was moved speaks again within this.
const TICK_MAX: Duration = Duration::from_secs(30);
/// What a guest does after it was moved is over by then.
pub(crate) const SETTLE: Duration = Duration::from_millis(300);

/// Who moves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mover {
    /// Our own binary.
    Pageferry,
    /// QEMU itself.
    Qemu(QemuWay),
}

impl Mover {
    /// As tables have it.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Pageferry => "pageferry".into(),
            Self::Qemu(way) => way.name(),
        }
    }
}

/// The guest to make.
#[derive(Clone, Debug)]
pub(crate) struct GuestShape {
    /// Size in MiB.
    pub(crate) memory_mib: u64,
    /// What it does.
    pub(crate) params: GuestParams,
    /// Virtual processors.
    pub(crate) smp: u32,
    /// What its memory is made of; `None` is the best there is.
    pub(crate) memory: Option<MemoryKind>,
    /// All its memory is there from the start, touched or not by the guest.
    pub(crate) prealloc: bool,
    /// Kernel words before all others.
    pub(crate) kernel_words: String,
    /// How long memory given back stays away before it is taken anew.
    pub(crate) fresh_after: Duration,
    /// How long the guest is left alone before it is moved.
    pub(crate) settle: Duration,
}

/// What a guest needs beside the memory that its program fills: kernel, initramfs and program.
const GUEST_OWN_MIB: u64 = 192;
/// And this part of what is filled: the kernel describes its memory, and keeps a reserve.
const GUEST_OWN_PART: u64 = 24;

impl GuestShape {
    /// One that fills its memory with noise and then does next to nothing, on one processor; all of its
    /// memory is there.
    pub(crate) fn idle(fill_mib: u64, memory: Option<MemoryKind>) -> Self {
        Self {
            memory_mib: (fill_mib + fill_mib / GUEST_OWN_PART + GUEST_OWN_MIB) & !1,
            params: GuestParams {
                fill_mib,
                // What is not rewritten would be verified over and over, at the guest's cost.
                hot_mib: fill_mib,
                writers: 1,
                pages_per_second: 1,
                ..GuestParams::default()
            },
            smp: 1,
            memory,
            prealloc: true,
            kernel_words: String::new(),
            fresh_after: Duration::ZERO,
            settle: SETTLE,
        }
    }
}

/// A guest, the two ends, and memory for both.
pub(crate) struct Rig {
    // Drop order: the guest before its memory and its namespace.
    source: Option<Qemu>,
    pool: MemoryPool,
    net: Net,
    spec: QemuSpec,
    shape: GuestShape,
    common: Common,
    workplace: Arc<Workplace>,
    serial: u32,
    last_mover: String,
}

/// One hop.
pub(crate) struct Hop {
    /// What it took.
    pub(crate) moved: Moved,
    /// The longest silence of the guest's ticks around the pause.
    pub(crate) tick_gap_ms: Option<f64>,
    /// What was seen last, if the guest never spoke again.
    pub(crate) lost: Option<String>,
    /// The guest's ticks from where it came to its first one here.
    pub(crate) ticks: Vec<Tick>,
}

impl Rig {
    /// Makes everything but the guest, which is started when it is first needed.
    pub(crate) fn new(common: &Common, shape: GuestShape) -> Result<Self, BenchError> {
        let workplace = Workplace::new()?;
        let net = Net::new(common, &workplace)?;
        let bytes = shape.memory_mib << 20;
        let pool = MemoryPool::new(shape.memory, bytes, shape.fresh_after, &workplace)?;
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        spec.binary = match common.qemu {
            WhichQemu::System => QemuBinary::system()?,
            WhichQemu::Other => QemuBinary::other()?,
        };
        spec.memory_mib = shape.memory_mib;
        spec.smp = shape.smp;
        spec.params = shape.params.clone();
        spec.memory = pool.for_qemu();
        if !shape.kernel_words.is_empty() {
            let line = GuestAssets::command_line(&shape.params);
            // The last `-append` is the one that counts.
            spec.extra = vec!["-append".into(), format!("{} {line}", shape.kernel_words)];
        }
        Ok(Self {
            source: None,
            pool,
            net,
            spec,
            shape,
            common: common.clone(),
            workplace,
            serial: 0,
            last_mover: "nobody".into(),
        })
    }

    /// Further arguments for `pageferry migrate` from here on.
    pub(crate) fn set_migrate_args(&mut self, args: &str) {
        self.common.migrate_args = args.into();
    }

    /// What was asked for.
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    /// The end points.
    pub(crate) fn net(&self) -> &Net {
        &self.net
    }

    /// The guest's size in MiB.
    pub(crate) fn memory_mib(&self) -> u64 {
        self.shape.memory_mib
    }

    /// Guest memory that is not holes, in MiB.
    pub(crate) fn populated_mib(&mut self) -> Result<f64, BenchError> {
        let guest = self.guest()?;
        let file = guest.memory_file().ok_or(BenchError::Usage { what: "memory has no file" })?;
        let metadata =
            std::fs::metadata(file).map_err(BenchError::io("look at", file.display()))?;
        // st_blocks counts 512 bytes whatever the file system's block is.
        Ok(metadata.blocks() as f64 * 512.0 / (1 << 20) as f64)
    }

    /// What guest memory is made of.
    pub(crate) fn memory_name(&self) -> &'static str {
        self.pool.name()
    }

    /// The QEMU's version.
    pub(crate) fn qemu_version(&self) -> String {
        self.spec.binary.version.to_string()
    }

    /// The guest where it is now, started if there is none.
    pub(crate) fn guest(&mut self) -> Result<&Qemu, BenchError> {
        if self.source.is_none() {
            self.last_mover = "nobody".into();
            let mut spec = self.spec.clone();
            spec.namespace = self.net.namespace(End::Source);
            let mut guest = self.launch(spec, self.shape.prealloc)?;
            guest.wait_ready(READY_MAX)?;
            guest.console().wait_tick(TICK_MAX)?;
            return Ok(self.source.insert(guest));
        }
        Ok(self.source.as_ref().expect("looked at above"))
    }

    /// The guest's memory, mapped here: what the ceiling sends.
    pub(crate) fn guest_memory(&mut self) -> Result<GuestMemory, BenchError> {
        let guest = self.guest()?;
        let file = guest.memory_file().ok_or(BenchError::Usage { what: "memory has no file" })?;
        let region = Region::open(RegionIndex(0), Backing::open(file)?)?;
        Ok(GuestMemory::new(vec![region]))
    }

    /// Memory of the guest's size that is no guest's: where the ceiling receives.
    pub(crate) fn scratch(&mut self, warm: bool) -> Result<ScratchMemory, BenchError> {
        if !warm {
            self.pool.make_second_fresh()?;
        }
        let scratch = self.pool.map_second("scratch")?;
        if warm {
            scratch.touch()?;
        }
        Ok(scratch)
    }

    /// Moves the guest on. After a failure the guest is given up, and the next hop makes a new one.
    pub(crate) fn hop(&mut self, mover: Mover, warm: bool) -> Result<Hop, BenchError> {
        self.guest()?;
        if !warm {
            self.pool.make_second_fresh()?;
        }
        let mut spec = self.spec.to_target();
        spec.namespace = self.net.namespace(End::Target);
        let target = self.launch(spec, warm)?;
        std::thread::sleep(self.shape.settle);
        let source = self.source.take().expect("started above");
        let moved = match mover {
            Mover::Pageferry => {
                ours::migrate(&self.common, &source, &target, &self.net, self.workplace.path())
            }
            Mover::Qemu(way) => qemu::migrate(way, &source, &target, &self.net),
        }?;
        let (from, to) = (source.console(), target.console());
        let lost = to.wait_tick(TICK_MAX).err().map(|error| error.to_string());
        let tick_gap_ms = pause::tick_gap_ms(from, to, &moved.pause);
        let ticks = pageferry_ctl::lab::console::ticks_across(from, to);
        drop(source);
        self.net.swap();
        if lost.is_none() {
            self.source = Some(target);
        }
        self.last_mover = mover.name();
        Ok(Hop { moved, tick_gap_ms, ticks, lost })
    }

    /// The same by Pageferry. The guest checks all its memory before, so that what was lost before is
    /// not ours, and afterwards: wrong memory then is an error of its own.
    pub(crate) fn hop_checked(&mut self, warm: bool) -> Result<Hop, BenchError> {
        if let Err(error) = self.verify() {
            output::progress(&format!("starting a new guest: {}", error.chain()));
            self.give_up_guest();
        }
        let hop = self.hop(Mover::Pageferry, warm)?;
        if hop.lost.is_none() {
            let pages = self.verify()?;
            output::progress(&format!("the guest checked {pages} pages after that: good"));
        }
        Ok(hop)
    }

    /// Gives the guest up; the next one who needs one starts another.
    pub(crate) fn give_up_guest(&mut self) {
        self.source = None;
    }

    /// QEMU before 8 loses writes of an emulated guest while it sends its memory.
    pub(crate) fn qemu_loses_writes(&self) -> bool {
        self.spec.binary.version.major < 8
    }

    /// Has the guest check all its memory.
    pub(crate) fn verify(&mut self) -> Result<u64, BenchError> {
        let verified = self.guest()?.console().verify(READY_MAX)?;
        match verified.bad {
            0 => Ok(verified.pages),
            bad => {
                let (by, pages) = (self.last_mover.clone(), verified.pages);
                Err(BenchError::MemoryLost { by, bad, pages })
            }
        }
    }

    fn launch(&mut self, mut spec: QemuSpec, touch: bool) -> Result<Qemu, BenchError> {
        if touch {
            spec.extra.push("-mem-prealloc".into());
        }
        self.serial += 1;
        let qemu = Qemu::launch(&self.workplace, &format!("q{}", self.serial), &spec)?;
        // It answers when it has touched its memory.
        Qmp::connect_by(qemu.qmp(), Instant::now() + ANSWER_MAX)?;
        Ok(qemu)
    }
}
