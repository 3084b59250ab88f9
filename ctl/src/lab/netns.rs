//! Hosts that are network namespaces, joined by a link that can be made slow.
//!
//! ```text
//!        source namespace                            target namespace
//!   10.201.0.1 link0 ═════════ the migration's link ═════════ link0 10.201.0.2
//!        tap0 ─ br0 ─ lan0                           lan0 ─ br0 ─ tap0
//!                      ║                               ║
//!                      ╚══ source0 ─ br0 ─ target0 ════╝
//!                            10.202.0.1, the namespace `lan`: someone who talks to the guest
//! ```
//! The guest (10.202.0.100) has its tap on either host; its address moves with it, and whoever
//! sits in `lan` can reach it throughout. Devices are made inside the namespaces, so the machine's
//! own never see a name of ours.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};

use super::command::run;
use super::error::{LabError, call, io};
use super::skip::is_root;
use super::workplace::{Undo, Workplace};

/// Address of the guest in the namespace `lan`.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 202, 0, 100);
/// Length of the network prefix around the guest.
pub const GUEST_PREFIX: u8 = 24;
/// The tap device for the guest on either host.
pub const TAP: &str = "tap0";
const LINK: &str = "link0";

/// A network namespace; dropped, it is deleted with everything in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    _workplace: Arc<Workplace>,
}

/// A host of the laboratory.
#[derive(Debug)]
pub struct Host {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its address on the link that the migration takes.
    pub address: Ipv4Addr,
}

/// Two hosts, a link between them, and a network around the guest.
#[derive(Debug)]
pub struct TwoHosts {
    /// Where the guest runs at first.
    pub source: Host,
    /// Where it goes.
    pub target: Host,
    /// Where someone talks to the guest.
    pub lan: Namespace,
}

impl Namespace {
    /// Makes one. Needs root.
    pub fn new(workplace: &Arc<Workplace>, word: &str) -> Result<Self, LabError> {
        if !is_root() {
            return Err(LabError::Missing {
                what: "the right to make network namespaces".into(),
                hint: "run as root; without it everything goes over loopback",
            });
        }
        let name = format!("{}{word}", workplace.unique_word());
        workplace.promise(&Undo::Namespace { name: name.clone() })?;
        run(&format!("ip netns add {name}"))?;
        let namespace = Self { name, _workplace: Arc::clone(workplace) };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that runs `program` in it.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program.as_ref());
        command
    }

    /// Runs `work` on a thread in this namespace: sockets made there belong to it for good, and
    /// threads started there begin in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        let path = PathBuf::from("/run/netns").join(&self.name);
        let namespace = File::open(&path).map_err(io("open", &path))?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET).map_err(call("setns"))?;
                Ok(work())
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// `ip ARGUMENTS` about this namespace.
    fn ip(&self, arguments: &str) -> Result<(), LabError> {
        run(&format!("ip -n {} {arguments}", self.name)).map(drop)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Undo::Namespace { name: self.name.clone() }.undo();
    }
}

fn rail(number: u8) -> String {
    if number == 0 { LINK.into() } else { format!("rail{number}") }
}

impl TwoHosts {
    /// Makes the namespaces and everything in them. Needs root.
    pub fn new(workplace: &Arc<Workplace>) -> Result<Self, LabError> {
        let source = Namespace::new(workplace, "s")?;
        let target = Namespace::new(workplace, "t")?;
        let lan = Namespace::new(workplace, "l")?;

        source.ip(&format!("link add {LINK} type veth peer name {LINK} netns {}", target.name))?;
        lan.ip("link add br0 type bridge")?;
        lan.ip(&format!("address add 10.202.0.1/{GUEST_PREFIX} dev br0"))?;
        lan.ip("link set br0 up")?;

        let addresses = [Ipv4Addr::new(10, 201, 0, 1), Ipv4Addr::new(10, 201, 0, 2)];
        let hosts = [(&source, "source0"), (&target, "target0")];
        for ((namespace, port), address) in hosts.into_iter().zip(addresses) {
            namespace.ip(&format!("address add {address}/24 dev {LINK}"))?;
            namespace.ip(&format!("link set {LINK} up"))?;
            namespace.ip("link add br0 type bridge")?;
            namespace
                .ip(&format!("link add lan0 type veth peer name {port} netns {}", lan.name))?;
            namespace.ip(&format!("tuntap add dev {TAP} mode tap"))?;
            for device in ["lan0", TAP] {
                namespace.ip(&format!("link set {device} master br0 up"))?;
            }
            namespace.ip("link set br0 up")?;
            lan.ip(&format!("link set {port} master br0 up"))?;
        }
        let [first, second] = addresses;
        Ok(Self {
            source: Host { namespace: source, address: first },
            target: Host { namespace: target, address: second },
            lan,
        })
    }

    /// Limits the link to `mbit_per_second` in either direction.
    pub fn shape(&self, mbit_per_second: u64) -> Result<(), LabError> {
        self.shape_device(LINK, mbit_per_second)
    }

    fn shape_device(&self, device: &str, mbit_per_second: u64) -> Result<(), LabError> {
        // tbf passes at most its burst per timer tick (4 ms at HZ=250), and lets nothing through
        // that is longer than it; GSO makes packets of 64 KiB.
        let burst_bytes = (mbit_per_second * 1_000_000 / 8 / 250).max(96 * 1024);
        for host in [&self.source, &self.target] {
            run(&format!(
                "tc -n {} qdisc replace dev {device} root tbf rate {mbit_per_second}mbit \
                 burst {burst_bytes} latency 50ms",
                host.namespace.name
            ))?;
        }
        Ok(())
    }

    /// Lets no packet on the link be longer than its MTU. Else a veth passes 64 KiB at a time, and
    /// counts one header for all of it.
    pub fn send_real_packets(&self) -> Result<(), LabError> {
        let hosts = [&self.source, &self.target];
        hosts.iter().try_for_each(|it| it.namespace.ip(&format!("link set {LINK} gso_max_segs 1")))
    }

    /// Cuts the link, or mends it: packets vanish without a word.
    pub fn cut(&self, cut: bool) -> Result<(), LabError> {
        let state = if cut { "down" } else { "up" };
        self.source.namespace.ip(&format!("link set {LINK} {state}"))
    }

    /// Another link between the two hosts: `rail1` is 10.203.1.1 and 10.203.1.2, and so on.
    pub fn add_rail(&self, number: u8) -> Result<(), LabError> {
        let (source, target) = (&self.source.namespace, &self.target.namespace);
        let device = rail(number);
        source
            .ip(&format!("link add {device} type veth peer name {device} netns {}", target.name))?;
        for (host, end) in [(source, 1), (target, 2)] {
            host.ip(&format!("address add 10.203.{number}.{end}/24 dev {device}"))?;
            host.ip(&format!("link set {device} up"))?;
        }
        Ok(())
    }

    /// Limits a rail, or the link for number 0, in either direction.
    pub fn shape_rail(&self, number: u8, mbit_per_second: u64) -> Result<(), LabError> {
        self.shape_device(&rail(number), mbit_per_second)
    }

    /// Takes a rail's carrier away at both ends, or gives it back.
    pub fn cut_rail(&self, number: u8, cut: bool) -> Result<(), LabError> {
        let state = if cut { "down" } else { "up" };
        self.source.namespace.ip(&format!("link set {} {state}", rail(number)))
    }

    /// Lets every packet on a rail vanish, with the carrier in place; [`Self::shape_rail`] mends it.
    pub fn swallow_rail(&self, number: u8) -> Result<(), LabError> {
        for host in [&self.source, &self.target] {
            let (name, device) = (&host.namespace.name, rail(number));
            // No packet is shorter than its burst, and longer ones are dropped.
            let nothing = "tbf rate 1kbit burst 16 limit 16";
            run(&format!("tc -n {name} qdisc replace dev {device} root {nothing}"))?;
        }
        Ok(())
    }
}
