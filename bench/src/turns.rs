//! Everyone takes turns at each setting. A run that fails is kept as such: the others go on.

use serde_json::Value;

use crate::error::BenchError;
use crate::recorder::Recorded;
use crate::series::{Kind, Reading, Series, SeriesRun};
use crate::{cpu, interrupt, output};

/// One who takes part at one setting, with what it gave.
#[derive(Debug)]
pub(crate) struct Entrant<C> {
    pub(crate) who: C,
    pub(crate) series: Series,
}

/// Those who are compared with each other.
pub(crate) type Setting<C> = Vec<Entrant<C>>;

/// What a run gave, with what else is to be said of it.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) recorded: Recorded,
    pub(crate) said: Value,
}

impl From<Recorded> for Taken {
    fn from(recorded: Recorded) -> Self {
        Self { recorded, said: Value::Null }
    }
}

/// Has everyone run once a turn, setting by setting. Each turn begins with the next one: nobody
/// always follows the same one. `measure` gives nothing where an entrant has no such setting. Guest
/// memory that was lost ends it.
pub(crate) fn take<C>(
    turns: u32,
    settings: &mut [Setting<C>],
    mut measure: impl FnMut(&C) -> Result<Option<Taken>, BenchError>,
) -> Result<(), BenchError> {
    for turn in 0..turns {
        for setting in &mut *settings {
            let count = setting.len();
            for index in 0..count {
                interrupt::check()?;
                let Entrant { who, series } = &mut setting[(index + turn as usize) % count];
                let busy = cpu::machine_busy_s()?;
                let taken = measure(who);
                let machine_cpu_s = cpu::machine_busy_s()? - busy;
                // What became of a guest's memory is no failure among others.
                if let Err(error @ BenchError::MemoryLost { .. }) = taken {
                    return Err(error);
                }
                keep(series, turn, machine_cpu_s, taken);
            }
        }
    }
    Ok(())
}

/// The series of all settings, in order; those that have no such setting are left out.
pub(crate) fn series<C>(settings: Vec<Setting<C>>) -> Vec<Series> {
    let all = settings.into_iter().flatten().map(|entrant| entrant.series);
    all.filter(|series| !series.runs.is_empty() || !series.failures.is_empty()).collect()
}

fn keep(
    series: &mut Series,
    turn: u32,
    machine_cpu_s: f64,
    taken: Result<Option<Taken>, BenchError>,
) {
    let (group, by) = (&series.group, &series.by);
    match taken {
        Ok(Some(Taken { recorded, said })) => {
            // A run may know better what was its own part of it.
            let machine_cpu_s = said["machine_cpu_s"].as_f64().unwrap_or(machine_cpu_s);
            let run = SeriesRun { turn, recorded, machine_cpu_s, said };
            output::progress(&format!("turn {turn}: {group}: {by}: {}", brief(series.kind, &run)));
            series.runs.push(run);
        }
        Ok(None) => {}
        Err(error) => {
            let failure = format!("turn {turn}: {}", error.chain());
            output::progress(&format!("{group}: {by}: {failure}"));
            series.failures.push(failure);
        }
    }
}

/// A run in a few words.
fn brief(kind: Kind, run: &SeriesRun) -> String {
    let of = |reading: Reading| reading.of(run).unwrap_or(f64::NAN);
    match kind {
        Kind::Latency => format!("p50 {:.2} us", of(Reading::Quantile(0.5)) / 1e3),
        Kind::Throughput => format!("{:.1} MiB/s", of(Reading::BytesPerS) / f64::from(1 << 20)),
        Kind::Cost => format!("{:.4} s/GiB", of(Reading::SecondsPerGib)),
        Kind::Link => format!(
            "{:.2} s, {:.1} % of the link, pause {:.1} ms",
            of(Reading::Said("wall_s")),
            of(Reading::Said("link_percent")),
            of(Reading::Said("pause_ms"))
        ),
        Kind::Drain => format!(
            "{:.2} s, {:.1} % of the links",
            of(Reading::Said("total_s")),
            of(Reading::Said("link_percent"))
        ),
        Kind::Migration | Kind::Slowdown => format!(
            "{:.1} MiB/s, pause {:.1} ms",
            of(Reading::BytesPerS) / f64::from(1 << 20),
            of(Reading::Said("pause_ms"))
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn everyone_begins_a_turn_and_failures_stay() {
        let entrant = |who: &'static str| Entrant {
            who,
            series: Series::new("g", who, Kind::Throughput, Value::Null),
        };
        let mut settings = vec![vec![entrant("a"), entrant("b"), entrant("c")]];
        let order = RefCell::new(String::new());
        let taken = take(3, &mut settings, |who| {
            order.borrow_mut().push_str(who);
            match *who {
                "b" => Err(BenchError::Usage { what: "no" }),
                "c" => Ok(None),
                _ => Ok(Some(Recorded { bytes: 1, seconds: 1.0, ..Recorded::default() }.into())),
            }
        });
        assert!(taken.is_ok());
        assert_eq!(order.into_inner(), "abcbcacab");
        let all = series(settings);
        assert_eq!(all.len(), 2, "c has no such setting");
        assert_eq!((all[0].runs.len(), all[1].failures.len()), (3, 3));
    }
}
