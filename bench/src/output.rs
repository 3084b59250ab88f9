//! What people see while it runs: a line per run on standard error.

use crate::contender::Run;

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
