//! What people see: the method and the host first, a line per run on standard error, tables last.

use crate::contender::{Metric, Record, Run};
use crate::host::Host;
use crate::method;
use crate::table::{Table, cell};

/// Method and host, before any number.
pub(crate) fn preamble(benchmark: &str, host: &Host) {
    println!("{benchmark}\n\nMethod\n{}\n\nHost\n{}\n", method::of(benchmark), host.text());
}

/// How far it is.
pub(crate) fn progress(text: &str) {
    eprintln!("{text}");
}

/// One run as it ends.
pub(crate) fn progress_run(table: &str, who: &str, run: &Run) {
    let mut line = format!("{table} turn {}: {who}: {:.2} GiB/s", run.turn, run.moving_gib_per_s);
    if let (Some(span), Some(wall)) = (run.span_gib_per_s, run.wall_gib_per_s) {
        line.push_str(&format!(" (span {span:.2}, wall {wall:.2})"));
    }
    line.push_str(&format!(", {:.3} CPU s/GiB", run.cpu_s_per_gib));
    if let Some(pause) = run.pause_ms {
        line.push_str(&format!(", pause {pause:.1} ms"));
    }
    progress(&line);
}

/// Medians of all contenders, the ceiling's percentage beside each.
pub(crate) fn records(name: &str, records: &[Record], ceiling_gib_per_s: Option<f64>) {
    let columns = [
        name,
        "runs",
        "GiB/s moving",
        "min",
        "max",
        "% of ceiling",
        "GiB/s span",
        "GiB/s wall",
        "CPU s/GiB",
        "pause ms",
        "min",
        "max",
        "tick gap ms",
    ];
    let mut table = Table::new(&columns);
    for record in records {
        let stats = |metric| record.stats(metric);
        let median = |metric, decimals| cell(record.median(metric), decimals);
        let (moving, pause) = (stats(Metric::Moving), stats(Metric::Pause));
        let percent = moving.as_ref().zip(ceiling_gib_per_s).map(|(m, c)| m.median / c * 100.0);
        table.row(vec![
            record.contender.name(),
            record.runs.len().to_string(),
            median(Metric::Moving, 2),
            cell(moving.as_ref().map(|s| s.min), 2),
            cell(moving.as_ref().map(|s| s.max), 2),
            cell(percent, 0),
            median(Metric::Span, 2),
            median(Metric::Wall, 2),
            median(Metric::Cpu, 3),
            median(Metric::Pause, 1),
            cell(pause.as_ref().map(|s| s.min), 1),
            cell(pause.as_ref().map(|s| s.max), 1),
            median(Metric::TickGap, 0),
        ]);
    }
    println!("{}", table.text());
    for record in records {
        for failure in &record.failures {
            println!("FAILED {}: {failure}", record.contender.name());
        }
    }
}
