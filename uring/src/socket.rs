//! Sockets of lanes: opened and tuned.
//!
//! Used by whoever opens or accepts a connection, before a lane's worker owns it.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::plan::{LaneRoute, SocketTuning};

/// Congestion control that paces nothing and that every system allows every user.
const UNPACED: &str = "reno";

/// Whether somebody listens at the end of `route`, and can be reached through its NIC: connects, says
/// nothing, and hangs up.
pub fn reaches(route: &LaneRoute, within: Duration) -> bool {
    open(route.to, Some(route), None, SocketTuning::default(), within).is_ok()
}

/// Connects, tuned before the handshake: the buffers decide about the window, and a congestion
/// control that has begun to pace leaves its pacing behind when it is replaced. `from` is a local
/// address better than the route's own.
pub(crate) fn open(
    addr: SocketAddr,
    route: Option<&LaneRoute>,
    from: Option<SocketAddr>,
    tuning: SocketTuning,
    wait: Duration,
) -> io::Result<TcpStream> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    tune(&fd, tuning)?;
    // Linux ends a blocking connect after this time.
    let timeout = TimeVal::new(wait.as_secs() as i64, wait.subsec_micros().into());
    setsockopt(&fd, sockopt::SendTimeout, &timeout)?;
    if let Some(route) = route {
        // Of two NICs in one subnet the system's routes would take the same for all lanes. Where
        // this is not allowed, the local address alone has to do.
        let device = OsString::from(&route.device);
        if let Err(errno) = setsockopt(&fd, sockopt::BindToDevice, &device) {
            tracing::debug!(%errno, route.device, "a lane is not bound to its NIC");
        }
    }
    if let Some(from) = from.or(route.map(|route| route.from)) {
        bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    }
    connect(fd.as_raw_fd(), &SockaddrStorage::from(addr))?;
    Ok(TcpStream::from(fd))
}

/// Tunes a socket, connected or not.
pub(crate) fn tune(socket: &impl AsFd, tuning: SocketTuning) -> io::Result<()> {
    // A barrier must not wait for more bytes to share its packet.
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    if let Some(bytes) = tuning.buffer_bytes {
        // Past the system's limit where privileges allow it.
        if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
            setsockopt(socket, sockopt::SndBuf, &bytes)?;
        }
        if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
            setsockopt(socket, sockopt::RcvBuf, &bytes)?;
        }
    }
    if tuning.unpaced
        && let Err(errno) = setsockopt(socket, sockopt::TcpCongestion, &OsString::from(UNPACED))
    {
        tracing::debug!(%errno, "congestion control left as it is");
    }
    Ok(())
}
