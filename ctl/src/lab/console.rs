//! A guest's serial console as seen from the host: lines with the time they were seen, and the
//! ticks among them.
//!
//! The host listens and QEMU connects, so not a byte is lost; one thread per console reads. The
//! times are the host's: a pause of the guest shows as a gap between two ticks, although the
//! guest's own clock stands still with it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::command::tail;
use super::error::{LabError, io};

/// One line of the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When its end was seen.
    pub seen: Instant,
    /// The text without its line ending.
    pub text: String,
}

/// The guest program's counters at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// When the host saw it.
    pub seen: Instant,
    /// Ticks since the guest began to count, without a hole if none was lost.
    pub n: u64,
    /// The guest's clock.
    pub uptime_ms: u64,
    /// Pages verified and rewritten.
    pub writes: u64,
    /// Pages written since the tick before: how fast the guest is.
    pub delta: u64,
    /// Pages that were not what was last written there.
    pub bad: u64,
    /// Disk reads past the page cache.
    pub disk_reads: u64,
    /// Buffers or disk blocks that were not what was last read or written there.
    pub disk_bad: u64,
    /// Disk blocks written and read back.
    pub disk_writes: u64,
    /// Walks through all pages that are not rewritten.
    pub cold_passes: u64,
    /// Walks through all buffers that keep what was read from the disk.
    pub disk_passes: u64,
}

impl Tick {
    fn parse(line: &Line) -> Option<Self> {
        let words = line.text.strip_prefix("tick ")?;
        let number = |name: &str| {
            let mut pairs = words.split(' ').filter_map(|word| word.split_once('='));
            pairs.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse().ok())
        };
        Some(Self {
            seen: line.seen,
            n: number("n")?,
            uptime_ms: number("uptime_ms")?,
            writes: number("writes")?,
            delta: number("delta")?,
            bad: number("bad")?,
            disk_reads: number("disk_reads")?,
            disk_bad: number("disk_bad")?,
            disk_writes: number("disk_writes")?,
            cold_passes: number("cold_passes")?,
            disk_passes: number("disk_passes")?,
        })
    }
}

/// What the guest answers when it has checked all its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Pages checked.
    pub pages: u64,
    /// Bad pages among them.
    pub bad: u64,
    /// Disk buffers checked.
    pub slots: u64,
    /// Bad ones among them.
    pub disk_bad: u64,
}

/// Follows one console. Dropped, it lets go; QEMU does not mind.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Line>,
    /// What came after the last line ending.
    rest: Vec<u8>,
    stream: Option<UnixStream>,
    closed: bool,
}

impl Console {
    /// Listens at `path` for the QEMU that is about to be started.
    pub(super) fn listen(path: &Path) -> Result<Self, LabError> {
        let listener = UnixListener::bind(path).map_err(io("listen at", path))?;
        let shared = Arc::new(Shared::default());
        let reader = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || reader.follow(&listener))
            .map_err(io("start a thread for", path))?;
        Ok(Self { shared })
    }

    /// All whole lines so far.
    pub fn lines(&self) -> Vec<Line> {
        self.shared.lock().lines.clone()
    }

    /// All ticks so far.
    pub fn ticks(&self) -> Vec<Tick> {
        self.shared.lock().lines.iter().filter_map(Tick::parse).collect()
    }

    /// The latest tick.
    pub fn last_tick(&self) -> Option<Tick> {
        self.shared.lock().lines.iter().rev().find_map(Tick::parse)
    }

    /// Number of whole lines so far: a place to wait from.
    pub fn line_count(&self) -> usize {
        self.shared.lock().lines.len()
    }

    /// Waits for a line at or after `from` that `wanted` accepts.
    ///
    /// # Errors
    /// [`LabError::Timeout`] with the end of the console.
    pub fn wait_line<T>(
        &self,
        what: &str,
        from: usize,
        timeout: Duration,
        wanted: impl Fn(&Line) -> Option<T>,
    ) -> Result<T, LabError> {
        let started = Instant::now();
        let mut state = self.shared.lock();
        let mut next = from;
        loop {
            if let Some(found) = state.lines.iter().skip(next).find_map(&wanted) {
                return Ok(found);
            }
            next = next.max(state.lines.len());
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() || state.closed {
                return Err(LabError::Timeout {
                    what: what.to_owned(),
                    waited_ms: started.elapsed().as_millis() as u64,
                    last_seen: state.tail(),
                });
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the guest has filled its memory and begins its work; the guest's uptime then.
    pub fn wait_ready(&self, timeout: Duration) -> Result<Duration, LabError> {
        self.wait_line("the guest to be ready", 0, timeout, |line| {
            let words = line.text.strip_prefix("ready ")?;
            let (_, uptime_ms) = words.split_once("uptime_ms=")?;
            uptime_ms.parse().ok().map(Duration::from_millis)
        })
    }

    /// Waits for the next tick that is not here yet.
    pub fn wait_tick(&self, timeout: Duration) -> Result<Tick, LabError> {
        self.wait_line("a tick", self.line_count(), timeout, Tick::parse)
    }

    /// Waits for a tick that `wanted` accepts, from now on.
    pub fn wait_tick_where(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Tick) -> bool,
    ) -> Result<Tick, LabError> {
        self.wait_line(what, self.line_count(), timeout, |line| Tick::parse(line).filter(&wanted))
    }

    /// Has the guest stop its writers, check every page and every disk buffer, and go on.
    pub fn verify(&self, timeout: Duration) -> Result<Verified, LabError> {
        let from = self.line_count();
        self.send("verify")?;
        self.wait_line("the guest's verification", from, timeout, |line| {
            let words = line.text.strip_prefix("verified ")?;
            let number = |name: &str| {
                let mut pairs = words.split(' ').filter_map(|word| word.split_once('='));
                pairs.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse().ok())
            };
            Some(Verified {
                pages: number("pages")?,
                bad: number("bad")?,
                slots: number("slots")?,
                disk_bad: number("disk_bad")?,
            })
        })
    }

    /// Sets how many pages a second the guest's writers rewrite from now on; 0 is no limit.
    pub fn set_rate(&self, pages_per_second: u64) -> Result<(), LabError> {
        self.send(&format!("rate {pages_per_second}"))
    }

    /// Sends one line to the guest.
    pub fn send(&self, line: &str) -> Result<(), LabError> {
        let state = self.shared.lock();
        let result = match &state.stream {
            Some(stream) => (&*stream).write_all(format!("{line}\n").as_bytes()),
            None => Err(std::io::ErrorKind::NotConnected.into()),
        };
        result.map_err(io("write to", Path::new("the guest's console")))
    }

    /// The end of the console, for messages.
    pub fn tail(&self) -> String {
        self.shared.lock().tail()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(stream) = &self.shared.lock().stream {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(&self, listener: &UnixListener) {
        let Ok((mut stream, _)) = listener.accept() else { return };
        self.lock().stream = stream.try_clone().ok();
        let mut buffer = [0; 4096];
        loop {
            let length = stream.read(&mut buffer).unwrap_or(0);
            let mut state = self.lock();
            if length == 0 {
                state.closed = true;
                state.stream = None;
                self.changed.notify_all();
                return;
            }
            state.take(&buffer[..length]);
            drop(state);
            self.changed.notify_all();
        }
    }
}

impl State {
    fn take(&mut self, bytes: &[u8]) {
        let seen = Instant::now();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.rest.extend(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.rest);
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                self.lines.push(Line { seen, text });
            }
        }
    }

    fn tail(&self) -> String {
        let lines = self.lines.iter().rev().take(12).map(|line| line.text.as_str());
        let mut lines: Vec<&str> = lines.collect();
        lines.reverse();
        tail(&lines.join("\n"), 1500)
    }
}

/// The ticks of a guest that moved from `source` to `target`. The line that it was saying when it
/// was paused begins on one console and ends on the other; it is put together here.
pub fn ticks_across(source: &Console, target: &Console) -> Vec<Tick> {
    let (mut lines, rest) = {
        let state = source.shared.lock();
        (state.lines.clone(), state.rest.clone())
    };
    let mut arrived = target.lines();
    if let Some(first) = arrived.first_mut() {
        first.text.insert_str(0, &String::from_utf8_lossy(&rest));
        first.text.truncate(first.text.trim_end().len());
    }
    lines.append(&mut arrived);
    lines.iter().filter_map(Tick::parse).collect()
}

/// The longest time between two ticks that follow each other.
pub fn longest_gap(ticks: &[Tick]) -> Duration {
    let gaps = ticks.windows(2).map(|pair| pair[1].seen.saturating_duration_since(pair[0].seen));
    gaps.max().unwrap_or_default()
}

/// Tick numbers that are missing between the first and the last.
pub fn missing_ticks(ticks: &[Tick]) -> u64 {
    ticks.windows(2).map(|pair| pair[1].n.saturating_sub(pair[0].n + 1)).sum()
}

/// Pages that the guest rewrote per second of the host's time between `from` and `to`: the measure
/// of how much a migration slows it down. `None` without two ticks in that time.
pub fn pages_per_second(ticks: &[Tick], from: Instant, to: Instant) -> Option<f64> {
    let mut within = ticks.iter().filter(|tick| (from..=to).contains(&tick.seen));
    let first = within.next()?;
    let last = within.next_back()?;
    let seconds = last.seen.duration_since(first.seen).as_secs_f64();
    Some((last.writes - first.writes) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: &str = "tick n=4 uptime_ms=1900 writes=70 bad=0 disk_reads=3 disk_bad=0 \
                        disk_writes=1 cold_passes=2 disk_passes=5 delta=7\r\n";

    fn console(texts: &[&str]) -> Console {
        let shared = Arc::new(Shared::default());
        for text in texts {
            shared.lock().take(text.as_bytes());
        }
        Console { shared }
    }

    #[test]
    fn a_tick_is_read_whole_or_not_at_all() {
        let tick = console(&[TICK]).last_tick().expect("a tick");
        assert_eq!((tick.n, tick.writes, tick.delta, tick.disk_passes), (4, 70, 7, 5));
        assert_eq!(console(&["tick n=4 uptime_ms=19\n"]).last_tick(), None);
        assert_eq!(console(&[TICK.trim_end()]).last_tick(), None);
    }

    #[test]
    fn a_line_cut_by_the_move_is_put_together() {
        for cut in 0..TICK.len() {
            let before = TICK.replace("n=4", "n=3");
            let after = TICK.replace("n=4", "n=5");
            let source = console(&[&before, &TICK[..cut]]);
            let target = console(&[&TICK[cut..], &after]);
            let ticks = ticks_across(&source, &target);
            assert_eq!(ticks.iter().map(|tick| tick.n).collect::<Vec<_>>(), [3, 4, 5], "{cut}");
            assert_eq!(missing_ticks(&ticks), 0);
        }
    }
}
