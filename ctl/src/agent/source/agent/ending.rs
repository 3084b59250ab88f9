//! How a source's part ends: what is recorded of it, what is let go of, and what its user is told.

use std::time::{Duration, Instant};

use pageferry_datapath::control::Word;
use pageferry_datapath::recover::Guest;
use pageferry_datapath::source::{Failure, Outcome, Source};

use super::Agent;
use crate::agent::failure;
use crate::agent::record::Decision;
use crate::agent::source::SourceResult;
use crate::limits;

/// How long the target may take to hear why the attempt ended, with the guest running again.
const GOODBYE_WAIT: Duration = Duration::from_secs(1);

impl Agent<'_> {
    pub(super) fn decide(&mut self, decision: Decision) -> Result<(), Failure> {
        let hint = "the disk of --state-dir must take a few hundred bytes";
        self.records
            .as_mut()
            .map_or(Ok(()), |records| records.write(decision))
            .map_err(|error| failure::host("record", &error, Some(hint.into())))
    }

    pub(super) fn release(&mut self) {
        self.tracking.disarm();
        self.mover.close(false);
        self.join_relay();
        self.monitor.release();
        self.forget();
    }

    /// Removes the record, durably, and says so. Not before: until it hears this the target answers for
    /// both, should this agent die or this host lose its power.
    pub(super) fn forget(&mut self) {
        if let Some(records) = self.records.take() {
            match records.remove() {
                Ok(()) => {
                    self.control.settle(Word::None);
                }
                Err(error) => tracing::warn!(%error, "the record of this session stays"),
            }
        }
    }

    pub(super) fn unwind(&mut self) -> Guest {
        self.digest = None;
        let guest = self.unwind_guest();
        let running = guest == Guest::Runs;
        self.tracking.disarm();
        // A guest that stands still here needs its record. One that runs, or is gone, does not, unless a
        // target that has loaded it did not act on this end and waits for somebody's word: before the
        // device state left it has not.
        let told = |word| matches!(word, Some(Word::Aborted | Word::None));
        let needed = match &self.records {
            _ if guest == Guest::Whole => true,
            Some(records) if records.record().decision == Decision::Aborted => {
                !told(self.control.settled(Duration::ZERO))
            }
            Some(records) if records.record().decision == Decision::HandedOver => !running,
            _ => false,
        };
        if !needed {
            self.forget();
        }
        self.control.finish(GOODBYE_WAIT, false);
        self.mover.close(true);
        self.join_relay();
        if running && self.records.is_some() {
            tracing::warn!("the target has not acted on this; see `pageferry recover`");
        }
        guest
    }

    fn unwind_guest(&mut self) -> Guest {
        if self.monitor.unwind() {
            return Guest::Runs;
        }
        // One that was killed closes its sockets a moment before it is gone.
        let until = Instant::now() + limits::MONITOR_ENDS_MAX;
        while self.monitor.is_alive() && Instant::now() < until {
            std::thread::sleep(limits::TELL_AGAIN_PAUSE);
        }
        if self.monitor.is_alive() { Guest::Whole } else { Guest::Absent }
    }

    /// Should this agent die from here on, nobody may think that the guest was handed over.
    pub(super) fn retract(&mut self) -> bool {
        self.decide(Decision::Aborted).is_ok()
            || self.records.take().is_none_or(|records| records.remove().is_ok())
    }

    pub(super) fn join_relay(&mut self) {
        if let Some(relay) = self.relay.take() {
            self.state_bytes = relay.join();
        }
    }

    pub(super) fn finish(mut self, machine: Source) -> SourceResult {
        // After an uncertain end nothing was let go of yet: the guest stays paused.
        self.mover.close(true);
        self.tracking.disarm();
        if machine.outcome() == Some(&Outcome::Migrated) {
            // The target waits until it knows that this side knows.
            self.control.finish(GOODBYE_WAIT, false);
        }
        self.control.close();
        SourceResult {
            session: self.session,
            outcome: machine.outcome().expect("the loop ends with it").clone(),
            security: Some(self.control.security()),
            report: machine.report().clone(),
            lanes: self.mover.take_stats(),
            path: self.mover.path(),
            path_reason: self.mover.path_reason().map(str::to_owned),
            rails: self.mover.take_over_rails(),
            rss: self.mover.rss(),
            cores: self.mover.cores(),
            cuts: std::mem::take(&mut self.cuts),
            lanes_renewed: self.mover.renewed(),
            scans: std::mem::take(&mut self.tracking.scans),
            state_bytes: self.state_bytes,
            attach_stopped: self.tracking.attach_stopped,
            total: self.started.elapsed(),
        }
    }
}
