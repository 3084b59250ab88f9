//! The other end of a measurement: a process that answers, and the handle on it.
//!
//! ```text
//!   benchmark                          serve
//!   connects (TCP)      ------------>
//!   one request a line  ------------>  makes what is asked for, listens
//!                       <------------  where: port
//!   data connection     ============>  answers until it is closed
//!                       <------------  done, or what went wrong
//! ```
//!
//! A process of its own, as the servers of the tools we stand beside are.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::ServeArgs;
use crate::error::BenchError;
use crate::{cores_wire, cpu, lanes_wire, rdma_wire, stream_wire, tcp_wire};

/// An answer that takes longer does not come: memory is made and registered before it.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// Between two looks for one that is on its way.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What is wanted of the other end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// A TCP connection whose every message is answered with one.
    TcpPong(tcp_wire::Way),
    /// TCP connections whose bytes are counted.
    TcpSink(stream_wire::Way),
    /// A bare connection over RDMA whose every message is answered with one.
    RdmaPong(rdma_wire::Way),
    /// Bare connections over RDMA that are written to.
    RdmaSink(rdma_wire::Way),
    /// A migration's lanes.
    Lanes(lanes_wire::Way),
    /// How the NIC that we are asked at spreads flows over its queues.
    Queues,
    /// A migration's lanes over TCP, with what each core did.
    LanesOnCores(cores_wire::Way),
}

/// One answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// It listens.
    Port(u16),
    /// It was closed in order; what there is to say.
    Done(Value),
    /// It failed.
    Error(String),
}

/// Serves until nobody is connected any more (`--once`), or for ever.
pub(crate) fn run(args: &ServeArgs) -> Result<(), BenchError> {
    if let Some(core) = args.cpu {
        cpu::pin_to(core)?;
    }
    let listener =
        TcpListener::bind(args.listen).map_err(BenchError::io("listen on", args.listen))?;
    let address = listener.local_addr().map_err(BenchError::io("listen on", args.listen))?;
    println!("listening {address}");
    loop {
        let (stream, _) = listener.accept().map_err(BenchError::io("accept on", address))?;
        if args.once {
            return answer_all(stream, address.ip());
        }
        std::thread::spawn(move || {
            if let Err(error) = answer_all(stream, address.ip()) {
                eprintln!("error: {}", error.chain());
            }
        });
    }
}

fn answer_all(stream: TcpStream, at: IpAddr) -> Result<(), BenchError> {
    let io = || BenchError::io("talk to", "the benchmark");
    let mut out = stream.try_clone().map_err(io())?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(io())?;
        let mut say = |answer: &Answer| {
            let mut line = serde_json::to_string(answer).expect("plain data");
            line.push('\n');
            out.write_all(line.as_bytes()).map_err(io())
        };
        let request = serde_json::from_str(&line);
        let request = request.map_err(|error| BenchError::Unexpected {
            program: "the benchmark".into(),
            said: format!("{line}: {error}"),
        });
        let mut ready = |port| say(&Answer::Port(port));
        let done = request.and_then(|request| match request {
            Request::TcpPong(way) => tcp_wire::serve_pong(at, &way, &mut ready),
            Request::RdmaPong(way) => rdma_wire::serve_pong(at, &way, &mut ready),
            Request::RdmaSink(way) => rdma_wire::serve_sink(at, &way, &mut ready),
            Request::TcpSink(way) => stream_wire::serve(at, &way, &mut ready),
            Request::Lanes(way) => lanes_wire::serve(at, &way, &mut ready),
            Request::Queues => cores_wire::tell(at, &mut ready),
            Request::LanesOnCores(way) => cores_wire::serve(at, &way, &mut ready),
        });
        match done {
            Ok(value) => say(&Answer::Done(value))?,
            Err(error) => say(&Answer::Error(error.chain()))?,
        }
    }
    Ok(())
}

/// A process that serves this one.
#[derive(Debug)]
pub(crate) struct Peer {
    child: Option<Child>,
    address: SocketAddr,
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Peer {
    /// Starts one at an address of this machine, on a core if told; `make` decides in which
    /// namespace.
    pub(crate) fn start(
        make: impl FnOnce(&Path) -> Command,
        at: IpAddr,
        core: Option<usize>,
    ) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::io("find", "this program"))?;
        let mut command = make(&program);
        command.args(["serve", "--once", "--listen", &SocketAddr::new(at, 0).to_string()]);
        if let Some(core) = core {
            command.args(["--cpu", &core.to_string()]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(BenchError::io("run", "this program"))?;
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).map_err(BenchError::io("read from", "serve"))?;
        let address = line.trim().strip_prefix("listening ").and_then(|text| text.parse().ok());
        let address = address.ok_or_else(|| unexpected(&line))?;
        let mut this = Self::connect(address)?;
        this.child = Some(child);
        Ok(this)
    }

    /// Asks one that runs already, on this machine or another.
    pub(crate) fn connect(address: SocketAddr) -> Result<Self, BenchError> {
        let io = || BenchError::io("connect to", address);
        let writer = TcpStream::connect(address).map_err(io())?;
        writer.set_read_timeout(Some(ANSWER_MAX)).map_err(io())?;
        let reader = BufReader::new(writer.try_clone().map_err(io())?);
        Ok(Self { child: None, address, reader, writer })
    }

    /// The same with one that may be on its way.
    pub(crate) fn connect_by(address: SocketAddr, until: Instant) -> Result<Self, BenchError> {
        loop {
            match Self::connect(address) {
                Err(_) if Instant::now() < until => std::thread::sleep(ASK_AGAIN),
                other => return other,
            }
        }
    }

    /// Has it make something; where that listens.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<SocketAddr, BenchError> {
        let mut line = serde_json::to_string(request).expect("plain data");
        line.push('\n');
        self.writer.write_all(line.as_bytes()).map_err(BenchError::io("write to", self.address))?;
        match self.answer()? {
            Answer::Port(port) => Ok(SocketAddr::new(self.address.ip(), port)),
            other => Err(unexpected(&format!("{other:?}"))),
        }
    }

    /// Waits until what it made is closed; what it has to say of it.
    pub(crate) fn done(&mut self) -> Result<Value, BenchError> {
        match self.answer()? {
            Answer::Done(value) => Ok(value),
            other => Err(unexpected(&format!("{other:?}"))),
        }
    }

    fn answer(&mut self) -> Result<Answer, BenchError> {
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(BenchError::io("read from", self.address))?;
        match serde_json::from_str(&line) {
            Ok(Answer::Error(said)) => Err(unexpected(&said)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(unexpected(&line)),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn unexpected(said: &str) -> BenchError {
    BenchError::Unexpected { program: "pageferry-bench serve".into(), said: said.trim().into() }
}
