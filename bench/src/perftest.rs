//! perftest (`ib_write_bw`, `ib_write_lat` and their like), run as its users do: a server and a
//! client, connected by rdma_cm (`-R`).
//!
//! The latency tools print every sample (`-U`), in the order they were taken, so that our own
//! percentiles are computed of theirs, and as many are dropped as of ours.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::distribution::Distribution;
use crate::error::BenchError;
use crate::ours::tail;
use crate::rdma_wire::Verb;
use crate::recorder::{Pace, Recorded};

/// A run that takes longer hangs.
const RUN_MAX: Duration = Duration::from_secs(120);
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
    pub(crate) fn stream(
        &self,
        device: &str,
        to: IpAddr,
        cores: Option<(usize, usize)>,
        operations: u64,
    ) -> Result<Recorded, BenchError> {
        let said = self.run(device, to, cores, operations, |said| bandwidth(said).is_some())?;
        let mib_per_s = bandwidth(&said).expect("asked before");
        let bytes = operations * u64::from(self.queue_pairs) * u64::from(self.bytes);
        let seconds = bytes as f64 / (mib_per_s * f64::from(1 << 20));
        Ok(Recorded { bytes, seconds, ..Recorded::default() })
    }

    /// One at a time; of WRITE and SEND half of each, as the tool has it.
    pub(crate) fn ping_pong(
        &self,
        device: &str,
        to: IpAddr,
        cores: Option<(usize, usize)>,
        pace: Pace,
    ) -> Result<Recorded, BenchError> {
        let operations = pace.warm_up + pace.operations;
        let enough = |said: &str| samples(said).len() as u64 + 2 >= operations;
        let said = self.run(device, to, cores, operations, enough)?;
        let kept = samples(&said).into_iter().skip(pace.warm_up as usize);
        let distribution = Distribution::of(kept.map(|us| (us * 1000.0) as u64));
        let round_trip = if self.verb == Verb::Read { 1.0 } else { 2.0 };
        let count = distribution.count() as f64;
        let seconds = distribution.mean() * count * round_trip / 1e9;
        let bytes = distribution.count() * u64::from(self.bytes);
        Ok(Recorded { bytes, seconds, distribution, intervals: Vec::new() })
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
        device: &str,
        to: IpAddr,
        cores: Option<(usize, usize)>,
        operations: u64,
        is_whole: impl Fn(&str) -> bool,
    ) -> Result<String, BenchError> {
        let mut last = String::new();
        for _ in 0..TRIES {
            let output = self.run_once(device, to, cores, operations)?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() && is_whole(&said) {
                return Ok(said);
            }
            last = format!("{said}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        Err(BenchError::Unexpected { program: self.program().into(), said: tail(&last) })
    }

    /// `cores` are the server's and the client's.
    fn run_once(
        &self,
        device: &str,
        to: IpAddr,
        cores: Option<(usize, usize)>,
        operations: u64,
    ) -> Result<Output, BenchError> {
        let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed).to_string();
        let command = |core: Option<usize>| {
            let mut command = match core {
                None => Command::new(self.program()),
                Some(core) => {
                    let mut command = Command::new("taskset");
                    command.args(["-c", &core.to_string(), self.program()]);
                    command
                }
            };
            command.args(self.words(self.streams)).args(["-d", device, "-p", &port]);
            command.args(["-n", &operations.to_string()]).stdin(Stdio::null());
            command
        };
        let run = || BenchError::io("run", self.program());
        let mut server = command(cores.map(|(server, _)| server));
        let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(run())?;
        let mut server = Ended(server);
        wait_listening(&port)?;
        let mut client = command(cores.map(|(_, client)| client));
        client.arg(to.to_string()).stdout(Stdio::piped()).stderr(Stdio::piped());
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

/// What a program has said by its end.
pub(crate) fn output_within(mut child: Child, program: &str) -> Result<Output, BenchError> {
    use std::io::Read;
    let mut out = child.stdout.take();
    let mut err = child.stderr.take();
    // Two threads: a full pipe must not hold it up.
    let read = |from: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut from) = from {
                let _what_there_was = from.read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let out = read(out.take().map(|out| Box::new(out) as _));
    let err = read(err.take().map(|err| Box::new(err) as _));
    let started = Instant::now();
    let mut child = Ended(child);
    let status = loop {
        match child.0.try_wait().map_err(BenchError::io("wait for", program))? {
            Some(status) => break status,
            None if started.elapsed() > RUN_MAX => {
                let (what, waited_s) = (format!("{program} to end"), RUN_MAX.as_secs());
                return Err(BenchError::Timeout { what, waited_s });
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let said = |thread: std::thread::JoinHandle<Vec<u8>>| thread.join().unwrap_or_default();
    Ok(Output { status, stdout: said(out), stderr: said(err) })
}

/// A child that does not outlive this.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a program can be run here.
pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| Path::new(&folder).join(program).exists())
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
