//! What one session at a target can be told from outside: to end. The others there go on.

use std::path::Path;

use crossbeam_channel::Sender;
use pageferry_datapath::ids::SessionId;
use serde_json::Value;

use super::super::admin::{Admin, Answer, Request};
use crate::agent::failure;

/// Listens in `dir`; `None`, logged, where that can't be: then only the source ends the session, or
/// who ends the agent.
pub(super) fn listen(dir: &Path, session: SessionId, cancel: Sender<()>) -> Option<Admin> {
    let answer = move |request| match request {
        Request::Cancel => {
            let _it_has_just_ended = cancel.send(());
            Answer::Ok(Value::Null)
        }
        Request::Status | Request::Set(_) => {
            Answer::Error("the source's agent is to be asked".into())
        }
    };
    // The source's end may be on this host, too.
    let admin = Admin::start(dir, &format!("{session}.target"), answer);
    admin
        .map_err(|error| {
            let error = failure::chain("", &error);
            tracing::warn!(%error, "this session can't be cancelled here by itself");
        })
        .ok()
}
