//! `pageferry cancel` at a target that takes in several guests: one session ends, and nothing else.
#![forbid(unsafe_code)]

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use crossbeam_channel::{bounded, never};
use pageferry_ctl::agent::admin::{self, Limit, Request, Settings};
use pageferry_ctl::agent::monitor::TargetMonitor;
use pageferry_ctl::agent::record;
use pageferry_ctl::agent::source::Watch;
use pageferry_ctl::cli::{Cli, Command};
use pageferry_ctl::report::Reporter;
use pageferry_ctl::report::events::Event;
use pageferry_ctl::report::exit::Exit;
use pageferry_ctl::{cancel, migrate, receive};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::source::Phase;
use pageferry_tests::synthetic::{Arrived, Guest, Shape, SyntheticSource, SyntheticTarget};

/// A busy machine.
const SOON: Duration = Duration::from_secs(120);

/// At [`SLOW`] it would be on its way for minutes.
const SHAPE: Shape = Shape {
    bytes: 24 << 20,
    filled_pages: 5000,
    huge: None,
    writers: 1,
    pages_per_second: 50,
    gives_back: false,
};
const SLOW: &str = "1M";

fn parse(words: &[&str]) -> Command {
    Cli::parse_from([&["pageferry"], words].concat()).command
}

/// Says nothing.
struct Silent;

impl Reporter for Silent {
    fn event(&mut self, _: &Event) {}
    fn progress(&mut self, _: &Watch<'_>) {}
}

/// Moves a guest slowly, and says how that ended.
fn migrate_slowly(to: String, state: String, run: String) -> thread::JoinHandle<Exit> {
    thread::spawn(move || {
        let words = ["migrate", "--insecure", "--qmp", "/none", "--to", &to, "--state-dir", &state];
        let more = ["--runtime-dir", &run, "--max-bandwidth", SLOW, "--downtime-ms", "1000"];
        let Command::Migrate(args) = parse(&[&words[..], &more].concat()) else { unreachable!() };
        let mut source = SyntheticSource::new(Guest::start(SHAPE).expect("memory"));
        migrate::run_with(&mut source, &args, &never(), &mut Silent)
    })
}

/// The sessions of a folder, once there are so many.
fn sessions(dir: &Path, count: usize) -> Vec<SessionId> {
    let until = Instant::now() + SOON;
    loop {
        let records = record::list(dir);
        if records.len() == count {
            return records.into_iter().map(|(_, record)| record.session).collect();
        }
        assert!(Instant::now() < until, "{count} sessions, not {records:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn moves(run: &Path, session: SessionId) {
    let until = Instant::now() + SOON;
    let moving = format!("{:?}", Phase::Moving).to_lowercase();
    loop {
        let status = admin::ask(run, &session.to_string(), &Request::Status);
        if status.is_ok_and(|status| status["phase"] == moving) {
            return;
        }
        assert!(Instant::now() < until, "{session} does not move");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn one_session_of_a_target_is_cancelled_and_the_others_go_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        free.local_addr().expect("bound").port()
    };
    let (to, there, run) = (format!("127.0.0.1:{port}"), path("there"), path("run"));
    let (stop, stopped) = bounded(1);
    let target = {
        let (to, there, run) = (to.clone(), there.clone(), run.clone());
        thread::spawn(move || {
            let words = ["target", "--insecure", "--json", "--listen", &to, "--state-dir", &there];
            let more = ["--runtime-dir", &run, "--sessions-per-peer", "2"];
            let Command::Target(args) = parse(&[&words[..], &more].concat()) else {
                unreachable!()
            };
            let open = |_: &_| {
                let target = SyntheticTarget::new(SHAPE, &Arrived::default());
                Ok(Box::new(target) as Box<dyn TargetMonitor>)
            };
            receive::run_with(&open, &args, &stopped)
        })
    };
    let until = Instant::now() + SOON;
    while std::net::TcpStream::connect(&to).is_err() {
        assert!(Instant::now() < until, "nobody listens");
        thread::sleep(Duration::from_millis(20));
    }

    let there = Path::new(&there);
    let first = migrate_slowly(to.clone(), path("first"), run.clone());
    let cancelled = sessions(there, 1)[0];
    let second = migrate_slowly(to.clone(), path("second"), run.clone());
    let goes_on = sessions(there, 2).into_iter().find(|it| *it != cancelled).expect("another");
    // A target takes so many of one source, and there is room for others.
    let third = migrate_slowly(to, path("third"), run.clone());
    assert_eq!(third.join().expect("no panic"), Exit::Refused);
    let run = Path::new(&run);
    moves(run, cancelled);
    moves(run, goes_on);

    // The agents are this very process: a signal to it would end them all, and the test.
    let words = ["cancel", &cancelled.to_string(), "--state-dir", &there.display().to_string()];
    let Command::Cancel(args) = parse(&words) else { unreachable!() };
    assert_eq!(cancel::run(&args), Exit::Done);
    assert_eq!(first.join().expect("no panic"), Exit::RunningAtSource);

    assert!(!second.is_finished());
    let lifted = Request::Set(Settings { max_bandwidth: Some(Limit(None)), ..Settings::default() });
    admin::ask(run, &goes_on.to_string(), &lifted).expect("it is on its way");
    assert_eq!(second.join().expect("no panic"), Exit::Done);
    stop.send(()).expect("the target listens");
    target.join().expect("no panic");
    let left: Vec<_> = std::fs::read_dir(run).expect("a folder").flatten().collect();
    assert!(left.is_empty(), "sockets go with their sessions: {left:?}");
}
