//! Whose is what arrives: new migrations, lanes of those that are on their way, sources that come
//! back after a cut.
//!
//! Owned by the thread that calls [`serve`]; each migration runs on a thread of its own and tells
//! it when it is over.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::thread::{self, Scope};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, after, select, unbounded};
use pageferry_datapath::control::{Abort, AbortReason, Hello, Message, Recover, Rejoin, Word};
use pageferry_datapath::framing::hello::Refusal;
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::recover;
use pageferry_datapath::target::Outcome;

use super::super::acceptor::{Acceptor, Arrival};
use super::super::control::{Control, NotAdopted};
use super::super::link::Link;
use super::super::record::{self, Role};
use super::super::recovery;
use super::super::stranger::Stranger;
use super::session::{Handle, Session};
use super::{OpenMonitor, TargetOptions, TargetResult};
use crate::limits;

/// Takes migrations in until cancelled, or until `done` says that one that ended was the last.
/// Those still on their way are cancelled then.
pub fn serve(
    options: &TargetOptions,
    acceptor: &Acceptor,
    open_monitor: &OpenMonitor<'_>,
    cancel: &Receiver<()>,
    tell: &mut dyn FnMut(&str),
    done: &mut dyn FnMut(TargetResult) -> ControlFlow<()>,
) {
    let (to_ended, ended) = unbounded();
    thread::scope(|scope| {
        let sessions = HashMap::new();
        let mut server = Server {
            options,
            open_monitor,
            scope,
            to_ended,
            sessions,
            waiting: None,
            asked: Vec::new(),
        };
        loop {
            select! {
                recv(acceptor.arrivals()) -> arrival => match arrival {
                    Ok(arrival) => server.arrived(arrival, tell),
                    Err(_) => break,
                },
                recv(ended) -> result => {
                    let result: TargetResult = result.expect("the server holds a sender");
                    server.ended(&result);
                    if done(result).is_break() {
                        break;
                    }
                    server.start_waiting(tell);
                }
                recv(after(limits::SUPERSEDING_LOOKS_EVERY)) -> _ => server.refuse_waiting(),
                recv(cancel) -> _ => break,
            }
        }
        server.stop();
        while !server.sessions.is_empty() {
            let result: TargetResult = ended.recv().expect("the server holds a sender");
            server.ended(&result);
            let _it_ends_anyway = done(result);
        }
    });
}

struct Server<'scope, 'env> {
    options: &'env TargetOptions,
    open_monitor: &'env OpenMonitor<'env>,
    scope: &'scope Scope<'scope, 'env>,
    to_ended: Sender<TargetResult>,
    sessions: HashMap<SessionId, Handle>,
    /// Comes as soon as the one that it takes the place of has ended.
    waiting: Option<(Link, Hello, Instant)>,
    /// Sources that ask what became of a session, which is ending.
    asked: Vec<(Recover, Link)>,
}

impl Server<'_, '_> {
    fn arrived(&mut self, arrival: Arrival, tell: &mut dyn FnMut(&str)) {
        match arrival {
            Arrival::Lane(lane) => match self.sessions.get(&lane.hello().session) {
                Some(session) => {
                    // One that has just ended drops the lane, which closes it.
                    let _dropped_with_it = session.lanes.send(lane);
                }
                None => lane.refuse(Refusal::Ticket),
            },
            Arrival::Control { link, first } => match *first {
                Message::Hello(hello) => self.begin(link, hello, tell),
                Message::Rejoin(rejoin) => {
                    let known = self.sessions.get(&rejoin.session);
                    let control = known.map(|session| session.control.clone());
                    self.scope.spawn(move || come_back(control, &link, &rejoin));
                }
                Message::Recover(ask) => self.recover(link, ask, tell),
                _ => refuse(&link, "a session begins with a hello", None),
            },
            Arrival::Stranger { from, reason } => tell(&format!("{from}: {reason}")),
        }
    }

    /// The agent of a source is gone, and somebody asks for it what became of the session. One that
    /// is on its way hears the source's word first, and ends by it. Nobody else's is heard.
    fn recover(&mut self, link: Link, ask: Recover, tell: &mut dyn FnMut(&str)) {
        if !self.admits(&link, tell) {
            return;
        }
        let Some(session) = self.sessions.get(&ask.session) else {
            let dir = self.options.state_dir.clone();
            self.scope.spawn(move || _ = recovery::answer(&dir, &link, ask));
            return;
        };
        let control = session.control.clone();
        let source = control.security();
        if let Err(stranger) = Stranger::is_let_in(&source, link.security(), ask.session) {
            return stranger.turn_away(&link);
        }
        let word = match ask.word {
            Word::HandedOver => Message::Commit,
            _ => Message::Abort(Abort {
                reason: AbortReason::HostFailed,
                text: "the source's agent is gone, and its guest goes on there".into(),
                hint: None,
            }),
        };
        self.asked.push((ask, link));
        self.scope.spawn(move || control.hear_otherwise(word));
    }

    /// A session is over; whoever asked for it hears how.
    fn ended(&mut self, result: &TargetResult) {
        self.sessions.remove(&result.session);
        let word = match &result.outcome {
            Outcome::Runs => Word::Running,
            Outcome::Failed(_) => Word::Aborted,
            Outcome::Uncertain(_) => Word::Attempting,
        };
        for (ask, link) in self.asked.extract_if(.., |(ask, _)| ask.session == result.session) {
            let dir = self.options.state_dir.clone();
            // Nobody else waits until the source has acted on it.
            self.scope.spawn(move || {
                let decided = recover::has_acted(word);
                if recovery::tell(&link, word) && decided && recovery::has_settled(&link) {
                    recovery::forget(&dir, ask.session, link.security());
                }
                link.finish();
            });
        }
    }

    /// Starts a session, if there is room. One that is cut off and has loaded nothing makes room:
    /// its source may have been started again.
    fn begin(&mut self, link: Link, hello: Hello, tell: &mut dyn FnMut(&str)) {
        if !self.admits(&link, tell) {
            return;
        }
        if self.sessions.contains_key(&hello.session) || self.waiting.is_some() {
            return busy(&link);
        }
        // Whoever took its number would stand between that record and the source that may ask for it.
        if record::path_of(&self.options.state_dir, hello.session, Role::Target).exists() {
            let hint = format!("pageferry recover {}", hello.session);
            return refuse(&link, "there is a record of this session already", Some(&hint));
        }
        let same_peer =
            |session: &&Handle| link.security().is_same_peer(&session.control.security());
        if self.sessions.values().filter(same_peer).count() >= self.options.sessions_per_peer {
            let hint = "wait for one of them to end, or raise --sessions-per-peer at the target";
            let text = "the target takes in as many guests of one source as it may already";
            return refuse(&link, text, Some(hint));
        }
        if self.sessions.len() < self.options.sessions_max {
            return self.start(link, hello);
        }
        let cut_off =
            |session: &&Handle| session.control.is_cut() && !session.loaded.load(Ordering::Relaxed);
        match self.sessions.values().find(cut_off) {
            Some(session) => {
                session.control.give_up();
                self.waiting = Some((link, hello, Instant::now()));
            }
            None => busy(&link),
        }
    }

    /// Whether a peer may come to this target at all; told so if not.
    fn admits(&self, link: &Link, tell: &mut dyn FnMut(&str)) -> bool {
        let admitted = self.options.allowed.peer(link.security());
        if let Err(failure) = &admitted {
            tell(&failure.text);
            refuse(link, &failure.text, failure.hint.as_deref());
        }
        admitted.is_ok()
    }

    fn start(&mut self, link: Link, hello: Hello) {
        let id = hello.session;
        let (session, handle, cancelled) = Session::new(self.options, link, hello);
        self.sessions.insert(id, handle);
        let (open_monitor, to_ended) = (self.open_monitor, self.to_ended.clone());
        self.scope.spawn(move || {
            let run = AssertUnwindSafe(|| session.run(open_monitor, &cancelled));
            // A bug: the guests' owners are in the records, and nobody waits for this one.
            let result = catch_unwind(run).unwrap_or_else(|_| std::process::exit(101));
            to_ended.send(result).expect("the server waits for every session");
        });
    }

    fn start_waiting(&mut self, tell: &mut dyn FnMut(&str)) {
        if let Some((link, hello, _)) = self.waiting.take() {
            self.begin(link, hello, tell);
        }
    }

    fn refuse_waiting(&mut self) {
        let over = |waiting: &mut (Link, Hello, Instant)| {
            waiting.2.elapsed() > limits::SUPERSEDING_WAIT_MAX
        };
        if let Some((link, ..)) = self.waiting.take_if(over) {
            busy(&link);
        }
    }

    fn stop(&mut self) {
        for session in self.sessions.values() {
            let _it_has_just_ended = session.cancel.send(());
        }
    }
}

fn come_back(control: Option<Control>, link: &Link, rejoin: &Rejoin) {
    let adopted = control.ok_or(NotAdopted).and_then(|it| it.adopt(link.clone(), rejoin));
    if let Err(error) = adopted {
        refuse(link, &error.to_string(), None);
    }
}

fn busy(link: &Link) {
    let hint = "start a target of its own for each guest, or wait";
    refuse(link, "the target is taking in another guest", Some(hint));
}

fn refuse(link: &Link, text: &str, hint: Option<&str>) {
    let abort =
        Abort { reason: AbortReason::Refused, text: text.into(), hint: hint.map(str::to_owned) };
    // Whoever it was may be gone again.
    let _nothing_to_do_about_it = link.send(&Message::Abort(abort)).map(|()| link.finish());
}
