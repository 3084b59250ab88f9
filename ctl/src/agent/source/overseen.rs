//! What a source agent says and lets be changed through its admin socket.
//!
//! The agent's loop writes down where it is whenever it tells its watcher; the socket's thread reads
//! that, and changes what may be changed at any time: the pacer. Where several migrations share a
//! budget, this one's part of it is looked up here too.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pageferry_datapath::pace::{Pacer, clock};
use serde::Serialize;
use serde_json::Value;

use super::Watch;
use crate::agent::admin::{Admin, Answer, Limit, Request, Settings};
use crate::agent::shares::Share;
use crate::bandwidth::Bandwidth;
use crate::limits;

/// How far a migration is, as its agent answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Status {
    /// The session.
    pub session: String,
    /// Which end answers.
    pub role: &'static str,
    /// Of the guest's monitor here.
    pub pid: i32,
    /// Where it goes.
    pub to: String,
    /// Where it is.
    pub phase: String,
    /// Since it began.
    pub at_ms: u64,
    /// Rounds moved or on their way.
    pub rounds: usize,
    /// Bytes of the round on its way, and of them handed to the lanes.
    pub round_bytes: (u64, u64),
    /// Guest memory moved so far.
    pub moved_bytes: u64,
    /// Lanes alive.
    pub lanes: usize,
    /// What all lanes together are held to.
    pub max_bandwidth: Option<Bandwidth>,
    /// Its weight among those that it shares a budget with.
    pub weight: Option<u32>,
}

/// See the [module](self). Kept for as long as the agent is to be asked.
#[derive(Debug)]
pub struct Overseen {
    status: Arc<Mutex<Status>>,
    to: String,
    pid: i32,
    pacer: Arc<Pacer>,
    group: Option<Group>,
    share: Arc<Mutex<Option<Share>>>,
    /// When the share was looked up last.
    looked: Option<Instant>,
    /// `Some` once it was tried.
    admin: Option<Option<Admin>>,
}

/// A budget that several migrations share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name on this host.
    pub name: String,
    /// This migration's weight in it.
    pub weight: u32,
    /// What it is, if this migration was told.
    pub budget: Option<Bandwidth>,
}

impl Overseen {
    /// For a guest of the monitor `pid` that goes `to` a target.
    pub fn new(to: String, pid: i32, pacer: Arc<Pacer>, group: Option<Group>) -> Self {
        let share = Arc::default();
        let status = Arc::default();
        Self { status, to, pid, pacer, group, share, looked: None, admin: None }
    }

    /// Notes where the agent is; from the first time on it can be asked.
    pub fn note(&mut self, dir: &Path, watch: &Watch<'_>) {
        *lock(&self.status) = Status {
            session: watch.session.to_string(),
            role: "source",
            pid: self.pid,
            to: self.to.clone(),
            phase: format!("{:?}", watch.phase).to_lowercase(),
            at_ms: watch.at.as_millis() as u64,
            rounds: watch.report.rounds.len(),
            round_bytes: watch.round_bytes,
            moved_bytes: watch.moved_bytes,
            lanes: watch.lanes,
            max_bandwidth: None,
            weight: None,
        };
        if let Some(group) = self.group.take() {
            let Group { name, weight, budget } = &group;
            let joined = Share::join(dir, name, &watch.session.to_string(), *weight, *budget);
            match joined {
                Ok(share) => *lock(&self.share) = Some(share),
                Err(error) => tracing::warn!(%error, "no part in the budget {name}"),
            }
        }
        // Others come and go.
        if self.looked.is_none_or(|at| at.elapsed() >= limits::SHARE_LOOK_EVERY)
            && let Some(share) = &*lock(&self.share)
        {
            self.looked = Some(Instant::now());
            hold(&self.pacer, share.bandwidth());
        }
        if self.admin.is_none() {
            let admin = Admin::start(dir, &watch.session.to_string(), self.answers());
            self.admin = Some(admin.map_err(|error| warn(&error)).ok());
        }
    }

    /// Answers whoever asks, on any thread.
    pub fn answers(&self) -> impl Fn(Request) -> Answer + Send + use<> {
        let (status, pacer) = (Arc::clone(&self.status), Arc::clone(&self.pacer));
        let share = Arc::clone(&self.share);
        move |request| answer(request, &status, &pacer, &share)
    }
}

fn warn(error: &crate::agent::admin::AdminError) {
    let error = crate::agent::failure::chain("", error);
    tracing::warn!(%error, "this agent can't be asked while it runs");
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hold(pacer: &Pacer, rate: Option<Bandwidth>) {
    pacer.set(clock(), rate.map(|rate| rate.bytes_per_second));
}

fn answer(
    request: Request,
    status: &Mutex<Status>,
    pacer: &Pacer,
    share: &Mutex<Option<Share>>,
) -> Answer {
    if request == Request::Cancel {
        return Answer::Error("this agent has one session: SIGINT ends it".into());
    }
    if let Request::Set(settings) = request
        && let Err(error) = change(settings, pacer, &mut lock(share))
    {
        return Answer::Error(error.to_string());
    }
    let weight = lock(share).as_ref().map(Share::weight);
    let status = lock(status).clone();
    let rate = pacer.bytes_per_second();
    let max_bandwidth = rate.map(|bytes_per_second| Bandwidth { bytes_per_second });
    match serde_json::to_value(Status { max_bandwidth, weight, ..status }) {
        Ok(status) => Answer::Ok(status),
        Err(error) => Answer::Error(Value::from(error.to_string()).to_string()),
    }
}

/// All of it, or nothing.
fn change(settings: Settings, pacer: &Pacer, share: &mut Option<Share>) -> io::Result<()> {
    let Settings { max_bandwidth, weight } = settings;
    let Some(share) = share else {
        if weight.is_some() {
            return Err(io::Error::other(
                "it has no weight: it shares its bandwidth with no other",
            ));
        }
        if let Some(Limit(rate)) = max_bandwidth {
            hold(pacer, rate);
        }
        return Ok(());
    };
    if let Some(weight) = weight {
        share.weigh(weight)?;
    }
    if let Some(Limit(rate)) = max_bandwidth {
        share.say(rate)?;
    }
    hold(pacer, share.bandwidth());
    Ok(())
}
