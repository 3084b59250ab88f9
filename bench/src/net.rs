//! The two end points: namespaces joined by veth, or one loopback device.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect,
    listen as listen_on, setsockopt, socket, sockopt,
};
use pageferry_ctl::lab::{Namespace, TwoHosts, Workplace, is_root};

use crate::args::{Common, NetKind};
use crate::error::BenchError;

/// Ports used are counted up from here, so that no run meets a socket that the one before left.
const FIRST_PORT: u16 = 5100;

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Where the guest is.
    Source,
    /// Where it goes.
    Target,
}

/// How sockets are tuned; the default leaves everything to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Send and receive buffer.
    pub(crate) buffer_bytes: Option<usize>,
    /// Congestion control.
    pub(crate) congestion: Option<String>,
}

/// Where everyone's bytes go.
#[derive(Debug)]
pub(crate) struct Net {
    ends: Ends,
    next_port: AtomicU16,
    /// The guest went over: what was the target is the source now.
    swapped: AtomicBool,
    /// There are more links than one.
    rails: AtomicBool,
}

#[derive(Debug)]
enum Ends {
    Veth(Box<TwoHosts>),
    Loopback(Namespace),
    /// Without root there is only the machine's own.
    Machine,
}

impl Net {
    /// Makes what `common` asks for.
    pub(crate) fn new(common: &Common, workplace: &Arc<Workplace>) -> Result<Self, BenchError> {
        let net = Self::between(common.net, workplace)?;
        if let Some(name) = &common.congestion {
            net.set_congestion_control(name)?;
        }
        Ok(net)
    }

    /// The two ends of this kind.
    pub(crate) fn between(kind: NetKind, workplace: &Arc<Workplace>) -> Result<Self, BenchError> {
        Ok(Self::of(match kind {
            NetKind::Veth => Ends::Veth(Box::new(TwoHosts::new(workplace)?)),
            // In a namespace of its own, neither ports nor settings are anyone else's.
            NetKind::Loopback if is_root() => Ends::Loopback(Namespace::new(workplace, "b")?),
            NetKind::Loopback => Ends::Machine,
        }))
    }

    /// Both ends on the machine's own loopback device.
    pub(crate) fn machine() -> Self {
        Self::of(Ends::Machine)
    }

    fn of(ends: Ends) -> Self {
        Self { ends, next_port: FIRST_PORT.into(), swapped: false.into(), rails: false.into() }
    }

    /// Source and target change places.
    pub(crate) fn swap(&self) {
        self.swapped.fetch_xor(true, Ordering::Relaxed);
    }

    /// Shapes the link between the namespaces; 0 leaves it as it is.
    pub(crate) fn shape(&self, mbit_per_second: u64) -> Result<(), BenchError> {
        match &self.ends {
            _ if mbit_per_second == 0 => Ok(()),
            Ends::Veth(hosts) => Ok(hosts.shape(mbit_per_second)?),
            _ => Err(BenchError::Usage { what: "a shaped link needs --net veth" }),
        }
    }

    /// Makes a rail, or takes the link for number 0, and shapes it.
    pub(crate) fn rail(&self, number: u8, mbit_per_second: u64) -> Result<(), BenchError> {
        let Ends::Veth(hosts) = &self.ends else {
            return Err(BenchError::Usage { what: "rails need --net veth" });
        };
        if number > 0 {
            hosts.add_rail(number)?;
            self.rails.store(true, Ordering::Relaxed);
        }
        Ok(hosts.shape_rail(number, mbit_per_second)?)
    }

    /// What the target agent is told to listen at, for a source that calls `address`.
    pub(crate) fn listen_at(&self, address: SocketAddr) -> String {
        match self.rails.load(Ordering::Relaxed) {
            true => format!("0.0.0.0:{}", address.port()),
            false => address.to_string(),
        }
    }

    /// The namespace of one end, by name.
    pub(crate) fn namespace(&self, end: End) -> Option<String> {
        self.namespace_of(end).map(|namespace| namespace.name().to_owned())
    }

    /// An address and port to listen on at the target, not used before.
    pub(crate) fn target_address(&self) -> SocketAddr {
        let port = match &self.ends {
            Ends::Machine => free_port(),
            _ => self.next_port.fetch_add(1, Ordering::Relaxed),
        };
        let address = match &self.ends {
            Ends::Veth(hosts) if self.swapped.load(Ordering::Relaxed) => hosts.source.address,
            Ends::Veth(hosts) => hosts.target.address,
            _ => Ipv4Addr::LOCALHOST,
        };
        (address, port).into()
    }

    /// A command that runs `program` at one end.
    pub(crate) fn command(&self, end: End, program: &Path) -> Command {
        match self.namespace_of(end) {
            Some(namespace) => namespace.command(program),
            None => Command::new(program),
        }
    }

    /// Connected pairs: the source's socket and the target's, tuned before the handshake: buffers
    /// decide about the window, and a congestion control that has begun to pace leaves its pacing
    /// behind when it is replaced.
    pub(crate) fn connect(
        &self,
        count: usize,
        tuning: &Tuning,
    ) -> Result<Vec<(TcpStream, TcpStream)>, BenchError> {
        let address = self.target_address();
        let listener = self.at(End::Target, || listen(address, tuning))??;
        (0..count)
            .map(|_| {
                let source = self.at(End::Source, || dial(address, tuning))??;
                let (target, _) =
                    listener.accept().map_err(BenchError::io("accept on", address))?;
                Ok((source, target))
            })
            .collect()
    }

    /// The congestion control that sockets at the source begin with.
    pub(crate) fn congestion_control(&self) -> Result<String, BenchError> {
        let read = || std::fs::read_to_string(CONGESTION);
        let text = self.at(End::Source, read)?.map_err(BenchError::io("read", CONGESTION))?;
        Ok(text.trim().to_owned())
    }

    fn set_congestion_control(&self, name: &str) -> Result<(), BenchError> {
        if matches!(self.ends, Ends::Machine) {
            let what = "--congestion needs root: without namespaces it would be the machine's";
            return Err(BenchError::Usage { what });
        }
        for end in [End::Source, End::Target] {
            // /proc/sys/net is that of the thread's namespace.
            let write = || std::fs::write(CONGESTION, name);
            self.at(end, write)?.map_err(BenchError::io("write", CONGESTION))?;
        }
        Ok(())
    }

    /// Runs `work` at one end: sockets made there belong to it.
    pub(crate) fn at<T: Send>(
        &self,
        end: End,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, BenchError> {
        match self.namespace_of(end) {
            Some(namespace) => Ok(namespace.run(work)?),
            None => Ok(work()),
        }
    }

    fn namespace_of(&self, end: End) -> Option<&Namespace> {
        let swapped = self.swapped.load(Ordering::Relaxed);
        match (&self.ends, end) {
            (Ends::Veth(hosts), End::Source) if !swapped => Some(&hosts.source.namespace),
            (Ends::Veth(hosts), End::Target) if swapped => Some(&hosts.source.namespace),
            (Ends::Veth(hosts), _) => Some(&hosts.target.namespace),
            (Ends::Loopback(namespace), _) => Some(namespace),
            (Ends::Machine, _) => None,
        }
    }
}

/// A port of the machine that was free a moment ago.
fn free_port() -> u16 {
    let any = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|it| it.local_addr());
    any.map_or(FIRST_PORT, |address| address.port())
}

const CONGESTION: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

fn listen(address: SocketAddr, tuning: &Tuning) -> Result<TcpListener, BenchError> {
    let fd = tuned(tuning)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address)).map_err(BenchError::call("bind"))?;
    listen_on(&fd, Backlog::MAXCONN).map_err(BenchError::call("listen"))?;
    Ok(fd.into())
}

fn dial(address: SocketAddr, tuning: &Tuning) -> Result<TcpStream, BenchError> {
    let fd = tuned(tuning)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(address))
        .map_err(BenchError::call("connect"))?;
    Ok(fd.into())
}

/// A socket that is not connected yet; one that listens hands its tuning on.
fn tuned(tuning: &Tuning) -> Result<OwnedFd, BenchError> {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(BenchError::call("socket"))?;
    if let Some(bytes) = tuning.buffer_bytes {
        // Past the system's limit where privileges allow it.
        if setsockopt(&fd, sockopt::SndBufForce, &bytes).is_err() {
            setsockopt(&fd, sockopt::SndBuf, &bytes).map_err(BenchError::call("setsockopt"))?;
        }
        if setsockopt(&fd, sockopt::RcvBufForce, &bytes).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &bytes).map_err(BenchError::call("setsockopt"))?;
        }
    }
    if let Some(name) = &tuning.congestion {
        setsockopt(&fd, sockopt::TcpCongestion, &name.into())
            .map_err(BenchError::call("setsockopt(TCP_CONGESTION)"))?;
    }
    Ok(fd)
}
