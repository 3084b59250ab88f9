//! `pageferry status`, `recover` and `cancel` on records alone: no guest, no agent, no other side.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_ctl::agent::record::{
    self, Decision, Record, Records, Role, SLOT_BYTES, SLOTS, path_of,
};
use pageferry_ctl::lab::program;
use pageferry_datapath::ids::SessionId;
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const DONE: i32 = 0;
const REFUSED: i32 = 3;
const GUEST_GONE: i32 = 6;

/// A busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Nobody's process.
const NO_PID: i32 = i32::MAX;

/// `pageferry ARGS` on a folder of records: its exit code, the JSON lines it says, and its errors.
fn pageferry(
    dir: &Path,
    args: &[&str],
) -> Result<(i32, Vec<Value>, String), Box<dyn std::error::Error>> {
    let Output { status, stdout, stderr } =
        Command::new(program()?).args(args).arg("--state-dir").arg(dir).output()?;
    let text = String::from_utf8(stdout)?;
    let events = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    Ok((status.code().unwrap_or(-1), events, String::from_utf8(stderr)?))
}

#[test]
fn a_record_that_can_t_be_read_is_shown_and_goes_by_the_operator_s_word() -> Outcome {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let (blank, spoiled) = (SessionId(0xb1), SessionId(0x5b));
    fs::write(path_of(dir, blank, Role::Source), [])?;
    fs::write(path_of(dir, spoiled, Role::Target), [b'?'; SLOTS * SLOT_BYTES])?;

    let (code, shown, _) = pageferry(dir, &["status", "--json"])?;
    assert_eq!((code, shown.len()), (DONE, 2), "{shown:?}");
    for (session, role, reason) in
        [(blank, "source", "never written"), (spoiled, "target", "can't be read")]
    {
        let line = shown.iter().find(|line| line["session"] == session.to_string());
        let line = line.ok_or("it is shown")?;
        assert_eq!(line["role"], role);
        assert!(line["unreadable"].as_str().is_some_and(|it| it.contains(reason)), "{line}");
        assert!(line["path"].as_str().is_some_and(|it| Path::new(it).exists()), "{line}");
    }

    let (code, _, errors) = pageferry(dir, &["recover"])?;
    assert_eq!(code, REFUSED);
    for session in [blank, spoiled] {
        assert!(errors.contains(&format!("recover {session} --forget")), "{errors}");
    }
    assert!(errors.contains("query-status"), "where the guest is has to be looked for: {errors}");
    let (code, _, errors) = pageferry(dir, &["cancel", &blank.to_string()])?;
    assert_eq!(code, REFUSED);
    assert!(errors.contains("can't be read"), "{errors}");

    for session in [blank, spoiled] {
        let session = session.to_string();
        let (code, said, errors) = pageferry(dir, &["recover", &session, "--forget", "--json"])?;
        assert_eq!((code, &said[0]["event"]), (DONE, &"forgotten".into()), "{errors}");
    }
    assert_eq!(fs::read_dir(dir)?.count(), 0);
    assert_eq!(pageferry(dir, &["recover"])?.0, DONE);
    Ok(())
}

/// A source's record of a session whose QEMU and target are gone.
fn template(dir: &Path, session: SessionId) -> Record {
    let (peer, qmp) = ("127.0.0.1:1".to_owned(), dir.join("none.qmp"));
    let mut record = Record::attempting(session, Role::Source, peer, qmp, NO_PID);
    record.security.insecure = true;
    record
}

/// Its file, as this process keeps it until it is dropped.
fn left_behind(dir: &Path, session: SessionId) -> Result<Records, Box<dyn std::error::Error>> {
    Ok(Records::begin(dir, template(dir, session))?)
}

#[test]
fn ctrl_c_ends_a_recover_that_waits() -> Outcome {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let dir = tempfile::tempdir()?;
        let path = left_behind(dir.path(), SessionId(7))?.path().to_owned();
        let mut recover = Command::new(program()?)
            .args(["recover", "--wait", "600", "--state-dir"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let until = Instant::now() + SOON;
        // Written before the target is asked.
        while record::read(&path)?.decision != Decision::HandedOver {
            assert!(Instant::now() < until && recover.try_wait()?.is_none(), "it asks");
            thread::sleep(Duration::from_millis(20));
        }
        kill(Pid::from_raw(recover.id() as i32), signal)?;
        let ended = loop {
            if let Some(status) = recover.try_wait()? {
                break status.signal();
            }
            if Instant::now() >= until {
                recover.kill()?;
                recover.wait()?;
                return Err(format!("{signal} is swallowed").into());
            }
            thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(ended, Some(signal as i32));
        assert_eq!(record::read(&path)?.decision, Decision::HandedOver);
    }
    Ok(())
}

#[test]
fn what_is_in_use_is_passed_over_unless_it_is_asked_for() -> Outcome {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let session = SessionId(9);
    let kept = left_behind(dir, session)?;
    let (code, said, errors) = pageferry(dir, &["recover", "--json"])?;
    assert_eq!((code, &said[0]["event"]), (DONE, &"passed-over".into()), "{errors}");
    assert_eq!(pageferry(dir, &["recover", &session.to_string()])?.0, REFUSED);
    drop(kept);
    Ok(())
}

#[test]
fn a_process_that_is_not_the_agent_is_not_signalled() -> Outcome {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let session = SessionId(0xa).to_string();
    // As if a guard had the record, and another process the agent's number.
    let mut record = template(dir, SessionId(0xa));
    let mut other = Command::new("sleep").arg("600").spawn()?;
    (record.agent, record.agent_started) = (other.id(), Some(1));
    let kept = Records::begin(dir, record)?;
    let (_, shown, _) = pageferry(dir, &["status", "--json"])?;
    let cancelled = pageferry(dir, &["cancel", &session]);
    let lives = other.try_wait()?.is_none();
    other.kill()?;
    other.wait()?;
    assert_eq!((&shown[0]["live"], &shown[0]["on_its_way"]), (&true.into(), &false.into()));
    let (code, _, errors) = cancelled?;
    assert!(code == REFUSED && errors.contains("its agent is gone"), "{errors}");
    assert!(lives, "somebody else was signalled");
    drop(kept);
    Ok(())
}

#[test]
fn a_forgotten_record_claims_nothing_and_a_guest_that_is_gone_is_told_by_the_exit_code() -> Outcome
{
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let (aborted, gone) = (SessionId(0xab).to_string(), SessionId(0x60).to_string());
    left_behind(dir, SessionId(0xab))?.write(Decision::Aborted)?;
    let forget = ["recover", &aborted, "--forget", "--json"];
    let (code, said, errors) = pageferry(dir, &forget)?;
    assert_eq!((code, &said[0]["event"]), (DONE, &"forgotten".into()), "{errors}");
    assert_eq!((&said[0]["decision"], &said[0]["end"]), (&"aborted".into(), &Value::Null));

    let mut record = template(dir, SessionId(0x60));
    record.role = Role::Target;
    drop(Records::begin(dir, record)?);
    let (code, said, errors) = pageferry(dir, &["recover", &gone, "--peer-is-dead", "--json"])?;
    assert_eq!((code, &said[0]["end"]), (GUEST_GONE, &"gone".into()), "{errors}");
    Ok(())
}
