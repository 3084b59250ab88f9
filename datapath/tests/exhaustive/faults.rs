//! What can go wrong, and what it does.

use pageferry_datapath::{source, target};

use crate::agent::Process;
use crate::messages::failure;
use crate::recovery::Asked;
use crate::world::{Side, Step, World};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// The connection breaks; of what was on its way, this much arrives: at the source, at the
    /// target.
    Cut(usize, usize),
    /// The message in this place on the way to this side is lost, which TCP would not do.
    Loss(Side, usize),
    /// It arrives twice, the second time right behind the first or behind everything.
    Duplicate(Side, usize, bool),
    /// It is overtaken by the next.
    Reorder(Side, usize),
    LaneBreaks,
    /// The agent is killed; of what it had sent, this much arrives.
    AgentDies(Side, usize),
    MonitorDies(Side),
    /// The agent is killed, and its guard with it.
    GuardDies(usize),
    /// A process at this side's record is killed.
    RecoveryDies(Side),
    /// The host never comes back.
    HostIsLost(Side, usize),
    /// Power is lost; what was written and not made durable is there or not.
    HostDies(Side, usize, bool),
    Cancel(Side),
    /// What this side waits for takes too long.
    Delay(Side),
    /// The next command of this side fails.
    CommandFails(Side),
}

impl World {
    /// Whatever could go wrong now. `delays`: waits may end too early, because there is something
    /// that could come.
    pub(crate) fn faults_now(&self, delays: bool, steps: &mut Vec<Step>) {
        let fault = |it| Step::Fault(it);
        let lens = [self.ways[0].queue.len(), self.ways[1].queue.len()];
        if !self.ways[0].down && !self.ways[1].down {
            for here in 0..=lens[0] {
                steps.extend((0..=lens[1]).map(|there| fault(Fault::Cut(here, there))));
            }
        }
        if self.lane.open && !self.lane.fenced {
            steps.push(fault(Fault::LaneBreaks));
        }
        for side in Side::BOTH {
            self.faults_of(side, lens, steps);
        }
        if delays {
            steps.extend(self.who_gives_up().map(|side| fault(Fault::Delay(side))));
        }
        if self.guest.alive {
            steps.push(fault(Fault::MonitorDies(Side::Source)));
        }
        // Once the guest runs there, its end is no longer ours.
        if self.waiting.alive && !self.waiting.ran {
            steps.push(fault(Fault::MonitorDies(Side::Target)));
        }
    }

    fn faults_of(&self, side: Side, lens: [usize; 2], steps: &mut Vec<Step>) {
        let at = side as usize;
        // What a target's server tells its own session does not travel.
        let travels = side == Side::Source || !self.asked.live();
        for index in (0..lens[at]).filter(|_| travels) {
            steps.push(Step::Fault(Fault::Loss(side, index)));
            steps.push(Step::Fault(Fault::Duplicate(side, index, false)));
            if index + 1 < lens[at] {
                steps.push(Step::Fault(Fault::Duplicate(side, index, true)));
                steps.push(Step::Fault(Fault::Reorder(side, index)));
            }
        }
        if self.setting.recovers > 0 && !self.lost[at] {
            self.later_faults_of(side, lens[side.other() as usize], steps);
        }
        if !self.works(side) {
            return;
        }
        let sent = lens[side.other() as usize];
        for arrives in 0..=sent {
            steps.push(Step::Fault(Fault::AgentDies(side, arrives)));
            steps.push(Step::Fault(Fault::HostDies(side, arrives, true)));
            if self.disks[at].seen != self.disks[at].durable {
                steps.push(Step::Fault(Fault::HostDies(side, arrives, false)));
            }
        }
        let (waits, fallible) = match side {
            Side::Source => (self.source.waits(), source_can_fail(self.source.todo.front())),
            Side::Target => (self.target.waits(), target_can_fail(self.target.todo.front())),
        };
        let half = [self.source.half, self.target.half][at];
        if waits {
            steps.push(Step::Fault(Fault::Cancel(side)));
        }
        if fallible && half == 0 {
            steps.push(Step::Fault(Fault::CommandFails(side)));
        }
    }

    /// What can go wrong when agents are gone.
    fn later_faults_of(&self, side: Side, sent: usize, steps: &mut Vec<Step>) {
        let at = side as usize;
        if self.jobs[at].is_some() {
            steps.push(Step::Fault(Fault::RecoveryDies(side)));
        }
        if self.works(side) {
            for arrives in 0..=sent {
                steps.push(Step::Fault(Fault::HostIsLost(side, arrives)));
                if side == Side::Source {
                    steps.push(Step::Fault(Fault::GuardDies(arrives)));
                }
            }
            return;
        }
        steps.push(Step::Fault(Fault::HostIsLost(side, 0)));
        steps.push(Step::Fault(Fault::HostDies(side, 0, true)));
        if self.disks[at].seen != self.disks[at].durable {
            steps.push(Step::Fault(Fault::HostDies(side, 0, false)));
        }
    }

    pub(crate) fn strike(&mut self, fault: Fault) {
        self.faults -= 1;
        match fault {
            Fault::Cut(here, there) => {
                self.ways[0].queue.truncate(here);
                self.ways[1].queue.truncate(there);
                (self.ways[0].down, self.ways[1].down) = (true, true);
            }
            Fault::Loss(side, index) => drop(self.ways[side as usize].queue.remove(index)),
            Fault::Duplicate(side, index, late) => {
                let queue = &mut self.ways[side as usize].queue;
                let copy = queue[index].clone();
                queue.insert(if late { queue.len() } else { index + 1 }, copy);
            }
            Fault::Reorder(side, index) => self.ways[side as usize].queue.swap(index, index + 1),
            Fault::LaneBreaks => {
                self.lane_closes();
                self.source.tell(source::Input::Failed(failure()));
                self.target.tell(target::Input::Failed(failure()));
            }
            Fault::AgentDies(side, arrives) => self.agent_dies(side, arrives),
            Fault::MonitorDies(side) => self.monitor_dies(side),
            Fault::GuardDies(arrives) => {
                self.agent_dies(Side::Source, arrives);
                self.guard = false;
            }
            Fault::RecoveryDies(side) => self.recovery_dies(side),
            Fault::HostIsLost(side, arrives) => {
                self.host_dies(side, arrives);
                self.lost[side as usize] = true;
            }
            Fault::HostDies(side, arrives, durable) => {
                self.host_dies(side, arrives);
                let disk = &mut self.disks[side as usize];
                if durable {
                    disk.seen = disk.durable;
                }
                disk.durable = disk.seen;
            }
            Fault::Cancel(Side::Source) => self.source_takes(source::Input::Cancelled),
            Fault::Cancel(Side::Target) => self.target_takes(target::Input::Cancelled),
            Fault::Delay(Side::Source) => self.source_takes(source::Input::Tick),
            Fault::Delay(Side::Target) => self.target_takes(target::Input::Tick),
            Fault::CommandFails(Side::Source) => self.source.fails = true,
            Fault::CommandFails(Side::Target) => self.target.fails = true,
        }
    }

    fn host_dies(&mut self, side: Side, arrives: usize) {
        self.recovery_dies(side);
        if side == Side::Target && self.asked.is_there() {
            self.asked = Asked::default();
        }
        if self.works(side) {
            self.agent_dies(side, arrives);
        }
        self.monitor_dies(side);
        if side == Side::Source {
            self.guard = false;
        }
    }

    /// The process is gone; the kernel closes what it had open.
    fn agent_dies(&mut self, side: Side, arrives: usize) {
        self.ways[side.other() as usize].queue.truncate(arrives);
        self.close(side);
        match side {
            Side::Source => {
                self.source.leave(Process::Dead);
                self.guest.armed = false;
                self.lane_is_reset();
                self.guard = true;
            }
            Side::Target => {
                self.recovery_dies(Side::Target);
                self.target.leave(Process::Dead);
                self.lane.fenced = true;
                if self.lane.open {
                    self.source.tell(source::Input::Failed(failure()));
                }
            }
        }
    }

    fn monitor_dies(&mut self, side: Side) {
        match side {
            Side::Source => {
                (self.guest.alive, self.guest.running) = (false, false);
                self.source.tell(source::Input::Failed(failure()));
            }
            Side::Target => {
                (self.waiting.alive, self.waiting.running) = (false, false);
                self.waiting.loaded = false;
                self.target.tell(target::Input::Failed(failure()));
            }
        }
    }
}

fn source_can_fail(command: Option<&source::Command>) -> bool {
    use source::Command as C;
    matches!(
        command,
        Some(
            C::OpenLanes(_)
                | C::Attach
                | C::Scan
                | C::Pause
                | C::Resume
                | C::PrepareSwitchover
                | C::SaveDeviceState
                | C::Record
                | C::Retract
                | C::Unwind
        )
    )
}

fn target_can_fail(command: Option<&target::Command>) -> bool {
    use target::Command as C;
    matches!(
        command,
        Some(
            C::Inspect(_)
                | C::BeginRound { .. }
                | C::PrepareIncoming
                | C::EndDeviceState
                | C::Record
                | C::Resume
                | C::Unwind
        )
    )
}
