//! Two ends over real sockets of this machine, cut at random.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, unbounded};
use pageferry_datapath::control::{Abort, AbortReason, Rejoin, Welcome};
use pageferry_datapath::ids::RoundIndex;

use super::*;
use crate::agent::tls::Channel;

const SESSION: SessionId = SessionId(77);
const SOON: Duration = Duration::from_secs(10);

struct Ends {
    source: Control,
    target: Control,
    at_source: Receiver<Event>,
    at_target: Receiver<Event>,
    /// Connections are refused by hand-shakes that come to nothing.
    closed: Arc<AtomicBool>,
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.source.close();
        self.target.close();
    }
}

/// A source and a target that has greeted it, with a target's server between them.
fn ends(rejoins: bool, patience: Duration) -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let connect = move |_within| {
        let stream = TcpStream::connect(address).map_err(LinkError::Broken)?;
        Link::over(Channel::plain(stream, Security::Loopback))
    };
    let (to_source, at_source) = unbounded();
    let (to_target, at_target) = unbounded();
    let link = connect(SOON).expect("connected");
    let source = Control::source(link, SESSION, patience, connect, move |event| {
        let _the_test_is_over = to_source.send(event);
    });
    let hello = Hello {
        session: SESSION,
        software: String::new(),
        host: String::new(),
        boot_id: String::new(),
        rejoins,
    };
    source.send(&Message::Hello(hello)).expect("sent");
    let (stream, _) = listener.accept().expect("a connection");
    let link = Link::over(Channel::plain(stream, Security::Loopback)).expect("tuned");
    let Ok(Message::Hello(hello)) = link.receive(SOON) else { panic!("a hello comes first") };
    let target = Control::target(link, hello, patience, move |event| {
        let _the_test_is_over = to_target.send(event);
    });
    let welcome = Welcome {
        software: String::new(),
        host: String::new(),
        boot_id: String::new(),
        rejoin_key: target.key(),
    };
    target.send(&Message::Welcome(welcome)).expect("sent");
    let closed = Arc::new(AtomicBool::new(false));
    let (server, shut) = (target.clone(), Arc::clone(&closed));
    // Ends with the process: a test's few connections.
    spawn("test-server", move || {
        for stream in listener.incoming().flatten() {
            if shut.load(Ordering::Relaxed) {
                continue;
            }
            let link = Link::over(Channel::plain(stream, Security::Loopback)).expect("tuned");
            if let Ok(Message::Rejoin(rejoin)) = link.receive(SOON) {
                let _dropped_if_not = server.adopt(link, &rejoin);
            }
        }
    });
    let ends = Ends { source, target, at_source, at_target, closed };
    assert!(matches!(ends.at_target.recv_timeout(SOON), Ok(Event::Message(Message::Hello(_), _))));
    assert!(matches!(
        ends.at_source.recv_timeout(SOON),
        Ok(Event::Message(Message::Welcome(_), _))
    ));
    ends
}

fn cut(control: &Control) {
    control.state().link.close();
}

/// The rounds that came until the last of them, each once and in order.
fn rounds(events: &Receiver<Event>, last: u32) -> Vec<u32> {
    let mut rounds = Vec::new();
    while rounds.last() != Some(&last) {
        match events.recv_timeout(SOON).expect("it goes on") {
            Event::Message(Message::RoundEnd(RoundIndex(round)), _) => rounds.push(round),
            Event::Message(other, _) => panic!("{other:?}"),
            Event::Lost(error) => panic!("{error}"),
            Event::Cut(_) | Event::Restored { .. } => {}
        }
    }
    rounds
}

#[test]
fn to_have_heard_the_end_is_not_to_have_acted_on_it() {
    let ends = ends(true, SOON);
    let last =
        Message::Abort(Abort { reason: AbortReason::Cancelled, text: String::new(), hint: None });
    ends.target.send(&last).expect("sent");
    assert!(matches!(ends.at_source.recv_timeout(SOON), Ok(Event::Message(..))));
    assert!(ends.source.settle(Word::None));
    assert_eq!(ends.target.settled(SOON), Some(Word::None));
    assert!(ends.at_target.try_recv().is_err(), "it is not for the state machine");
    // One that heard as much, and was killed before it acted.
    let ends = super::tests::ends(true, SOON);
    ends.target.send(&last).expect("sent");
    assert!(matches!(ends.at_source.recv_timeout(SOON), Ok(Event::Message(..))));
    ends.source.close();
    assert_eq!(ends.target.settled(SOON), None);
}

#[test]
fn every_message_arrives_once_and_in_order_through_cuts() {
    let ends = ends(true, SOON);
    let (source, target) = (ends.source.clone(), ends.target.clone());
    let sends = |control: Control| {
        move || {
            for round in 0..400 {
                control.send(&Message::RoundEnd(RoundIndex(round))).expect("kept");
                thread::sleep(Duration::from_millis(1));
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(sends(source.clone()));
        scope.spawn(sends(target.clone()));
        scope.spawn(|| {
            for turn in 0..6 {
                thread::sleep(Duration::from_millis(40 + turn * 13));
                cut(if turn % 2 == 0 { &source } else { &target });
            }
        });
        let expected: Vec<u32> = (0..400).collect();
        assert_eq!(rounds(&ends.at_target, 399), expected);
        assert_eq!(rounds(&ends.at_source, 399), expected);
    });
    let mut state = ends.source.state();
    assert!(state.generation > 0, "it was cut at least once");
    state.patience = SOON;
}

#[test]
fn what_was_heard_is_kept_no_longer() {
    let ends = ends(true, SOON);
    for round in 0..200 {
        ends.source.send(&Message::RoundEnd(RoundIndex(round))).expect("sent");
    }
    rounds(&ends.at_target, 199);
    ends.source.finish(SOON, false);
    assert!(ends.source.state().kept.is_empty());
    assert_eq!(ends.source.state().kept_bytes, 0);
}

#[test]
fn a_cut_longer_than_the_patience_is_a_lost_peer_on_both_sides() {
    let ends = ends(true, Duration::from_millis(400));
    ends.closed.store(true, Ordering::Relaxed);
    cut(&ends.source);
    for events in [&ends.at_source, &ends.at_target] {
        assert!(matches!(events.recv_timeout(SOON), Ok(Event::Cut(_))));
        assert!(matches!(events.recv_timeout(SOON), Ok(Event::Lost(_))));
    }
    assert!(ends.source.send(&Message::Prepare).is_err());
}

#[test]
fn who_does_not_rejoin_is_lost_at_the_first_cut() {
    let ends = ends(false, SOON);
    assert!(ends.target.key().is_none() && !ends.source.rejoins());
    cut(&ends.source);
    assert!(matches!(ends.at_source.recv_timeout(SOON), Ok(Event::Lost(_))));
    assert!(matches!(ends.at_target.recv_timeout(SOON), Ok(Event::Lost(_))));
}

#[test]
fn a_stranger_does_not_get_into_a_session() {
    let ends = ends(true, SOON);
    let pair = TcpListener::bind("127.0.0.1:0").expect("a port");
    let link = || {
        let stream = TcpStream::connect(pair.local_addr().expect("an address")).expect("connects");
        Link::over(Channel::plain(stream, Security::Loopback)).expect("tuned")
    };
    let key = Ticket([7; 32]);
    let wrong_key = Rejoin { session: SESSION, key, received: 0 };
    assert_eq!(ends.target.adopt(link(), &wrong_key), Err(NotAdopted));
    let key = ends.target.key().expect("it rejoins");
    let wrong_session = Rejoin { session: SessionId(1), key, received: 0 };
    assert_eq!(ends.target.adopt(link(), &wrong_session), Err(NotAdopted));
    // And the one who is in it goes on.
    ends.source.send(&Message::RoundEnd(RoundIndex(0))).expect("sent");
    assert_eq!(rounds(&ends.at_target, 0), [0]);
}

#[test]
fn the_last_word_ends_it_without_a_cut() {
    let ends = ends(true, SOON);
    ends.target
        .send(&Message::Running(pageferry_datapath::control::Running {
            load_us: 1,
            resume_us: 1,
            late_us: 0,
            cpu_us: 0,
        }))
        .expect("sent");
    ends.target.finish(SOON, true);
    assert!(ends.target.state().kept.is_empty(), "the source has heard it");
    ends.target.close();
    assert!(matches!(
        ends.at_source.recv_timeout(SOON),
        Ok(Event::Message(Message::Running(_), _))
    ));
    assert!(matches!(ends.at_source.recv_timeout(SOON), Ok(Event::Lost(_))));
}

/// Pieces of device state that are sent, and much more than may wait.
const PIECES: usize = 160;

fn stream(control: &Control) {
    for piece in 0..PIECES {
        let mut bytes = vec![0; 256 << 10];
        bytes[0] = piece as u8;
        control.send(&Message::DeviceState(bytes)).expect("sent or kept");
    }
}

/// All pieces, each once and in order, and nothing else.
fn pieces(events: &Receiver<Event>) {
    for piece in 0..PIECES {
        match events.recv_timeout(SOON).expect("it goes on") {
            Event::Message(Message::DeviceState(bytes), _) => assert_eq!(bytes[0], piece as u8),
            other => panic!("{other:?} for piece {piece}"),
        }
    }
}

#[test]
fn who_does_not_keep_up_reads_no_further_and_calls_nobody_silent() {
    let ends = ends(true, SOON);
    thread::scope(|scope| {
        // Both at once: neither loop handles anything while its own stream is stuck.
        scope.spawn(|| stream(&ends.source));
        scope.spawn(|| stream(&ends.target));
        // Longer than silence is borne.
        thread::sleep(limits::SILENCE_MAX + Duration::from_millis(1500));
        for (control, events) in [(&ends.source, &ends.at_source), (&ends.target, &ends.at_target)]
        {
            assert!(control.shared.backlog.is_full());
            let waiting = limits::BACKLOG_BYTES_MAX / (256 << 10) + 1;
            assert!(events.len() <= waiting, "{} messages wait", events.len());
        }
        pieces(&ends.at_target);
        pieces(&ends.at_source);
    });
    assert!(!ends.source.shared.backlog.is_full() && !ends.target.shared.backlog.is_full());
}

#[test]
fn a_peer_that_takes_nothing_does_not_keep_the_last_word() {
    let ends = ends(true, SOON);
    thread::scope(|scope| {
        scope.spawn(|| {
            let piece = Message::DeviceState(vec![0; 256 << 10]);
            while ends.source.send(&piece).is_ok() {}
        });
        while !ends.target.shared.backlog.is_full() {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(200));
        let (reason, began) = (AbortReason::Cancelled, Instant::now());
        let abort = Abort { reason, text: String::new(), hint: None };
        assert!(ends.source.send(&Message::Abort(abort)).is_err());
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    });
    assert!(matches!(ends.at_source.recv_timeout(SOON), Ok(Event::Lost(LinkError::Silent { .. }))));
}

#[test]
fn who_waits_for_room_in_a_cut_keeps_nobody_from_coming_back() {
    let ends = ends(true, SOON);
    ends.closed.store(true, Ordering::Relaxed);
    cut(&ends.source);
    for events in [&ends.at_source, &ends.at_target] {
        assert!(matches!(events.recv_timeout(SOON), Ok(Event::Cut(_))));
    }
    thread::scope(|scope| {
        scope.spawn(|| stream(&ends.source));
        let full = limits::CONTROL_KEPT_BYTES_MAX;
        while ends.source.state().kept_bytes <= full {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(100));
        ends.closed.store(false, Ordering::Relaxed);
        for events in [&ends.at_source, &ends.at_target] {
            assert!(matches!(events.recv_timeout(SOON), Ok(Event::Restored { .. })));
        }
        pieces(&ends.at_target);
    });
}
