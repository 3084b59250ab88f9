//! The way of QEMU's device state between QEMU and this agent: a socket pair, one end given away.
//!
//! ```text
//!   source QEMU ──device state──► Channel ┄┄ control connection ┄┄► Channel ──► target QEMU
//!               ◄──return path───         ◄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄           ◄──
//! ```
//!
//! Nothing of it is in the file system, nobody else can connect to it, and when this process dies
//! QEMU sees the end at once. Both directions may be used from different threads. Bytes are passed
//! on as they come and never looked at or stored.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use crate::limits::DEVICE_STATE_SOCKET_BYTES;

/// Our end.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Makes a channel; the descriptor is QEMU's end.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, qemus) = UnixStream::pair()?;
        // On a Unix socket the sender's buffer is the one that counts. Without privileges the
        // system's limit is kept to, which is slower and not wrong.
        for end in [&ours, &qemus] {
            if setsockopt(end, sockopt::SndBufForce, &DEVICE_STATE_SOCKET_BYTES).is_err() {
                let _ = setsockopt(end, sockopt::SndBuf, &DEVICE_STATE_SOCKET_BYTES);
            }
        }
        ours.set_nonblocking(true)?;
        Ok((Self { stream: ours }, qemus.into()))
    }

    /// Reads what QEMU has sent, up to the length of `bytes`; 0 when it has closed its end.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if nothing came until `deadline`.
    pub fn read(&self, bytes: &mut [u8], deadline: Instant) -> io::Result<usize> {
        loop {
            match (&self.stream).read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLIN, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // QEMU closed with bytes of ours unread: as much its end as any.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                other => return other,
            }
        }
    }

    /// Writes all of `bytes`, waiting for QEMU to take them.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if QEMU did not take all of them until `deadline`;
    /// [`io::ErrorKind::BrokenPipe`] if it has closed its end.
    pub fn write_all(&self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            match (&self.stream).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLOUT, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Nothing more will be written: QEMU reads an end behind what was. The other direction stays.
    pub fn finish(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    /// Ends both directions at once; wakes whoever waits in them. QEMU's migration fails of it,
    /// unless it had finished.
    pub fn close(&self) {
        // Fails only if the other end is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = PollTimeout::try_from(left + Duration::from_millis(1))
            .unwrap_or(PollTimeout::from(u16::MAX));
        match poll(&mut [PollFd::new(self.stream.as_fd(), flags)], left) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Channel {
    /// For waiting on it together with something else; it is not blocking.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[test]
    fn both_directions_have_deadlines_and_ends() {
        let (channel, qemus) = Channel::pair().expect("pair");
        let mut qemu = UnixStream::from(qemus);
        let mut bytes = [0; 16];
        let error = channel.read(&mut bytes, soon()).expect_err("nothing was sent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        qemu.write_all(b"state").expect("write");
        assert_eq!(channel.read(&mut bytes, soon()).expect("read"), 5);

        let error = channel.write_all(&vec![0; 64 << 20], soon()).expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        channel.finish().expect("finish");
        assert!(qemu.read_to_end(&mut Vec::new()).expect("end") > 0);
        drop(qemu);
        assert_eq!(channel.read(&mut bytes, soon()).expect("end"), 0);
    }

    #[test]
    fn close_wakes_a_reader() {
        let (channel, _qemus) = Channel::pair().expect("pair");
        let channel = &channel;
        std::thread::scope(|scope| {
            let far = || Instant::now() + Duration::from_secs(20);
            let reader = scope.spawn(move || channel.read(&mut [0; 16], far()).expect("end"));
            channel.close();
            assert_eq!(reader.join().expect("reader"), 0);
        });
    }
}
