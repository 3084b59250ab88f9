//! Peers that break the rules, on real sockets, against the real agents: each is answered with an
//! error that says what it did, within a bounded time, and costs bounded memory. The honest one who
//! comes after it is served.
//!
//! All of it on loopback and without TLS: behind TLS there is nobody but who was let in.
#![forbid(unsafe_code)]

mod lanes;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_ctl::lab::{
    GuestAssets, LabError, Qemu, QemuSpec, Workplace, is_root, one_at_a_time, skip,
};
use pageferry_datapath::control::{Decoder, MAGIC, Message, MessageKind, Ticket, VERSION, encode};
use pageferry_datapath::framing::hello::{self, HELLO_BYTES, REPLY_BYTES, Refusal, Reply};
use pageferry_datapath::ids::{LaneId, RoundIndex, SessionId};
use pageferry_tests::agents::{Agent, PORT};
use serde_json::json;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A sentence that is said at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(10);
/// The longest that any agent waits for a peer's next word, and a busy machine's delay.
const PATIENCE: Duration = Duration::from_secs(45);
/// How long a flood goes on, if it can: gigabytes on loopback.
const FLOOD: Duration = Duration::from_secs(3);
/// What a peer may cost an agent, whatever it sends.
const MEMORY_MAX: u64 = 48 << 20;

/// A target without a QEMU: it refuses every offer, and until then is as any other.
struct Listening {
    agent: Agent,
    address: String,
    memory: u64,
}

impl Listening {
    fn start(workplace: &Arc<Workplace>, sessions_max: &str) -> Result<Self, LabError> {
        let state = workplace.file("state").display().to_string();
        let mut args = vec!["target", "--listen", "127.0.0.1:0", "--json", "--state-dir", &state];
        args.extend(["--sessions-max", sessions_max]);
        let agent = Agent::start(workplace, None, "target", &args)?;
        agent.wait_text("listening on ", PATIENCE)?;
        let said = agent.said();
        let address = said.split("listening on ").nth(1).and_then(|rest| rest.split('"').next());
        let address = address.expect("it says where").to_owned();
        let memory = high_water(agent.pid());
        Ok(Self { agent, address, memory })
    }

    fn call(&self) -> Caller {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Caller { stream, decoder: Decoder::new() }
    }

    /// An honest source is served.
    fn serves(&self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let mut caller = self.call();
            caller.say(&encode(&hello(1)));
            if let Some(Message::Welcome(_)) = caller.hear() {
                return true;
            }
            // It may still be saying goodbye to the one before.
            thread::sleep(Duration::from_millis(50));
        }
        false
    }

    fn assert_memory_is_bounded(&self, what: &str) {
        let grown = high_water(self.agent.pid()).saturating_sub(self.memory);
        println!("{what}: the target's memory grew by {} KiB at most", grown >> 10);
        assert!(grown < MEMORY_MAX, "{what}: {grown} bytes");
    }
}

struct Caller {
    stream: TcpStream,
    decoder: Decoder,
}

impl Caller {
    /// Says this, if anybody is still there.
    fn say(&mut self, bytes: &[u8]) {
        let _it_may_have_hung_up = self.stream.write_all(bytes);
    }

    /// The next message; `None` when it hangs up.
    ///
    /// # Panics
    /// If it does neither for [`PATIENCE`].
    fn hear(&mut self) -> Option<Message> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next_message().expect("agents speak the protocol") {
                return Some(message);
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    panic!("it neither answers nor hangs up")
                }
                Err(_) => return None,
            }
        }
    }

    /// All it still says, until it hangs up: the words of its abort, if it gave one.
    fn hear_out(&mut self) -> String {
        let mut text = String::new();
        while let Some(message) = self.hear() {
            if let Message::Abort(abort) = message {
                text = abort.text;
            }
        }
        text
    }
}

fn hello(session: u128) -> Message {
    let session = SessionId(session);
    from_wire(
        MessageKind::Hello,
        json!({ "session": session, "software": "a test", "host": "", "boot_id": "" }),
    )
}

/// A message of these fields.
fn from_wire(kind: MessageKind, header: serde_json::Value) -> Message {
    let header = header.to_string();
    let mut decoder = Decoder::new();
    decoder.push(&prefix(VERSION, kind, header.len() as u32, 0));
    decoder.push(header.as_bytes());
    decoder.next_message().expect("as the protocol has it").expect("a whole frame")
}

/// A frame of nothing but these numbers.
fn prefix(version: u8, kind: MessageKind, header_bytes: u32, body_bytes: u32) -> Vec<u8> {
    let mut prefix = MAGIC.to_vec();
    prefix.extend([version, kind as u8, 0, 0]);
    prefix.extend(header_bytes.to_le_bytes());
    prefix.extend(body_bytes.to_le_bytes());
    prefix
}

/// The most memory that this process ever had, in bytes; 0 when it is gone.
fn high_water(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn garbage(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn a_target_answers_whatever_a_caller_sends() -> Outcome {
    let workplace = Workplace::new()?;
    let target = Listening::start(&workplace, "16")?;
    let large = limits_body();
    let hello_then = |more: &[u8]| [&encode(&hello(2))[..], more].concat();
    // What is sent, what the caller is told, what the target's operator is told.
    let cases: &[(&str, Vec<u8>, &str, &str)] = &[
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec(), "", "no known protocol"),
        (
            "another version",
            prefix(VERSION + 8, MessageKind::Hello, 2, 0),
            "speaks control version 9",
            "speaks control version 9",
        ),
        (
            "an endless header",
            prefix(VERSION, MessageKind::Hello, u32::MAX, 0),
            "header of 4294967295 bytes",
            "header of 4294967295 bytes",
        ),
        (
            "a large body first",
            [prefix(VERSION, MessageKind::RoundStart, 2, large), garbage(large as usize)].concat(),
            "body of",
            "body of",
        ),
        ("garbage after the greeting", hello_then(&garbage(1 << 20)), "not a pageferry", ""),
        ("a message out of turn", hello_then(&encode(&Message::Commit)), "sent Commit", "Commit"),
        ("the greeting twice", hello_then(&encode(&hello(2))), "sent Hello", "sent Hello"),
        (
            "a header that is no object",
            hello_then(&[prefix(VERSION, MessageKind::Offer, 2, 0), b"[]".to_vec()].concat()),
            "not a JSON object",
            "",
        ),
    ];
    for (what, bytes, told, said) in cases {
        let began = Instant::now();
        let mut caller = target.call();
        caller.say(bytes);
        let heard = caller.hear_out();
        println!("{what}: told {heard:?} after {} ms", began.elapsed().as_millis());
        assert!(heard.contains(told), "{what}: {heard:?}");
        assert!(began.elapsed() < AT_ONCE, "{what}: {:?}", began.elapsed());
        target.agent.wait_error(said, AT_ONCE)?;
        target.assert_memory_is_bounded(what);
        assert!(target.serves(), "{what}: the next one is not served");
    }
    Ok(())
}

/// A bitmap of a large guest.
fn limits_body() -> u32 {
    pageferry_datapath::limits::CONTROL_BODY_BYTES_MAX as u32
}

#[test]
fn a_target_does_not_wait_for_ever() -> Outcome {
    let workplace = Workplace::new()?;
    let target = Listening::start(&workplace, "16")?;

    // Connections that say nothing, or next to nothing, beside each other.
    let began = Instant::now();
    let mut silent: Vec<_> = (0..200).map(|_| target.call()).collect();
    for (index, caller) in silent.iter_mut().enumerate() {
        caller.say(&b"PFR"[..index % 4]);
    }
    assert!(target.serves(), "two hundred silent ones are in the way");
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    silent.iter_mut().for_each(|caller| assert_eq!(caller.hear_out(), ""));
    println!("200 silent callers: gone after {} ms", began.elapsed().as_millis());
    target.agent.wait_error("no complete greeting before the deadline", AT_ONCE)?;
    assert!(began.elapsed() < PATIENCE);

    // A greeting that comes byte by byte, and one that is never finished.
    for pause in [Duration::from_millis(300), PATIENCE] {
        let began = Instant::now();
        let mut caller = target.call();
        let mut writer = caller.stream.try_clone()?;
        caller.say(&encode(&hello(3))[..30]);
        let dripping = thread::spawn(move || {
            while began.elapsed() < PATIENCE && pause < AT_ONCE {
                if writer.write_all(b" ").is_err() {
                    break;
                }
                thread::sleep(pause);
            }
        });
        let heard = caller.hear_out();
        println!("a byte each {pause:?}: {heard:?} after {} ms", began.elapsed().as_millis());
        assert!(heard.contains("said nothing for"), "{heard:?}");
        assert!(began.elapsed() < PATIENCE);
        caller.stream.shutdown(Shutdown::Both)?;
        dripping.join().expect("it only writes");
        assert!(target.serves());
    }
    target.assert_memory_is_bounded("silent and slow callers");
    Ok(())
}

#[test]
fn a_target_lets_in_no_lane_of_a_stranger_and_no_second_session() -> Outcome {
    let workplace = Workplace::new()?;
    let target = Listening::start(&workplace, "1")?;
    let stranger = hello::Hello { session: SessionId(4), lane: LaneId(0), ticket: Ticket([7; 32]) };
    let reply_to = |bytes: &[u8; HELLO_BYTES]| {
        let mut caller = target.call();
        caller.say(bytes);
        let mut reply = [0; REPLY_BYTES];
        caller.stream.read_exact(&mut reply).map(|()| Reply::decode(&reply))
    };
    let mut other_version = stranger.encode();
    other_version[4] = 9;
    let mut spoiled = stranger.encode();
    spoiled[20] ^= 1;

    let mut first = target.call();
    first.say(&encode(&hello(4)));
    assert!(matches!(first.hear(), Some(Message::Welcome(_))));
    let refused = |refusal| Ok(Reply::Refused(refusal));
    assert_eq!(reply_to(&stranger.encode())?, refused(Refusal::Ticket));
    assert_eq!(reply_to(&other_version)?, refused(Refusal::Version));
    assert!(reply_to(&spoiled).is_err(), "a spoiled hello is answered");

    let began = Instant::now();
    let mut second = target.call();
    second.say(&encode(&hello(5)));
    assert!(second.hear_out().contains("another guest"));
    assert!(began.elapsed() < AT_ONCE);
    // It was in nobody's way.
    first.say(&encode(&Message::Commit));
    assert!(first.hear_out().contains("sent Commit"));
    assert!(target.serves());
    target.assert_memory_is_bounded("strange lanes");
    Ok(())
}

/// Says these again and again for a while, or until nobody listens.
fn floods(stream: &mut TcpStream, messages: &[Message]) -> usize {
    let frames: Vec<u8> = messages.iter().flat_map(encode).collect();
    let frames = frames.repeat(1 + (256 << 10) / frames.len());
    let (began, mut said) = (Instant::now(), 0);
    stream.set_write_timeout(Some(FLOOD)).expect("a socket");
    while began.elapsed() < FLOOD && stream.write_all(&frames).is_ok() {
        said += frames.len();
    }
    said
}

#[test]
fn a_flood_of_messages_costs_no_memory() -> Outcome {
    let workplace = Workplace::new()?;
    let target = Listening::start(&workplace, "16")?;
    let greeting = |session: u128, rejoins: bool| {
        let session = SessionId(session);
        let fields = json!({
            "session": session, "software": "", "host": "", "boot_id": "", "rejoins": rejoins,
        });
        from_wire(MessageKind::Hello, fields)
    };
    let small = [Message::RoundClosed(RoundIndex(1)), Message::Verify];
    let lanes_lost = from_wire(MessageKind::LanesLost, json!({ "round": null, "paths": [] }));
    for (first, what, flood) in [
        (greeting(6, false), "small messages", &small[..]),
        (greeting(7, true), "small messages", &small),
        (greeting(8, true), "large messages", &[Message::DeviceState(vec![7; 256 << 10])]),
        // Which the session's loop answers itself.
        (greeting(9, true), "lost lanes", &[lanes_lost]),
    ] {
        let mut caller = target.call();
        caller.say(&encode(&first));
        let mut writer = caller.stream.try_clone()?;
        let (told, said) = thread::scope(|scope| {
            let flood = scope.spawn(move || {
                let said = floods(&mut writer, flood);
                let _it_may_have_hung_up = writer.shutdown(Shutdown::Write);
                said
            });
            (caller.hear_out(), flood.join().expect("it only writes"))
        });
        println!("a flood of {what}, {} MiB: {told:?}", said >> 20);
        assert!(said > 1 << 20, "{what}: no flood");
        assert!(told.contains("broke the protocol") || what == "lost lanes", "{told:?}");
        target.assert_memory_is_bounded(what);
        assert!(target.serves(), "{what}: the next one is not served");
    }
    Ok(())
}

/// What a target does that breaks the rules, once a source has called.
type Breaks = fn(&TcpListener, TcpStream);

fn read_hello(stream: &mut TcpStream) {
    let mut bytes = [0; 4096];
    let _whatever_it_says = stream.read(&mut bytes);
}

/// Says these after the source's hello, and then waits until it hangs up.
fn answers(mut stream: TcpStream, parts: &[&[u8]]) {
    for part in parts {
        read_hello(&mut stream);
        let _it_may_have_hung_up = stream.write_all(part);
    }
    while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
}

/// What it does, what the source is to say of it, and within which time.
const TARGETS: &[(&str, Breaks, &str, Duration)] = &[
    ("hangs up", |_, stream| drop(stream), "control connection", AT_ONCE),
    ("says nothing", |_, stream| answers(stream, &[]), "nothing came back for", PATIENCE),
    (
        "speaks another protocol",
        |_, stream| answers(stream, &[b"220 ready\r\n"]),
        "not a pageferry control connection",
        AT_ONCE,
    ),
    (
        "speaks another version",
        |_, stream| answers(stream, &[&prefix(9, MessageKind::Welcome, 2, 0)]),
        "speaks control version 9",
        AT_ONCE,
    ),
    (
        "floods it with messages",
        |_, mut stream| {
            read_hello(&mut stream);
            floods(&mut stream, &[Message::RoundClosed(RoundIndex(3)), Message::Verify]);
        },
        "sent RoundClosed",
        PATIENCE,
    ),
    (
        "floods it with large messages",
        |_, mut stream| {
            read_hello(&mut stream);
            let key = "7".repeat(64);
            let fields = json!({ "software": "", "host": "", "boot_id": "", "rejoin_key": key });
            let welcome = encode(&from_wire(MessageKind::Welcome, fields));
            let _it_may_have_hung_up = stream.write_all(&welcome);
            floods(&mut stream, &[Message::DeviceState(vec![7; 256 << 10])]);
        },
        "sent DeviceState",
        PATIENCE,
    ),
    (
        "announces a large body",
        |_, stream| answers(stream, &[&prefix(VERSION, MessageKind::Welcome, 2, 64 << 20)]),
        "body of",
        AT_ONCE,
    ),
];

#[test]
fn a_source_gets_away_from_every_target_with_its_guest_running() -> Outcome {
    let name = "a_source_gets_away_from_every_target_with_its_guest_running";
    if !is_root() {
        skip(name, "needs root to attach to QEMU");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
    spec.memory_mib = 128;
    spec.params.fill_mib = 32;
    let mut guest = Qemu::launch(&workplace, "guest", &spec)?;
    guest.wait_ready(Duration::from_secs(120))?;
    let listener = TcpListener::bind(("127.0.0.1", PORT))?;
    for (index, (what, breaks, said, within)) in TARGETS.iter().enumerate() {
        let (theirs, breaks) = (listener.try_clone()?, *breaks);
        let target = thread::spawn(move || {
            let (stream, _) = theirs.accept().expect("a source calls");
            breaks(&theirs, stream);
        });
        let more = ["--transport", "tcp", "--reconnect-timeout", "1"];
        let began = Instant::now();
        let source =
            Agent::source(&workplace, None, &format!("source-{index}"), &guest, None, &more)?;
        let pid = source.pid();
        let watching = thread::spawn(move || {
            let (mut most, mut now) = (0, high_water(pid));
            while now > 0 {
                most = most.max(now);
                thread::sleep(Duration::from_millis(20));
                now = high_water(pid);
            }
            most
        });
        let ended = source.wait(PATIENCE * 2)?;
        let took = began.elapsed();
        let most = watching.join().expect("it only reads");
        let summary = ended.summary();
        let reason = summary["reason"].as_str().unwrap_or_default();
        println!("a target that {what}: {reason:?}, {} ms, {} KiB", took.as_millis(), most >> 10);
        assert!(reason.contains(said), "{what}: {summary:#}\n{}", ended.stderr);
        assert!(took < *within, "{what}: {took:?}");
        assert_eq!(summary["guest_running_on"], "source", "{what}");
        // The guest's memory is mapped, and its pages that were read count.
        assert!(most < MEMORY_MAX + (128 << 20), "{what}: {most} bytes");
        target.join().expect("it only breaks rules");
    }
    let before = guest.console().wait_tick(PATIENCE)?;
    guest.console().wait_tick_where("more ticks", PATIENCE, |tick| tick.n > before.n + 2)?;
    Ok(())
}
