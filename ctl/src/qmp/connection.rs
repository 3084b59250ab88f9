//! The socket of a monitor: bounded lines in, commands out, events queued.
//!
//! Used by [`super::Qmp`] alone, one call at a time.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    sendmsg, socket, sockopt,
};
use serde_json::{Map, Value, json};

use super::{Event, QmpError};
use crate::limits::{QMP_CONNECT_RETRY, QMP_EVENTS_MAX, QMP_LINE_BYTES_MAX, QMP_LISTEN_TIMEOUT};

/// One line from QEMU.
#[derive(Debug)]
pub(super) enum Message {
    /// `{"QMP": …}`, once.
    Greeting(Value),
    /// The answer to a command.
    Reply { id: Option<u64>, result: Answer },
    /// Something that happened.
    Event(Event),
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Bytes read and not yet taken as a line.
    pending: Vec<u8>,
    /// How much of `pending` is known to hold no line end.
    searched: usize,
    events: VecDeque<Event>,
    last_id: u64,
    /// Commands whose answers will be asked for, with those that have come.
    kept: Vec<(u64, Option<Answer>)>,
}

/// What QEMU answered: a value, or its error's class and words.
type Answer = Result<Value, (String, String)>;

impl Connection {
    pub(super) fn open(path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let failed = |errno: Errno| QmpError::Connect { path: path.into(), source: errno.into() };
        let address = UnixAddr::new(path).map_err(failed)?;
        // Not blocking: QEMU's backlog is one, and while it serves another client a third one
        // would hang in connect() for ever. With this flag the kernel says EAGAIN instead.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
        // A QEMU that is just starting has bound its socket before it listens on it.
        let listens_by = deadline.min(Instant::now() + QMP_LISTEN_TIMEOUT);
        loop {
            match connect(fd.as_raw_fd(), &address) {
                Ok(()) => break,
                Err(Errno::EAGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(QMP_CONNECT_RETRY);
                }
                Err(Errno::ECONNREFUSED) if Instant::now() < listens_by => {
                    std::thread::sleep(QMP_CONNECT_RETRY);
                }
                Err(Errno::EAGAIN) => return Err(QmpError::Busy { path: path.into() }),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Self::over(UnixStream::from(fd))
    }

    pub(super) fn over(stream: UnixStream) -> Result<Self, QmpError> {
        let set = stream.set_nonblocking(true);
        set.map_err(|source| QmpError::Host { call: "fcntl", source })?;
        Ok(Self {
            stream,
            pending: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            last_id: 0,
            kept: Vec::new(),
        })
    }

    pub(super) fn execute(
        &mut self,
        command: &str,
        args: &Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let id = self.post(command, args, fd, deadline, false)?;
        self.answer(command, id, deadline)
    }

    /// Sends a command and returns its id. Its answer is kept until it is asked for, if `keep`.
    pub(super) fn post(
        &mut self,
        command: &str,
        args: &Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
        keep: bool,
    ) -> Result<u64, QmpError> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({ "execute": command, "id": id });
        if args.as_object().is_some_and(|args| !args.is_empty()) {
            line["arguments"] = args.clone();
        }
        let mut line = line.to_string();
        line.push('\n');
        tracing::trace!(%command, %args, "qmp: execute");
        let doing = || format!("sending {command}");
        self.send(line.as_bytes(), fd, deadline).map_err(|error| error.while_doing(doing))?;
        if keep {
            self.kept.push((id, None));
        }
        Ok(id)
    }

    /// Waits for the answer to `command`, sent as `id`.
    pub(super) fn answer(
        &mut self,
        command: &str,
        id: u64,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let began = Instant::now();
        let kept = self.kept.iter().position(|(kept, _)| *kept == id);
        let mut answer = kept.and_then(|index| self.kept.swap_remove(index).1);
        loop {
            if let Some(answer) = answer {
                tracing::trace!(%command, us = began.elapsed().as_micros(), "qmp: answered");
                return answer.map_err(|(class, desc)| QmpError::Refused {
                    command: command.into(),
                    class,
                    desc,
                });
            }
            let doing = || format!("running {command}");
            match self.read(deadline).map_err(|error| error.while_doing(doing))? {
                Message::Event(event) => self.queue(event),
                // An answer without id is to a line that QEMU could not parse: ours.
                Message::Reply { id: answered, result } if answered.is_none_or(|it| it == id) => {
                    answer = Some(result);
                }
                Message::Reply { id, result } => self.keep(id, result),
                Message::Greeting(_) => return Err(QmpError::Malformed { source: None }),
            }
        }
    }

    pub(super) fn execute_until_event(
        &mut self,
        command: &str,
        args: &Value,
        name: &str,
        deadline: Instant,
    ) -> Result<Option<Event>, QmpError> {
        self.forget_events(name)?;
        let id = self.post(command, args, None, deadline, true)?;
        loop {
            // The event comes first, if one comes.
            if let Some(index) = self.events.iter().position(|event| event.name == name) {
                self.kept.retain(|(kept, _)| *kept != id);
                return Ok(self.events.remove(index));
            }
            if self.kept.iter().any(|(kept, answer)| *kept == id && answer.is_some()) {
                return self.answer(command, id, deadline).map(|_| None);
            }
            let doing = || format!("running {command}");
            match self.read(deadline).map_err(|error| error.while_doing(doing))? {
                Message::Event(event) => self.queue(event),
                Message::Reply { id, result } => self.keep(id, result),
                Message::Greeting(_) => return Err(QmpError::Malformed { source: None }),
            }
        }
    }

    /// Keeps an answer that somebody will ask for. Others are late ones, to commands that timed
    /// out: nobody waits for them.
    fn keep(&mut self, id: Option<u64>, result: Answer) {
        if let Some(place) = self.kept.iter_mut().find(|(kept, _)| Some(*kept) == id) {
            place.1 = Some(result);
        }
    }

    pub(super) fn wait_event(
        &mut self,
        name: &str,
        deadline: Instant,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        let matches = |event: &Event| event.name == name && wanted(event);
        if let Some(event) =
            self.events.iter().position(matches).and_then(|index| self.events.remove(index))
        {
            return Ok(event);
        }
        let doing = || format!("waiting for the event {name}");
        loop {
            match self.read(deadline).map_err(|error| error.while_doing(doing))? {
                Message::Event(event) if matches(&event) => return Ok(event),
                Message::Event(event) => self.queue(event),
                Message::Reply { id, result } => self.keep(id, result),
                Message::Greeting(_) => return Err(QmpError::Malformed { source: None }),
            }
        }
    }

    pub(super) fn drain_events(&mut self) -> Result<Vec<Event>, QmpError> {
        self.collect_events()?;
        Ok(self.events.drain(..).collect())
    }

    pub(super) fn forget_events(&mut self, name: &str) -> Result<(), QmpError> {
        self.collect_events()?;
        self.events.retain(|event| event.name != name);
        Ok(())
    }

    /// Queues all events that have arrived.
    fn collect_events(&mut self) -> Result<(), QmpError> {
        let now = Instant::now();
        loop {
            match self.read(now) {
                Ok(Message::Event(event)) => self.queue(event),
                Ok(Message::Reply { id, result }) => self.keep(id, result),
                Ok(Message::Greeting(_)) => {}
                Err(QmpError::Timeout { .. }) => return Ok(()),
                Err(error) => return Err(error.while_doing(|| "looking for events".into())),
            }
        }
    }

    pub(super) fn listener_credentials(&self) -> Result<(i32, u32), QmpError> {
        let credentials = getsockopt(&self.stream, sockopt::PeerCredentials)
            .map_err(|errno| QmpError::Host { call: "SO_PEERCRED", source: errno.into() })?;
        Ok((credentials.pid(), credentials.uid()))
    }

    /// The next line. At a deadline in the past, lines that have already arrived are still
    /// returned.
    pub(super) fn read(&mut self, deadline: Instant) -> Result<Message, QmpError> {
        loop {
            if let Some(line) = self.take_line() {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return parse(&line);
            }
            if self.pending.len() >= QMP_LINE_BYTES_MAX {
                return Err(QmpError::LineTooLong { limit_bytes: QMP_LINE_BYTES_MAX });
            }
            self.fill(deadline)?;
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.pending[self.searched..].iter().position(|byte| *byte == b'\n');
        match end {
            Some(end) => {
                let rest = self.pending.split_off(self.searched + end + 1);
                self.searched = 0;
                Some(std::mem::replace(&mut self.pending, rest))
            }
            None => {
                self.searched = self.pending.len();
                None
            }
        }
    }

    /// Waits for bytes and appends them to `pending`.
    fn fill(&mut self, deadline: Instant) -> Result<(), QmpError> {
        let mut chunk = [0; 16 << 10];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed { doing: String::new() }),
                Ok(count) => {
                    self.pending.extend_from_slice(&chunk[..count]);
                    return Ok(());
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLIN, deadline)?,
                    io::ErrorKind::ConnectionReset => {
                        return Err(QmpError::Closed { doing: String::new() });
                    }
                    _ => return Err(QmpError::Host { call: "recv", source: error }),
                },
            }
        }
    }

    fn send(
        &mut self,
        mut bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        let fds: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        // The descriptor belongs to the first byte: what follows a short write carries none.
        let mut control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        while !bytes.is_empty() {
            let part = [IoSlice::new(bytes)];
            let socket = self.stream.as_raw_fd();
            match sendmsg::<()>(socket, &part, control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    control = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, deadline)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => {
                    return Err(QmpError::Closed { doing: String::new() });
                }
                Err(errno) => {
                    return Err(QmpError::Host { call: "sendmsg", source: errno.into() });
                }
            }
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), QmpError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(QmpError::Timeout { doing: String::new() });
        }
        // Rounded up: a wait of 0 ms would spin through the last millisecond.
        let left = PollTimeout::try_from(left + Duration::from_millis(1))
            .unwrap_or(PollTimeout::from(u16::MAX));
        match poll(&mut [PollFd::new(self.stream.as_fd(), flags)], left) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(QmpError::Host { call: "poll", source: errno.into() }),
        }
    }

    fn queue(&mut self, event: Event) {
        tracing::trace!(name = %event.name, data = %event.data, "qmp: event");
        if self.events.len() == QMP_EVENTS_MAX {
            let lost = self.events.pop_front();
            tracing::warn!(name = ?lost.map(|event| event.name), "qmp: too many events, one lost");
        }
        self.events.push_back(event);
    }
}

impl QmpError {
    /// Says what was being waited for when the socket gave up.
    fn while_doing(self, doing: impl FnOnce() -> String) -> Self {
        match self {
            Self::Closed { .. } => Self::Closed { doing: doing() },
            Self::Timeout { .. } => Self::Timeout { doing: doing() },
            other => other,
        }
    }
}

fn parse(line: &[u8]) -> Result<Message, QmpError> {
    let mut object: Map<String, Value> = serde_json::from_slice(line)
        .map_err(|source| QmpError::Malformed { source: Some(source) })?;
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(value) = object.remove("return") {
        Ok(Message::Reply { id, result: Ok(value) })
    } else if let Some(error) = object.remove("error") {
        let text = |name: &str| error[name].as_str().unwrap_or("?").to_owned();
        Ok(Message::Reply { id, result: Err((text("class"), text("desc"))) })
    } else if let Some(Value::String(name)) = object.remove("event") {
        let part = |name: &str| object.get("timestamp").and_then(|at| at[name].as_u64());
        // QEMU writes -1 when it has no clock.
        let at = Duration::from_secs(part("seconds").unwrap_or(0))
            .saturating_add(Duration::from_micros(part("microseconds").unwrap_or(0)));
        let data = object.remove("data").unwrap_or(Value::Null);
        Ok(Message::Event(Event { name, data, at }))
    } else if let Some(greeting) = object.remove("QMP") {
        Ok(Message::Greeting(greeting))
    } else {
        Err(QmpError::Malformed { source: None })
    }
}
