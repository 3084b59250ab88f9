//! sockperf over TCP, run as its users do.

use crate::distribution::Distribution;
use crate::ends::Ends;
use crate::error::BenchError;
use crate::ours::tail;
use crate::program::serve_and_ask;
use crate::recorder::{Pace, Recorded};

/// The program, and Debian's package.
pub(crate) const PROGRAM: &str = "sockperf";
/// Its own least and most.
const BYTES: std::ops::RangeInclusive<u32> = 14..=65_507;

/// `sockperf ping-pong --tcp`; every sample is in the log that it writes. Nothing for sizes that
/// it does not have.
pub(crate) fn ping_pong(
    ends: &Ends,
    bytes: u32,
    pace: Pace,
    seconds: f64,
) -> Result<Option<Recorded>, BenchError> {
    let Some(bytes) = size(bytes) else { return Ok(None) };
    let log = std::env::temp_dir().join(format!("sockperf-{}.csv", std::process::id()));
    let more = ["--full-log".to_owned(), log.display().to_string()];
    let said = run(ends, "ping-pong", bytes, seconds, &more);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    // It may not have come to write it.
    let _ = std::fs::remove_file(&log);
    let said = said?;
    let samples: Vec<u64> = round_trips(&text).into_iter().map(|ns| ns / 2).collect();
    if samples.len() as u64 <= pace.warm_up {
        return Err(BenchError::Unexpected { program: PROGRAM.into(), said: tail(&said) });
    }
    let kept = samples.into_iter().skip(pace.warm_up as usize).take(pace.operations as usize);
    Ok(Some(Recorded::of_latencies(Distribution::of(kept), bytes, true)))
}

/// `sockperf throughput --tcp`: messages of one size, one after the other.
pub(crate) fn stream(
    ends: &Ends,
    bytes: u32,
    seconds: f64,
) -> Result<Option<Recorded>, BenchError> {
    let Some(bytes) = size(bytes) else { return Ok(None) };
    let said = run(ends, "throughput", bytes, seconds, &[])?;
    let unexpected = || BenchError::Unexpected { program: PROGRAM.into(), said: tail(&said) };
    let rate = messages_per_s(&said).ok_or_else(unexpected)? * f64::from(bytes);
    Ok(Some(Recorded::of_rate(rate, seconds)))
}

fn size(bytes: u32) -> Option<u32> {
    // 8 bytes are below its header: the least it has stands for it.
    let bytes = bytes.max(*BYTES.start());
    BYTES.contains(&bytes).then_some(bytes)
}

fn run(
    ends: &Ends,
    mode: &str,
    bytes: u32,
    seconds: f64,
    more: &[String],
) -> Result<String, BenchError> {
    let listens = ends.net.target_address();
    let words = |mode: &str| -> Vec<String> {
        let (ip, port) = (listens.ip().to_string(), listens.port().to_string());
        [mode, "--tcp", "--ip", &ip, "--port", &port].map(String::from).into()
    };
    let mut client = words(mode);
    // It knows whole seconds only.
    let seconds = seconds.ceil().max(1.0);
    client.extend(["-m", &bytes.to_string(), "-t", &seconds.to_string()].map(String::from));
    client.extend(more.iter().cloned());
    let server = (ends.cores.1, words("server"));
    serve_and_ask(&ends.net, PROGRAM, listens, server, (ends.cores.0, client))
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

/// `Message Rate is 320323 [msg/sec]`.
fn messages_per_s(said: &str) -> Option<f64> {
    let (_, after) = said.split_once("Message Rate is ")?;
    after.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_read() {
        let log = "------\npacket, txTime(sec), rxTime(sec)\n0, 1.000001, 1.000021\n";
        let trips = round_trips(log);
        assert_eq!(trips.len(), 1);
        assert!(trips[0].abs_diff(20_000) < 5, "{trips:?}");
        let said = "sockperf: Summary: Message Rate is 320323 [msg/sec], Packet Rate is about 96";
        assert_eq!(messages_per_s(said), Some(320_323.0));
        assert_eq!((size(8), size(65_536)), (Some(14), None));
    }
}
