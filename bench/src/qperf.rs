//! qperf over TCP and RDMA, run as its users do: it has one number for a run, an average.

use serde::Serialize;

use crate::distribution::Distribution;
use crate::ends::Ends;
use crate::error::BenchError;
use crate::ours::tail;
use crate::program::serve_and_ask;
use crate::rdma_wire::Verb;
use crate::recorder::Recorded;

/// The program, and Debian's package.
pub(crate) const PROGRAM: &str = "qperf";

/// One of its tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Test {
    TcpLatency,
    TcpStream,
    /// Its ends poll as ours do.
    RdmaLatency(Verb),
    RdmaStream,
}

impl Test {
    /// As qperf has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::TcpLatency => "tcp_lat",
            Self::TcpStream => "tcp_bw",
            Self::RdmaLatency(Verb::Write) => "rc_rdma_write_poll_lat",
            Self::RdmaLatency(Verb::Read) => "rc_rdma_read_lat",
            Self::RdmaLatency(Verb::Send) => "rc_lat",
            Self::RdmaStream => "rc_rdma_write_bw",
        }
    }

    fn is_latency(self) -> bool {
        matches!(self, Self::TcpLatency | Self::RdmaLatency(_))
    }

    /// Runs it.
    pub(crate) fn run(self, ends: &Ends, bytes: u32, seconds: f64) -> Result<Recorded, BenchError> {
        let listens = ends.net.target_address();
        let port = listens.port().to_string();
        let mut client: Vec<String> = ["-lp", &port, "-uu", "-e", "6"].map(String::from).into();
        // It knows whole seconds only.
        let whole = seconds.ceil().max(1.0);
        client.extend(["-t", &whole.to_string(), "-m", &bytes.to_string()].map(String::from));
        let to = match self {
            Self::TcpLatency | Self::TcpStream => listens.ip(),
            Self::RdmaLatency(_) | Self::RdmaStream => {
                // By rdma_cm, which iWARP needs, and polling, as perftest and we do.
                client.extend(["-cm1", "-cp1"].map(String::from));
                ends.rdma()?.peer
            }
        };
        client.extend([to.to_string(), self.name().into()]);
        let server = (ends.cores.1, vec!["-lp".into(), port]);
        let said = serve_and_ask(&ends.net, PROGRAM, listens, server, (ends.cores.0, client))?;
        let unexpected = || BenchError::Unexpected { program: PROGRAM.into(), said: tail(&said) };
        if self.is_latency() {
            let ns = latency_ns(&said).ok_or_else(unexpected)?;
            let halves = self != Self::RdmaLatency(Verb::Read);
            return Ok(Recorded::of_latencies(Distribution::of([ns]), bytes, halves));
        }
        Ok(Recorded::of_rate(bytes_per_s(&said).ok_or_else(unexpected)?, whole))
    }
}

/// `latency = 10.3 us`.
fn latency_ns(said: &str) -> Option<u64> {
    let (number, unit) = value(said, "latency")?;
    let scale = match unit {
        "ns" => 1.0,
        "us" => 1e3,
        "ms" => 1e6,
        "sec" => 1e9,
        _ => return None,
    };
    Some((number * scale) as u64)
}

/// `bw = 2930638848 bytes/sec`; its other units are powers of 1000.
fn bytes_per_s(said: &str) -> Option<f64> {
    let (number, unit) = value(said, "bw")?;
    let scale = match unit {
        "bytes/sec" => 1.0,
        "KB/sec" => 1e3,
        "MB/sec" => 1e6,
        "GB/sec" => 1e9,
        _ => return None,
    };
    Some(number * scale)
}

fn value<'a>(said: &'a str, name: &str) -> Option<(f64, &'a str)> {
    let is_its = |line: &&str| line.trim_start().starts_with(name);
    let (_, value) = said.lines().find(is_its)?.split_once('=')?;
    let mut words = value.split_ascii_whitespace();
    Some((words.next()?.replace(',', "").parse().ok()?, words.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_read() {
        assert_eq!(latency_ns("tcp_lat:\n    latency  =  10.3 us\n"), Some(10_300));
        assert_eq!(latency_ns("failed to connect"), None);
        assert_eq!(bytes_per_s("tcp_bw:\n    bw  =  2930638848 bytes/sec\n"), Some(2930638848.0));
        assert_eq!(bytes_per_s("tcp_bw:\n    bw  =  2.6 GB/sec\n"), Some(2.6e9));
        assert_eq!(bytes_per_s("    bw  =  2.6 furlongs\n"), None);
    }
}
