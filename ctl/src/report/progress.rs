//! A migration as it happens: a bar on a terminal, plain lines in a pipe, JSON lines for programs.
//!
//! Owned by the agent's main thread, which tells it of each event and, ten times a second, how far
//! things are. It measures nothing but the rate, over the last second, from the bytes it is told.
//! With `--json` standard output carries JSON lines and nothing else.

pub(crate) mod meter;

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use console::Style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::events::{Event, Going, Round, Start, Summary};
use super::timeline::ms;
use super::{text, units};
use crate::agent::failure::one_line;
use meter::Meter;

/// Lines in a pipe: often enough to see that it lives, seldom enough for a log.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Progress as events: as often as a bar is looked at.
const EVENT_EVERY: Duration = Duration::from_millis(200);
/// Steps of the bar, whatever the round's size: finer than any terminal.
const BAR_STEPS: u64 = 1000;

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Since the attempt began.
    pub at: Duration,
    /// What the source is doing, for people.
    pub doing: &'static str,
    /// Which round is moving; the first pass is 0.
    pub round: u32,
    /// Bytes of that round.
    pub round_bytes: u64,
    /// And how many of them are on their way or there.
    pub round_done_bytes: u64,
    /// Guest memory moved so far, all rounds together.
    pub moved_bytes: u64,
    /// How fast the guest writes; `None` before the first scan.
    pub dirty_bytes_per_second: Option<u64>,
    /// The pause to expect if the guest were paused now.
    pub blackout_predicted: Option<Duration>,
}

/// Where events and progress go.
pub struct Console {
    mode: Mode,
    meter: Meter,
}

enum Mode {
    Json { out: Box<dyn Write + Send>, next: Option<Duration> },
    Bar { bar: ProgressBar, text: Text },
    Lines { text: Text, next: Duration },
}

/// Where text for people goes.
pub struct Text {
    /// Progress and report.
    pub out: Box<dyn Write + Send>,
    /// `error:` and `hint:`.
    pub err: Box<dyn Write + Send>,
    /// Whether either may be coloured.
    pub colour: bool,
}

impl Console {
    /// The one for this process: JSON if asked for, else by what standard output is.
    pub fn new(json: bool) -> Self {
        if json {
            return Self::json(Box::new(io::stdout()));
        }
        let is_terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
        let colour = is_terminal && console::colors_enabled();
        let text = Text { out: Box::new(io::stdout()), err: Box::new(io::stderr()), colour };
        match is_terminal {
            true => Self::bar(text, ProgressDrawTarget::stderr()),
            false => Self::lines(text),
        }
    }

    /// JSON lines to `out`.
    pub fn json(out: Box<dyn Write + Send>) -> Self {
        Self::with(Mode::Json { out, next: None })
    }

    /// JSON lines tell how far things are, too.
    pub fn with_progress(mut self) -> Self {
        if let Mode::Json { next, .. } = &mut self.mode {
            *next = Some(Duration::ZERO);
        }
        self
    }

    /// Plain lines.
    pub fn lines(text: Text) -> Self {
        Self::with(Mode::Lines { text, next: LINE_EVERY })
    }

    /// A bar on `target`; what stays goes above it, the report where `text` says.
    pub fn bar(text: Text, target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(Some(BAR_STEPS), target);
        // The message is last and gets what room is left: a narrow terminal cuts it, not the bar.
        let template = "{prefix} [{bar:24}] {percent:>3} %  {wide_msg}";
        let style = ProgressStyle::with_template(template).expect("the template is constant");
        bar.set_style(style.progress_chars("=> "));
        Self::with(Mode::Bar { bar, text })
    }

    fn with(mode: Mode) -> Self {
        Self { mode, meter: Meter::default() }
    }

    /// How far things are; as often as one likes.
    pub fn progress(&mut self, progress: &Progress) {
        self.meter.note(progress.at, progress.moved_bytes);
        let rate = self.meter.bytes_per_second();
        match &mut self.mode {
            Mode::Json { out, next } => {
                if next.is_some_and(|next| progress.at >= next) {
                    *next = Some(progress.at + EVENT_EVERY);
                    let _ = Event::Progress(going(progress)).write_line(&mut **out);
                }
            }
            Mode::Bar { bar, .. } => {
                bar.set_prefix(format!("round {:<2}", progress.round));
                bar.set_position(per_mille(progress));
                bar.set_message(figures(progress, rate));
            }
            Mode::Lines { text: Text { out, .. }, next } => {
                if progress.at < *next {
                    return;
                }
                *next = progress.at + LINE_EVERY;
                let percent = per_mille(progress) / 10;
                let (at, round) = (seconds(progress.at), progress.round);
                let figures = figures(progress, rate);
                // Nobody reading any more is no reason to stop a migration.
                let _ = writeln!(out, "{at}  round {round:<2} {percent:>3} %  {figures}");
                let _ = out.flush();
            }
        }
    }

    /// Something happened. The summary is printed whole, and takes the bar away.
    pub fn event(&mut self, event: &Event) {
        if let Mode::Json { out, .. } = &mut self.mode {
            let _ = event.write_line(&mut **out);
            return;
        }
        match event {
            Event::Start(start) => self.line(&start_line(start)),
            Event::Round(round) => self.line(&round_line(round)),
            Event::Drain(drain) => self.line(&format!(
                "{}  drained direct I/O in {}: {}",
                seconds(Duration::from_secs_f64(drain.at_ms.max(0.0) / 1e3)),
                units::millis(drain.pause_ms),
                drain.reason
            )),
            // Their figures stand in the summary, which follows at once.
            Event::Brownout(_) | Event::Blackout(_) => {}
            // People are shown it otherwise.
            Event::Progress(_) => {}
            Event::Summary(summary) => self.summary(summary),
        }
    }

    fn line(&mut self, line: &str) {
        match &mut self.mode {
            Mode::Json { .. } => {}
            Mode::Bar { bar, .. } => bar.println(line),
            Mode::Lines { text: Text { out, .. }, .. } => {
                let _ = writeln!(out, "{line}");
                let _ = out.flush();
            }
        }
    }

    fn summary(&mut self, summary: &Summary) {
        let Text { out, err, colour } = match &mut self.mode {
            Mode::Json { .. } => return,
            Mode::Bar { bar, text } => {
                bar.finish_and_clear();
                text
            }
            Mode::Lines { text, .. } => text,
        };
        let _ = write!(out, "\n{}", text::summary(summary, *colour));
        let _ = out.flush();
        if let Some(reason) = &summary.reason {
            let _ = err.write_all(complaint(reason, summary.hint.as_deref(), *colour).as_bytes());
        }
    }
}

impl Drop for Console {
    /// An early return leaves no half-drawn bar on the terminal.
    fn drop(&mut self) {
        if let Mode::Bar { bar, .. } = &self.mode {
            bar.finish_and_clear();
        }
    }
}

/// `error: a: b: c` and `hint: …` for standard error.
pub fn complaint(reason: &str, hint: Option<&str>, colour: bool) -> String {
    let style = |style: Style| style.bold().force_styling(colour);
    let error = style(Style::new().red()).apply_to("error:");
    let mut text = format!("{error} {}\n", one_line(reason));
    if let Some(hint) = hint {
        let label = style(Style::new().cyan()).apply_to("hint:");
        text.push_str(&format!("{label} {}\n", one_line(hint)));
    }
    text
}

fn per_mille(progress: &Progress) -> u64 {
    let whole = u128::from(progress.round_bytes.max(1));
    let done = u128::from(progress.round_done_bytes) * u128::from(BAR_STEPS) / whole;
    // Between rounds there is nothing to move, and nothing left to wait for.
    match progress.round_bytes {
        0 => BAR_STEPS,
        _ => u64::try_from(done).unwrap_or(BAR_STEPS).min(BAR_STEPS),
    }
}

fn going(progress: &Progress) -> Going {
    Going {
        at_ms: ms(progress.at),
        doing: progress.doing.into(),
        round: progress.round,
        round_bytes: progress.round_bytes,
        round_done_bytes: progress.round_done_bytes,
        moved_bytes: progress.moved_bytes,
        dirty_bytes_per_second: progress.dirty_bytes_per_second,
        blackout_predicted_ms: progress.blackout_predicted.map(ms),
    }
}

/// Rate, dirty rate, predicted blackout, ETA.
fn figures(progress: &Progress, rate: u64) -> String {
    let mut parts = vec![units::rate(rate)];
    if let Some(dirty) = progress.dirty_bytes_per_second {
        parts.push(format!("dirty {}", units::rate(dirty)));
    }
    if let Some(blackout) = progress.blackout_predicted {
        parts.push(format!("blackout ~{}", units::time(blackout)));
    }
    parts.push(match meter::eta(progress, rate) {
        Some(eta) => format!("ETA {}", units::time(eta)),
        None => "ETA unknown".into(),
    });
    parts.push(progress.doing.to_owned());
    parts.join("  ")
}

fn start_line(start: &Start) -> String {
    format!(
        "{}  {} of {} populated, over {} lane{}",
        seconds(Duration::from_secs_f64(start.at_ms.max(0.0) / 1e3)),
        units::bytes(start.populated_bytes),
        units::bytes(start.guest_bytes),
        start.lanes,
        if start.lanes == 1 { "" } else { "s" },
    )
}

fn round_line(round: &Round) -> String {
    let mut line = format!(
        "{}  round {:<2} {:>9} in {:>8}  {:>10}",
        seconds(Duration::from_secs_f64(round.at_ms.max(0.0) / 1e3)),
        round.round,
        units::bytes(round.bytes),
        units::millis(round.took_ms),
        units::rate(round.bytes_per_second),
    );
    if let Some(left) = round.left_bytes {
        line.push_str(&format!("  {} dirty since", units::bytes(left)));
    }
    if let Some(ms) = round.blackout_predicted_ms {
        line.push_str(&format!(", blackout ~{}", units::millis(ms)));
    }
    if round.in_blackout {
        line.push_str("  guest paused");
    }
    line
}

fn seconds(at: Duration) -> String {
    format!("{:>7.2} s", at.as_secs_f64())
}

#[cfg(test)]
mod tests;
