//! After an agent or a host was lost: asks the other side, and carries out what
//! `pageferry_datapath::recover` makes of both records and both monitors.
//!
//! Used by `pageferry recover`, by the guard of a source agent, and by a target agent that is asked.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_datapath::attach::{self, Process};
use pageferry_datapath::control::{Abort, AbortReason, Message, Recover, Recovered, Word};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::recover::{self, End, Guest, Peer, Step};

use super::failure::one_line;
use super::link::{Link, LinkError};
use super::record::{self, Decision, Record, RecordError, RecordedSecurity, Records, Role};
use super::stranger::Stranger;
use super::tls::{Caller, Security};
use crate::limits;
use crate::qemu::runstate::{self, RunState};
use crate::qemu::{device_state, pid};
use crate::qmp::{Qmp, QmpError};

/// Why a session could not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The record can't be read, written, or belongs to an agent that lives.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It is not settled whose the guest is.
    #[error("its record says {decision:?}: that is not for this side alone to forget")]
    Undecided {
        /// What the record says.
        decision: Decision,
    },
    /// QEMU lives, and does not say whether the guest runs.
    #[error("QEMU, process {pid}, lives, but does not answer: its guest may run")]
    Silent {
        /// Its process.
        pid: i32,
        /// Its monitor's socket.
        qmp: PathBuf,
        /// Why; `None` if another monitor answers there.
        #[source]
        source: Option<QmpError>,
    },
    /// The guest did not go on.
    #[error("the guest on {} does not go on", qmp.display())]
    Run {
        /// Its monitor's socket.
        qmp: PathBuf,
        /// Why.
        #[source]
        source: QmpError,
    },
}

/// One side of a session whose agent is gone.
#[derive(Debug)]
pub struct Side {
    records: Option<Records>,
    record: Record,
    /// Its monitor, if it lives, once it was looked for.
    qmp: Option<Qmp>,
    /// Source: where the target answered last, and waits to hear that this side has acted on it.
    answered: Option<Link>,
}

impl Side {
    /// Takes over the record at `path`.
    pub fn open(path: &Path) -> Result<Self, RecoveryError> {
        let records = Records::open(path)?;
        let record = records.record().clone();
        Ok(Self { records: Some(records), record, qmp: None, answered: None })
    }

    /// What its record said when it was opened.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The guest on this side.
    pub fn guest(&mut self) -> Result<Guest, RecoveryError> {
        self.qmp = monitor(&self.record)?;
        let Some(qmp) = &self.qmp else { return Ok(Guest::Absent) };
        match RunState::query(qmp) {
            Ok(state) if state.running => Ok(Guest::Runs),
            Ok(state) if state.status != "inmigrate" => Ok(Guest::Whole),
            Ok(_) => Ok(Guest::Absent),
            Err(_) if !self.record.monitor_lives() => Ok(Guest::Absent),
            Err(error) => Err(silent(&self.record, Some(error))),
        }
    }

    fn word(&self) -> Word {
        self.records.as_ref().map_or(Word::None, |records| records.record().word())
    }

    /// The source's way to its end. The target is asked again and again until `until`.
    pub fn recover_source(
        &mut self,
        peer_is_dead: bool,
        until: Instant,
    ) -> Result<End, RecoveryError> {
        let guest = self.guest()?;
        self.close_leftovers();
        let (word, first) = recover::source_word(self.word(), guest);
        self.carry_out(first.as_slice())?;
        let mut peer = self.ask(word, until);
        if peer_is_dead {
            peer = recover::believed_dead(peer);
        }
        let plan = recover::source(self.word(), guest, peer);
        self.carry_out(&plan.steps)?;
        self.set_back(plan.end);
        if let Some(link) = self.answered.take().filter(|_| self.records.is_none()) {
            settle(&link, self.record.session);
        }
        Ok(plan.end)
    }

    /// An agent that was killed with its guard, while it attached, has left this to whoever recovers.
    fn close_leftovers(&self) {
        if self.qmp.is_none() {
            return;
        }
        let closed = Process::open(self.record.pid).and_then(|it| attach::close_leftovers(&it));
        if let Err(error) = closed {
            tracing::warn!(%error, "what the agent left open in QEMU stays there, unused");
        }
    }

    fn ask(&mut self, word: Word, until: Instant) -> Peer {
        let (peer, link) = ask(&self.record, word, until);
        self.answered = link;
        peer
    }

    /// The target's way to its end, with what is known of the source.
    pub fn recover_target(&mut self, peer: Peer) -> Result<End, RecoveryError> {
        let guest = match self.word() {
            // What is settled is so whatever there is to see, and whoever holds the monitor now.
            Word::Running | Word::Aborted => self.guest().unwrap_or(Guest::Absent),
            _ => self.guest()?,
        };
        let plan = recover::target(self.word(), guest, peer);
        self.carry_out(&plan.steps)?;
        self.set_back(plan.end);
        Ok(plan.end)
    }

    /// Removes a record that says what is so, whoever asks; by the operator's word nobody does. And one
    /// by which nothing could run here: a source's that gave the guest away, where the target has lost
    /// its own; a target's without a guest, where the source has.
    pub fn forget_settled(&mut self) -> Result<End, RecoveryError> {
        let end = match (self.record.decision, self.record.role) {
            (Decision::HandedOver, Role::Source) => End::TheOthers,
            (Decision::Ready | Decision::Attempting, Role::Target)
                if self.guest()? == Guest::Absent =>
            {
                End::TheOthers
            }
            (Decision::Running, _) | (Decision::Aborted, Role::Source) => End::RunsHere,
            (Decision::Aborted, Role::Target) => End::TheOthers,
            (decision, _) => return Err(RecoveryError::Undecided { decision }),
        };
        match self.records.take() {
            Some(records) => records.remove().map(|()| end).map_err(RecoveryError::Record),
            None => Ok(end),
        }
    }

    /// A guest that runs here is its owner's again, with the migration settings it had.
    fn set_back(&self, end: End) {
        let (Some(qmp), Some(settings), End::RunsHere) = (&self.qmp, &self.record.settings, end)
        else {
            return;
        };
        let ended = device_state::cancel(qmp, Instant::now() + limits::STATE_TIMEOUT);
        if let Err(error) = settings.restore_differing(qmp) {
            tracing::warn!(%error, ?ended, "QEMU's migration settings stay as they are");
        }
    }

    fn carry_out(&mut self, steps: &[Step]) -> Result<(), RecoveryError> {
        for step in steps {
            match step {
                Step::Record(word) => self.write(*word)?,
                Step::Run => self.run()?,
                // A monitor that loaded a guest can't be made to wait for another: it stays paused
                // until its operator ends it.
                Step::Release => {}
                Step::Tell => {
                    let until = Instant::now() + limits::RECOVER_TELL_MAX;
                    let _it_may_not_hear_it = self.ask(self.word(), until);
                }
                Step::Forget => self.forget(),
            }
        }
        Ok(())
    }

    fn forget(&mut self) {
        // Durably: a source says then that it has none, and the target forgets its own.
        if let Some(Err(error)) = self.records.take().map(Records::remove) {
            tracing::warn!(%error, "the record of this session stays");
            self.answered = None;
        }
    }

    fn write(&mut self, word: Word) -> Result<(), RecoveryError> {
        let decision = match word {
            Word::Attempting | Word::None => Decision::Attempting,
            Word::HandedOver => Decision::HandedOver,
            Word::Ready => Decision::Ready,
            Word::Running => Decision::Running,
            Word::Aborted => Decision::Aborted,
        };
        if let Some(records) = &mut self.records {
            records.write(decision)?;
        }
        Ok(())
    }

    fn run(&self) -> Result<(), RecoveryError> {
        let Some(qmp) = &self.qmp else { return Ok(()) };
        let failed = |source| RecoveryError::Run { qmp: self.record.qmp.clone(), source };
        runstate::settle_and_cont(qmp).map(drop).map_err(failed)
    }
}

/// The monitor of a record, `None` if its process is gone. One that lives and can't be asked is not
/// gone: its guest may run.
fn monitor(record: &Record) -> Result<Option<Qmp>, RecoveryError> {
    let until = Instant::now() + limits::RECOVER_EXIT_MAX;
    loop {
        let (refused, somebody) = match Qmp::connect(&record.qmp) {
            Ok(qmp) => match pid::find(&qmp) {
                Ok(found) if found == record.pid && record.monitor_lives() => {
                    return Ok(Some(qmp));
                }
                // Another QEMU in its place says nothing of the one that was there.
                Ok(_another) => (None, false),
                // Somebody answers, and /proc does not show who.
                Err(_) => (None, true),
            },
            Err(error) => (Some(error), false),
        };
        if !somebody && !record.monitor_lives() {
            return Ok(None);
        }
        if Instant::now() >= until {
            return Err(silent(record, refused));
        }
        thread::sleep(limits::RECOVER_PAUSE);
    }
}

fn silent(record: &Record, source: Option<QmpError>) -> RecoveryError {
    RecoveryError::Silent { pid: record.pid, qmp: record.qmp.clone(), source }
}

/// How the other side of a record is spoken to.
fn caller(security: &RecordedSecurity) -> Caller {
    Caller {
        tls_dir: security.tls_dir.clone(),
        hostname: security.hostname.clone(),
        insecure: security.insecure,
        ..Caller::default()
    }
}

/// Tells the target the source's word and asks for its own, again and again until `until`. If it
/// answers it waits, on the connection that comes with it, for [`settle`].
pub fn ask(record: &Record, word: Word, until: Instant) -> (Peer, Option<Link>) {
    let question = Message::Recover(Recover { session: record.session, word });
    let mut known = Peer::Unreachable;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let within = left.clamp(limits::RECOVER_TRY_MIN, limits::RECOVER_ANSWER_MAX);
        let answered =
            Link::connect(&record.peer, &caller(&record.security), within).and_then(|link| {
                link.send(&question)?;
                Ok((link.receive(within)?, link))
            });
        match answered {
            Ok((Message::Recovered(Recovered { word }), link)) if recover::has_acted(word) => {
                return (Peer::Says(word), Some(link));
            }
            Ok((Message::Recovered(Recovered { word }), _)) => {
                tracing::debug!(?word, "the target does not know whose the guest is");
                known = Peer::Says(word);
            }
            // It will not answer the next question either, and whoever asks can do something about it.
            Ok((Message::Abort(Abort { reason: AbortReason::Refused, text, .. }), _)) => {
                eprintln!("error: the target does not answer: {}", one_line(&text));
                return (Peer::Silent, None);
            }
            Ok((other, _)) => {
                known = Peer::Silent;
                tracing::warn!(?other, "the target does not answer the question");
            }
            Err(error) => {
                if !matches!(error, LinkError::Connect { .. } | LinkError::Address { .. }) {
                    known = Peer::Silent;
                }
                tracing::debug!(%error, "the target does not answer");
            }
        }
        if Instant::now() >= until {
            return (known, None);
        }
        thread::sleep(limits::RECOVER_PAUSE);
    }
}

/// Source: nothing is left here for the target to answer to; it may forget the session, too.
pub fn settle(link: &Link, session: SessionId) {
    // Its record stays if it does not hear this, and says what is so.
    let _harmless = link.send(&Message::Recover(Recover { session, word: Word::None }));
    link.finish();
}

/// Target: acts on the source's word, and answers with what the record here says then; forgets it
/// when both sides know. `None` if there was nothing to act on, or the source was not told; so it is
/// for whoever is not the source of that session, and is turned away.
pub fn answer(state_dir: &Path, link: &Link, ask: Recover) -> Option<End> {
    let path = record::path_of(state_dir, ask.session, Role::Target);
    if !path.exists() {
        tell(link, Word::None);
        link.finish();
        return None;
    }
    // Before anything is touched.
    let record = match record::read(&path) {
        Ok(record) => record,
        Err(error) => {
            tracing::warn!(%error, session = %ask.session, "not recovered");
            return None;
        }
    };
    if let Err(stranger) = Stranger::is_let_by(&record, link.security()) {
        stranger.turn_away(link);
        return None;
    }
    let answered = Side::open(&path).and_then(|mut side| {
        let end = side.recover_target(Peer::Says(ask.word))?;
        tracing::info!(session = %ask.session, ?end, "recovered by the source's word");
        Ok((side, end))
    });
    match answered {
        Ok((mut side, end)) => {
            if !tell(link, side.word()) {
                return None;
            }
            let settled = || recover::has_acted(side.word()) && has_settled(link);
            if recover::target_may_forget(side.word(), ask.word) || settled() {
                side.forget();
            }
            link.finish();
            Some(end)
        }
        // Without an answer the source keeps what it has, and asks again.
        Err(error) => {
            tracing::warn!(%error, session = %ask.session, "not recovered");
            None
        }
    }
}

/// Answers. Returns whether the answer left; whether it was heard, and acted on, says
/// [`has_settled`].
pub fn tell(link: &Link, word: Word) -> bool {
    // Who is gone asks again.
    link.send(&Message::Recovered(Recovered { word })).is_ok()
}

/// Target: whether the source says that it has acted on the answer, and keeps no record any more. One
/// that keeps its own asks again.
pub fn has_settled(link: &Link) -> bool {
    let word = link.receive(limits::SETTLE_MAX);
    matches!(word, Ok(Message::Recover(Recover { word: Word::None, .. })))
}

/// Whether the guest of a session runs on this side.
pub fn runs(record: &Record) -> bool {
    let qmp = monitor(record).ok().flatten();
    qmp.and_then(|qmp| RunState::query(&qmp).ok()).is_some_and(|state| state.running)
}

/// Target: removes the record of a session that both sides know the end of, if `source` began it.
pub fn forget(state_dir: &Path, session: SessionId, source: &Security) {
    if let Ok(records) = Records::open(&record::path_of(state_dir, session, Role::Target))
        && Stranger::is_let_by(records.record(), source).is_ok()
    {
        records.forget();
    }
}

/// What people are told of an end, on the side of `role`.
pub fn in_words(end: End, role: Role) -> &'static str {
    match (end, role) {
        (End::RunsHere, Role::Source) => "the guest runs here, at the source",
        (End::RunsHere, Role::Target) => "the guest runs here, at the target",
        (End::TheOthers, Role::Source) => "the guest is the target's; here it stays paused",
        (End::TheOthers, Role::Target) => "the guest is the source's; end the QEMU that waits here",
        (End::Unknown, Role::Source) => {
            "only the target can know whose the guest is; it does not answer, or has lost its QEMU or \
             its record: nothing runs here"
        }
        (End::Unknown, Role::Target) => {
            "the guest is loaded and paused here, or may have run before its QEMU was lost; only the \
             source's record says whose it is"
        }
        (End::Gone, _) => "the guest is gone: its QEMU ended before it was loaded elsewhere",
        (End::RunsTwice, _) => {
            "the guest runs on both sides: somebody let it run against the records"
        }
    }
}

/// How long a recovery may wait for the other side unless told otherwise.
pub const WAIT_S: u64 = 10;

/// Pause between looks of a target that waits to be asked.
pub const LOOK: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use pageferry_datapath::control::encode;

    use super::*;

    fn asked(peer: String, until: Instant) -> Peer {
        let mut record =
            Record::attempting(SessionId(7), Role::Source, peer, PathBuf::from("/qmp"), 1);
        record.security.insecure = true;
        ask(&record, Word::HandedOver, until).0
    }

    #[test]
    fn who_listens_and_does_not_answer_is_not_one_that_nobody_reaches() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        let hangs_up = thread::spawn(move || drop(listener.accept()));
        assert_eq!(asked(address.clone(), Instant::now()), Peer::Silent);
        hangs_up.join().expect("no panic");
        assert_eq!(asked(address, Instant::now()), Peer::Unreachable);
    }

    #[test]
    fn who_refuses_is_not_asked_again_and_not_dead() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        let refuses = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("somebody asks");
            let text = "host-b is not the source".into();
            let abort = Abort { reason: AbortReason::Refused, text, hint: None };
            stream.write_all(&encode(&Message::Abort(abort))).expect("it listens");
            while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
        });
        let long = Instant::now() + Duration::from_secs(3600);
        assert_eq!(asked(address, long), Peer::Silent);
        refuses.join().expect("no panic");
    }

    #[test]
    fn a_monitor_is_known_by_more_than_its_number() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let mut record =
            Record::attempting(SessionId(7), Role::Source, String::new(), "/qmp".into(), own);
        assert!(record.monitor_lives());
        record.boot = Some("another".into());
        assert!(!record.monitor_lives());
        record.boot = None;
        record.pid_started = record.pid_started.map(|started| started + 1);
        assert!(!record.monitor_lives());
        assert!(monitor(&record).expect("it is gone").is_none());
    }
}
