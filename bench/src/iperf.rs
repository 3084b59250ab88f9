//! iperf3 between the same end points: what people measure a link with.

use serde::Serialize;
use serde_json::{Value, json};

use crate::ceiling::{Placement, Streamed};
use crate::cpu;
use crate::distribution::Distribution;
use crate::error::BenchError;
use crate::net::Net;
use crate::ours::tail;
use crate::program::serve_and_ask;
use crate::recorder::{Interval, Recorded};
use crate::stream_wire::Span;
use crate::turns::Taken;

/// The program, and Debian's package.
pub(crate) const PROGRAM: &str = "iperf3";

/// One way to run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct IperfWay {
    /// `-P`.
    pub(crate) streams: usize,
    /// `-w` in KiB; `None` leaves the buffers to the kernel.
    pub(crate) buffer_kib: Option<usize>,
    /// `-l`.
    pub(crate) length_bytes: usize,
    /// `-A`: iperf3 (before 3.16) has one thread at each end, whatever the streams.
    pub(crate) placement: Placement,
    /// `-C`.
    pub(crate) congestion: Option<String>,
}

impl IperfWay {
    /// Every way to try; `quick` is a handful.
    pub(crate) fn all(quick: bool, congestion: &[Option<String>]) -> Vec<Self> {
        let streams: &[usize] = if quick { &[1] } else { &[1, 2, 4] };
        let lengths: &[usize] = if quick { &[128] } else { &[128, 256, 1024] };
        let buffers: &[Option<usize>] = match quick {
            true => &[None, Some(256)],
            false => &[None, Some(128), Some(256), Some(512), Some(2048)],
        };
        let mut all = Vec::new();
        for &streams in streams {
            for &length_kib in lengths {
                for &buffer_kib in buffers {
                    for placement in Placement::ALL {
                        all.extend(congestion.iter().map(|congestion| Self {
                            streams,
                            buffer_kib,
                            length_bytes: length_kib << 10,
                            placement,
                            congestion: congestion.clone(),
                        }));
                    }
                }
            }
        }
        all
    }

    /// As tables have it.
    pub(crate) fn name(&self) -> String {
        let mut name = format!("iperf3 -P {} -l {}", self.streams, self.length());
        if let Some(kib) = self.buffer_kib {
            name.push_str(&format!(" -w {kib}K"));
        }
        if let Some(affinity) = self.affinity() {
            name.push_str(&format!(" -A {affinity}"));
        }
        if let Some(congestion) = &self.congestion {
            name.push_str(&format!(" -C {congestion}"));
        }
        name
    }

    /// Sends `bytes` once.
    pub(crate) fn run(&self, net: &Net, bytes: u64) -> Result<Streamed, BenchError> {
        let (busy, children) = (cpu::machine_busy_s()?, cpu::ended_children_s()?);
        let report = self.report(net, &["-n".into(), bytes.to_string()])?;
        let (bytes, seconds) = received(&report).ok_or_else(|| unexpected(&report))?;
        Ok(Streamed {
            bytes,
            seconds,
            cpu_s: cpu::ended_children_s()? - children,
            machine_cpu_s: cpu::machine_busy_s()? - busy,
        })
    }

    /// Sends for some time; of the receiver's account, with the sender's intervals.
    pub(crate) fn stream(
        &self,
        net: &Net,
        span: Span,
        interval_ms: u64,
    ) -> Result<Taken, BenchError> {
        // It takes whole seconds, and intervals from a tenth of one on.
        let whole = |seconds: f64| (seconds.ceil().max(1.0) as u64).to_string();
        let interval_s = (interval_ms as f64 / 1e3).max(0.1);
        let mut words = vec!["-t".into(), whole(span.seconds), "-i".into(), interval_s.to_string()];
        if span.warm_up_s > 0.0 {
            words.extend(["-O".into(), whole(span.warm_up_s)]);
        }
        let report = self.report(net, &words)?;
        let (bytes, seconds) = received(&report).ok_or_else(|| unexpected(&report))?;
        let distribution = Distribution::default();
        let intervals = intervals(&report);
        let said = report["end"]["cpu_utilization_percent"].clone();
        let recorded = Recorded { bytes, seconds, distribution, intervals };
        Ok(Taken { recorded, said: json!({ "cpu_utilization_percent": said }) })
    }

    /// What it says in JSON.
    fn report(&self, net: &Net, amount: &[String]) -> Result<Value, BenchError> {
        let address = net.target_address();
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let server = ["-s", "-1", "-p", &port, "-B", &ip].map(String::from);
        let mut client: Vec<String> = ["-J", "-c", &ip, "-p", &port].map(String::from).into();
        client.extend(amount.iter().cloned());
        client.extend(["-P".into(), self.streams.to_string()]);
        client.extend(["-l".into(), self.length()]);
        if let Some(kib) = self.buffer_kib {
            client.extend(["-w".into(), format!("{kib}K")]);
        }
        if let Some(affinity) = self.affinity() {
            client.extend(["-A".into(), affinity]);
        }
        if let Some(congestion) = &self.congestion {
            client.extend(["-C".into(), congestion.clone()]);
        }
        let (server, client) = ((None, server.into()), (None, client));
        let said = serve_and_ask(net, PROGRAM, address, server, client)?;
        let not_json = |_| BenchError::Unexpected { program: PROGRAM.into(), said: tail(&said) };
        serde_json::from_str(&said).map_err(not_json)
    }

    /// As `-l` takes it.
    fn length(&self) -> String {
        match self.length_bytes % 1024 {
            0 => format!("{}K", self.length_bytes / 1024),
            _ => self.length_bytes.to_string(),
        }
    }

    fn affinity(&self) -> Option<String> {
        let (client, server) = self.placement.cores(0);
        Some(format!("{},{}", client?, server?))
    }
}

/// Bytes that were received, and in which time.
fn received(report: &Value) -> Option<(u64, f64)> {
    let received = &report["end"]["sum_received"];
    Some((received["bytes"].as_u64()?, received["seconds"].as_f64()?))
}

/// Those after what is omitted. The first one's own times are wrong (3.12): each one goes on until
/// the next one starts.
fn intervals(report: &Value) -> Vec<Interval> {
    let all = report["intervals"].as_array().cloned().unwrap_or_default();
    let sums = all.into_iter().map(|mut interval| interval["sum"].take());
    let kept: Vec<Value> = sums.filter(|sum| sum["omitted"] == false).collect();
    let number = |sum: &Value, name: &str| sum[name].as_f64().unwrap_or(0.0);
    let interval = |(index, sum): (usize, &Value)| {
        let at_s = if index == 0 { 0.0 } else { number(sum, "start") };
        let seconds = match kept.get(index + 1) {
            Some(next) => number(next, "start") - at_s,
            None => number(sum, "seconds"),
        };
        let distribution = Distribution::default();
        Interval { at_s, seconds, bytes: sum["bytes"].as_u64().unwrap_or(0), distribution }
    };
    kept.iter().enumerate().map(interval).collect()
}

fn unexpected(report: &Value) -> BenchError {
    BenchError::Unexpected { program: PROGRAM.into(), said: tail(&report.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What 3.12 says of `-t 1 -O 1 -i 0.5`, with its first interval after the omitted ones.
    #[test]
    fn what_it_says_is_read() {
        let sum = |start: f64, seconds: f64, bytes: u64, omitted: bool| json!({ "sum": { "start": start, "seconds": seconds, "bytes": bytes, "omitted": omitted } });
        let report = json!({
            "intervals": [
                sum(0.0, 0.5, 1, true), sum(0.5, 0.5, 2, true),
                sum(0.5, 1.0, 30, false), sum(0.5, 0.5, 40, false),
            ],
            "end": { "sum_received": { "bytes": 70, "seconds": 0.99 } },
        });
        assert_eq!(received(&report), Some((70, 0.99)));
        let read: Vec<(f64, f64, u64)> =
            intervals(&report).iter().map(|i| (i.at_s, i.seconds, i.bytes)).collect();
        assert_eq!(read, [(0.0, 0.5, 30), (0.5, 0.5, 40)]);
    }
}
