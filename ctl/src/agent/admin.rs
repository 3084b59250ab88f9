//! Talking to a running agent: one Unix socket each, a line of JSON there and a line back.
//!
//! ```text
//!   RUNTIME_DIR/SESSION.sock   {"verb":"status"}                          -> {"ok":{...}}
//!                              {"verb":"set","max_bandwidth":"500Mbit"}   -> {"ok":{...}}
//!                              {"verb":"set","weight":3}                  -> {"ok":{...}}
//!   RUNTIME_DIR/SESSION.target.sock   {"verb":"cancel"}                   -> {"ok":null}
//!                              anything else                              -> {"error":"..."}
//! ```
//!
//! Folder and socket belong to the user who runs the agents, and nobody else may write there or
//! connect: who can may do what this user may. One thread of the agent answers, one caller at a time, each within
//! [`limits::ADMIN_WAIT`]; what a verb does is the agent's affair and must not wait for anything.
//! An agent that can't have its socket runs on without.

use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::shares::Weight;
use crate::bandwidth::Bandwidth;
use crate::limits;
use crate::privileges;

/// What an agent can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How far it is.
    Status,
    /// Change a setting; what is not named stays.
    Set(Settings),
    /// End the session, as Ctrl-C at an agent that has no other: a target may have several.
    Cancel,
}

/// What can be changed while an agent runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What all lanes together may send; `none` lifts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<Limit>,
    /// The migration's weight in the budget that it shares with others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Weight>,
}

/// A bandwidth, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Limit(pub Option<Bandwidth>);

impl std::str::FromStr for Limit {
    type Err = crate::bandwidth::BandwidthError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self(None)),
            rate => Ok(Self(Some(rate.parse()?))),
        }
    }
}

impl TryFrom<String> for Limit {
    type Error = crate::bandwidth::BandwidthError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Limit> for String {
    fn from(Limit(rate): Limit) -> Self {
        rate.map_or_else(|| "none".into(), |rate| rate.to_string())
    }
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// What was asked for.
    Ok(Value),
    /// Why not.
    Error(String),
}

/// Why an agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No running agent has a session that begins like this.
    #[error("no agent is running a session that begins with {prefix:?} in {}", dir.display())]
    Unknown {
        /// What was asked for.
        prefix: String,
        /// Where was looked.
        dir: PathBuf,
    },
    /// Several have.
    #[error("{count} sessions begin with {prefix:?}")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many.
        count: usize,
    },
    /// A system call failed.
    #[error("{call} on {} failed", path.display())]
    Host {
        /// The call's name.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The agent's answer makes no sense.
    #[error("the agent's answer is not understood")]
    Answer,
    /// The agent said no.
    #[error("refused by the agent: {0}")]
    Refused(String),
}

/// Where agents of this user have their sockets unless told otherwise.
pub fn runtime_dir() -> PathBuf {
    match (nix::unistd::geteuid().is_root(), std::env::var_os("XDG_RUNTIME_DIR")) {
        (false, Some(dir)) => Path::new(&dir).join("pageferry"),
        (true, _) => "/run/pageferry".into(),
        (false, None) => std::env::temp_dir().join(format!("pageferry-{}", nix::unistd::geteuid())),
    }
}

/// An agent's socket, and the thread that answers there. Gone when dropped.
#[derive(Debug)]
pub struct Admin {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Admin {
    /// Listens in `dir` for what concerns `session`; `answer` runs on the socket's thread.
    pub fn start(
        dir: &Path,
        session: &str,
        answer: impl Fn(Request) -> Answer + Send + 'static,
    ) -> Result<Self, AdminError> {
        let host = |call, path: &Path| {
            let path = path.to_owned();
            move |source| AdminError::Host { call, path, source }
        };
        make_private(dir).map_err(host("mkdir", dir))?;
        sweep(dir, limits::ADMIN_SOCKET_LEFT_AFTER);
        let path = socket(dir, session);
        let listener = UnixListener::bind(&path).map_err(host("bind", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .map_err(host("chmod", &path))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("pf-admin".into())
            .spawn(move || {
                privileges::drop_on_this_thread(&[]);
                serve(&listener, &stopping, &answer)
            })
            .map_err(host("clone", &path))?;
        Ok(Self { path, stop, thread: Some(thread) })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread, if nobody else does just now.
        let _it_may_be_awake = UnixStream::connect(&self.path);
        let _it_may_be_gone = fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take() {
            let _its_panic_is_told_already = thread.join();
        }
    }
}

/// Removes the sockets of agents that were killed. One that is younger may be about to be listened at.
fn sweep(dir: &Path, left_after: Duration) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let age = || fs::metadata(&path).ok()?.modified().ok()?.elapsed().ok();
        let is_old = || age().is_some_and(|age| age >= left_after);
        if path.extension().is_some_and(|name| name == "sock") && is_old() && !listens(&path) {
            let _another_agent_may_sweep_too = fs::remove_file(&path);
        }
    }
}

/// Sessions whose source agents listen in `dir`, in order.
pub fn sessions(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut sessions: Vec<_> = names
        .filter_map(|name| name.strip_suffix(".sock").map(str::to_owned))
        // A target's end of one has nothing that could be set.
        .filter(|session| !session.contains('.'))
        // What a killed agent left behind answers nobody.
        .filter(|session| UnixStream::connect(socket(dir, session)).is_ok())
        .collect();
    sessions.sort();
    sessions
}

/// Asks the agent whose session begins with `prefix`.
pub fn ask(dir: &Path, prefix: &str, request: &Request) -> Result<Value, AdminError> {
    let mut matching = sessions(dir);
    matching.retain(|session| session.starts_with(prefix));
    let session = match &matching[..] {
        [session] => session,
        [] => return Err(AdminError::Unknown { prefix: prefix.into(), dir: dir.into() }),
        many => return Err(AdminError::Ambiguous { prefix: prefix.into(), count: many.len() }),
    };
    tell(&socket(dir, session), request)
}

/// Asks the agent at a socket.
pub fn tell(path: &Path, request: &Request) -> Result<Value, AdminError> {
    let answer = exchange(path, request).map_err(|source| {
        let path = path.to_owned();
        AdminError::Host { call: "talking", path, source }
    })?;
    understood(&answer)
}

/// Whether somebody listens at a socket, or may: who may not connect can't know.
pub fn listens(path: &Path) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    match UnixStream::connect(path) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), ConnectionRefused | NotFound),
    }
}

/// What an agent's line says.
pub fn understood(line: &[u8]) -> Result<Value, AdminError> {
    match serde_json::from_slice(line).map_err(|_| AdminError::Answer)? {
        Answer::Ok(value) => Ok(value),
        Answer::Error(text) => Err(AdminError::Refused(text)),
    }
}

fn exchange(path: &Path, request: &Request) -> io::Result<Vec<u8>> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(limits::ADMIN_WAIT * 2))?;
    stream.set_write_timeout(Some(limits::ADMIN_WAIT))?;
    write_line(&stream, request)?;
    read_line(&stream)
}

fn serve(listener: &UnixListener, stop: &AtomicBool, answer: &dyn Fn(Request) -> Answer) {
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = stream.and_then(|stream| serve_one(&stream, answer)) {
            tracing::debug!(%error, "someone who asked this agent");
        }
    }
}

fn serve_one(stream: &UnixStream, answer: &dyn Fn(Request) -> Answer) -> io::Result<()> {
    stream.set_write_timeout(Some(limits::ADMIN_WAIT))?;
    let until = Instant::now() + limits::ADMIN_WAIT;
    hear_and_answer(Patient { stream, until }, stream, answer)
}

/// What a caller says until a time, however he spreads it.
struct Patient<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl Read for Patient<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut stream = self.stream;
        stream.read(into).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }
}

/// Serves one caller: whatever he says is answered, and nothing is where he hangs up without a word.
///
/// # Errors
/// If the answer can't be written.
pub fn hear_and_answer(
    said: impl Read,
    heard: impl Write,
    answer: &dyn Fn(Request) -> Answer,
) -> io::Result<()> {
    let answer = match read_line(said) {
        Ok(line) if line.is_empty() => return Ok(()),
        Ok(line) => match serde_json::from_slice(&line) {
            Ok(request) => answer(request),
            Err(error) => Answer::Error(error.to_string()),
        },
        Err(error) => Answer::Error(format!("no whole line came: {error}")),
    };
    write_line(heard, &answer)
}

/// Any bytes: that they are text is for JSON to say, so that who sends others is told too.
fn read_line(said: impl Read) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(said.take(limits::ADMIN_LINE_BYTES_MAX)).read_until(b'\n', &mut line)?;
    Ok(line)
}

fn write_line(mut heard: impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    heard.write_all(&line)
}

fn socket(dir: &Path, session: &str) -> PathBuf {
    dir.join(format!("{session}.sock"))
}

/// A folder that nobody else may write to. One that others may is not used: they could have put
/// anything there.
pub(super) fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let found = fs::symlink_metadata(dir)?;
    let ours = found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw();
    match ours && found.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "others may write to the folder, or own it",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn private() -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let inside = dir.path().join("run");
        (dir, inside)
    }

    #[test]
    fn an_agent_is_asked_and_told() {
        let (_keep, dir) = private();
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&told);
        let admin = Admin::start(&dir, "00c0ffee", move |request| {
            hears.lock().unwrap().push(request);
            Answer::Ok(json!({ "moved_bytes": 7 }))
        });
        let admin = admin.unwrap();
        assert_eq!(sessions(&dir), ["00c0ffee"]);
        let set = Request::Set(Settings {
            max_bandwidth: Some("500M".parse().unwrap()),
            weight: Some("3".parse().unwrap()),
        });
        assert_eq!(ask(&dir, "00c0", &set).unwrap()["moved_bytes"], 7);
        ask(&dir, "", &Request::Status).unwrap();
        assert_eq!(*told.lock().unwrap(), [set, Request::Status]);
        assert!(matches!(ask(&dir, "ff", &Request::Status), Err(AdminError::Unknown { .. })));
        drop(admin);
        assert!(sessions(&dir).is_empty() && fs::read_dir(&dir).unwrap().next().is_none());
    }

    #[test]
    fn several_agents_are_told_apart_and_those_left_behind_are_none() {
        let (_keep, dir) = private();
        let admins: Vec<_> = ["aa01", "aa02"]
            .iter()
            .map(|session| Admin::start(&dir, session, |_| Answer::Error("busy".into())).unwrap())
            .collect();
        drop(UnixListener::bind(dir.join("aa03.sock")).unwrap());
        assert_eq!(sessions(&dir), ["aa01", "aa02"]);
        let left = || fs::read_dir(&dir).unwrap().count();
        sweep(&dir, Duration::from_secs(3600));
        assert_eq!(left(), 3, "its agent may not listen yet");
        sweep(&dir, Duration::ZERO);
        assert_eq!((left(), sessions(&dir).len()), (2, 2));
        let ambiguous = ask(&dir, "aa", &Request::Status);
        assert!(matches!(ambiguous, Err(AdminError::Ambiguous { count: 2, .. })));
        let refused = ask(&dir, "aa02", &Request::Status).unwrap_err();
        assert_eq!(refused.to_string(), "refused by the agent: busy");
        drop(admins);
    }

    #[test]
    fn nonsense_is_answered_with_an_error() {
        let (_keep, dir) = private();
        let _admin = Admin::start(&dir, "aa01", |_| Answer::Ok(Value::Null)).unwrap();
        for (line, word) in [
            (&b"hello\n"[..], "expected value"),
            (br#"{"verb":"explode"}"#, "unknown variant"),
            (br#"{"verb":"set","max_bandwidth":"fast"}"#, "a bandwidth looks like"),
            (br#"{"verb":"set","weight":0}"#, "weights are 1 to 1000"),
            (br#"{"verb":"set","max_bandwith":"1G"}"#, "unknown field"),
            (b"\"\xff\"", "unicode"),
        ] {
            let mut stream = UnixStream::connect(dir.join("aa01.sock")).unwrap();
            stream.write_all(line).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let answer = String::from_utf8(read_line(&stream).unwrap()).unwrap();
            assert!(answer.contains("error") && answer.contains(word), "{word}: {answer}");
        }
        // Somebody who connects and says nothing, and then somebody who does.
        let _silent = UnixStream::connect(dir.join("aa01.sock")).unwrap();
        assert!(ask(&dir, "aa01", &Request::Status).is_ok());
    }

    #[test]
    fn a_line_that_comes_byte_by_byte_is_not_waited_for() {
        let (_keep, dir) = private();
        let admin = Admin::start(&dir, "aa01", |_| Answer::Ok(Value::Null)).unwrap();
        let slow = UnixStream::connect(dir.join("aa01.sock")).unwrap();
        let mut says = slow.try_clone().unwrap();
        let says = thread::spawn(move || {
            // Longer than any answer takes, and not for ever.
            (0..600)
                .take_while(|_| {
                    thread::sleep(limits::ADMIN_WAIT / 20);
                    says.write_all(b" ").is_ok()
                })
                .count()
        });
        let answer = String::from_utf8(read_line(&slow).unwrap()).unwrap();
        assert!(answer.contains("no whole line came: timed out"), "{answer:?}");
        drop(admin);
        says.join().unwrap();
    }

    #[test]
    fn a_line_without_an_end_is_answered_all_the_same() {
        let mut answer = Vec::new();
        let nobody_is_asked = |_| unreachable!("it is no request");
        hear_and_answer(io::repeat(b' '), &mut answer, &nobody_is_asked).unwrap();
        assert!(matches!(understood(&answer), Err(AdminError::Refused(_))));
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_not_used() {
        let (_keep, dir) = private();
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = Admin::start(&dir, "aa01", |_| Answer::Ok(Value::Null));
        assert!(matches!(refused, Err(AdminError::Host { call: "mkdir", .. })));
    }

    #[test]
    fn requests_are_lines_that_can_be_typed() {
        let set = |text: &str| serde_json::from_str::<Request>(text).unwrap();
        let lift = Request::Set(Settings { max_bandwidth: Some(Limit(None)), weight: None });
        assert_eq!(set(r#"{"verb":"set","max_bandwidth":"none"}"#), lift);
        assert_eq!(set(r#"{"verb":"status"}"#), Request::Status);
        let line = serde_json::to_string(&lift).unwrap();
        assert_eq!(line, r#"{"verb":"set","max_bandwidth":"none"}"#);
    }
}
