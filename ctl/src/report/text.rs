//! The report at the end, for people: one table that fits a terminal.

use console::Style;
use pageferry_datapath::control::CoreUse;
use pageferry_datapath::lane::{LanePath, ZeroCopy};
use pageferry_uring::cpulist;

use super::events::{
    Latency, MigrationOutcome, RailDetail, RssDetail, RunningOn, Secured, Summary,
};
use super::units;

/// The whole report, with a newline at its end. A failure's reason and hint are not in it: they go
/// to standard error.
pub fn summary(summary: &Summary, colour: bool) -> String {
    let mut text = format!("{}\n", headline(summary, colour));
    for (name, value) in rows(summary) {
        text.push_str(&format!("  {name:<10}{value}\n"));
    }
    text.push_str(&latencies(&summary.latencies));
    text
}

fn headline(summary: &Summary, colour: bool) -> String {
    let (style, outcome) = match summary.outcome {
        MigrationOutcome::Migrated => (Style::new().green(), "migrated"),
        MigrationOutcome::Failed => (Style::new().red(), "failed"),
    };
    let place = match summary.guest_running_on {
        RunningOn::Target => "the guest runs on the target",
        RunningOn::Source => "the guest runs at the source, as before",
        RunningOn::None => "the guest is whole at the source, but still paused",
        RunningOn::Gone => "the guest is gone: its QEMU ended before it was loaded elsewhere",
        RunningOn::Uncertain => "paused at the source, and may run on the target",
    };
    format!("{}: {place}", style.bold().force_styling(colour).apply_to(outcome))
}

/// Names and values; a row that says nothing is left out.
fn rows(summary: &Summary) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let reason = |reason: &Option<String>| match reason {
        Some(reason) => format!(" ({reason})"),
        None => String::new(),
    };
    if let Some(path) = summary.transport {
        let path = match path {
            LanePath::TcpUring => "TCP by io_uring",
            LanePath::TcpPlain => "TCP by plain sockets",
            LanePath::Rdma => "RDMA",
        };
        rows.push(("transport", format!("{path}{}", reason(&summary.transport_reason))));
    }
    if let Some(secured) = &summary.security {
        rows.extend(
            security(secured, summary.moved_bytes)
                .into_iter()
                .zip(["security", ""])
                .map(|(v, n)| (n, v)),
        );
    }
    if let Some(tracker) = &summary.tracker {
        rows.push(("tracker", format!("{tracker}{}", reason(&summary.tracker_reason))));
    }
    if summary.lanes > 0 {
        rows.push(("lanes", format!("{}{}", summary.lanes, cores(summary))));
        let zero_copy = match summary.zero_copy {
            ZeroCopy::Yes => "sent from guest memory",
            ZeroCopy::Copied => "the kernel copied; switched off",
            ZeroCopy::Off => "off",
        };
        rows.push(("zero-copy", format!("{zero_copy}{}", reason(&summary.zero_copy_reason))));
    }
    if let Some(rss) = &summary.rss {
        rows.push(("rss", placed(rss)));
    }
    let rails = summary.rails.iter().map(rail);
    rows.extend(rails.enumerate().map(|(n, line)| (if n == 0 { "rails" } else { "" }, line)));
    if summary.lanes_renewed > 0 {
        rows.push(("cuts", cuts(summary)));
    }
    if let Some(compression) = &summary.compression {
        rows.push(("compress", compression.line()));
    }
    if let Some(narrowing) = summary.narrowing.as_ref().filter(|it| it.hashed_bytes > 0) {
        rows.push(("narrowing", narrowing.line()));
    }
    if summary.guest_bytes > 0 {
        rows.push(("memory", memory(summary)));
    }
    if summary.rounds > 0 {
        let rate = units::rate(summary.bytes_per_second);
        rows.push(("rounds", format!("{}, moved at {rate}", summary.rounds)));
    }
    if let Some(ms) = summary.brownout_ms {
        let drain = summary.drain_pause_ms.map_or(String::new(), |ms| {
            format!(", in it a pause of {} to drain direct I/O", units::millis(ms))
        });
        rows.push(("brownout", format!("{}{drain}", units::millis(ms))));
    }
    if let Some(ms) = summary.blackout_ms {
        rows.push(("blackout", format!("{}{}", units::millis(ms), prediction(summary))));
        rows.extend(parts(summary).into_iter().map(|line| ("", line)));
    }
    rows.push(("total", units::millis(summary.total_ms)));
    rows.push(("CPU", cpu(summary)));
    let busy = [("source", &summary.cores_source), ("target", &summary.cores_target)];
    let busy: Vec<String> =
        busy.into_iter().filter_map(|(end, cores)| busiest(end, cores)).collect();
    if !busy.is_empty() {
        rows.push(("cores", busy.join("; ")));
    }
    if summary.outcome == MigrationOutcome::Migrated {
        let verified = match summary.verified {
            true => "yes: both sides' memory was the same inside the pause",
            false => "no (--verify compares all memory inside the pause)",
        };
        rows.push(("verified", verified.into()));
    }
    rows
}

fn security(secured: &Secured, moved_bytes: u64) -> Vec<String> {
    let control = match (&secured.peer, &secured.warning) {
        (Some(peer), _) => format!("TLS 1.3, the target is {peer}"),
        (None, Some(_)) => "NONE (--insecure): nobody knows who was on the other side".into(),
        (None, None) => "none: it did not leave this host".into(),
    };
    let lanes = match secured.lanes.as_str() {
        "tls-kernel" => Some("guest memory encrypted by the kernel".into()),
        "tls-process" => Some(format!("guest memory encrypted{}", cost(secured, moved_bytes))),
        _ if secured.peer.is_some() => {
            Some("guest memory in the clear, lanes by one-time ticket".to_owned())
        }
        _ => None,
    };
    [control].into_iter().chain(lanes).collect()
}

fn cost(secured: &Secured, moved_bytes: u64) -> String {
    let gib = moved_bytes as f64 / f64::from(1 << 30);
    match secured.sealing_seconds {
        Some(seconds) if gib >= 0.1 => {
            format!(", which cost {seconds:.2} s here ({:.2} s per GiB)", seconds / gib)
        }
        Some(seconds) => format!(", which cost {seconds:.2} s here"),
        None => String::new(),
    }
}

fn cores(summary: &Summary) -> String {
    let mut cores: Vec<usize> = summary.lane_details.iter().filter_map(|lane| lane.cpu).collect();
    cores.sort_unstable();
    cores.dedup();
    match cores.len() {
        0 => ", not pinned".into(),
        1 => format!(", on core {}", cores[0]),
        _ => format!(", on cores {}", cpulist::format(&cores)),
    }
}

fn placed(rss: &RssDetail) -> String {
    let reason = rss.reason.as_deref().unwrap_or_default();
    match rss.placed {
        0 => format!("not placed: {reason}"),
        placed if placed == rss.lanes => format!("placed {placed} of {placed} lanes"),
        placed => format!("placed {placed} of {} lanes: {reason}", rss.lanes),
    }
}

/// Cores named in the report, the busiest first.
const CORES_SHOWN: usize = 4;

fn busiest(end: &str, cores: &[CoreUse]) -> Option<String> {
    let mut cores = cores.to_vec();
    cores.sort_by_key(|core| (std::cmp::Reverse(core.percent), core.cpu));
    let mut shown: Vec<String> = cores
        .iter()
        .take(CORES_SHOWN)
        .map(|core| format!("{} {} %", core.cpu, core.percent))
        .collect();
    if cores.len() > CORES_SHOWN {
        shown.push("the others less".into());
    }
    (!shown.is_empty()).then(|| format!("{end} {}", shown.join(", ")))
}

fn rail(rail: &RailDetail) -> String {
    let RailDetail { device, from, target_device, to, lanes, moved_bytes } = rail;
    let moved = units::bytes(*moved_bytes);
    let to = to.ip();
    format!("{device} {from} to {target_device} {to}: {moved} over {lanes} lanes")
}

fn cuts(summary: &Summary) -> String {
    let times = match summary.lanes_renewed {
        1 => "once".into(),
        times => format!("{times} times"),
    };
    let away: f64 = summary.cuts_ms.iter().sum();
    let away = match summary.cuts_ms.len() {
        0 => String::new(),
        count => format!("; the target was out of reach {count}x, {} in all", units::millis(away)),
    };
    format!("lanes were opened again {times}{away}")
}

fn memory(summary: &Summary) -> String {
    // Before the first round nobody looked at what is populated.
    if summary.rounds == 0 {
        return units::bytes(summary.guest_bytes);
    }
    let zero = match summary.zero_bytes {
        0 => String::new(),
        bytes => format!(", {} zero", units::bytes(bytes)),
    };
    let holes = match summary.hole_bytes {
        0 => String::new(),
        bytes => format!(" ({} given back)", units::bytes(bytes)),
    };
    format!(
        "{}, {} populated{zero}{holes}, {} moved, {} on the wire",
        units::bytes(summary.guest_bytes),
        units::bytes(summary.populated_bytes),
        units::bytes(summary.moved_bytes),
        units::bytes(summary.wire_bytes),
    )
}

/// The prediction is of the pause alone: comparing all memory is asked for, and not counted.
fn prediction(summary: &Summary) -> String {
    let verify = summary.blackout_parts_ms.map_or(0.0, |parts| parts.verify);
    match (summary.blackout_predicted_ms.map(units::millis), verify > 0.0) {
        (Some(ms), true) => {
            format!(", {} of it for --verify (predicted {ms} without)", units::millis(verify))
        }
        (Some(ms), false) => format!(" (predicted {ms})"),
        (None, true) => format!(", {} of it for --verify", units::millis(verify)),
        (None, false) => String::new(),
    }
}

/// The parts of the blackout that took any time, a few to a line.
fn parts(summary: &Summary) -> Vec<String> {
    let Some(parts) = summary.blackout_parts_ms else { return Vec::new() };
    let shown: Vec<String> = parts
        .named()
        .iter()
        .filter(|(_, ms)| *ms > 0.0)
        .map(|(name, ms)| format!("{name} {}", units::millis(*ms)))
        .collect();
    shown.chunks(3).map(|line| line.join(", ")).collect()
}

fn cpu(summary: &Summary) -> String {
    let target = match summary.cpu_seconds_target {
        Some(seconds) => format!("{seconds:.2} s"),
        None => "unknown".into(),
    };
    let mut text = format!("source {:.2} s, target {target}", summary.cpu_seconds_source);
    let gib = summary.moved_bytes as f64 / f64::from(1 << 30);
    // Below that the agents' fixed cost is all one would see.
    if let (Some(target), true) = (summary.cpu_seconds_target, gib >= 0.1) {
        let both = (summary.cpu_seconds_source + target) / gib;
        text.push_str(&format!(" ({both:.2} s per GiB moved)"));
    }
    text
}

fn latencies(latencies: &[Latency]) -> String {
    let recorded: Vec<&Latency> = latencies.iter().filter(|latency| latency.count > 0).collect();
    if recorded.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "\n  {:<10}{:>8} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
        "latency", "count", "p50", "p90", "p99", "p99.9", "max"
    );
    for latency in recorded {
        text.push_str(&format!("  {:<10}{:>8}", latency.of, latency.count));
        for us in [latency.p50_us, latency.p90_us, latency.p99_us, latency.p999_us, latency.max_us]
        {
            text.push_str(&format!(" {:>9}", units::millis(us / 1e3)));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn a_migration_s_report_is_golden() {
        let golden = "\
migrated: the guest runs on the target
  transport TCP by io_uring (no RDMA device on either side)
  security  TLS 1.3, the target is host-b (host-b, 10.0.0.2)
            guest memory in the clear, lanes by one-time ticket
  tracker   uffd-one-phase (writes to a test mapping were reported)
  lanes     2, on cores 0-1
  zero-copy the kernel copied; switched off
  rss       placed 2 of 2 lanes
  compress  lz4, 900 MiB became 300 MiB (300 MiB/s against 110 MiB/s before)
  memory    2.00 GiB, 1.07 GiB populated, 1.17 GiB moved, 1.17 GiB on the wire
  rounds    4, moved at 3.00 GiB/s
  brownout  512 ms, in it a pause of 3.10 ms to drain direct I/O
  blackout  31.2 ms (predicted 29.0 ms)
            pause 500 µs, last scan 1.25 ms, last extents 8.00 ms
            barrier 400 µs, device state save 3.10 ms, transfer 200 µs
            load 15.0 ms, commit 800 µs, resume 2.00 ms
  total     810 ms
  CPU       source 0.41 s, target 0.52 s (0.79 s per GiB moved)
  cores     source 1 88 %, 0 40 %; target 3 97 %
  verified  yes: both sides' memory was the same inside the pause

  latency      count       p50       p90       p99     p99.9       max
  batches       1200    202 µs    300 µs    950 µs   1.80 ms   2.00 ms
";
        assert_eq!(summary(&sample::summary(), false), golden);
        assert!(golden.lines().all(|line| line.chars().count() <= 80), "fits a terminal");
    }

    #[test]
    fn lanes_that_share_a_queue_are_told_with_the_reason() {
        let rss = |placed, reason: Option<&str>| {
            let reason = reason.map(str::to_owned);
            self::placed(&RssDetail { placed, lanes: 4, reason, queues: vec![] })
        };
        assert_eq!(rss(4, None), "placed 4 of 4 lanes");
        assert_eq!(rss(2, Some("two differ")), "placed 2 of 4 lanes: two differ");
        assert_eq!(rss(0, Some("lo has no RSS")), "not placed: lo has no RSS");
        let cores: Vec<_> = (0..9).map(|cpu| CoreUse { cpu, percent: cpu as u8 }).collect();
        let text = busiest("source", &cores).unwrap();
        assert_eq!(text, "source 8 8 %, 7 7 %, 6 6 %, 5 5 %, the others less");
        assert_eq!(busiest("source", &[]), None);
    }

    #[test]
    fn what_verifying_took_is_told_apart() {
        let mut with = sample::summary();
        if let Some(parts) = &mut with.blackout_parts_ms {
            parts.verify = 12.5;
        }
        let text = summary(&with, false);
        let line = "  blackout  31.2 ms, 12.5 ms of it for --verify (predicted 29.0 ms without)\n";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn a_refusal_s_report_is_short() {
        let golden = "\
failed: the guest runs at the source, as before
  memory    2.00 GiB
  total     12.0 ms
  CPU       source 0.01 s, target unknown
";
        assert_eq!(summary(&sample::refused(), false), golden);
        let coloured = summary(&sample::refused(), true);
        assert!(coloured.contains('\x1b'));
        assert_eq!(console::strip_ansi_codes(&coloured), golden);
    }
}
