//! Who is told: a program (JSON lines) or a person (text; a bar on a terminal).

use super::events::Event;
use super::progress::{Console, Progress};
use crate::agent::source::Watch;

/// Told of a migration as it happens. Never blocks for long: it is called from the agent's loop.
pub trait Reporter {
    /// Something happened.
    fn event(&mut self, event: &Event);

    /// Things are on their way; called at every change and every 100 ms.
    fn progress(&mut self, watch: &Watch<'_>);
}

/// The reporter for `--json`, with `--progress` too, or for people.
pub fn reporter(json: bool, progress: bool) -> Box<dyn Reporter> {
    let console = Console::new(json);
    Box::new(if progress { console.with_progress() } else { console })
}

impl Reporter for Console {
    fn event(&mut self, event: &Event) {
        Self::event(self, event);
    }

    fn progress(&mut self, watch: &Watch<'_>) {
        let (round_bytes, round_done_bytes) = watch.round_bytes;
        Self::progress(
            self,
            &Progress {
                at: watch.at,
                doing: watch.phase.doing(),
                // A round is noted when it is over: so many, so this is the next one's number.
                round: u32::try_from(watch.report.rounds.len()).unwrap_or(u32::MAX),
                round_bytes,
                round_done_bytes,
                moved_bytes: watch.moved_bytes,
                dirty_bytes_per_second: watch.report.dirty_bytes_per_second,
                blackout_predicted: watch.report.predicted_blackout,
            },
        );
    }
}
