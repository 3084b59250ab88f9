//! What a drain shows: a bar for each guest and one for all on a terminal, lines in a pipe, JSON
//! lines for programs. `error:` and `hint:` go to standard error in each of them.
//!
//! JSON lines are those of each guest's agent (`report::events`) with the guest's name, and of the
//! drain itself: `drain-note`, `drain-plan`, `drain-begun`, `drain-guest`, `drain-summary`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::plan::{Plan, Step};
use super::table::{Fate, Row, Table, columns};
use crate::agent::failure::one_line;
use crate::report::events::{Event, Going};
use crate::report::progress::meter::Meter;
use crate::report::progress::{Text, complaint};
use crate::report::units;

/// Lines in a pipe.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Steps of a bar.
const BAR_STEPS: u64 = 1000;

/// How far all of it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    /// Since the first began.
    pub(super) at: Duration,
    /// Guests of the plan.
    guests: usize,
    /// Their memory that is not holes.
    bytes: u64,
    /// Guests on their way.
    pub(super) under_way: usize,
    /// Guests whose turn has not come.
    pub(super) waiting: usize,
    /// Of those on their way: what of their memory is there, and what was moved for it.
    pub(super) under_way_bytes: (u64, u64),
    /// Guests at their target.
    moved: usize,
    /// The same of those that are done with, however they ended.
    done_bytes: (u64, u64),
}

impl Totals {
    /// So many guests with so much memory, none of them begun.
    pub(super) fn of(guests: usize, bytes: u64) -> Self {
        Self { guests, bytes, ..Self::default() }
    }

    /// A guest is done with.
    pub(super) fn done(&mut self, populated: u64, row: &Row) {
        self.moved += usize::from(row.outcome == Fate::Moved);
        self.done_bytes.0 += populated;
        self.done_bytes.1 += row.moved_bytes;
    }

    fn there(&self) -> u64 {
        self.done_bytes.0 + self.under_way_bytes.0
    }

    fn moved_bytes(&self) -> u64 {
        self.done_bytes.1 + self.under_way_bytes.1
    }

    fn line(&self, rate: u64) -> String {
        let eta = match self.bytes.saturating_sub(self.there()) {
            left if rate > 0 => units::time(Duration::from_secs_f64(left as f64 / rate as f64)),
            _ => "unknown".into(),
        };
        format!(
            "{} of {} there, {} on the way, {} to come  {}  ETA {eta}",
            self.moved,
            self.guests,
            self.under_way,
            self.waiting,
            units::rate(rate),
        )
    }
}

/// Where it goes.
pub(super) struct View {
    mode: Mode,
    meter: Meter,
    text: Text,
}

enum Mode {
    Json,
    Bars(Bars),
    Lines { next: Duration },
}

struct Bars {
    all: MultiProgress,
    total: Option<ProgressBar>,
    guests: BTreeMap<usize, (ProgressBar, Meter)>,
    name_width: usize,
}

impl View {
    /// The one for this process.
    pub(super) fn new(json: bool) -> Self {
        let is_terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
        let mode = match (json, is_terminal) {
            (true, _) => Mode::Json,
            (false, true) => Mode::Bars(Bars::on(MultiProgress::new())),
            (false, false) => Mode::Lines { next: LINE_EVERY },
        };
        let colour = is_terminal && console::colors_enabled();
        Self::with(mode, Text { out: Box::new(io::stdout()), err: Box::new(io::stderr()), colour })
    }

    fn with(mode: Mode, text: Text) -> Self {
        Self { mode, meter: Meter::default(), text }
    }

    /// Something that is no event of a guest.
    pub(super) fn note(&mut self, text: &str) {
        match &mut self.mode {
            Mode::Json => self.event(&json!({ "event": "drain-note", "text": one_line(text) })),
            _ => self.line(&one_line(text)),
        }
    }

    /// Something is wrong.
    pub(super) fn complain(&mut self, reason: &str, hint: Option<&str>) {
        let text = complaint(reason, hint, self.text.colour);
        self.error(text.trim_end());
    }

    /// A line of an agent's standard error.
    pub(super) fn error_line(&mut self, guest: &str, line: &str) {
        let text = format!("{guest}: {}", one_line(line));
        self.error(&text);
    }

    /// What will be done.
    pub(super) fn plan(&mut self, plan: &Plan) {
        let total_ms = plan.estimate().map(|it| it.as_millis() as u64);
        match &mut self.mode {
            Mode::Json => {
                let guests: Vec<Value> = plan.steps.iter().map(step_json).collect();
                let rows: Vec<&Row> = plan.rows.iter().map(|(_, row)| row).collect();
                self.event(&json!({
                    "event": "drain-plan",
                    "parallel": plan.parallel,
                    "estimate_ms": total_ms,
                    "guests": guests,
                    "not_moved": rows,
                }));
            }
            Mode::Bars(bars) => {
                let names = plan.steps.iter().map(|step| step.guest.name.chars().count());
                bars.name_width = names.chain([5]).max().unwrap_or(5).min(16);
                self.plan_text(plan);
            }
            Mode::Lines { .. } => self.plan_text(plan),
        }
        for (_, row) in plan.rows.iter().filter(|(_, row)| !row.is_there()) {
            self.reason(row);
        }
    }

    fn plan_text(&mut self, plan: &Plan) {
        let head = ["guest", "to", "", "memory", "populated", "writes", "estimate"];
        let mut lines = vec![head.map(str::to_owned)];
        lines.extend(plan.steps.iter().map(|step| {
            [
                step.guest.name.clone(),
                step.to.clone(),
                step.guest.target_qmp.clone().unwrap_or_default(),
                units::bytes(step.facts.guest_bytes()),
                units::bytes(step.facts.populated_bytes()),
                step.facts.dirty_bytes_per_second.map_or_else(|| "-".into(), units::rate),
                step.estimate.map_or_else(|| "-".into(), units::time),
            ]
        }));
        let before = plan.rows.iter().filter(|(_, row)| row.is_there()).count();
        let unfit = plan.rows.len() - before;
        let mut text = format!(
            "{} to move, {} at a time, {before} at their target already, {unfit} that can't be moved",
            plan.steps.len(),
            plan.parallel,
        );
        if let Some(estimate) = plan.estimate().filter(|it| !it.is_zero()) {
            text.push_str(&format!("; about {}", units::time(estimate)));
        }
        self.line(&text);
        if !plan.steps.is_empty() {
            self.line(columns(&lines).trim_end());
        }
    }

    /// A guest's agent was started.
    pub(super) fn begun(&mut self, place: usize, step: &Step) {
        let name = &step.guest.name;
        match &mut self.mode {
            Mode::Json => {
                self.event(&json!({ "event": "drain-begun", "guest": name, "to": step.to }));
            }
            Mode::Bars(bars) => bars.add(place, name),
            Mode::Lines { .. } => self.line(&format!("{name}: to {}", step.to)),
        }
    }

    /// An agent said something.
    pub(super) fn said(
        &mut self,
        place: usize,
        guest: &str,
        mut value: Value,
        event: Option<&Event>,
    ) {
        match (&mut self.mode, event) {
            (Mode::Json, _) => {
                if let Some(fields) = value.as_object_mut() {
                    fields.insert("guest".into(), guest.into());
                }
                self.event(&value);
            }
            (Mode::Bars(bars), Some(Event::Progress(going))) => bars.going(place, going),
            _ => {}
        }
    }

    /// A guest is done with.
    pub(super) fn ended(&mut self, place: usize, row: &Row) {
        if let Mode::Bars(bars) = &mut self.mode
            && let Some((bar, _)) = bars.guests.remove(&place)
        {
            bar.finish_and_clear();
            bars.all.remove(&bar);
        }
        match &mut self.mode {
            Mode::Json => {
                let mut value = serde_json::to_value(row).expect("a row is plain data");
                value["event"] = "drain-guest".into();
                self.event(&value);
            }
            _ if row.is_there() => {
                let ms = |ms: Option<f64>| ms.map_or_else(|| "?".into(), units::millis);
                self.line(&format!(
                    "{}: moved in {}, brownout {}, blackout {}",
                    row.guest,
                    ms(row.total_ms),
                    ms(row.brownout_ms),
                    ms(row.blackout_ms)
                ));
            }
            _ => {}
        }
        self.reason(row);
    }

    fn reason(&mut self, row: &Row) {
        if let Some(reason) = &row.reason {
            self.complain(&format!("{}: {reason}", row.guest), row.hint.as_deref());
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, totals: &Totals) {
        self.meter.note(totals.at, totals.moved_bytes());
        let rate = self.meter.bytes_per_second();
        let per_mille = per_mille(totals.there(), totals.bytes);
        match &mut self.mode {
            Mode::Json => {}
            Mode::Bars(bars) => {
                let total = bars.total();
                total.set_position(per_mille);
                total.set_message(totals.line(rate));
            }
            Mode::Lines { next } => {
                if totals.at >= *next {
                    *next = totals.at + LINE_EVERY;
                    let (at, percent) = (totals.at.as_secs_f64(), per_mille / 10);
                    let line = format!("{at:>7.2} s  {percent:>3} %  {}", totals.line(rate));
                    self.line(&line);
                }
            }
        }
    }

    /// The end.
    pub(super) fn table(&mut self, table: &Table) {
        match &mut self.mode {
            Mode::Json => {
                let mut value = serde_json::to_value(table).expect("a table is plain data");
                value["event"] = "drain-summary".into();
                value["exit_code"] = table.exit().code().into();
                self.event(&value);
            }
            Mode::Bars(bars) => {
                if let Some(total) = bars.total.take() {
                    total.finish_and_clear();
                }
                self.line(&format!("\n{}", table.text().trim_end()));
            }
            Mode::Lines { .. } => self.line(&format!("\n{}", table.text().trim_end())),
        }
    }

    /// Nobody reading any more is no reason to stop a drain.
    fn event(&mut self, value: &Value) {
        if let Mode::Json = self.mode {
            let out = &mut self.text.out;
            let _ = writeln!(out, "{value}").and_then(|()| out.flush());
        }
    }

    fn line(&mut self, text: &str) {
        let out = &mut self.text.out;
        let mut write = || drop(writeln!(out, "{text}").and_then(|()| out.flush()));
        match &self.mode {
            Mode::Json => {}
            Mode::Bars(bars) => bars.all.suspend(write),
            Mode::Lines { .. } => write(),
        }
    }

    fn error(&mut self, text: &str) {
        let err = &mut self.text.err;
        let mut write = || drop(writeln!(err, "{text}"));
        match &self.mode {
            Mode::Bars(bars) => bars.all.suspend(write),
            _ => write(),
        }
    }
}

impl Bars {
    fn on(all: MultiProgress) -> Self {
        Self { all, total: None, guests: BTreeMap::new(), name_width: 5 }
    }

    fn bar(&self, prefix: &str) -> ProgressBar {
        let bar = ProgressBar::new(BAR_STEPS);
        let template = "{prefix} [{bar:24}] {percent:>3} %  {wide_msg}";
        let style = ProgressStyle::with_template(template).expect("the template is constant");
        bar.set_style(style.progress_chars("=> "));
        let width = self.name_width;
        bar.set_prefix(format!("{prefix:<width$.width$}"));
        bar
    }

    /// The one for all, below the others.
    fn total(&mut self) -> &ProgressBar {
        if self.total.is_none() {
            let bar = self.bar("total");
            self.total = Some(self.all.add(bar));
        }
        self.total.as_ref().expect("just made")
    }

    fn add(&mut self, place: usize, name: &str) {
        let bar = self.bar(name);
        let total = self.total().clone();
        let bar = self.all.insert_before(&total, bar);
        self.guests.insert(place, (bar, Meter::default()));
    }

    fn going(&mut self, place: usize, going: &Going) {
        let Some((bar, meter)) = self.guests.get_mut(&place) else { return };
        meter.note(Duration::from_secs_f64(going.at_ms.max(0.0) / 1e3), going.moved_bytes);
        let position = match going.round_bytes {
            // Between rounds there is nothing to move.
            0 => BAR_STEPS,
            bytes => per_mille(going.round_done_bytes, bytes),
        };
        bar.set_position(position);
        let dirty = going.dirty_bytes_per_second;
        let dirty = dirty.map_or_else(String::new, |it| format!("  dirty {}", units::rate(it)));
        let rate = units::rate(meter.bytes_per_second());
        bar.set_message(format!("round {:<2}  {rate}{dirty}  {}", going.round, going.doing));
    }
}

fn per_mille(done: u64, whole: u64) -> u64 {
    let share = u128::from(done) * u128::from(BAR_STEPS) / u128::from(whole.max(1));
    u64::try_from(share).unwrap_or(BAR_STEPS).min(BAR_STEPS)
}

fn step_json(step: &Step) -> Value {
    json!({
        "guest": step.guest.name,
        "qmp": step.guest.qmp,
        "to": step.to,
        "target_qmp": step.guest.target_qmp,
        "weight": step.guest.weight,
        "guest_bytes": step.facts.guest_bytes(),
        "populated_bytes": step.facts.populated_bytes(),
        "dirty_bytes_per_second": step.facts.dirty_bytes_per_second,
        "estimate_ms": step.estimate.map(|it| it.as_millis() as u64),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::ProgressDrawTarget;

    use super::super::plan::tests::plan;
    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    /// Two guests, one of which is moved and one is not; what stands in either stream.
    fn shown(mode: Mode) -> (String, String) {
        let (out, err) = (Shared::default(), Shared::default());
        let text = Text { out: Box::new(out.clone()), err: Box::new(err.clone()), colour: false };
        let mut view = View::with(mode, text);
        let plan = plan();
        view.plan(&plan);
        let mut totals = Totals::of(2, 200 << 20);
        let going = json!({
            "event": "progress", "at_ms": 900.0, "doing": "moving memory", "round": 0,
            "round_bytes": 100, "round_done_bytes": 50, "moved_bytes": 50 << 20,
            "dirty_bytes_per_second": 1024, "blackout_predicted_ms": null,
        });
        let event = serde_json::from_value(going.clone()).unwrap();
        for (place, step) in plan.steps.iter().enumerate() {
            view.begun(place, step);
            view.said(place, &step.guest.name, going.clone(), Some(&event));
        }
        view.tick(&totals);
        totals.at = Duration::from_secs(1);
        totals.under_way = 2;
        totals.under_way_bytes = (100 << 20, 100 << 20);
        view.tick(&totals);
        let moved = Row { total_ms: Some(1500.0), ..Row::without("a", Fate::Moved, None) };
        let stays =
            Row::without("b", Fate::Stays, None).because("it broke", Some("mend it".into()));
        for (place, row) in [moved.clone(), stays.clone()].iter().enumerate() {
            totals.done(100 << 20, row);
            view.ended(place, row);
        }
        view.table(&Table::after(vec![moved, stays], Duration::from_secs(2)));
        (out.text(), err.text())
    }

    #[test]
    fn a_pipe_gets_lines() {
        let (out, err) = shown(Mode::Lines { next: LINE_EVERY });
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(
            lines[..7],
            [
                "2 to move, 2 at a time, 0 at their target already, 0 that can't be moved; about 2.00 s",
                "guest  to                memory  populated  writes  estimate",
                "a      x:1  /run/a.qmp  100 MiB    100 MiB       -    2.00 s",
                "b      x:1  /run/b.qmp  100 MiB    100 MiB       -    2.00 s",
                "a: to x:1",
                "b: to x:1",
                "   1.00 s   50 %  0 of 2 there, 2 on the way, 0 to come  100 MiB/s  ETA 1.00 s",
            ]
        );
        assert!(lines[7].starts_with("a: moved in 1.50 s"), "{out}");
        assert_eq!(err, "error: b: it broke\nhint: mend it\n");
        assert!(out.ends_with("\n1 of 2 guests are at their target\n"), "{out}");
    }

    #[test]
    fn a_program_gets_json_lines_that_name_their_guests() {
        let (out, err) = shown(Mode::Json);
        let events: Vec<Value> =
            out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let names: Vec<&str> = events.iter().map(|it| it["event"].as_str().unwrap()).collect();
        let of_one = ["drain-begun", "progress"];
        let wanted =
            [&["drain-plan"], &of_one[..], &of_one, &["drain-guest"; 2], &["drain-summary"]];
        assert_eq!(names, wanted.concat());
        assert!(events[1..7].iter().all(|it| it["guest"].is_string()), "{out}");
        assert_eq!(
            (&events[7]["exit_code"], &events[7]["guests"][1]["outcome"]),
            (&json!(1), &json!("stays"))
        );
        assert!(err.contains("it broke"));
    }

    #[test]
    fn a_terminal_gets_bars_and_keeps_what_stays() {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::hidden());
        let (out, err) = shown(Mode::Bars(Bars::on(all)));
        assert!(out.contains("a: moved in 1.50 s") && out.contains("1 of 2 guests"), "{out}");
        assert!(err.contains("it broke") && !out.contains("ETA"), "{out}");
    }
}
