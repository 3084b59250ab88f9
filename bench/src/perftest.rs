//! perftest (`ib_write_bw`, `ib_write_lat` and their like), run as its users do: a server and a
//! client, connected by rdma_cm (`-R`).
//!
//! The latency tools print every sample (`-U`), in the order they were taken, so that our own
//! percentiles are computed of theirs, and as many are dropped as of ours.

use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::distribution::Distribution;
use crate::ends::Ends;
use crate::error::BenchError;
use crate::ours::tail;
use crate::program::{Ended, on_core, output_within};
use crate::rdma_wire::Verb;
use crate::recorder::{Pace, Recorded};

/// Until a server listens; it opens a device first.
const LISTEN_MAX: Duration = Duration::from_secs(20);
/// Under emulation it prints nothing, or its client crashes, now and then.
const TRIES: u32 = 4;
/// Ports are counted up from here: the one before may not be free again.
static NEXT_PORT: AtomicU16 = AtomicU16::new(18_600);

/// One way to run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct PerftestWay {
    pub(crate) verb: Verb,
    /// Streams, or one at a time.
    pub(crate) streams: bool,
    pub(crate) bytes: u32,
    pub(crate) queue_pairs: u32,
    /// `-t`; none is the tool's own.
    pub(crate) depth: Option<u32>,
    /// `-Q`: every which request is signalled.
    pub(crate) signal_every: Option<u32>,
    /// `-l`: requests of one post.
    pub(crate) chain: Option<u32>,
}

impl PerftestWay {
    /// The program.
    pub(crate) fn program(&self) -> &'static str {
        match (self.verb, self.streams) {
            (Verb::Write, true) => "ib_write_bw",
            (Verb::Read, true) => "ib_read_bw",
            (Verb::Send, true) => "ib_send_bw",
            (Verb::Write, false) => "ib_write_lat",
            (Verb::Read, false) => "ib_read_lat",
            (Verb::Send, false) => "ib_send_lat",
        }
    }

    /// As tables have it.
    pub(crate) fn name(&self) -> String {
        let words = self.words(self.streams);
        format!("{} {}", self.program(), words.join(" "))
    }

    /// Streams; `operations` are of each queue pair.
    pub(crate) fn stream(&self, ends: &Ends, operations: u64) -> Result<Recorded, BenchError> {
        let said = self.run(ends, operations, |said| bandwidth(said).is_some())?;
        let mib_per_s = bandwidth(&said).expect("asked before");
        let bytes = operations * u64::from(self.queue_pairs) * u64::from(self.bytes);
        let seconds = bytes as f64 / (mib_per_s * f64::from(1 << 20));
        Ok(Recorded { bytes, seconds, ..Recorded::default() })
    }

    /// One at a time; of WRITE and SEND half of each, as the tool has it.
    pub(crate) fn ping_pong(&self, ends: &Ends, pace: Pace) -> Result<Recorded, BenchError> {
        let operations = pace.warm_up + pace.operations;
        let enough = |said: &str| samples(said).len() as u64 + 2 >= operations;
        let said = self.run(ends, operations, enough)?;
        let kept = samples(&said).into_iter().skip(pace.warm_up as usize);
        let distribution = Distribution::of(kept.map(|us| (us * 1000.0) as u64));
        Ok(Recorded::of_latencies(distribution, self.bytes, self.verb != Verb::Read))
    }

    fn words(&self, streams: bool) -> Vec<String> {
        let mut words: Vec<String> = ["-R", "-F", "-s"].map(String::from).into();
        words.push(self.bytes.to_string());
        if streams {
            // Its peak costs a reading of the clock for each message.
            words.extend(["-N".into(), "--perform_warm_up".into(), "-q".into()]);
            words.push(self.queue_pairs.to_string());
        } else {
            words.push("-U".into());
        }
        for (option, value) in [("-t", self.depth), ("-Q", self.signal_every), ("-l", self.chain)] {
            if let Some(value) = value {
                words.extend([option.into(), value.to_string()]);
            }
        }
        words
    }

    fn run(
        &self,
        ends: &Ends,
        operations: u64,
        is_whole: impl Fn(&str) -> bool,
    ) -> Result<String, BenchError> {
        let mut last = String::new();
        for _ in 0..TRIES {
            let output = self.run_once(ends, operations)?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() && is_whole(&said) {
                return Ok(said);
            }
            last = format!("{said}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        Err(BenchError::Unexpected { program: self.program().into(), said: tail(&last) })
    }

    fn run_once(&self, ends: &Ends, operations: u64) -> Result<Output, BenchError> {
        let rdma = ends.rdma()?;
        let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed).to_string();
        let command = |core: Option<usize>| {
            let mut command = on_core(Command::new, self.program(), core);
            command.args(self.words(self.streams)).args(["-d", &rdma.device, "-p", &port]);
            command.args(["-n", &operations.to_string()]).stdin(Stdio::null());
            command
        };
        let run = || BenchError::io("run", self.program());
        let mut server = command(ends.cores.1);
        let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(run())?;
        let mut server = Ended(server);
        wait_listening(&port)?;
        let mut client = command(ends.cores.0);
        client.arg(rdma.peer.to_string()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let client = client.spawn().map_err(run())?;
        let output = output_within(client, self.program())?;
        if output.status.success() {
            // It ends by itself, and its memory is not there for the next one before.
            let until = Instant::now() + Duration::from_secs(5);
            while server.0.try_wait().map_err(run())?.is_none() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(output)
    }
}

/// Waits for the rdma_cm listener on a port.
fn wait_listening(port: &str) -> Result<(), BenchError> {
    let (started, end) = (Instant::now(), format!(":{port}"));
    while started.elapsed() < LISTEN_MAX {
        let shown = Command::new("rdma").args(["resource", "show", "cm_id"]).output();
        let shown = shown.map_err(BenchError::io("run", "rdma"))?.stdout;
        let is_ours = |line: &str| {
            line.contains("LISTEN") && line.split_ascii_whitespace().any(|w| w.ends_with(&end))
        };
        if String::from_utf8_lossy(&shown).lines().any(is_ours) {
            // It is shown a little before it can take connections.
            std::thread::sleep(Duration::from_millis(100));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(BenchError::Timeout { what: "perftest to listen".into(), waited_s: LISTEN_MAX.as_secs() })
}

/// Average MiB/s: the fourth number of the last line of numbers.
fn bandwidth(said: &str) -> Option<f64> {
    let numbers = |line: &str| -> Option<Vec<f64>> {
        line.split_ascii_whitespace().map(|word| word.parse().ok()).collect()
    };
    let row = said.lines().rev().filter_map(numbers).find(|row| row.len() >= 4)?;
    Some(row[3]).filter(|mib_per_s| *mib_per_s > 0.0)
}

/// Lines of `number, microseconds`.
fn samples(said: &str) -> Vec<f64> {
    let sample = |line: &str| {
        let (index, us) = line.split_once(',')?;
        index.trim().parse::<u64>().ok()?;
        us.trim().parse().ok()
    };
    said.lines().filter_map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_read() {
        let said = " Mtu : 4096[B]\n #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]\n \
                    65536      100              131.28             14.72  \t\t   0.000235\n------\n";
        assert_eq!(bandwidth(said), Some(14.72));
        assert_eq!(bandwidth(" 65536 100 0.00 0.00 0.0"), None);
        assert_eq!(bandwidth("Couldn't connect to 10.0.0.1:18515"), None);
    }

    #[test]
    fn samples_are_read() {
        let said = "#, usec\n1, 38.43\n2, 40\n---\n 4096  500  38.43  28985.13  7127.69\n";
        assert_eq!(samples(said), [38.43, 40.0]);
    }
}
