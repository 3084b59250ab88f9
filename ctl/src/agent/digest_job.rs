//! A digest of all guest memory on the way, beside the agent's loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::digest::MemoryDigest;
use pageferry_datapath::region::GuestMemory;
use pageferry_datapath::source::Failure;

use super::failure;

/// Cancels the digest and waits for its threads when dropped.
#[derive(Debug)]
pub(super) struct DigestJob {
    cancel: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl DigestJob {
    /// Digests with `threads` threads; `done` gets the digest and the time it took, unless the job
    /// was cancelled.
    pub(super) fn start(
        memory: GuestMemory,
        threads: usize,
        done: impl FnOnce(Result<(MemoryDigest, Duration), Failure>) + Send + 'static,
    ) -> Self {
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&cancel);
        let work = move || {
            let started = Instant::now();
            let digested = MemoryDigest::of_memory(&memory, threads.max(1), &cancelled)
                .map(|digest| (digest, started.elapsed()))
                .map_err(|error| failure::host("memory digest", &error, None));
            if !cancelled.load(Ordering::Relaxed) {
                done(digested);
            }
        };
        let thread = thread::Builder::new()
            .name("pf-digest".into())
            .spawn(work)
            .expect("the process can start threads");
        Self { cancel, thread: Some(thread) }
    }
}

impl Drop for DigestJob {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _its_panic_was_printed = thread.join();
        }
    }
}
