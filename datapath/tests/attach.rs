//! One system call inside a running process: taken out, nothing left behind, and what the process
//! was doing goes on.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, RawFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, ppoll};
use nix::sys::time::TimeSpec;
use pageferry_datapath::attach::{
    AttachError, Process, UffdPrivilege, close_leftovers, take_userfaultfd,
};
use pageferry_datapath::backing::Backing;
use pageferry_datapath::ids::RegionIndex;
use pageferry_datapath::region::Region;
use pageferry_datapath::tracker::{ScanPhases, UffdTracker};

/// How long each helper is asleep in its call. The injections come in its first third.
const ASLEEP: Duration = Duration::from_millis(600);

fn main() {
    if let Ok(call) = std::env::var("HELPER") {
        return helper(&call);
    }
    let test = |name: &str, test: fn()| {
        libtest_mimic::Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    macro_rules! trials {
        ($($name:ident,)*) => { vec![$(test(stringify!($name), $name)),*] };
    }
    let trials = trials![
        a_thread_in_ppoll_goes_on,
        a_thread_in_poll_goes_on,
        a_thread_in_nanosleep_goes_on,
        a_thread_in_futex_goes_on,
        a_thread_in_read_goes_on,
        a_thread_that_computes_goes_on,
        a_process_stopped_by_a_signal_is_refused_and_left_stopped,
        a_process_traced_by_another_is_refused_by_name,
        a_process_that_exits_meanwhile_is_gone_and_its_parent_reaps_it,
        injections_under_signals_lose_none,
        a_polling_thread_outlives_any_number_of_killed_attachers,
        what_killed_attachers_left_is_closed_and_nothing_else,
    ];
    libtest_mimic::run(&libtest_mimic::Arguments::from_args(), trials).exit();
}

/// What this program does when it is started again: its main thread sits in `call`, and then says
/// how that went.
fn helper(call: &str) {
    if let Some(pid) = call.strip_prefix("attach ") {
        let process = Process::open(pid.parse().unwrap()).unwrap();
        println!("\nhelper ready");
        loop {
            take_userfaultfd(&process).unwrap();
        }
    }
    if call == "userfaultfds" {
        let backing = Backing::memfd("attach-test", 1 << 20, None).unwrap();
        let region = Region::open(RegionIndex(0), backing).unwrap();
        let _in_use = UffdTracker::of_own(&[region], &[], ScanPhases::One).unwrap();
        let other = Helper::start("main loop");
        let _unused = [(); 2].map(|()| take_userfaultfd(&other.process()).unwrap());
        println!("\nhelper ready");
        return main_loop();
    }
    println!("\nhelper ready");
    if call == "main loop" {
        return main_loop();
    }
    let started = Instant::now();
    let outcome = match call {
        "ppoll" => {
            let stdin = std::io::stdin();
            let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLPRI)];
            format!("{:?}", ppoll(&mut fds, Some(TimeSpec::from(ASLEEP)), None))
        }
        "poll" => {
            let stdin = std::io::stdin();
            let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(ASLEEP).unwrap();
            format!("{:?}", nix::poll::poll(&mut fds, timeout))
        }
        "nanosleep" => {
            // The standard library's sleep goes on after EINTR; count the bare call.
            let asleep = nix::time::clock_nanosleep(
                nix::time::ClockId::CLOCK_MONOTONIC,
                nix::time::ClockNanosleepFlags::empty(),
                &TimeSpec::from(ASLEEP),
            );
            format!("{asleep:?}").replace("TimeSpec", "").split('(').next().unwrap().to_owned()
        }
        "futex" => {
            let (_sender, receiver) = std::sync::mpsc::channel::<()>();
            format!("{:?}", receiver.recv_timeout(ASLEEP))
        }
        "read" => {
            let mut byte = [0];
            // Past the buffered reader, so that it is one call.
            format!("{:?}", nix::unistd::read(std::io::stdin(), &mut byte))
        }
        "spin" => {
            let mut sum = 0.0f64;
            let mut steps = 0u64;
            while started.elapsed() < ASLEEP {
                for _ in 0..1000 {
                    steps += 1;
                    sum += f64::from((steps % 7) as u32) * 0.5;
                }
            }
            let expected: f64 = (1..=steps).map(|step| (step % 7) as f64 * 0.5).sum();
            format!("{}", (sum - expected).abs() < 1e-6)
        }
        other => panic!("{other}?"),
    };
    println!("\noutcome {outcome} after {}", started.elapsed().as_millis());
    let mut rest = String::new();
    let _ = std::io::stdin().read_to_string(&mut rest);
}

/// Polls over and over, as a monitor's main thread does, until its input ends.
fn main_loop() {
    let stdin = std::io::stdin();
    loop {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from(Duration::from_millis(20))), None) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            // Others may be said to be ready that are not.
            Ok(_) if fds[0].revents() == Some(PollFlags::empty()) => {}
            Ok(_) => break,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A helper process, killed and reaped when dropped.
struct Helper {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Helper {
    fn start(call: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env("HELPER", call)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut helper = Self { child, stdin, stdout };
        helper.line("helper ready");
        std::thread::sleep(Duration::from_millis(30));
        helper
    }

    fn process(&self) -> Process {
        Process::open(self.child.id() as libc::pid_t).unwrap()
    }

    fn line(&mut self, start: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "ended before {start:?}");
            if let Some(rest) = line.strip_prefix(start) {
                return rest.trim().to_owned();
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resumes(call: &str, outcome: &str) {
    let mut helper = Helper::start(call);
    let process = helper.process();
    let before = (process.fds().unwrap(), process.maps().unwrap().len());
    for _ in 0..20 {
        let taken = take_userfaultfd(&process).unwrap();
        assert_eq!(taken.privilege, UffdPrivilege::Full);
        assert!(taken.stopped > Duration::ZERO);
        let name = std::fs::read_link(format!("/proc/self/fd/{}", {
            use std::os::fd::AsRawFd;
            taken.fd.as_raw_fd()
        }));
        assert!(name.unwrap().to_str().unwrap().contains("userfaultfd"));
        assert_eq!(process.tracer().unwrap(), 0);
    }
    assert_eq!((process.fds().unwrap(), process.maps().unwrap().len()), before);
    if call == "read" {
        std::thread::sleep(ASLEEP / 2);
        helper.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    }
    let said = helper.line("outcome");
    let (said, after) = said.rsplit_once(" after ").unwrap();
    assert_eq!(said, outcome, "{call}");
    let after: u64 = after.parse().unwrap();
    let least = if call == "read" { ASLEEP / 2 } else { ASLEEP };
    assert!(after >= least.as_millis() as u64 - 1, "{call} ended after {after} ms");
    drop(helper.stdin.take());
    assert!(helper.child.wait().unwrap().success(), "the helper goes on to its end");
}

fn a_thread_in_ppoll_goes_on() {
    resumes("ppoll", "Ok(0)");
}

fn a_thread_in_poll_goes_on() {
    resumes("poll", "Ok(0)");
}

fn a_thread_in_nanosleep_goes_on() {
    resumes("nanosleep", "Ok");
}

fn a_thread_in_futex_goes_on() {
    resumes("futex", "Err(Timeout)");
}

fn a_thread_in_read_goes_on() {
    resumes("read", "Ok(1)");
}

fn a_thread_that_computes_goes_on() {
    resumes("spin", "true");
}

fn a_process_stopped_by_a_signal_is_refused_and_left_stopped() {
    let helper = Helper::start("read");
    let process = helper.process();
    let pid = nix::unistd::Pid::from_raw(process.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(matches!(take_userfaultfd(&process), Err(AttachError::Stopped { .. })));
    // It stops again by itself, when it gets a core.
    let stopped = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.contains("State:\tT (stopped)")
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    while !stopped() {
        assert!(Instant::now() < deadline, "it runs on");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(process.tracer().unwrap(), 0);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    take_userfaultfd(&process).unwrap();
}

fn a_process_traced_by_another_is_refused_by_name() {
    let helper = Helper::start("read");
    let process = helper.process();
    let pid = nix::unistd::Pid::from_raw(process.pid());
    std::thread::scope(|scope| {
        let (seized, is_seized) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let options = nix::sys::ptrace::Options::empty();
            seized.send(nix::sys::ptrace::seize(pid, options)).unwrap();
            let _ = released.recv();
        });
        is_seized.recv().unwrap().unwrap();
        let refused = take_userfaultfd(&process);
        assert!(matches!(refused, Err(AttachError::Traced { .. })), "{refused:?}");
        drop(release);
    });
}

fn a_process_that_exits_meanwhile_is_gone_and_its_parent_reaps_it() {
    for delay_us in [0, 50, 100, 500] {
        let mut helper = Helper::start("spin");
        let process = helper.process();
        let killer = {
            let pid = nix::unistd::Pid::from_raw(process.pid());
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(delay_us));
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            })
        };
        let error = loop {
            if let Err(error) = take_userfaultfd(&process) {
                break error;
            }
        };
        assert!(matches!(error, AttachError::Gone { .. }), "{error:?}");
        killer.join().unwrap();
        assert!(!helper.child.wait().unwrap().success());
    }
}

fn injections_under_signals_lose_none() {
    // SIGWINCH is ignored by default and still interrupts; SIGURG too.
    let mut helper = Helper::start("nanosleep");
    let process = helper.process();
    let pid = nix::unistd::Pid::from_raw(process.pid());
    for _ in 0..50 {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGWINCH).unwrap();
        take_userfaultfd(&process).unwrap();
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGURG).unwrap();
    }
    assert!(helper.line("outcome").starts_with("Ok"));
}

fn a_polling_thread_outlives_any_number_of_killed_attachers() {
    let mut helper = Helper::start("main loop");
    let pid = helper.child.id();
    let blocked = blocked_signals(pid);
    for round in 0..60 {
        let mut attacher = Helper::start(&format!("attach {pid}"));
        // At any time of an attachment, which takes some hundred microseconds.
        std::thread::sleep(Duration::from_micros(round * 37 % 1000));
        attacher.child.kill().unwrap();
        attacher.child.wait().unwrap();
        assert!(helper.child.try_wait().unwrap().is_none(), "gone after {round} kills");
    }
    assert_eq!(helper.process().tracer().unwrap(), 0);
    assert_eq!(blocked_signals(pid), blocked);
    take_userfaultfd(&helper.process()).unwrap();
    assert!(userfaultfds(&helper.process()).is_empty(), "left by those that were killed");
    drop(helper.stdin.take());
    assert!(helper.child.wait().unwrap().success());
}

fn what_killed_attachers_left_is_closed_and_nothing_else() {
    // One that is in use, as a monitor's own is, and two as a killed attacher leaves them.
    let helper = Helper::start("userfaultfds");
    let process = helper.process();
    let before = userfaultfds(&process);
    assert_eq!(before.len(), 3);
    assert_eq!(close_leftovers(&process).unwrap(), 2);
    assert_eq!(userfaultfds(&process), before[..1]);
    assert_eq!(close_leftovers(&process).unwrap(), 0);
    take_userfaultfd(&process).unwrap();
    assert_eq!(userfaultfds(&process), before[..1]);
}

fn blocked_signals(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find(|line| line.starts_with("SigBlk:")).unwrap().to_owned()
}

fn userfaultfds(process: &Process) -> Vec<RawFd> {
    let fds = process.fds().unwrap().into_iter();
    let mut fds: Vec<_> =
        fds.filter(|(_, name)| name.ends_with("anon_inode:[userfaultfd]")).map(|it| it.0).collect();
    fds.sort_unstable();
    fds
}
