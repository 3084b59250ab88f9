//! How far a thread that moves memory gives way to the guest's own.
//!
//! The first pass is long, and most of it is work that nobody waits for: while it lasts, lanes and
//! the threads that populate the target's memory take idle time first. The rounds after it are
//! short, and decide how long the pause will be: they run like everyone else.
//!
//! Nice values count among threads of one scheduling group: between control groups, and between
//! sessions where autogrouping is on, the groups' own weights do.

use std::sync::OnceLock;

use rustix::process::{getpriority_process, setpriority_process};

/// Nice value of a thread that gives way: on a core that a guest keeps busy the kernel leaves it
/// about 3 % (36 of 36 + 1024, sched_prio_to_weight), and all of one that is idle.
const NICE: i32 = 15;

/// Whether this thread gives way now.
#[derive(Debug, Default)]
pub struct GivesWay {
    /// The nice value to return to.
    was: Option<i32>,
}

impl GivesWay {
    /// This thread gives way from now on. Without the privilege to return (CAP_SYS_NICE, or
    /// RLIMIT_NICE) nothing happens.
    pub fn begin(&mut self) {
        if self.was.is_none() && may_return() {
            self.was = lower();
        }
    }

    /// It does so no more.
    pub fn end(&mut self) {
        if let Some(was) = self.was.take()
            && let Err(error) = setpriority_process(None, was)
        {
            tracing::warn!(%error, "a thread's nice value stays raised");
        }
    }
}

/// For a thread that gives way until it ends.
pub fn give_way() {
    lower();
}

/// Raises this thread's nice value; returns the one it had, if it was lower.
fn lower() -> Option<i32> {
    let was = getpriority_process(None).ok().filter(|&nice| nice < NICE)?;
    setpriority_process(None, NICE).ok().map(|()| was)
}

/// Whether a nice value that was raised can be lowered again: tried once, on a thread of its own.
fn may_return() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let tried = std::thread::spawn(|| {
            lower().is_some_and(|was| setpriority_process(None, was).is_ok())
        });
        tried.join().unwrap_or(false)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_way_and_returns_and_no_other_does() {
        let nice = || getpriority_process(None).unwrap();
        let before = nice();
        let seen = std::thread::spawn(move || {
            let mut gives_way = GivesWay::default();
            gives_way.begin();
            gives_way.begin();
            let lowered = nice();
            gives_way.end();
            gives_way.end();
            (lowered, nice())
        });
        let (lowered, after) = seen.join().unwrap();
        let expected = if may_return() { before.max(NICE) } else { before };
        assert_eq!((lowered, after, nice()), (expected, before, before));
    }
}
