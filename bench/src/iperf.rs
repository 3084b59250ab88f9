//! iperf3 between the same end points: what people measure a link with.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::ceiling::{Placement, Streamed};
use crate::cpu;
use crate::error::BenchError;
use crate::net::{End, Net};
use crate::ours::tail;

/// A run that takes longer hangs.
const RUN_MAX: Duration = Duration::from_secs(120);
/// A server that was asked to serve one client ends soon after it.
const SERVER_END_MAX: Duration = Duration::from_secs(10);

/// One way to run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct IperfWay {
    /// `-P`.
    pub(crate) streams: usize,
    /// `-w` in KiB; `None` leaves the buffers to the kernel.
    pub(crate) buffer_kib: Option<usize>,
    /// `-l` in KiB.
    pub(crate) length_kib: usize,
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
                            length_kib,
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
        let mut name = format!("iperf3 -P {} -l {}K", self.streams, self.length_kib);
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
        let (address, program) = (net.target_address(), Path::new("iperf3"));
        let port = address.port().to_string();
        let mut server = net.command(End::Target, program);
        server.args(["-s", "-1", "--forceflush", "-p", &port, "-B", &address.ip().to_string()]);
        let mut server = Running::start(&mut server)?;
        server.wait_listening()?;

        let mut client = net.command(End::Source, program);
        client.args(["-J", "-c", &address.ip().to_string(), "-p", &port]);
        client.args(["-n", &bytes.to_string(), "-P", &self.streams.to_string()]);
        client.args(["-l", &format!("{}K", self.length_kib)]);
        if let Some(kib) = self.buffer_kib {
            client.args(["-w", &format!("{kib}K")]);
        }
        if let Some(affinity) = self.affinity() {
            client.args(["-A", &affinity]);
        }
        if let Some(congestion) = &self.congestion {
            client.args(["-C", congestion]);
        }
        let mut client = Running::start(&mut client)?;
        let said = client.finish(RUN_MAX)?;
        server.finish(SERVER_END_MAX)?;
        let unexpected = || BenchError::Unexpected { program: "iperf3".into(), said: tail(&said) };
        let report: Value = serde_json::from_str(&said).map_err(|_| unexpected())?;
        let received = &report["end"]["sum_received"];
        Ok(Streamed {
            bytes: received["bytes"].as_u64().ok_or_else(unexpected)?,
            seconds: received["seconds"].as_f64().ok_or_else(unexpected)?,
            cpu_s: cpu::ended_children_s()? - children,
            machine_cpu_s: cpu::machine_busy_s()? - busy,
        })
    }

    fn affinity(&self) -> Option<String> {
        let (client, server) = self.placement.cores(0);
        Some(format!("{},{}", client?, server?))
    }
}

/// A program whose output is read; dropped, it is killed.
struct Running {
    child: Child,
    reader: Option<std::thread::JoinHandle<String>>,
    listening: std::sync::mpsc::Receiver<()>,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self, BenchError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(BenchError::io("run", "iperf3"))?;
        let (heard, listening) = std::sync::mpsc::channel();
        let out = child.stdout.take();
        let reader = std::thread::spawn(move || {
            use std::io::{BufRead, BufReader};
            let mut said = String::new();
            for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()).flatten() {
                if line.contains("listening") {
                    // Nobody waits for it at the client's end.
                    let _ = heard.send(());
                }
                said.push_str(&line);
                said.push('\n');
            }
            said
        });
        Ok(Self { child, reader: Some(reader), listening })
    }

    fn wait_listening(&mut self) -> Result<(), BenchError> {
        self.listening.recv_timeout(SERVER_END_MAX).map_err(|_| BenchError::Timeout {
            what: "iperf3 to listen".into(),
            waited_s: SERVER_END_MAX.as_secs(),
        })
    }

    /// Waits for its end; what it said.
    fn finish(&mut self, longest: Duration) -> Result<String, BenchError> {
        let started = Instant::now();
        let status = loop {
            match self.child.try_wait().map_err(BenchError::io("wait for", "iperf3"))? {
                Some(status) => break status,
                None if started.elapsed() > longest => {
                    let (what, waited_s) = ("iperf3 to end".into(), longest.as_secs());
                    return Err(BenchError::Timeout { what, waited_s });
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        // The reader has no reason to panic; an empty report is refused by whoever reads it.
        let said = self.reader.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        match status.success() {
            true => Ok(said),
            false => {
                let program = "iperf3".to_owned();
                Err(BenchError::Program { program, status, said: tail(&said) })
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
