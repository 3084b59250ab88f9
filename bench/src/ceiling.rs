//! The ceiling that everyone is compared with: threads that `send()` and `recv()` guest memory.
//!
//! The ways to do it that are known to matter are all tried; see [`CeilingWay::all`].

use pageferry_datapath::region::GuestMemory;
use pageferry_uring::ceiling::Ceiling;
use pageferry_uring::plan::SocketTuning;
use serde::Serialize;

use crate::cpu;
use crate::error::BenchError;
use crate::net::{Net, Tuning};

/// Which cores a connection's two threads get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Placement {
    /// Left to the scheduler.
    Free,
    /// Both on one core, another for each connection.
    SameCore,
    /// Each on a core of its own.
    TwoCores,
}

impl Placement {
    /// Every one of them.
    pub(crate) const ALL: [Self; 3] = [Self::Free, Self::SameCore, Self::TwoCores];

    /// As tables have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::SameCore => "same core",
            Self::TwoCores => "two cores",
        }
    }

    /// The cores of a source and a target of one thread each; where there is only one core it is
    /// nobody's.
    pub(crate) fn two(self) -> (Option<usize>, Option<usize>) {
        match pageferry_ctl::host::cpus_allowed().len() {
            0 | 1 => (None, None),
            _ => self.cores(0),
        }
    }

    /// The cores of connection `index`.
    pub(crate) fn cores(self, index: usize) -> (Option<usize>, Option<usize>) {
        let cores = pageferry_ctl::host::cpus_allowed();
        let core = |index: usize| Some(cores[index % cores.len()]);
        match self {
            Self::Free => (None, None),
            Self::SameCore => (core(index), core(index)),
            Self::TwoCores => (core(index), core(index + 1)),
        }
    }
}

/// One way to run the ceiling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct CeilingWay {
    /// Connections, each with two threads.
    pub(crate) connections: usize,
    /// Bytes of one call, in KiB.
    pub(crate) chunk_kib: u64,
    /// Socket buffers in KiB; `None` leaves them to the kernel.
    pub(crate) buffer_kib: Option<usize>,
    /// Cores.
    pub(crate) placement: Placement,
    /// Congestion control; `None` is what QEMU's sockets get, too.
    pub(crate) congestion: Option<String>,
}

impl CeilingWay {
    /// Every way to try; `quick` is a handful of those that did best.
    pub(crate) fn all(quick: bool, congestion: &[Option<String>]) -> Vec<Self> {
        let connections: &[usize] = if quick { &[1, 2] } else { &[1, 2, 4] };
        let chunks: &[u64] = if quick { &[1024] } else { &[256, 1024, 4096] };
        let buffers: &[Option<usize>] = match quick {
            true => &[None, Some(256)],
            false => &[None, Some(128), Some(256), Some(512), Some(2048)],
        };
        let mut all = Vec::new();
        for &connections in connections {
            for &chunk_kib in chunks {
                for &buffer_kib in buffers {
                    for placement in Placement::ALL {
                        all.extend(congestion.iter().map(|congestion| Self {
                            connections,
                            chunk_kib,
                            buffer_kib,
                            placement,
                            congestion: congestion.clone(),
                        }));
                    }
                }
            }
        }
        all
    }

    /// As tables have it.
    pub(crate) fn name(&self) -> String {
        let mut name = format!("sockets x{} {} KiB", self.connections, self.chunk_kib);
        match self.buffer_kib {
            Some(kib) => name.push_str(&format!(", buffers {kib} KiB")),
            None => name.push_str(", buffers auto"),
        }
        name.push_str(&format!(", {}", self.placement.name()));
        if let Some(congestion) = &self.congestion {
            name.push_str(&format!(", {congestion}"));
        }
        name
    }

    /// Moves `from` into `to` once.
    pub(crate) fn run(
        &self,
        net: &Net,
        from: &GuestMemory,
        to: &GuestMemory,
    ) -> Result<Streamed, BenchError> {
        let tuning = Tuning {
            buffer_bytes: self.buffer_kib.map(|kib| kib << 10),
            congestion: self.congestion.clone(),
        };
        let pairs = net.connect(self.connections, &tuning)?;
        let ceiling = Ceiling {
            cpus: (0..self.connections).map(|index| self.placement.cores(index)).collect(),
            chunk_bytes: self.chunk_kib << 10,
            // `connect` has seen to it.
            tuning: SocketTuning::default(),
        };
        let (busy, own) = (cpu::machine_busy_s()?, cpu::own_s()?);
        let took = ceiling.run_over(&pairs, from, to)?;
        Ok(Streamed {
            bytes: from.regions().iter().map(|region| region.len()).sum(),
            seconds: took.as_secs_f64(),
            cpu_s: cpu::own_s()? - own,
            machine_cpu_s: cpu::machine_busy_s()? - busy,
        })
    }
}

/// What a mere stream of bytes took.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Streamed {
    /// Bytes that arrived.
    pub(crate) bytes: u64,
    /// In this time.
    pub(crate) seconds: f64,
    /// With this much processor time, both ends.
    pub(crate) cpu_s: f64,
    /// And this much of all processors of the machine, whoever used them.
    pub(crate) machine_cpu_s: f64,
}

impl Streamed {
    /// Throughput.
    pub(crate) fn gib_per_s(&self) -> f64 {
        self.gib() / self.seconds
    }

    /// Volume.
    pub(crate) fn gib(&self) -> f64 {
        self.bytes as f64 / (1u64 << 30) as f64
    }
}
