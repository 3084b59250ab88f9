//! Peers that open lanes and then do nothing with them, against agents in this process that move a
//! guest without a monitor.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use crossbeam_channel::never;
use pageferry_ctl::agent::monitor::TargetMonitor;
use pageferry_ctl::agent::source::Watch;
use pageferry_ctl::cli::{self, Cli};
use pageferry_ctl::report::Reporter;
use pageferry_ctl::report::events::Event;
use pageferry_ctl::report::exit::Exit;
use pageferry_ctl::{migrate, receive};
use pageferry_datapath::control::{Decoder, LaneTicket, Message, MessageKind, encode};
use pageferry_datapath::framing::hello::{self, HELLO_BYTES, REPLY_BYTES, Reply};
use pageferry_datapath::ids::{LaneId, SessionId};
use pageferry_tests::synthetic::{Arrived, Guest, Shape, SyntheticSource, SyntheticTarget};
use serde_json::{Value, json};

use super::{Caller, PATIENCE, from_wire};

const SESSION: SessionId = SessionId(11);
const LANES: usize = 2;

/// More than all socket buffers on the way hold.
fn shape() -> Shape {
    let (bytes, filled_pages) = (64 << 20, 48 << 8);
    Shape { bytes, filled_pages, huge: None, writers: 1, pages_per_second: 100, gives_back: false }
}

fn caller(stream: TcpStream) -> Caller {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    Caller { stream, decoder: Decoder::new() }
}

fn args(words: &[&str]) -> cli::Command {
    Cli::parse_from([&["pageferry"], words].concat()).command
}

#[derive(Default)]
struct Told(Vec<Value>);

impl Reporter for Told {
    fn event(&mut self, event: &Event) {
        self.0.push(serde_json::to_value(event).expect("events are JSON"));
    }

    fn progress(&mut self, _: &Watch<'_>) {}
}

/// A target that takes lanes and reads nothing from them, until the source hangs up. One that
/// `rejoins` says so, and never says again what it heard.
fn takes_lanes(listener: &TcpListener, rejoins: bool) {
    let mut source = caller(listener.accept().expect("a source calls").0);
    assert!(matches!(source.hear(), Some(Message::Hello(_))));
    let key = rejoins.then(|| "7".repeat(64));
    let welcome = json!({ "software": "", "host": "", "boot_id": "", "rejoin_key": key });
    source.say(&encode(&from_wire(MessageKind::Welcome, welcome)));
    let Some(Message::Offer(offer)) = source.hear() else { panic!("an offer comes next") };
    let path = serde_json::to_value(offer.lanes.paths[0]).expect("a name");
    let lane = json!({ "path": path, "ticket": "0".repeat(64), "cpu": null });
    let choice = json!({ "lanes": [lane.clone(), lane], "refused": [] });
    source.say(&encode(&from_wire(MessageKind::Choice, choice)));
    let lanes: Vec<_> = (0..LANES).map(|_| listener.accept().expect("a lane").0).collect();
    for mut lane in &lanes {
        lane.read_exact(&mut [0; HELLO_BYTES]).expect("a lane's hello");
        lane.write_all(&Reply::Accepted.encode()).expect("sent");
    }
    while source.hear().is_some() {}
}

#[test]
fn lanes_that_nobody_reads_from_end_a_migration_in_time() {
    for rejoins in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let to = listener.local_addr().expect("bound").to_string();
        let target = thread::spawn(move || takes_lanes(&listener, rejoins));
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().display().to_string();
        let words = ["migrate", "--insecure", "--qmp", "/none", "--to", &to, "--state-dir", &state];
        let more = ["--transport", "tcp", "--lanes", "2", "--reconnect-timeout", "6"];
        let cli::Command::Migrate(args) = args(&[&words[..], &more].concat()) else {
            panic!("it is the subcommand");
        };
        let mut source = SyntheticSource::new(Guest::start(shape()).expect("memory"));
        let (began, mut told) = (Instant::now(), Told::default());
        let exit = migrate::run_with(&mut source, &args, &never(), &mut told);
        let took = began.elapsed();
        let summary = told.0.last().expect("a summary comes last");
        println!("nobody reads, rejoins {rejoins}: {} after {took:?}", summary["reason"]);
        assert_eq!(exit, Exit::RunningAtSource, "{summary:#}");
        assert!(took < PATIENCE, "{took:?}");
        let (guest, before) = (source.guest(), source.guest().written());
        while guest.written() < before + 50 {
            assert!(began.elapsed() < 2 * PATIENCE, "the guest does not write any more");
            thread::sleep(Duration::from_millis(10));
        }
        guest.pause();
        assert_eq!((guest.bad(), guest.verify()), (0, 0), "pages hold what they should not");
        target.join().expect("it does nothing");
    }
}

/// A source that has come as far as lanes; the first has sent half of a frame's header.
fn opens_lanes(to: &str) -> (Caller, Vec<TcpStream>) {
    let began = Instant::now();
    let stream = loop {
        match TcpStream::connect(to) {
            Ok(stream) => break stream,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    let mut target = caller(stream);
    let hello = json!({ "session": SESSION, "software": "", "host": "", "boot_id": "" });
    target.say(&encode(&from_wire(MessageKind::Hello, hello)));
    assert!(matches!(target.hear(), Some(Message::Welcome(_))));
    let region = json!({
        "name": "", "bytes": shape().bytes, "page_bytes": 4096, "backing": "",
        "populated_bytes": 0,
    });
    let offer = json!({
        "regions": [region],
        "monitor": "",
        "machine": "",
        "lanes": { "count": LANES, "paths": ["tcp-plain"], "cpus": 1 },
        "tracker": "",
        "target_qmp": null,
        "verify": false,
        "limits": { "downtime_ms": 50 },
    });
    target.say(&encode(&from_wire(MessageKind::Offer, offer)));
    let Some(Message::Choice(choice)) = target.hear() else { panic!("lanes are chosen") };
    assert_eq!(choice.lanes.len(), LANES);
    let open = |(lane, LaneTicket { ticket, .. }): (usize, &LaneTicket)| {
        let mut stream = TcpStream::connect(to).expect("it listens");
        let hello = hello::Hello { session: SESSION, lane: LaneId(lane as u16), ticket: *ticket };
        stream.write_all(&hello.encode()).expect("sent");
        let mut reply = [0; REPLY_BYTES];
        stream.read_exact(&mut reply).expect("a reply");
        assert_eq!(Reply::decode(&reply), Ok(Reply::Accepted));
        stream
    };
    let lanes: Vec<_> = choice.lanes.iter().enumerate().map(open).collect();
    (&lanes[0]).write_all(&[0; 2048]).expect("sent");
    (target, lanes)
}

#[test]
fn lanes_on_which_nothing_comes_end_with_their_session() {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = free.local_addr().expect("bound").to_string();
    drop(free);
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().display().to_string();
    let arrived = Arrived::default();
    let (listen, theirs) = (to.clone(), Arc::clone(&arrived));
    let target = thread::spawn(move || {
        let words = ["target", "--insecure", "--once", "--json", "--listen", &listen];
        let more = ["--state-dir", &state, "--session-max-s", "3", "--reconnect-timeout", "2"];
        let cli::Command::Target(args) = args(&[&words[..], &more].concat()) else {
            panic!("it is the subcommand");
        };
        let open =
            |_: &_| Ok(Box::new(SyntheticTarget::new(shape(), &theirs)) as Box<dyn TargetMonitor>);
        receive::run_with(&open, &args, &never())
    });
    let began = Instant::now();
    let (mut source, mut lanes) = opens_lanes(&to);
    let text = source.hear_out();
    println!("nothing comes: {text:?} after {:?}", began.elapsed());
    assert!(text.contains("took longer than 3 s") || text.contains("lane"), "{text:?}");
    // Both lanes are closed, too: what the peer may still read ends.
    for lane in &mut lanes {
        lane.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let ended = lane.read(&mut [0; 64]);
        assert!(
            matches!(&ended, Ok(0)) || ended.as_ref().is_err_and(|error| !would_block(error)),
            "{ended:?}"
        );
    }
    assert_ne!(target.join().expect("no panic"), Exit::Done);
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert!(arrived.lock().expect("no panic").is_none());
}

fn would_block(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock
}
