//! A rate is held, by the target's NIC's count: neither more nor less, whichever five seconds are
//! looked at.

use std::path::Path;

use pageferry_ctl::agent::admin::{self, Limit, Request, Settings};
use pageferry_ctl::lab::{Host, LabError, TwoHosts, one_at_a_time};

use super::*;

/// What a rate is held over.
const WINDOW: Duration = Duration::from_secs(5);
/// Windows begin in the first two of these seconds.
const SPELL: Duration = Duration::from_secs(7);
/// Until a new rate is all that is on its way: the sockets' buffers go first.
const SETTLES: Duration = Duration::from_secs(1);
const LOOKS_EVERY: Duration = Duration::from_millis(50);
/// If this test's own thread stood still for so long, so did the agents', and a rate that was not
/// reached says nothing.
const HELD_UP: Duration = Duration::from_millis(150);
const ATTEMPTS: u32 = 3;
/// Of a full packet by MTU 1500: what TCP with its timestamps carries, and what a NIC counts.
const PAYLOAD_SHARE: f64 = 1448.0 / 1514.0;

/// What a NIC has received.
#[derive(Clone, Copy)]
struct Received {
    at: Instant,
    bytes: u64,
    packets: u64,
}

impl Received {
    /// By the link of the namespace that this thread is in.
    fn now() -> Self {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("it is there");
        let line = table.lines().find_map(|line| line.trim().strip_prefix("link0:"));
        let counts: Vec<u64> = line
            .expect("the link is there")
            .split_whitespace()
            .map(|word| word.parse().expect("a count"))
            .collect();
        Self { at: Instant::now(), bytes: counts[0], packets: counts[1] }
    }

    /// Looks for so long.
    fn during(host: &Host, spell: Duration) -> Result<Vec<Self>, LabError> {
        host.namespace.run(|| {
            let mut all = vec![Self::now()];
            while all[0].at.elapsed() < spell {
                thread::sleep(LOOKS_EVERY);
                all.push(Self::now());
            }
            all
        })
    }
}

/// The least and the most of `rate`, payload in bytes a second, that a window got.
fn held(all: &[Received], rate: f64) -> (f64, f64) {
    let windows = all.iter().filter_map(|first| {
        let last = all.iter().find(|last| last.at - first.at >= WINDOW)?;
        let bytes = (last.bytes - first.bytes) as f64 * PAYLOAD_SHARE;
        Some(bytes / (last.at - first.at).as_secs_f64() / rate)
    });
    windows.fold((f64::MAX, 0.0), |(least, most), it| (it.min(least), it.max(most)))
}

/// Whether a spell at a rate could be judged, and was as it should be.
fn judge(all: &[Received], rate: f64, what: &str) -> bool {
    let (least, most) = held(all, rate);
    let (first, last) = (all[0], all[all.len() - 1]);
    let packet = (last.bytes - first.bytes) / (last.packets - first.packets).max(1);
    let gap = all.windows(2).map(|it| it[1].at - it[0].at).max().unwrap_or_default();
    println!(
        "{what}: {:.2} to {:.2} % in each {WINDOW:?}, {packet} bytes a packet, looked every {} ms",
        least * 100.0,
        most * 100.0,
        gap.as_millis(),
    );
    assert!((1400..=1514).contains(&packet), "{packet} bytes a packet: the headers are unknown");
    assert!(most <= 1.02, "{what}: {most} of the rate");
    if least < 0.98 && gap > HELD_UP {
        return false;
    }
    assert!(least >= 0.98, "{what}: {least} of the rate");
    true
}

/// What the agent says that was asked in its folder, once it can be.
fn ask(run: &Path, request: &Request) -> Value {
    let deadline = Instant::now() + SOON;
    loop {
        match admin::ask(run, "", request) {
            Ok(status) => return status,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Two spells at different rates within the first pass; whether both could be judged.
fn two_spells(run: &Path, target: &Host) -> Result<bool, LabError> {
    while ask(run, &Request::Status)["phase"] != "moving" {
        thread::sleep(LOOKS_EVERY);
    }
    let mut is_judged = true;
    for (rate, bytes_per_second) in [("160M", 20e6), ("240M", 30e6)] {
        let limit = Some(rate.parse().expect("a rate"));
        let set = Request::Set(Settings { max_bandwidth: limit, ..Settings::default() });
        assert_eq!(ask(run, &set)["max_bandwidth"], format!("{rate}bit"));
        thread::sleep(SETTLES);
        let all = Received::during(target, SPELL)?;
        let status = ask(run, &Request::Status);
        assert_eq!(status["rounds"], 0, "the first pass was too short: {status:#}");
        is_judged &= judge(&all, bytes_per_second, rate);
    }
    let lift = Settings { max_bandwidth: Some(Limit(None)), ..Settings::default() };
    ask(run, &Request::Set(lift));
    Ok(is_judged)
}

#[test]
fn is_held_within_two_percent_of_every_five_seconds() -> Result<(), LabError> {
    let name = "rate::is_held_within_two_percent_of_every_five_seconds";
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let hosts = TwoHosts::new(&workplace)?;
    hosts.send_real_packets()?;
    let run = workplace.file("run");
    let run_dir = run.display().to_string();
    // Enough for the first pass to last through both spells, though some of its pages are zeros.
    let shape = &Shape { filled_pages: (480 << 20) / 4096, writers: 1, ..shape(480, None) };
    let more = ["--transport", "tcp", "--lanes", "2", "--compress", "off", "--max-bandwidth"];
    let more = &[&more[..], &["160M", "--runtime-dir", &run_dir]].concat();
    for attempt in 0..ATTEMPTS {
        let end = |has_source| Scene {
            to: format!("{}:{}", hosts.target.address, 4841 + attempt),
            has_source,
            has_target: !has_source,
        };
        let (source, target) = (end(true), end(false));
        let is_judged = thread::scope(|scope| {
            let target = scope.spawn(|| {
                hosts.target.namespace.run(move || {
                    let moved = target.move_guest(shape, &[], None);
                    assert_goes_on(&moved.arrived.expect("it arrived"));
                })
            });
            let source = scope.spawn(|| {
                let moves = move || source.move_guest(shape, more, None).assert_migrated("tcp");
                hosts.source.namespace.run(moves)
            });
            let is_judged = two_spells(&run, &hosts.target);
            let ends = [source.join(), target.join()];
            ends.into_iter().for_each(|end| end.expect("its own panic").expect("a namespace"));
            is_judged
        })?;
        if is_judged {
            return Ok(());
        }
    }
    skip(name, "the machine was too busy to hold a rate");
    Ok(())
}
