//! What a monitor answers: the client is given all of it at once, and then the end.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use pageferry_ctl::qmp::Qmp;
use serde_json::json;

const GREETING: &[u8] =
    br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}
{"return": {}, "id": 1}
"#;

/// Below this, the first byte asks for a monitor that greets as it should.
const GREETED_BELOW: u8 = 224;

pub(super) fn run(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    if *first < GREETED_BELOW {
        theirs.write_all(GREETING).expect("the socket takes this much");
    }
    theirs.write_all(rest).expect("the socket takes this much");
    theirs.shutdown(Shutdown::Write).expect("it is connected");
    // All that will come is there, so that nothing has to be waited for.
    let now = Instant::now();
    let Ok(qmp) = Qmp::over(ours, "fuzz".as_ref(), now) else { return };
    let order = usize::from(*first);
    for step in 0..5 {
        let _any_answer = match (order + step) % 5 {
            0 => qmp.execute_by("query-status", json!({}), now).map(drop),
            1 => qmp.wait_event("STOP", now).map(drop),
            2 => qmp.execute_until_event("stop", json!({}), "STOP", now).map(drop),
            3 => qmp.post("cont", json!({ "x": 1 })).and_then(|it| qmp.answer(it, now)).map(drop),
            _ => qmp.drain_events().map(drop),
        };
    }
}
