//! What became of each guest: rows for people, for programs (JSON) and for spreadsheets (CSV).

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::DrainError;
use crate::report::events::{MigrationOutcome, RunningOn, Summary};
use crate::report::exit::Exit;
use crate::report::timeline::per_second;
use crate::report::units;

/// What became of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It runs at its target.
    Moved,
    /// It did already when this run began.
    MovedBefore,
    /// Its migration failed, and it runs on here.
    Stays,
    /// It was refused before it was touched, and runs on here.
    Refused,
    /// Its turn did not come.
    Left,
    /// Its migration failed, and it is paused here.
    Paused,
    /// The hand-over was decided and not confirmed: paused here, perhaps running at the target.
    Uncertain,
    /// Its QEMU ended.
    Gone,
}

impl Fate {
    /// For people.
    fn words(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::MovedBefore => "moved before",
            Self::Stays => "stays",
            Self::Refused => "refused",
            Self::Left => "not begun",
            Self::Paused => "paused here",
            Self::Uncertain => "uncertain",
            Self::Gone => "gone",
        }
    }
}

/// One guest's row. What is not known is null, or empty in CSV.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The guest.
    pub guest: String,
    /// What became of it.
    pub outcome: Fate,
    /// Its target.
    pub to: Option<String>,
    /// The session, as both agents log it.
    pub session: Option<String>,
    /// Size of its memory.
    pub guest_bytes: u64,
    /// From the first page moved until it was paused.
    pub brownout_ms: Option<f64>,
    /// The time it stood still.
    pub blackout_ms: Option<f64>,
    /// Rounds.
    pub rounds: u32,
    /// Guest memory moved, pages moved twice counted twice, zero pages not.
    pub moved_bytes: u64,
    /// Guest memory that was zero and did not travel.
    pub zero_bytes: u64,
    /// What was sent for it, headers included and compressed where it was.
    pub wire_bytes: u64,
    /// `moved_bytes` over the time in which rounds were moving.
    pub bytes_per_second: u64,
    /// The whole attempt.
    pub total_ms: Option<f64>,
    /// Exit code of its agent; null if none was started.
    pub exit_code: Option<i32>,
    /// Why it is not at its target, `a: b: c`.
    pub reason: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Row {
    /// Of a guest that was not migrated in this run.
    pub fn without(guest: &str, outcome: Fate, to: Option<String>) -> Self {
        Self {
            guest: guest.into(),
            outcome,
            to,
            session: None,
            guest_bytes: 0,
            brownout_ms: None,
            blackout_ms: None,
            rounds: 0,
            moved_bytes: 0,
            zero_bytes: 0,
            wire_bytes: 0,
            bytes_per_second: 0,
            total_ms: None,
            exit_code: None,
            reason: None,
            hint: None,
        }
    }

    /// The same, with a reason.
    pub fn because(mut self, reason: impl Into<String>, hint: Option<String>) -> Self {
        (self.reason, self.hint) = (Some(reason.into()), hint);
        self
    }

    /// From its agent's summary.
    pub fn of(guest: &str, to: &str, summary: &Summary) -> Self {
        let outcome = match (summary.outcome, summary.guest_running_on) {
            (MigrationOutcome::Migrated, _) => Fate::Moved,
            (_, RunningOn::Uncertain | RunningOn::Target) => Fate::Uncertain,
            (_, RunningOn::None) => Fate::Paused,
            (_, RunningOn::Gone) => Fate::Gone,
            (_, RunningOn::Source) if summary.exit_code == Exit::Refused.code() => Fate::Refused,
            (_, RunningOn::Source) => Fate::Stays,
        };
        Self {
            session: Some(summary.session.clone()),
            guest_bytes: summary.guest_bytes,
            brownout_ms: summary.brownout_ms,
            blackout_ms: summary.blackout_ms,
            rounds: summary.rounds,
            moved_bytes: summary.moved_bytes,
            zero_bytes: summary.zero_bytes,
            wire_bytes: summary.wire_bytes,
            bytes_per_second: summary.bytes_per_second,
            total_ms: Some(summary.total_ms),
            exit_code: Some(i32::from(summary.exit_code)),
            reason: summary.reason.clone(),
            hint: summary.hint.clone(),
            ..Self::without(guest, outcome, Some(to.into()))
        }
    }

    /// It is where it was asked to go.
    pub fn is_there(&self) -> bool {
        matches!(self.outcome, Fate::Moved | Fate::MovedBefore)
    }
}

/// What became of all of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Table {
    /// The whole drain, from the first guest's begin.
    pub(super) total_ms: f64,
    /// What moved in it, over `total_ms`.
    pub(super) bytes_per_second: u64,
    /// Rows, in the order of the plan.
    pub(super) guests: Vec<Row>,
}

impl Table {
    /// Of a drain that did not begin.
    pub(super) fn new(guests: Vec<Row>) -> Self {
        Self::after(guests, Duration::ZERO)
    }

    /// Of one that took so long.
    pub(super) fn after(guests: Vec<Row>, total: Duration) -> Self {
        let moved = guests.iter().filter(|row| row.outcome != Fate::MovedBefore);
        let moved_bytes = moved.map(|row| row.moved_bytes).sum();
        let total_ms = (total.as_secs_f64() * 1e5).round() / 1e2;
        Self { total_ms, bytes_per_second: per_second(moved_bytes, total), guests }
    }

    fn count(&self, wanted: impl Fn(&Row) -> bool) -> usize {
        self.guests.iter().filter(|row| wanted(row)).count()
    }

    /// The worst that became of any guest.
    pub(super) fn exit(&self) -> Exit {
        let any = |fates: &[Fate]| self.guests.iter().any(|row| fates.contains(&row.outcome));
        if any(&[Fate::Uncertain, Fate::Gone]) {
            Exit::HandoverUncertain
        } else if any(&[Fate::Paused]) {
            Exit::PausedAtSource
        } else if any(&[Fate::Stays, Fate::Left]) {
            Exit::RunningAtSource
        } else if !any(&[Fate::Refused]) {
            Exit::Done
        } else if self.count(Row::is_there) > 0 {
            Exit::RunningAtSource
        } else {
            Exit::Refused
        }
    }

    /// Of a plan: whether each guest can be moved, as far as can be told.
    pub(super) fn exit_of_plan(&self) -> Exit {
        let unfit = self.count(|row| !row.is_there() && row.outcome != Fate::Left);
        if unfit == 0 { Exit::Done } else { Exit::Refused }
    }

    /// For people, with a newline at its end.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![HEAD.map(str::to_owned)];
        lines.extend(self.guests.iter().map(cells));
        let mut text = columns(&lines);
        let there = self.count(Row::is_there);
        let moved: u64 = self
            .guests
            .iter()
            .filter(|row| row.outcome != Fate::MovedBefore)
            .map(|row| row.moved_bytes)
            .sum();
        text.push_str(&format!("{there} of {} guests are at their target", self.guests.len()));
        if moved > 0 {
            text.push_str(&format!(
                "; {} moved in {}, {}",
                units::bytes(moved),
                units::millis(self.total_ms),
                units::rate(self.bytes_per_second),
            ));
        }
        text.push('\n');
        text
    }

    /// Rows with a head of names; numbers as in JSON, nothing for what is not known.
    pub(super) fn write_csv(&self, path: &Path) -> Result<(), DrainError> {
        let failed = |source| DrainError::Csv { path: path.to_owned(), source };
        let mut csv = csv::Writer::from_path(path).map_err(failed)?;
        for row in &self.guests {
            csv.serialize(row).map_err(failed)?;
        }
        csv.flush().map_err(|error| failed(error.into()))
    }
}

const HEAD: [&str; 9] =
    ["guest", "outcome", "to", "moved", "rounds", "brownout", "blackout", "rate", "total"];

fn cells(row: &Row) -> [String; 9] {
    let or_none = |ms: Option<f64>| ms.map_or_else(|| "-".into(), units::millis);
    let ran = row.rounds > 0;
    let if_ran = |text: String| if ran { text } else { "-".into() };
    [
        row.guest.clone(),
        row.outcome.words().into(),
        row.to.clone().unwrap_or_else(|| "-".into()),
        if_ran(units::bytes(row.moved_bytes)),
        if_ran(row.rounds.to_string()),
        or_none(row.brownout_ms),
        or_none(row.blackout_ms),
        if_ran(units::rate(row.bytes_per_second)),
        or_none(row.total_ms),
    ]
}

/// Lines of cells as columns: words to the left, figures to the right.
pub(super) fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    const WORDS: usize = 3;
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let padded = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column < WORDS { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(&format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(guest: &str) -> Row {
        Row {
            brownout_ms: Some(512.25),
            blackout_ms: Some(31.25),
            rounds: 4,
            moved_bytes: 1 << 30,
            bytes_per_second: 1 << 30,
            total_ms: Some(1250.0),
            exit_code: Some(0),
            ..Row::without(guest, Fate::Moved, Some("10.0.0.2:4777".into()))
        }
    }

    fn refused(guest: &str) -> Row {
        Row::without(guest, Fate::Refused, None).because("no room, none", None)
    }

    #[test]
    fn the_table_is_golden() {
        let rows = vec![moved("web-1"), refused("db"), moved("web-10")];
        let golden = "\
guest   outcome  to                moved  rounds  brownout  blackout        rate   total
web-1   moved    10.0.0.2:4777  1.00 GiB       4    512 ms   31.2 ms  1.00 GiB/s  1.25 s
db      refused  -                     -       -         -         -           -       -
web-10  moved    10.0.0.2:4777  1.00 GiB       4    512 ms   31.2 ms  1.00 GiB/s  1.25 s
2 of 3 guests are at their target; 2.00 GiB moved in 4.00 s, 512 MiB/s
";
        assert_eq!(Table::after(rows, Duration::from_secs(4)).text(), golden);
    }

    #[test]
    fn a_spreadsheet_gets_a_head_and_a_line_a_guest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.csv");
        Table::new(vec![moved("web-1"), refused("db")]).write_csv(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("guest,outcome,to,session,guest_bytes,brownout_ms,"));
        assert!(lines[1].starts_with("web-1,moved,10.0.0.2:4777,,0,512.25,31.25,4,1073741824,"));
        assert!(lines[2].contains("\"no room, none\""), "{}", lines[2]);
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn the_exit_code_tells_the_worst() {
        let exit = |fates: &[Fate]| {
            Table::new(fates.iter().map(|fate| Row::without("a", *fate, None)).collect()).exit()
        };
        assert_eq!(exit(&[Fate::Moved, Fate::MovedBefore]), Exit::Done);
        assert_eq!(exit(&[Fate::Moved, Fate::Refused]), Exit::RunningAtSource);
        assert_eq!(exit(&[Fate::Refused, Fate::Refused]), Exit::Refused);
        assert_eq!(exit(&[Fate::Left, Fate::Moved]), Exit::RunningAtSource);
        assert_eq!(exit(&[Fate::Stays, Fate::Paused]), Exit::PausedAtSource);
        assert_eq!(exit(&[Fate::Paused, Fate::Uncertain]), Exit::HandoverUncertain);
    }
}
