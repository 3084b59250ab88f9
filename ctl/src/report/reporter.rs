//! Who is told: a program (JSON lines) or a person (text; a bar on a terminal).

use std::io;

use super::events::Event;
use super::human::Human;
use crate::agent::source::Watch;

/// Told of a migration as it happens. Never blocks for long: it is called from the agent's loop.
pub trait Reporter {
    /// Something happened.
    fn event(&mut self, event: &Event);

    /// Things are on their way; called at every change and every 100 ms.
    fn progress(&mut self, watch: &Watch<'_>);
}

/// The reporter for `--json`, or for people.
pub fn reporter(json: bool) -> Box<dyn Reporter> {
    match json {
        true => Box::new(JsonLines),
        false => Box::new(Human::new()),
    }
}

/// One JSON object a line, and nothing else.
struct JsonLines;

impl Reporter for JsonLines {
    fn event(&mut self, event: &Event) {
        // A reader that is gone must not end a migration.
        let _reader_may_be_gone = event.write_line(&mut io::stdout().lock());
    }

    fn progress(&mut self, _watch: &Watch<'_>) {}
}
