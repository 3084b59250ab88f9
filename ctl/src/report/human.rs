//! A migration as people follow it: a bar on a terminal, plain lines in a pipe, a table at the end.

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry_datapath::source::Phase;

use super::events::{Event, MigrationOutcome, RunningOn, Summary};
use super::reporter::Reporter;
use super::timeline::per_second;
use crate::agent::failure::one_line;
use crate::agent::source::Watch;

/// Between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// See the [module](self).
pub(super) struct Human {
    bar: Option<ProgressBar>,
    line_at: Instant,
    before: Option<(Duration, u64)>,
    rate: u64,
}

impl Human {
    /// For standard output, as it is.
    pub(super) fn new() -> Self {
        let bar = stdout().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            let style = "{prefix:>9} [{bar:30}] {percent:>3}% {msg}";
            let style = ProgressStyle::with_template(style).expect("a constant template");
            bar.set_style(style.progress_chars("=> "));
            bar
        });
        Self { bar, line_at: Instant::now(), before: None, rate: 0 }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => {
                // A reader that is gone must not end a migration.
                let _reader_may_be_gone = writeln!(stdout().lock(), "{text}");
            }
        }
    }

    fn note_rate(&mut self, watch: &Watch<'_>) {
        let now = (watch.at, watch.moved_bytes);
        let (at, bytes) = *self.before.get_or_insert(now);
        let passed = watch.at.saturating_sub(at);
        if passed >= Duration::from_millis(200) {
            self.rate = per_second(watch.moved_bytes.saturating_sub(bytes), passed);
            self.before = Some(now);
        }
    }

    /// `1.2 GiB/s, dirty 3 MiB/s, pause 12 ms, 4 s left`, as far as it is known.
    fn status(&self, watch: &Watch<'_>) -> String {
        let mut text = format!("{}/s", HumanBytes(self.rate));
        if let Some(dirty) = watch.report.dirty_bytes_per_second {
            text += &format!(", dirty {}/s", HumanBytes(dirty));
        }
        if let Some(pause) = watch.report.predicted_blackout {
            text += &format!(", pause of {} ms predicted", pause.as_millis());
        }
        let (total, taken) = watch.round_bytes;
        if self.rate > 0 && total > taken {
            text += &format!(", {} s left in this round", (total - taken) / self.rate + 1);
        }
        text
    }
}

impl Default for Human {
    fn default() -> Self {
        Self::new()
    }
}

impl Reporter for Human {
    fn progress(&mut self, watch: &Watch<'_>) {
        self.note_rate(watch);
        let (total, taken) = watch.round_bytes;
        let round = match watch.phase {
            Phase::Moving => format!("round {}", watch.report.rounds.len()),
            phase => phase.doing().to_owned(),
        };
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(taken);
            bar.set_prefix(round);
            bar.set_message(self.status(watch));
        } else if self.line_at.elapsed() >= LINE_EVERY {
            self.line_at = Instant::now();
            let percent = (taken * 100).checked_div(total).unwrap_or(0);
            self.line(&format!("{round}: {percent} %, {}", self.status(watch)));
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Start(start) => self.line(&format!(
                "session {}: {} lanes, {:?}, {} of {} populated, tracked by {} ({})",
                start.session,
                start.lanes,
                start.transport,
                HumanBytes(start.populated_bytes),
                HumanBytes(start.guest_bytes),
                start.tracker,
                start.tracker_reason,
            )),
            Event::Round(round) if !round.in_blackout => self.line(&format!(
                "round {}: {} in {:.1} ms, {}/s",
                round.round,
                HumanBytes(round.bytes),
                round.took_ms,
                HumanBytes(round.bytes_per_second),
            )),
            Event::Round(_) => {}
            Event::Drain(drain) => {
                self.line(&format!("drain point: {:.1} ms ({})", drain.pause_ms, drain.reason));
            }
            Event::Brownout(brownout) => self.line(&format!(
                "brownout: {:.1} ms, {} rounds, {} scans",
                brownout.brownout_ms, brownout.rounds, brownout.scans
            )),
            Event::Blackout(blackout) => {
                self.line(&format!("blackout: {:.1} ms", blackout.blackout_ms));
                let parts = blackout.parts_ms.named();
                let parts: Vec<_> =
                    parts.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
                self.line(&format!("  {}", parts.join(", ")));
            }
            Event::Summary(summary) => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                say_summary(summary, &mut |text| self.line(text));
            }
        }
    }
}

fn say_summary(summary: &Summary, line: &mut dyn FnMut(&str)) {
    if summary.moved_bytes > 0 {
        line(&format!(
            "moved {} ({} on the wire) in {} rounds, {}/s; {:.0} ms in all",
            HumanBytes(summary.moved_bytes),
            HumanBytes(summary.wire_bytes),
            summary.rounds,
            HumanBytes(summary.bytes_per_second),
            summary.total_ms,
        ));
        line(&format!(
            "CPU: {:.2} s at the source, {} s at the target; zero-copy: {:?}; memory {}",
            summary.cpu_seconds_source,
            summary.cpu_seconds_target.map_or("?".into(), |cpu| format!("{cpu:.2}")),
            summary.zero_copy,
            if summary.verified { "compared and equal" } else { "not compared" },
        ));
        for latency in &summary.latencies {
            line(&format!(
                "{:>9}: p50 {:.0} µs, p90 {:.0}, p99 {:.0}, p99.9 {:.0}, max {:.0} ({} of them)",
                latency.of,
                latency.p50_us,
                latency.p90_us,
                latency.p99_us,
                latency.p999_us,
                latency.max_us,
                latency.count,
            ));
        }
    }
    line(match (summary.outcome, summary.guest_running_on) {
        (MigrationOutcome::Migrated, _) => "the guest runs at the target",
        (_, RunningOn::Source) => "failed; the guest runs at the source, as before",
        (_, RunningOn::Target) => "failed; the guest runs at the target",
        (_, RunningOn::None) => "failed; the guest is paused at the source, whole",
        (_, RunningOn::Uncertain) => {
            "hand-over uncertain: the guest is paused at the source and may run at the target"
        }
    });
    if let Some(reason) = &summary.reason {
        eprintln!("error: {}", one_line(reason));
    }
    if let Some(hint) = &summary.hint {
        eprintln!("hint: {}", one_line(hint));
    }
}
