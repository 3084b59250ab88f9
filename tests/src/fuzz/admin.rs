//! What a running agent is asked through its admin socket, and what it answers there.
//!
//! The first byte says what the others are: a line for the agent, the bandwidth in one that is
//! well-formed, or a line of the agent for whoever asked.

use std::sync::{Arc, OnceLock};

use pageferry_ctl::agent::admin::{self, Limit, Request, Settings};
use pageferry_ctl::agent::source::overseen::Overseen;
use pageferry_ctl::bandwidth::Bandwidth;
use pageferry_datapath::pace::{BYTES_PER_SECOND_MIN, Pacer};
use serde_json::{Value, json};

pub(super) fn run(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    match first % 4 {
        0 => {
            let _any_answer = admin::understood(rest);
        }
        1 => {
            let bandwidth = String::from_utf8_lossy(rest);
            asks(json!({ "verb": "set", "max_bandwidth": bandwidth }).to_string().as_bytes());
        }
        _ => asks(rest),
    }
}

/// One caller says this, and closes his half.
fn asks(said: &[u8]) {
    let pacer = Arc::new(Pacer::new(Some(BYTES_PER_SECOND_MIN)));
    let agent = Overseen::new("fuzz:1".into(), 1, Arc::clone(&pacer), None);
    let answers = agent.answers();
    let heard = OnceLock::new();
    let mut line = Vec::new();
    let served = admin::hear_and_answer(said, &mut line, &|request| {
        heard.set(request.clone()).expect("one line, one request");
        answers(request)
    });
    served.expect("whoever asks is there, and gets his answer");
    if said.is_empty() {
        return assert!(line.is_empty(), "an answer to nothing");
    }
    assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1), "not one line");
    let answer = admin::understood(&line);
    match heard.get() {
        Some(request) if !is_refused(request) => {
            judge(request, &answer.expect("it was understood"), &pacer);
        }
        // Not understood; or not done by one that has no other session, and no budget to share.
        _ => {
            let refused = matches!(answer, Err(admin::AdminError::Refused(_)));
            assert!(refused, "it is not refused");
            assert_eq!(
                pacer.bytes_per_second(),
                Some(BYTES_PER_SECOND_MIN),
                "changed all the same"
            );
        }
    }
}

fn is_refused(request: &Request) -> bool {
    let weighs = matches!(request, Request::Set(Settings { weight: Some(_), .. }));
    *request == Request::Cancel || weighs
}

/// What was understood is what was done and what is answered, and it can be said again.
fn judge(request: &Request, status: &Value, pacer: &Pacer) {
    let again = serde_json::to_string(request).expect("it is plain");
    assert_eq!(serde_json::from_str::<Request>(&again).ok().as_ref(), Some(request));
    let rate = pacer.bytes_per_second();
    let asked = match request {
        Request::Set(Settings { max_bandwidth: Some(Limit(asked)), .. }) => {
            asked.map(|rate| rate.bytes_per_second)
        }
        _ => Some(BYTES_PER_SECOND_MIN),
    };
    assert_eq!(rate, asked, "another rate than was asked for");
    let said: Option<Bandwidth> =
        serde_json::from_value(status["max_bandwidth"].clone()).expect("a rate or none");
    assert_eq!(said.map(|said| said.bytes_per_second), rate, "another rate than it has");
    assert_eq!(status["role"], "");
}
