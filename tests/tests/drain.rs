//! Several guests moved by one command: in order, side by side, to several targets; one that can't
//! be moved stops no other, and what was interrupted goes on.
#![forbid(unsafe_code)]

use std::fs;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_ctl::lab::{
    GuestAssets, LabError, Qemu, QemuSpec, TwoHosts, Workplace, certificates, is_root, left_behind,
    one_at_a_time, skip,
};
use pageferry_ctl::qemu::runstate::RunState;
use pageferry_ctl::qmp::Qmp;
use pageferry_tests::agents::{Agent, Ended, MIGRATION_MAX, Manner};
use pageferry_tests::scene::{BOOT_MAX, SOON};
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Emulated guests on busy cores stand still for longer than the default allows for.
const PATIENT: [&str; 4] = ["--downtime-ms", "1000", "--not-converging", "switch-over"];

/// Guests on one host, and for each a QEMU that waits on the other. QEMUs go before the hosts.
struct Fleet {
    guests: Vec<Qemu>,
    waiting: Vec<Qemu>,
    hosts: TwoHosts,
    workplace: Arc<Workplace>,
}

impl Fleet {
    /// Boots guests of so many MiB, `web-0` and so on; the QEMU that waits for one may be of another
    /// size.
    fn boot(sizes: &[(u64, u64)]) -> Result<Self, LabError> {
        let workplace = Workplace::new()?;
        let hosts = TwoHosts::new(&workplace)?;
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        spec.smp = 1;
        spec.params.hot_mib = 4;
        (spec.params.writers, spec.params.pages_per_second) = (1, 500);
        let (mut guests, mut waiting) = (Vec::new(), Vec::new());
        for (index, (memory_mib, waiting_mib)) in sizes.iter().enumerate() {
            spec.memory_mib = *memory_mib;
            // What a guest has to move tells them apart, too.
            spec.params.fill_mib = (memory_mib - 144) / 2;
            spec.extra = vec!["-name".into(), format!("web-{index}")];
            spec.namespace = Some(hosts.source.namespace.name().into());
            guests.push(Qemu::launch(&workplace, &format!("web-{index}"), &spec)?);
            let mut target = spec.to_target();
            target.memory_mib = *waiting_mib;
            target.namespace = Some(hosts.target.namespace.name().into());
            waiting.push(Qemu::launch(&workplace, &format!("in-web-{index}"), &target)?);
        }
        let began = Instant::now();
        for guest in &mut guests {
            guest.wait_ready(BOOT_MAX)?;
        }
        println!("{} guests booted in {:.1} s", guests.len(), began.elapsed().as_secs_f64());
        Ok(Self { guests, waiting, hosts, workplace })
    }

    fn path(&self, name: &str) -> String {
        self.workplace.file(name).display().to_string()
    }

    /// Starts a target agent for all QEMUs that wait; where it listens.
    fn target(&self, name: &str, port: u16) -> Result<(Agent, String), LabError> {
        let host = &self.hosts.target;
        let listen = format!("{}:{port}", host.address);
        let tls = certificates(&self.workplace, &host.address.to_string())?;
        let (tls, state) = (tls.display().to_string(), self.path(&format!("{name}.state")));
        let allow = format!("qmp={}", self.path("in-*.qmp"));
        let mut args = vec!["target", "--listen", &listen, "--allow", &allow, "--json"];
        args.extend(["--state-dir", &state, "--tls-dir", &tls, "--reconnect-timeout", "3"]);
        let agent = Agent::start(&self.workplace, Some(host), name, &args)?;
        agent.wait_text("listening", SOON)?;
        Ok((agent, listen))
    }

    /// Starts a drain, with every agent of it held in a phase.
    fn drain(&self, name: &str, args: &[&str], hold: &str) -> Result<Agent, LabError> {
        let host = &self.hosts.source;
        let tls = certificates(&self.workplace, &host.address.to_string())?;
        let (tls, state) = (tls.display().to_string(), self.path("drain.state"));
        let (run, pattern) = (self.path("run"), self.path("in-{name}.qmp"));
        let mut all = vec!["drain", "--tls-dir", &tls, "--state-dir", &state];
        all.extend(["--runtime-dir", &run, "--target-qmp", &pattern]);
        all.extend(args);
        let manner = Manner { hold, ..Manner::default() };
        Agent::start_in(&self.workplace, Some(host), name, &all, manner)
    }

    fn drained(&self, name: &str, args: &[&str]) -> Result<Ended, LabError> {
        let began = Instant::now();
        let ended = self.drain(name, args, "")?.wait(MIGRATION_MAX);
        println!("{name}: {:.1} s", began.elapsed().as_secs_f64());
        ended
    }

    /// The pid of the only agent under way.
    fn agent(&self) -> Result<i32, Box<dyn std::error::Error>> {
        let args = ["status", "--json", "--state-dir", &self.path("drain.state")];
        let host = &self.hosts.source;
        let status = Agent::start(&self.workplace, Some(host), "status", &args)?.wait(SOON)?;
        let agents = status.events.iter().filter(|it| it["live"] == true);
        let pids: Vec<i64> = agents.filter_map(|it| it["agent"].as_i64()).collect();
        match pids[..] {
            [pid] => Ok(i32::try_from(pid)?),
            _ => Err(format!("one agent: {:?}", status.events).into()),
        }
    }

    /// A list of all guests, as an operator writes it.
    fn list(&self) -> std::io::Result<String> {
        let guest = |index: usize| {
            format!("[[guest]]\nname = 'web-{index}'\nqmp = '{}'\n", self.path(&qmp(index)))
        };
        let path = self.path("guests.toml");
        fs::write(&path, (0..self.guests.len()).map(guest).collect::<String>())?;
        Ok(path)
    }

    /// The guest runs at the target and nowhere else, and everything it has checked was right.
    fn assert_there(&self, index: usize) -> Outcome {
        assert!(!runs(&self.guests[index])? && runs(&self.waiting[index])?, "web-{index}");
        assert_goes_on(&self.waiting[index])
    }

    /// The guest runs at the source, as if nothing had been tried.
    fn assert_here(&self, index: usize) -> Outcome {
        assert!(runs(&self.guests[index])?, "web-{index}");
        let left = left_behind(self.guests[index].pid())?;
        assert!(left.is_empty(), "left in the QEMU of web-{index}: {left:?}");
        assert_goes_on(&self.guests[index])
    }
}

fn qmp(index: usize) -> String {
    format!("web-{index}.qmp")
}

fn runs(qemu: &Qemu) -> Result<bool, Box<dyn std::error::Error>> {
    Ok(RunState::query(&Qmp::connect(qemu.spare_qmp())?)?.running)
}

fn assert_goes_on(qemu: &Qemu) -> Outcome {
    let before = qemu.console().wait_tick(SOON)?;
    let more = |tick: &pageferry_ctl::lab::Tick| tick.n >= before.n + 2;
    qemu.console().wait_tick_where("two more ticks", SOON, more)?;
    let began = Instant::now();
    assert_eq!(qemu.console().verify(SOON)?.bad, 0, "the guest found bad memory");
    println!("verified in {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// The row of each guest in the summary: name and outcome.
fn outcomes(ended: &Ended) -> Vec<(String, String)> {
    let summary = ended.event("drain-summary").unwrap_or(&Value::Null);
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let rows = summary["guests"].as_array().into_iter().flatten();
    rows.map(|row| (text(row, "guest"), text(row, "outcome"))).collect()
}

fn pairs(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
    wanted.iter().map(|(name, outcome)| ((*name).into(), (*outcome).into())).collect()
}

#[test]
fn guests_are_drained_one_after_the_other_smallest_first() -> Outcome {
    if !is_root() {
        skip("guests_are_drained_one_after_the_other_smallest_first", "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let fleet = Fleet::boot(&[(256, 256), (192, 192), (224, 224)])?;
    let (target, to) = fleet.target("target", 4777)?;
    let (list, csv) = (fleet.list()?, fleet.path("moved.csv"));
    let order = ["--order", "smallest-first", "--to", &to, "--json", &list];

    let planned = fleet.drained("dry", &[&order[..], &["--dry-run"]].concat())?;
    assert_eq!(planned.code, 0, "{}", planned.stderr);
    let plan = planned.event("drain-plan").expect("a plan");
    let bytes = |guest: &Value| guest["populated_bytes"].as_u64().unwrap_or(0);
    let guests = plan["guests"].as_array().expect("its guests");
    assert_eq!(guests.len(), 3, "{plan:#}");
    assert!(guests.windows(2).all(|two| bytes(&two[0]) <= bytes(&two[1])), "{plan:#}");
    assert!(guests.iter().all(|guest| guest["dirty_bytes_per_second"].is_u64()), "{plan:#}");
    for index in 0..3 {
        assert!(runs(&fleet.guests[index])? && !runs(&fleet.waiting[index])?);
    }

    let args = [&order[..], &["--csv", &csv, "--", "--verify"], &PATIENT].concat();
    let ended = fleet.drained("drain", &args)?;
    assert_eq!(ended.code, 0, "{}\n{:#?}", ended.stderr, outcomes(&ended));
    // One at a time: each begins when the one before has ended, and says who it is.
    let turns: Vec<&str> = ended
        .events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .filter(|name| ["drain-begun", "drain-guest"].contains(name))
        .collect();
    assert_eq!(turns, ["drain-begun", "drain-guest"].repeat(3));
    let named = |event: &&Value| event["event"] == "summary" && event["verified"] == true;
    let moved: Vec<&Value> = ended.events.iter().filter(named).map(|it| &it["guest"]).collect();
    assert_eq!(moved, ["web-1", "web-2", "web-0"]);
    let rows = fs::read_to_string(&csv)?;
    assert!(rows.starts_with("guest,outcome,to,session,"), "{rows}");
    assert_eq!((rows.lines().count(), rows.matches(",moved,").count()), (4, 3), "{rows}");
    for index in 0..3 {
        fleet.assert_there(index)?;
    }

    // For people: what was moved, and nothing to do.
    let again = fleet.drain("again", &["--resume", "--to", &to], "")?;
    again.wait_text("3 of 3 guests are at their target", SOON)?;
    let said = again.said();
    println!("{said}");
    assert_eq!(again.wait(SOON)?.code, 0);
    assert_eq!(said.matches("moved before").count(), 3, "{said}");
    target.signal(Signal::SIGINT);
    target.wait(SOON)?;
    Ok(())
}

#[test]
fn guests_go_side_by_side_to_two_targets_and_one_that_does_not_fit_stays() -> Outcome {
    let name = "guests_go_side_by_side_to_two_targets_and_one_that_does_not_fit_stays";
    if !is_root() {
        skip(name, "needs root for namespaces");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let mut fleet = Fleet::boot(&[(192, 192), (256, 224), (224, 224), (192, 192)])?;
    let (_first, one) = fleet.target("target-1", 4777)?;
    let (_second, two) = fleet.target("target-2", 4778)?;
    let sockets = fleet.path("web-?.qmp");
    let to = ["--qmp", &sockets, "--to", &one, "--to", &two, "--json"];
    let strict = fleet.drained("strict", &[&to[..], &["--all-or-nothing"]].concat())?;
    assert_eq!(strict.code, 3, "{}", strict.stderr);
    assert!(strict.stderr.contains("web-1"), "{}", strict.stderr);

    // One more loses the QEMU that waits for it under way; at 240 Mbit/s all of them take seconds.
    let side_by_side = ["--parallel", "3", "--max-bandwidth", "240M"];
    let args = [&to[..], &side_by_side, &["--", "--compress", "off"], &PATIENT].concat();
    let drain = fleet.drain("drain", &args, "scanning:4000")?;
    drain.wait_error("web-3: held in", SOON)?;
    fleet.waiting[3].kill();
    let ended = drain.wait(MIGRATION_MAX)?;
    assert_eq!(ended.code, 1, "{}\n{:#?}", ended.stderr, outcomes(&ended));
    let wanted = [("web-1", "refused"), ("web-0", "moved"), ("web-2", "moved"), ("web-3", "stays")];
    assert_eq!(outcomes(&ended), pairs(&wanted), "{}", ended.stderr);
    let plan = ended.event("drain-plan").expect("a plan");
    let tos: Vec<&Value> =
        plan["guests"].as_array().expect("guests").iter().map(|it| &it["to"]).collect();
    assert!(tos.contains(&&Value::from(one)) && tos.contains(&&Value::from(two)), "{plan:#}");
    for index in [0, 2] {
        fleet.assert_there(index)?;
    }
    for index in [1, 3] {
        fleet.assert_here(index)?;
    }
    // The three shared one budget: 30 MB/s, and what their pauses were exempt from.
    let summary = ended.event("drain-summary").expect("a summary");
    println!("side by side: {} ms", summary["total_ms"]);
    let rates = ended.events.iter().filter(|it| it["event"] == "brownout");
    for brownout in rates {
        let bytes = brownout["bytes_per_second"].as_u64().unwrap_or(0);
        assert!(bytes < 30_000_000, "{brownout:#}");
    }
    Ok(())
}

#[test]
fn a_drain_that_is_interrupted_or_killed_goes_on_where_it_was() -> Outcome {
    if !is_root() {
        skip("a_drain_that_is_interrupted_or_killed_goes_on_where_it_was", "needs root");
        return Ok(());
    }
    let _alone = one_at_a_time();
    let fleet = Fleet::boot(&[(192, 192), (192, 192), (192, 192)])?;
    let (_target, to) = fleet.target("target", 4777)?;
    let list = fleet.list()?;
    let args = [list.as_str(), "--to", &to, "--json"];
    let resume =
        [&["--resume", "--to", &to, "--json", "--parallel", "2", "--"][..], &PATIENT].concat();

    let drain = fleet.drain("first", &args, "scanning:60000")?;
    drain.wait_error("web-0: held in", SOON)?;
    let other = fleet.drained("other", &args)?;
    assert_eq!(other.code, 3, "{}", other.stderr);
    assert!(other.stderr.contains("another drain is under way"), "{}", other.stderr);
    // An agent that is killed takes its own guest's turn, and no other's.
    kill(Pid::from_raw(fleet.agent()?), Signal::SIGKILL)?;
    drain.wait_error("web-1: held in", SOON)?;
    drain.signal(Signal::SIGINT);
    let ended = drain.wait(SOON)?;
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("web-0: its agent ended unexpectedly"), "{}", ended.stderr);
    let wanted = [("web-0", "stays"), ("web-1", "stays"), ("web-2", "left")];
    assert_eq!(outcomes(&ended), pairs(&wanted));
    for index in 0..3 {
        fleet.assert_here(index)?;
    }

    // Killed, it leaves an agent under way, which comes to its end.
    let drain = fleet.drain("second", &resume[..4], "scanning:5000")?;
    drain.wait_error("web-0: held in", SOON)?;
    drain.signal(Signal::SIGKILL);
    drain.wait(SOON)?;
    let ended = fleet.drained("third", &resume)?;
    assert_eq!(ended.code, 0, "{}\n{:#?}", ended.stderr, outcomes(&ended));
    let notes = ended.events.iter().filter(|it| it["event"] == "drain-note");
    let notes: Vec<&str> = notes.filter_map(|it| it["text"].as_str()).collect();
    assert!(notes.iter().any(|note| note.starts_with("web-0: waiting for agent")), "{notes:?}");
    let wanted = [("web-0", "moved-before"), ("web-1", "moved"), ("web-2", "moved")];
    assert_eq!(outcomes(&ended), pairs(&wanted));
    for index in 0..3 {
        fleet.assert_there(index)?;
    }
    Ok(())
}

#[test]
fn what_a_drain_can_t_begin_with_is_said() -> Outcome {
    let _alone = one_at_a_time();
    let workplace = Workplace::new()?;
    let state = workplace.file("state").display().to_string();
    let run = |name: &str, args: &[&str]| -> Result<Ended, LabError> {
        let all = [&["drain", "--state-dir", &state, "--insecure"], args].concat();
        Agent::start(&workplace, None, name, &all)?.wait(SOON)
    };
    let list = workplace.file("guests.json").display().to_string();
    fs::write(&list, r#"{"guest":[{"qmp":"/none/a.qmp"}]}"#)?;
    let nowhere = run("nowhere", &[&list, "--dry-run"])?;
    assert_eq!(nowhere.code, 3, "{}", nowhere.stderr);
    assert!(nowhere.stderr.contains("error: a: "), "{}", nowhere.stderr);
    let nothing = run("nothing", &["--resume"])?;
    assert_eq!(nothing.code, 3, "{}", nothing.stderr);
    assert!(nothing.stderr.contains("no drain before"), "{}", nothing.stderr);
    fs::write(&list, r#"{"guest":[{"qpm":"/none/a.qmp"}]}"#)?;
    let mistyped = run("mistyped", &[&list])?;
    assert_eq!(mistyped.code, 2, "{}", mistyped.stderr);
    assert!(mistyped.stderr.contains("qpm"), "{}", mistyped.stderr);
    assert!(!workplace.file("state").exists(), "who is refused leaves nothing");
    let manner = Manner { under: &["env", "PATH=/none"], ..Manner::default() };
    let all = ["drain", "--state-dir", &state, "--insecure", "--libvirt", "--to", "127.0.0.1:1"];
    let libvirt = Agent::start_in(&workplace, None, "libvirt", &all, manner)?.wait(SOON)?;
    assert_eq!(libvirt.code, 3, "{}", libvirt.stderr);
    assert!(libvirt.stderr.contains("virsh list"), "{}", libvirt.stderr);
    assert!(libvirt.stderr.contains("hint: apt install libvirt-clients"), "{}", libvirt.stderr);
    Ok(())
}
