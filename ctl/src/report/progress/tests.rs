//! What stands in a pipe and in the JSON stream, to the letter.

use std::sync::{Arc, Mutex};

use super::*;
use crate::report::events::Drain;
use crate::report::sample;

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

fn text(out: &Shared, err: &Shared) -> Text {
    Text { out: Box::new(out.clone()), err: Box::new(err.clone()), colour: false }
}

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn feed(console: &mut Console) {
    for tenth in 1..=12_u64 {
        console.progress(&Progress {
            at: Duration::from_millis(tenth * 100),
            doing: "moving memory",
            round: 0,
            round_bytes: 1 << 30,
            round_done_bytes: tenth * (64 << 20),
            moved_bytes: tenth * (64 << 20),
            dirty_bytes_per_second: None,
            blackout_predicted: None,
        });
    }
    console.event(&Event::Round(Round {
        at_ms: 1600.0,
        round: 0,
        bytes: 1 << 30,
        zero_bytes: 0,
        pages: 262_144,
        took_ms: 1590.0,
        bytes_per_second: 675_282_028,
        dirty_bytes_per_second: Some(10 << 20),
        left_bytes: Some(16 << 20),
        blackout_predicted_ms: Some(41.0),
        in_blackout: false,
    }));
    console.event(&Event::Drain(Drain {
        at_ms: 1650.0,
        pause_ms: 2.5,
        reason: "disk0 has cache.direct".into(),
    }));
    console.progress(&Progress {
        at: Duration::from_millis(2000),
        doing: "moving memory",
        round: 1,
        round_bytes: 16 << 20,
        round_done_bytes: 8 << 20,
        moved_bytes: (1 << 30) + (8 << 20),
        dirty_bytes_per_second: Some(10 << 20),
        blackout_predicted: Some(Duration::from_millis(41)),
    });
    console.event(&Event::Summary(Box::new(sample::refused())));
}

#[test]
fn a_pipe_gets_a_line_a_second_and_one_for_each_round() {
    let (out, err) = (Shared::default(), Shared::default());
    feed(&mut Console::lines(text(&out, &err)));
    let text = out.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..4],
        [
            "   1.00 s  round 0   62 %  640 MiB/s  ETA 600 ms  moving memory",
            "   1.60 s  round 0   1.00 GiB in   1.59 s   644 MiB/s  16.0 MiB dirty since, blackout ~41.0 ms",
            "   1.65 s  drained direct I/O in 2.50 ms: disk0 has cache.direct",
            "   2.00 s  round 1   50 %  392 MiB/s  dirty 10.0 MiB/s  blackout ~41.0 ms  ETA 61.9 ms  moving memory",
        ]
    );
    let complaint = "error: target refused: region sizes differ\nhint: start it with -m 512M\n";
    assert_eq!(err.text(), complaint);
    assert!(!text.contains('\x1b'), "no colours in a pipe");
}

#[test]
fn json_is_nothing_but_json_lines() {
    let out = Shared::default();
    feed(&mut Console::json(Box::new(out.clone())));
    let events: Vec<Event> =
        out.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.len(), 3);
    assert!(matches!(events.last(), Some(Event::Summary(_))));
}

#[test]
fn json_tells_how_far_it_is_where_that_was_asked_for() {
    let out = Shared::default();
    feed(&mut Console::json(Box::new(out.clone())).with_progress());
    let events: Vec<Event> =
        out.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // 12 tenths of a second, one in 200 ms; and one in the second round.
    let going = |event: &&Event| matches!(event, Event::Progress(_));
    assert_eq!((events.iter().filter(going).count(), events.len()), (7, 10));
    let Event::Progress(first) = &events[0] else { panic!("{:?}", events[0]) };
    assert_eq!((first.round_done_bytes, first.round_bytes), (64 << 20, 1 << 30));
}

#[test]
fn a_reader_that_went_away_stops_nothing() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    let text = || Text { out: Box::new(Closed), err: Box::new(Closed), colour: false };
    feed(&mut Console::lines(text()));
    feed(&mut Console::json(Box::new(Closed)));
    feed(&mut Console::bar(text(), ProgressDrawTarget::hidden()));
}

#[test]
fn progress_never_leaves_0_to_100_percent() {
    let mut progress = Progress { round_bytes: 10, round_done_bytes: 20, ..Progress::default() };
    assert_eq!(per_mille(&progress), 1000);
    progress.round_bytes = 0;
    assert_eq!(per_mille(&progress), 1000);
    progress = Progress { round_bytes: u64::MAX, round_done_bytes: 1, ..Progress::default() };
    assert_eq!(per_mille(&progress), 0);
}
