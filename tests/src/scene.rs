//! A scene for migrations: two hosts, a guest on one of them, and where it can go next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry_ctl::lab::{
    GUEST_ADDRESS, GUEST_PREFIX, GuestAssets, Host, LabError, Qemu, QemuSpec, TAP, Tick, TwoHosts,
    Workplace, is_root, left_behind, one_at_a_time, skip,
};

use crate::agents::{Agent, Ended, MIGRATION_MAX, Manner, is_kvm};

/// A guest boots in seconds here; but not where the machine is emulated, or does other work.
pub const BOOT_MAX: Duration = Duration::from_secs(300);
/// A busy guest's next tick.
pub const SOON: Duration = Duration::from_secs(120);

/// QEMUs go before the hosts they run in: fields are dropped in this order.
pub struct Scene {
    /// Where the guest runs.
    pub guest: Qemu,
    /// What it is.
    pub spec: QemuSpec,
    /// The two hosts.
    pub hosts: TwoHosts,
    /// Where everything lies.
    pub workplace: Arc<Workplace>,
    /// The guest is on the second host.
    pub away: bool,
    attempts: AtomicU32,
}

impl Scene {
    /// A spec of a small guest that writes hard; a smaller one, that writes less, under KVM, which is
    /// emulated.
    pub fn spec() -> Result<QemuSpec, LabError> {
        let mut spec = QemuSpec::new(GuestAssets::prepare()?)?;
        let (memory_mib, fill_mib, hot_mib, pages_per_second) =
            if is_kvm() { (192, 16, 8, 200) } else { (256, 64, 16, 5000) };
        spec.memory_mib = memory_mib;
        (spec.params.fill_mib, spec.params.hot_mib) = (fill_mib, hot_mib);
        spec.params.pages_per_second = pages_per_second;
        Ok(spec.with_network(TAP, GUEST_ADDRESS, GUEST_PREFIX))
    }

    /// The usual guest, and the machine to itself for as long as the first of both is held. Nothing,
    /// and `name` is skipped, for who may not make namespaces.
    pub fn alone(name: &str) -> Result<Option<(impl Sized, Self)>, LabError> {
        if !is_root() {
            skip(name, "needs root for namespaces");
            return Ok(None);
        }
        let alone = one_at_a_time();
        let scene = Self::boot(&Workplace::new()?, Self::spec()?)?;
        Ok(Some((alone, scene)))
    }

    /// Boots a guest of `spec` on the first host.
    pub fn boot(workplace: &Arc<Workplace>, mut spec: QemuSpec) -> Result<Self, LabError> {
        let hosts = TwoHosts::new(workplace)?;
        spec.namespace = Some(hosts.source.namespace.name().into());
        let mut guest = Qemu::launch(workplace, "guest-0", &spec)?;
        guest.wait_ready(BOOT_MAX)?;
        let workplace = Arc::clone(workplace);
        Ok(Self { guest, spec, hosts, workplace, away: false, attempts: AtomicU32::new(0) })
    }

    /// Boots a new guest where the last one was; `change` says what else is different.
    pub fn boot_again(&mut self, change: impl FnOnce(&mut QemuSpec)) -> Result<(), LabError> {
        let mut spec = self.spec.clone();
        spec.namespace = Some(self.here().namespace.name().into());
        change(&mut spec);
        self.guest.kill();
        // What it lay in is needed again, and goes with the old guest only when there is a new one.
        if let Some(memory) = self.guest.memory_file() {
            let _it_is_removed_again_then = std::fs::remove_file(memory);
        }
        self.guest = Qemu::launch(&self.workplace, &self.next_name(), &spec)?;
        self.guest.wait_ready(BOOT_MAX)?;
        Ok(())
    }

    fn next_name(&self) -> String {
        format!("guest-{}", self.attempts.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The host the guest is on.
    pub fn here(&self) -> &Host {
        if self.away { &self.hosts.target } else { &self.hosts.source }
    }

    /// The host it is not on.
    pub fn there(&self) -> &Host {
        if self.away { &self.hosts.source } else { &self.hosts.target }
    }

    /// A waiting QEMU on the other host; `change` may make it another one than fits.
    pub fn waiting(&self, change: impl FnOnce(&mut QemuSpec)) -> Result<Qemu, LabError> {
        let mut spec = self.spec.to_target();
        spec.namespace = Some(self.there().namespace.name().into());
        change(&mut spec);
        Qemu::launch(&self.workplace, &self.next_name(), &spec)
    }

    /// Starts both agents; the target agent listens when this returns.
    pub fn agents(&self, waiting: &Qemu, more: &[&str]) -> Result<(Agent, Agent), LabError> {
        self.agents_held(waiting, more, "")
    }

    /// The same, with the source agent held in a phase: `PHASE:MILLISECONDS`.
    pub fn agents_held(
        &self,
        waiting: &Qemu,
        more: &[&str],
        hold: &str,
    ) -> Result<(Agent, Agent), LabError> {
        let source = (more, Manner { hold, ..Manner::default() });
        self.agents_in(waiting, source, (&[], Manner::default()))
    }

    /// Both agents, with a target that waits so many seconds for a source that is cut off.
    pub fn agents_patient(
        &self,
        waiting: &Qemu,
        more: &[&str],
        seconds: &str,
    ) -> Result<(Agent, Agent), LabError> {
        self.agents_told(waiting, more, &["--reconnect-timeout", seconds])
    }

    /// Both agents; the target is told something too.
    pub fn agents_told(
        &self,
        waiting: &Qemu,
        more: &[&str],
        told: &[&str],
    ) -> Result<(Agent, Agent), LabError> {
        self.agents_in(waiting, (more, Manner::default()), (told, Manner::default()))
    }

    /// Both agents, each with arguments and a manner of its own.
    pub fn agents_in(
        &self,
        waiting: &Qemu,
        source: (&[&str], Manner<'_>),
        target: (&[&str], Manner<'_>),
    ) -> Result<(Agent, Agent), LabError> {
        let (from, to) = (Some(self.here()), Some(self.there()));
        let attempt = self.attempts.load(Ordering::Relaxed);
        let name = |role: &str| format!("{role}-{attempt}");
        let place = &self.workplace;
        let there = Agent::target_in(place, to, &name("target"), waiting, target.0, target.1)?;
        let here =
            Agent::source_in(place, from, &name("source"), &self.guest, to, source.0, source.1)?;
        Ok((here, there))
    }

    /// Moves the guest to the other host; what both agents left. On success the guest is there.
    pub fn migrate(&mut self, more: &[&str]) -> Result<(Ended, Ended), LabError> {
        let waiting = self.waiting(|_| {})?;
        let (source, target) = self.agents(&waiting, more)?;
        let source = source.wait(MIGRATION_MAX)?;
        if source.code != 0 {
            target.signal(Signal::SIGINT);
        }
        let target = target.wait(SOON)?;
        if source.code == 0 {
            self.moved_to(waiting);
        }
        Ok((source, target))
    }

    /// The guest is in the QEMU that waited for it.
    pub fn moved_to(&mut self, waiting: Qemu) {
        self.guest = waiting;
        self.away = !self.away;
    }

    /// The guest goes on: it ticks, and everything it has checked was right.
    pub fn assert_goes_on(&self) -> Result<Tick, LabError> {
        let before = self.guest.console().wait_tick(SOON)?;
        let tick = self.guest.console().wait_tick_where("five more ticks", SOON, |tick| {
            tick.n >= before.n + 5 && tick.writes > before.writes
        })?;
        assert_eq!((tick.bad, tick.disk_bad), (0, 0), "the guest found bad memory: {tick:?}");
        Ok(tick)
    }

    /// Nothing of ours is left in the process that runs the guest.
    pub fn assert_clean(&self) -> Result<(), LabError> {
        let left = left_behind(self.guest.pid())?;
        assert!(left.is_empty(), "left in the guest's QEMU: {left:?}");
        Ok(())
    }
}
