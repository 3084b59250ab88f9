//! QEMU's own migration, at its best: both sides configured alike before the clock starts, no
//! limit on bandwidth, memory of the same kind as everyone's.

use std::time::{Duration, Instant};

use pageferry_ctl::lab::Qemu;
use pageferry_ctl::qmp::Qmp;
use serde_json::{Value, json};

use crate::error::BenchError;
use crate::moved::{CpuMeter, Moved};
use crate::net::Net;
use crate::pause::{self, Monitored, PauseWatch};

/// A migration that takes longer has failed.
pub(crate) const MOVE_MAX: Duration = Duration::from_secs(180);
/// QEMU's default for `downtime-limit`.
const DEFAULT_DOWNTIME_MS: u64 = 300;

/// One way to run it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QemuWay {
    /// Multifd channels; `None` is the plain, single-threaded stream.
    pub(crate) channels: Option<u8>,
    /// Multifd's zstd, at its default level.
    pub(crate) zstd: bool,
    /// `downtime-limit`; `None` is QEMU's default.
    pub(crate) downtime_ms: Option<u64>,
    /// Over RDMA; with all memory pinned before, or not.
    pub(crate) rdma: Option<Pinned>,
}

/// `rdma-pin-all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pinned {
    /// On.
    All,
    /// Off, the default: a MiB at a time, when it is needed.
    AsNeeded,
}

impl QemuWay {
    /// As tables have it.
    pub(crate) fn name(self) -> String {
        let mut name = match (self.rdma, self.channels) {
            (Some(Pinned::AsNeeded), _) => "qemu rdma".to_owned(),
            (Some(Pinned::All), _) => "qemu rdma-pin-all".to_owned(),
            (None, None) => "qemu plain".to_owned(),
            (None, Some(channels)) => format!("qemu multifd {channels}"),
        };
        if self.zstd {
            name.push_str(", zstd");
        }
        if let Some(ms) = self.downtime_ms {
            name.push_str(&format!(", limit {ms} ms"));
        }
        name
    }
}

/// Moves the guest of `source` to `target`.
pub(crate) fn migrate(
    way: QemuWay,
    source: &Qemu,
    target: &Qemu,
    net: &Net,
) -> Result<Moved, BenchError> {
    move_by(way, &format!("tcp:{}", net.target_address()), source, target)
}

/// The same to an address in QEMU's words.
pub(crate) fn move_by(
    way: QemuWay,
    uri: &str,
    source: &dyn Monitored,
    target: &dyn Monitored,
) -> Result<Moved, BenchError> {
    let (from, to) = (Qmp::connect(source.qmp())?, Qmp::connect(target.qmp())?);
    for monitor in [&from, &to] {
        prepare(monitor, way)?;
    }
    to.execute("migrate-incoming", json!({ "uri": uri }))?;
    let watch = PauseWatch::begin(source, target)?;
    let meter = CpuMeter::begin((source.pid(), target.pid()))?;
    let deadline = Instant::now() + MOVE_MAX;
    let started = pause::now();
    from.execute("migrate", json!({ "uri": uri }))?;
    let active = from
        .wait_event_where("MIGRATION", deadline, |event| {
            matches!(event.data["status"].as_str(), Some("active" | "failed"))
        })?
        .at;
    let account = finished(&from, way, deadline)?;
    let pause = watch.finish(deadline)?;
    let cpu = meter.finish()?;
    let seconds = |since: Duration| pause.resume.as_secs_f64() - since.as_secs_f64();
    Ok(Moved {
        wall_s: seconds(started),
        span_s: seconds(active),
        // Its own `total-time` is in whole milliseconds, and 0 for a moment after the end.
        moving_bytes_per_s: number(&account["ram"]["transferred"]) / seconds(active),
        pause,
        pause_ms: pause.ms(),
        cpu,
        account,
    })
}

fn prepare(monitor: &Qmp, way: QemuWay) -> Result<(), BenchError> {
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = json!([
        capability("events", true),
        capability("multifd", way.channels.is_some()),
        // Whoever moved the guest here may have left these set.
        capability("x-ignore-shared", false),
        capability("return-path", false),
    ]);
    monitor.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
    if let Some(pinned) = way.rdma {
        let capabilities = [capability("rdma-pin-all", pinned == Pinned::All)];
        monitor.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
    }
    let mut parameters = json!({
        // 0 is no limit at all: no accounting against one either.
        "max-bandwidth": 0,
        "downtime-limit": way.downtime_ms.unwrap_or(DEFAULT_DOWNTIME_MS),
        "multifd-compression": if way.zstd { "zstd" } else { "none" },
    });
    if let Some(channels) = way.channels {
        parameters["multifd-channels"] = channels.into();
    }
    monitor.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

/// Waits until the source says that it is done; what `query-migrate` says then.
fn finished(from: &Qmp, way: QemuWay, deadline: Instant) -> Result<Value, BenchError> {
    // Asking in a loop would take QEMU's main lock again and again; the event comes by itself.
    from.wait_event_where("MIGRATION", deadline, |event| {
        matches!(event.data["status"].as_str(), Some("completed" | "failed" | "cancelled"))
    })?;
    let account = from.execute("query-migrate", json!({}))?;
    match account["status"].as_str() {
        Some("completed") => Ok(account),
        _ => Err(BenchError::NotMoved { by: way.name(), reason: account.to_string() }),
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}
