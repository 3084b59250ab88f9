//! What one migration took, whoever did it.

use serde::Serialize;
use serde_json::Value;

use crate::cpu;
use crate::error::BenchError;
use crate::pause::Pause;

/// One migration.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Moved {
    /// From the command until the guest ran at the target, in seconds.
    pub(crate) wall_s: f64,
    /// From the first page until the guest ran at the target, in seconds.
    pub(crate) span_s: f64,
    /// While memory moved, by the mover's own account: bytes per second.
    pub(crate) moving_bytes_per_s: f64,
    /// The pause.
    #[serde(skip)]
    pub(crate) pause: Pause,
    /// The same in milliseconds.
    pub(crate) pause_ms: f64,
    /// Processor time, by process.
    pub(crate) cpu: MovedCpu,
    /// What the mover says itself.
    pub(crate) account: Value,
}

/// Processor seconds of one migration.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct MovedCpu {
    /// The source's QEMU; the guest's own work is in it.
    pub(crate) qemu_source_s: f64,
    /// The target's QEMU.
    pub(crate) qemu_target_s: f64,
    /// Both agents, if there are any, from their start to their end.
    pub(crate) agents_s: f64,
    /// All processors of the machine, whoever used them.
    pub(crate) machine_s: f64,
}

impl MovedCpu {
    /// All processes that take part.
    pub(crate) fn total_s(&self) -> f64 {
        self.qemu_source_s + self.qemu_target_s + self.agents_s
    }
}

/// Reads the meters before and after.
pub(crate) struct CpuMeter {
    pids: (u32, u32),
    before: MovedCpu,
}

impl CpuMeter {
    /// Begins; `pids` are the source's and the target's QEMU.
    pub(crate) fn begin(pids: (u32, u32)) -> Result<Self, BenchError> {
        Ok(Self { pids, before: Self::read(pids)? })
    }

    /// What was used since. All agents have ended and were waited for.
    pub(crate) fn finish(&self) -> Result<MovedCpu, BenchError> {
        let now = Self::read(self.pids)?;
        Ok(MovedCpu {
            qemu_source_s: now.qemu_source_s - self.before.qemu_source_s,
            qemu_target_s: now.qemu_target_s - self.before.qemu_target_s,
            agents_s: now.agents_s - self.before.agents_s,
            machine_s: now.machine_s - self.before.machine_s,
        })
    }

    fn read(pids: (u32, u32)) -> Result<MovedCpu, BenchError> {
        Ok(MovedCpu {
            qemu_source_s: cpu::process_s(pids.0)?,
            qemu_target_s: cpu::process_s(pids.1)?,
            agents_s: cpu::ended_children_s()?,
            machine_s: cpu::machine_busy_s()?,
        })
    }
}
