//! sockperf and qperf for the latency of TCP, run as their users do.

use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::distribution::Distribution;
use crate::error::BenchError;
use crate::ours::tail;
use crate::perftest::{Ended, output_within};
use crate::recorder::{Pace, Recorded};

/// Ports are counted up from here: the one before may not be free again.
static NEXT_PORT: AtomicU16 = AtomicU16::new(19_700);
/// A server listens by then.
const LISTEN_MAX: Duration = Duration::from_secs(5);
/// sockperf's own least and most.
const SOCKPERF_BYTES: std::ops::RangeInclusive<u32> = 14..=65_507;

/// `sockperf ping-pong --tcp`; every sample is in the log that it writes. Nothing for sizes that
/// it does not have.
pub(crate) fn sockperf(
    bytes: u32,
    cores: Option<(usize, usize)>,
    pace: Pace,
    seconds: u64,
) -> Result<Option<Recorded>, BenchError> {
    // 8 bytes are below its header: the least it has stands for it.
    let bytes = bytes.max(*SOCKPERF_BYTES.start());
    if !SOCKPERF_BYTES.contains(&bytes) {
        return Ok(None);
    }
    let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
    let at = Ipv4Addr::LOCALHOST.to_string();
    let words =
        |mode: &str| [mode, "--tcp", "--ip", &at, "--port", &port.to_string()].map(String::from);
    let mut server = on_core("sockperf", cores.map(|(server, _)| server));
    server.args(words("server")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Ended(server.spawn().map_err(BenchError::io("run", "sockperf"))?);
    wait_listening(port)?;
    let log = std::env::temp_dir().join(format!("sockperf-{}-{port}.csv", std::process::id()));
    let mut client = on_core("sockperf", cores.map(|(_, client)| client));
    client.args(words("ping-pong")).args(["-m", &bytes.to_string(), "-t", &seconds.to_string()]);
    client.arg("--full-log").arg(&log).stdin(Stdio::null());
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = output_within(client.map_err(BenchError::io("run", "sockperf"))?, "sockperf")?;
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    // It may not have come to write it.
    let _ = std::fs::remove_file(&log);
    let samples: Vec<u64> = round_trips(&text).into_iter().map(|ns| ns / 2).collect();
    if samples.len() as u64 <= pace.warm_up {
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        return Err(BenchError::Unexpected { program: "sockperf".into(), said: tail(&said) });
    }
    let kept = samples.into_iter().skip(pace.warm_up as usize).take(pace.operations as usize);
    Ok(Some(recorded(Distribution::of(kept), bytes)))
}

/// `qperf tcp_lat`: an average is all that it has.
pub(crate) fn qperf(
    bytes: u32,
    to: IpAddr,
    cores: Option<(usize, usize)>,
    seconds: u64,
) -> Result<Recorded, BenchError> {
    let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed).to_string();
    let mut server = on_core("qperf", cores.map(|(server, _)| server));
    server.args(["-lp", &port]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Ended(server.spawn().map_err(BenchError::io("run", "qperf"))?);
    wait_listening(port.parse().unwrap_or(0))?;
    let mut client = on_core("qperf", cores.map(|(_, client)| client));
    client.args(["-lp", &port, "-u", "-t", &seconds.to_string(), "-m", &bytes.to_string()]);
    client.args([&to.to_string(), "tcp_lat"]).stdin(Stdio::null());
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = output_within(client.map_err(BenchError::io("run", "qperf"))?, "qperf")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let ns = qperf_latency_ns(&said);
    let ns = ns.ok_or(BenchError::Unexpected { program: "qperf".into(), said: tail(&said) })?;
    Ok(recorded(Distribution::of([ns]), bytes))
}

fn recorded(distribution: Distribution, bytes: u32) -> Recorded {
    let count = distribution.count();
    let seconds = distribution.mean() * count as f64 * 2.0 / 1e9;
    Recorded { bytes: count * u64::from(bytes), seconds, distribution, intervals: Vec::new() }
}

fn on_core(program: &str, core: Option<usize>) -> Command {
    match core {
        None => Command::new(program),
        Some(core) => {
            let mut command = Command::new("taskset");
            command.args(["-c", &core.to_string(), program]);
            command
        }
    }
}

/// Waits for a TCP listener on a port, by looking at the kernel's table: nobody is disturbed.
fn wait_listening(port: u16) -> Result<(), BenchError> {
    let started = Instant::now();
    let wanted = format!(":{port:04X}");
    while started.elapsed() < LISTEN_MAX {
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let text = std::fs::read_to_string(table).unwrap_or_default();
            let listens = text.lines().any(|line| {
                let mut words = line.split_ascii_whitespace().skip(1);
                let at = words.next().unwrap_or_default();
                // proc_net(5): state 0A is LISTEN.
                at.ends_with(&wanted) && words.nth(1) == Some("0A")
            });
            if listens {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let (what, waited_s) = (format!("a listener on port {port}"), LISTEN_MAX.as_secs());
    Err(BenchError::Timeout { what, waited_s })
}

/// Lines of `packet, sent, received`, both in seconds.
fn round_trips(log: &str) -> Vec<u64> {
    let sample = |line: &str| {
        let mut words = line.split(',').map(str::trim);
        words.next()?.parse::<u64>().ok()?;
        let (sent, received): (f64, f64) =
            (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(((received - sent) * 1e9).max(0.0) as u64)
    };
    log.lines().filter_map(sample).collect()
}

/// `latency = 10.3 us`.
fn qperf_latency_ns(said: &str) -> Option<u64> {
    let (_, value) = said.lines().find(|line| line.contains("latency"))?.split_once('=')?;
    let mut words = value.split_ascii_whitespace();
    let number: f64 = words.next()?.parse().ok()?;
    let scale = match words.next()? {
        "ns" => 1.0,
        "us" => 1e3,
        "ms" => 1e6,
        "sec" => 1e9,
        _ => return None,
    };
    Some((number * scale) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_they_say_is_read() {
        assert_eq!(qperf_latency_ns("tcp_lat:\n    latency  =  10.3 us\n"), Some(10_300));
        assert_eq!(qperf_latency_ns("failed to connect"), None);
        let log = "------\npacket, txTime(sec), rxTime(sec)\n0, 1.000001, 1.000021\n";
        let trips = round_trips(log);
        assert_eq!(trips.len(), 1);
        assert!(trips[0].abs_diff(20_000) < 5, "{trips:?}");
    }
}
