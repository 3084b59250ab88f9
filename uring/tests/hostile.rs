//! Peers that break the rules: what they do ends their lane, in time, and touches nothing else.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use pageferry_datapath::codec::{Chunk, CodecName, Coding};
use pageferry_datapath::framing::hello::{Greeting, HELLO_BYTES, Refusal, Reply};
use pageferry_datapath::framing::{ACK_BYTES, Ack, FramingError, HEADER_BYTES, LaneWriter};
use pageferry_datapath::ids::{LaneId, RoundIndex};
use pageferry_datapath::lane::{LaneError, LaneEvent, SourceLanes};
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::work::RoundWork;
use pageferry_datapath::zero::Sorted;
use pageferry_uring::greet::{self, GreetError};
use pageferry_uring::plan::{PathWish, TargetLaneConfig};
use pageferry_uring::source::LanePool;
use pageferry_uring::target::TargetLane;
use support::{Acceptor, contents, extent, fill, memory, next};

const PATHS: [PathWish; 2] = [PathWish::Plain, PathWish::Uring];
/// A lane without progress fails after this.
const PROGRESS: Duration = Duration::from_millis(300);

/// Two ends of a connection on loopback.
fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
    let (far, _) = listener.accept().expect("accept");
    (near, far)
}

/// A target lane, and the hostile source's end of it.
struct Victim {
    stream: TcpStream,
    memory: GuestMemory,
    events: Receiver<LaneEvent>,
    lane: TargetLane,
}

impl Victim {
    fn new(path: PathWish) -> Self {
        Self::with(path, Vec::new())
    }

    fn unpacking(path: PathWish) -> Self {
        Self::with(path, CodecName::ALL.to_vec())
    }

    fn with(path: PathWish, codecs: Vec<CodecName>) -> Self {
        let (stream, far) = pair();
        let memory = memory(&[1 << 20]);
        let (sender, events) = crossbeam_channel::unbounded();
        let progress_wait = PROGRESS;
        let config =
            TargetLaneConfig { path, codecs, progress_wait, ..TargetLaneConfig::default() };
        let lane =
            TargetLane::start(far, LaneId(0), memory.clone(), &config, sender).expect("lane");
        Self { stream, memory, events, lane }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("send");
    }

    fn error(&self) -> LaneError {
        match next(&self.events) {
            LaneEvent::Failed { error, unacked, .. } => {
                assert!(unacked.is_empty());
                error
            }
            other => panic!("{other:?}"),
        }
    }

    /// The lane has hung up, its worker is gone, and guest memory is as new.
    fn assert_untouched(mut self) {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = self.stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{} bytes in answer", rest.len());
        self.lane.finish();
        assert!(contents(&self.memory.regions()[0]).iter().all(|&b| b == 0));
    }
}

fn batch_header(offset: u64, len: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    LaneWriter::new().batch(&[extent(0, offset, len)], &[], &mut header);
    header
}

#[test]
fn a_frame_that_is_none_ends_the_lane() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        victim.send(&[0x55; HEADER_BYTES]);
        let error = victim.error();
        assert!(
            matches!(error, LaneError::PeerMisbehaved { source: FramingError::Magic, .. }),
            "{error:?}"
        );
        victim.assert_untouched();
    }
}

#[test]
fn an_extent_outside_guest_memory_ends_the_lane() {
    for path in PATHS {
        for (offset, len) in [(1 << 20, 4096), (u64::MAX - 4095, 4096), (0, 4097), (0, 0)] {
            let mut victim = Victim::new(path);
            victim.send(&batch_header(offset, len));
            let error = victim.error();
            let LaneError::PeerMisbehaved { source: FramingError::Extent { .. }, .. } = error
            else {
                panic!("{error:?}")
            };
            victim.assert_untouched();
        }
    }
}

/// A header whose only extent is packed in one chunk.
fn packed_header(coding: Coding, packed_bytes: u64, raw_bytes: u64) -> [u8; HEADER_BYTES] {
    let (mut header, mut batch) = ([0; HEADER_BYTES], Sorted::new());
    batch.packed.push(extent(0, 0, raw_bytes));
    batch.chunks.push(Chunk { coding, packed_bytes, raw_bytes });
    LaneWriter::new().sorted(&batch, &mut header);
    header
}

#[test]
fn a_corrupt_chunk_ends_the_lane() {
    let short = lz4_flex::block::compress(&[7; 4096]);
    for path in PATHS {
        for coding in [Coding::Lz4, Coding::Zstd] {
            // Noise, and a good chunk of less memory than was announced.
            for bytes in [&[0xf5; 600][..], &short] {
                let mut victim = Victim::unpacking(path);
                victim.send(&packed_header(coding, bytes.len() as u64, 8192));
                victim.send(bytes);
                // A chunk is looked at when the next header is there.
                victim.send(&batch_header(0, 4096));
                let error = victim.error();
                let LaneError::PeerMisbehaved { source: FramingError::CorruptChunk, .. } = error
                else {
                    panic!("{error:?}")
                };
                victim.assert_untouched();
            }
        }
    }
}

#[test]
fn a_chunk_that_nobody_agreed_to_ends_the_lane() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        victim.send(&packed_header(Coding::Lz4, 100, 8192));
        let error = victim.error();
        let LaneError::PeerMisbehaved { source: FramingError::ExtentKind { .. }, .. } = error
        else {
            panic!("{error:?}")
        };
        victim.assert_untouched();
    }
}

#[test]
fn a_payload_cut_short_ends_the_lane() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        victim.send(&batch_header(0, 8192));
        victim.send(&[1; 5000]);
        victim.stream.shutdown(Shutdown::Write).expect("shutdown");
        assert!(matches!(victim.error(), LaneError::PeerClosed { .. }));
        victim.lane.finish();
        // What came was placed where it belongs, and nothing else.
        let bytes = contents(&victim.memory.regions()[0]);
        assert!(bytes[..5000].iter().all(|&b| b == 1) && bytes[5000..].iter().all(|&b| b == 0));
    }
}

#[test]
fn an_end_without_a_close_frame_is_a_failure() {
    for path in PATHS {
        let victim = Victim::new(path);
        victim.stream.shutdown(Shutdown::Both).expect("shutdown");
        assert!(matches!(victim.error(), LaneError::PeerClosed { .. }));
        victim.assert_untouched();
    }
}

#[test]
fn silence_inside_a_batch_times_out() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        victim.send(&batch_header(0, 8192));
        let start = Instant::now();
        assert!(matches!(victim.error(), LaneError::Timeout { .. }));
        assert!((PROGRESS..PROGRESS * 4).contains(&start.elapsed()), "{:?}", start.elapsed());
        victim.assert_untouched();
    }
}

#[test]
fn silence_inside_a_header_times_out() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        thread::sleep(PROGRESS / 3);
        victim.send(&batch_header(0, 8192)[..100]);
        assert!(matches!(victim.error(), LaneError::Timeout { .. }));
        victim.assert_untouched();
    }
}

#[test]
fn silence_between_rounds_is_no_failure() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        thread::sleep(PROGRESS * 3);
        assert!(victim.events.is_empty());
        let (mut writer, mut header) = (LaneWriter::new(), [0; HEADER_BYTES]);
        writer.batch(&[extent(0, 4096, 4096)], &[], &mut header);
        victim.send(&header);
        victim.send(&[7; 4096]);
        let seq = writer.barrier(RoundIndex(3), &mut header);
        victim.send(&header);
        let mut ack = [0; ACK_BYTES];
        victim.stream.read_exact(&mut ack).expect("ack");
        let expected = Ack { lane: LaneId(0), round: RoundIndex(3), seq };
        assert_eq!(Ack::decode(&ack), Ok(expected));
        assert!(matches!(next(&victim.events), LaneEvent::Placed { round: RoundIndex(3), .. }));
        assert!(contents(&victim.memory.regions()[0])[4096..8192].iter().all(|&b| b == 7));
    }
}

#[test]
fn a_slow_batch_is_no_failure_while_it_moves() {
    for path in PATHS {
        let mut victim = Victim::new(path);
        victim.send(&batch_header(0, 4096));
        for _ in 0..16 {
            thread::sleep(PROGRESS / 3);
            victim.send(&[9; 256]);
        }
        assert!(victim.events.is_empty(), "{:?}", victim.events.try_recv());
        victim.lane.fence();
        assert!(contents(&victim.memory.regions()[0])[..4096].iter().all(|&b| b == 9));
    }
}

/// Streams that begin well and then go wrong at a random place, in a random way.
#[test]
fn no_stream_of_bytes_does_more_than_end_its_lane() {
    let mut state = 0x243f_6a88_85a3_08d3u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state >> 33
    };
    for turn in 0..60 {
        let mut victim = Victim::new(PATHS[turn % 2]);
        let (mut writer, mut header) = (LaneWriter::new(), [0; HEADER_BYTES]);
        let mut stream = Vec::new();
        for _ in 0..1 + random() % 4 {
            let pages = 1 + random() % 8;
            writer.batch(&[extent(0, (random() % 200) * 4096, pages * 4096)], &[], &mut header);
            stream.extend_from_slice(&header);
            stream.resize(stream.len() + pages as usize * 4096, random() as u8);
        }
        match random() % 3 {
            0 => stream.truncate(random() as usize % stream.len()),
            1 => {
                let at = random() as usize % HEADER_BYTES;
                stream[at] ^= 1 + random() as u8 % 255;
            }
            _ => stream.extend((0..600).map(|_| random() as u8)),
        }
        // The lane may hang up before it has all.
        let _ = victim.stream.write_all(&stream);
        let _ = victim.stream.shutdown(Shutdown::Write);
        victim.error();
        victim.lane.finish();
    }
}

#[test]
fn a_greeting_is_told_apart_or_refused_in_time() {
    let soon = || Instant::now() + PROGRESS;
    let greeted = |bytes: &[u8], end: bool| {
        let (mut near, far) = pair();
        near.write_all(bytes).expect("send");
        if end {
            near.shutdown(Shutdown::Write).expect("shutdown");
        }
        (greet::peek_greeting(&far, soon()), near, far)
    };
    assert!(matches!(greeted(b"PFRYrest", false).0, Ok(Greeting::Control)));
    assert!(matches!(greeted(b"HTTP/1.1", false).0, Err(GreetError::Unknown)));
    assert!(matches!(greeted(b"", true).0, Err(GreetError::PeerClosed)));
    assert!(matches!(greeted(b"PF", false).0, Err(GreetError::Timeout)));
    let (greeting, _near, far) = greeted(b"PFLN and then not enough", true);
    assert!(matches!(greeting, Ok(Greeting::Lane)));
    assert!(matches!(greet::read_hello(&far, soon()), Err(GreetError::PeerClosed)));
    let (greeting, _near, far) = greeted(&[b"PFLN".as_slice(), &[0xff; 60]].concat(), false);
    assert!(matches!(greeting, Ok(Greeting::Lane)));
    assert!(matches!(greet::read_hello(&far, soon()), Err(GreetError::Malformed { .. })));
}

#[test]
fn a_hello_trickling_in_meets_the_deadline() {
    let (mut near, far) = pair();
    let trickle = thread::spawn(move || {
        for byte in b"PFLN".iter().chain(&[0; HELLO_BYTES]) {
            if near.write_all(&[*byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let start = Instant::now();
    let deadline = start + PROGRESS;
    assert!(matches!(greet::peek_greeting(&far, deadline), Ok(Greeting::Lane)));
    assert!(matches!(greet::read_hello(&far, deadline), Err(GreetError::Timeout)));
    assert!(start.elapsed() < PROGRESS * 2);
    drop(far);
    trickle.join().expect("trickle");
}

/// What a target that misbehaves makes of a source's attempt to connect one lane.
fn connect_to(target: impl FnOnce(TcpStream) + Send + 'static) -> LaneError {
    let acceptor = Acceptor::new(1);
    let mut plan = acceptor.plan(PathWish::Auto);
    plan.connect_wait = PROGRESS;
    let (events, _inbox) = crossbeam_channel::unbounded();
    let serving = thread::spawn(move || {
        let (mut stream, _) = acceptor.listener.accept().expect("accept");
        stream.read_exact(&mut [0; HELLO_BYTES]).expect("hello");
        target(stream);
    });
    let error = LanePool::connect(&plan, memory(&[4096]), events).expect_err("connected");
    serving.join().expect("target");
    error
}

#[test]
fn a_target_that_does_not_admit_is_understood() {
    let refuse = Reply::Refused(Refusal::Ticket).encode();
    let refused = connect_to(move |mut s| s.write_all(&refuse).expect("reply"));
    assert!(matches!(refused, LaneError::Refused { refusal: Refusal::Ticket, .. }), "{refused:?}");
    let garbled = connect_to(|mut s| s.write_all(&[0; 16]).expect("reply"));
    assert!(matches!(garbled, LaneError::PeerMisbehaved { .. }), "{garbled:?}");
    assert!(matches!(connect_to(drop), LaneError::PeerClosed { .. }));
    let silent = connect_to(|s| {
        thread::sleep(PROGRESS * 2);
        drop(s);
    });
    assert!(matches!(silent, LaneError::Timeout { .. }), "{silent:?}");
}

/// What a target that misbehaves after admission makes of a round of 4 MiB.
fn move_to(path: PathWish, target: impl FnOnce(TcpStream) + Send + 'static) -> LaneEvent {
    let acceptor = Acceptor::new(1);
    let mut plan = acceptor.plan(path);
    plan.progress_wait = PROGRESS;
    let (events, inbox) = crossbeam_channel::unbounded();
    let serving = thread::spawn(move || {
        let (mut stream, _) = acceptor.listener.accept().expect("accept");
        stream.read_exact(&mut [0; HELLO_BYTES]).expect("hello");
        stream.write_all(&Reply::Accepted.encode()).expect("reply");
        target(stream);
    });
    let from = memory(&[4 << 20]);
    fill(&from.regions()[0], extent(0, 0, 4 << 20), 1);
    let mut pool = LanePool::connect(&plan, from, events).expect("connect");
    let all = [extent(0, 0, 4 << 20)];
    pool.move_round(Arc::new(RoundWork::new(RoundIndex(0), all)));
    let event = next(&inbox);
    assert_eq!(pool.alive(), 0);
    Box::new(pool).close(false);
    serving.join().expect("target");
    event
}

#[test]
fn a_target_that_acknowledges_wrongly_ends_the_lane() {
    let all_frames = 4 * (HEADER_BYTES + (1 << 20)) + HEADER_BYTES;
    let answer = move |ack: [u8; ACK_BYTES]| {
        move |mut stream: TcpStream| {
            stream.read_exact(&mut vec![0; all_frames]).expect("round");
            stream.write_all(&ack).expect("ack");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    };
    for path in PATHS {
        let other = Ack { lane: LaneId(0), round: RoundIndex(0), seq: 3 }.encode();
        for (ack, wrong) in [(other, true), ([0; ACK_BYTES], false)] {
            let event = move_to(path, answer(ack));
            let LaneEvent::Failed { error, unacked, .. } = event else { panic!("{event:?}") };
            match error {
                LaneError::WrongAck { .. } => assert!(wrong),
                LaneError::PeerMisbehaved { .. } => assert!(!wrong),
                other => panic!("{other:?}"),
            }
            assert_eq!(unacked, [extent(0, 0, 4 << 20)]);
        }
    }
}

#[test]
fn a_target_that_never_reads_times_out() {
    for path in PATHS {
        for zero in [0usize, 100] {
            let event = move_to(path, move |mut stream| {
                stream.read_exact(&mut vec![0; zero]).expect("some");
                thread::sleep(PROGRESS * 5);
            });
            let LaneEvent::Failed { error, unacked, .. } = event else { panic!("{event:?}") };
            assert!(matches!(error, LaneError::Timeout { .. }), "{error:?}");
            assert!(!unacked.is_empty());
        }
    }
}

#[test]
fn a_target_that_reads_all_and_never_acknowledges_times_out() {
    for path in PATHS {
        let event = move_to(path, |mut stream| {
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let LaneEvent::Failed { error, unacked, .. } = event else { panic!("{event:?}") };
        assert!(matches!(error, LaneError::Timeout { .. }), "{error:?}");
        assert_eq!(unacked, [extent(0, 0, 4 << 20)]);
    }
}
