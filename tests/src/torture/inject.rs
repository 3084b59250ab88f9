//! Does the fault, and takes it back.

use std::path::Path;
use std::thread::sleep;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_ctl::lab::{Host, LabError, Qemu, with_environment};
use rustix::process::{Resource, Rlimit, prlimit};

use super::fault::Fault;
use super::rig::Rig;
use crate::agents::{Agent, PORT};

/// A migration on its way.
pub(super) struct Stage<'a> {
    pub(super) rig: &'a Rig,
    pub(super) waiting: &'a Qemu,
    pub(super) source: &'a Agent,
    pub(super) target: &'a Agent,
    /// What the agents and all that they started have in their environment.
    pub(super) mark: (&'a str, &'a str),
    /// Agents that are held go on when there is this file.
    pub(super) release: &'a Path,
}

impl Stage<'_> {
    /// Does it, and lets held agents go on; for faults that last for a time, returns after that.
    /// `false` if there was nothing to do it to.
    pub(super) fn inject(&self, fault: Fault) -> Result<bool, LabError> {
        let scene = &self.rig.scene;
        let sigkill = |agent: &Agent| agent.signal(Signal::SIGKILL);
        let mut done = true;
        match fault {
            Fault::KillSourceAgent => sigkill(self.source),
            Fault::KillTargetAgent => sigkill(self.target),
            Fault::KillSourceAgentAndGuard => {
                self.kill_guard();
                sigkill(self.source);
            }
            Fault::KillBothAgents => {
                self.kill_guard();
                sigkill(self.source);
                sigkill(self.target);
            }
            Fault::KillSourceQemu => signal(scene.guest.pid(), Signal::SIGKILL),
            Fault::KillTargetQemu => signal(self.waiting.pid(), Signal::SIGKILL),
            Fault::LinkDownShort | Fault::LinkDownForGood => scene.hosts.cut(true)?,
            Fault::ResetLane => done = self.reset(|all| all.get(1..)?.last())?,
            Fault::ResetControl => done = self.reset(<[_]>::first)?,
            Fault::StopSourceAgent | Fault::StopSourceAgentLong => {
                self.source.signal(Signal::SIGSTOP);
            }
            Fault::StopTargetAgent | Fault::StopTargetAgentLong => {
                self.target.signal(Signal::SIGSTOP);
            }
            Fault::FillSourceDisk => self.rig.records_here().fill()?,
            Fault::FillTargetDisk => self.rig.records_there().fill()?,
            Fault::FillHugepages => match self.rig.huge_pages_there() {
                Some(disk) => disk.fill()?,
                None => done = false,
            },
            Fault::SmallMemlock => [self.source, self.target].into_iter().for_each(no_memlock),
        }
        if !fault.ends_holds() {
            self.let_go();
        }
        sleep(fault.length());
        match fault {
            Fault::LinkDownShort => scene.hosts.cut(false)?,
            Fault::StopSourceAgent | Fault::StopSourceAgentLong => {
                self.source.signal(Signal::SIGCONT);
            }
            Fault::StopTargetAgent | Fault::StopTargetAgentLong => {
                self.target.signal(Signal::SIGCONT);
            }
            _ => {}
        }
        Ok(done)
    }

    /// Lets held agents go on.
    pub(super) fn let_go(&self) {
        let _they_go_on_by_themselves_in_the_end = std::fs::write(self.release, []);
    }

    fn kill_guard(&self) {
        let agents = [self.source.pid(), self.target.pid()];
        for pid in with_environment(self.mark.0, self.mark.1) {
            if !agents.contains(&pid) {
                signal(pid, Signal::SIGKILL);
            }
        }
    }

    /// Resets one of the source's connections to the target; the control connection is the oldest.
    fn reset(
        &self,
        choose: impl Fn(&[Connection]) -> Option<&Connection>,
    ) -> Result<bool, LabError> {
        let host = self.rig.scene.here();
        let mut connections = connections(host, self.source.pid())?;
        connections.sort_by_key(|connection| connection.descriptor);
        let Some(connection) = choose(&connections) else { return Ok(false) };
        let from = format!("sport = :{}", connection.port);
        ss(host, &["-K", "-t", "-n", &from, "and", &format!("dport = :{PORT}")])?;
        Ok(true)
    }
}

/// Takes back what lasts until the end.
pub(super) fn mend(rig: &Rig, fault: Fault) -> Result<(), LabError> {
    match fault {
        Fault::LinkDownForGood => rig.scene.hosts.cut(false)?,
        Fault::FillSourceDisk => rig.records_here().empty(),
        Fault::FillTargetDisk => rig.records_there().empty(),
        Fault::FillHugepages => rig.huge_pages_there().into_iter().for_each(|disk| disk.empty()),
        _ => {}
    }
    Ok(())
}

/// One connection of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    descriptor: u32,
    port: u16,
}

fn connections(host: &Host, pid: u32) -> Result<Vec<Connection>, LabError> {
    let text = ss(host, &["-t", "-n", "-p", "-H", "state", "established"])?;
    Ok(text.lines().filter_map(|line| connection(line, pid)).collect())
}

/// `0 0 10.201.0.1:40000 10.201.0.2:4777 users:(("pageferry",pid=7,fd=9))`
fn connection(line: &str, pid: u32) -> Option<Connection> {
    let mut words = line.split_ascii_whitespace().skip(2);
    let (local, remote) = (words.next()?, words.next()?);
    let (_, owner) = line.split_once(&format!("pid={pid},fd="))?;
    let descriptor = owner.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    let port = local.rsplit_once(':')?.1.parse().ok()?;
    (remote.rsplit_once(':')?.1 == PORT.to_string()).then_some(Connection { descriptor, port })
}

fn ss(host: &Host, args: &[&str]) -> Result<String, LabError> {
    let mut command = host.namespace.command("ss");
    let failed = |source| LabError::Io { action: "run", path: "ss".into(), source };
    let output = command.args(args).output().map_err(failed)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Without `CAP_IPC_LOCK`, which these agents are started without, nothing can be locked then.
fn no_memlock(agent: &Agent) {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let pid = rustix::process::Pid::from_raw(agent.pid() as i32);
    let _it_may_have_ended = prlimit(pid, Resource::Memlock, none);
}

fn signal(pid: u32, signal: Signal) {
    let _it_may_be_gone = kill(Pid::from_raw(pid as i32), signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_read_from_what_ss_prints() {
        let line = "0      0         10.201.0.1:40000    10.201.0.2:4777 \
                    users:((\"pageferry\",pid=71,fd=19))";
        assert_eq!(connection(line, 71), Some(Connection { descriptor: 19, port: 40000 }));
        assert_eq!(connection(line, 7), None);
    }
}
