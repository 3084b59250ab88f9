//! Rails: pairs of NICs, one of each host, that lanes are spread over. Where both have an RDMA device
//! lanes are over RDMA, on other pairs over TCP beside them.
//!
//! ```text
//!   eth0 10.1.0.1 ═══════ 10.1.0.2 eth0     lanes 0, 2     workers pull batches: a faster rail
//!   eth1 10.2.0.1 ═══════ 10.2.0.2 ens2     lanes 1, 3     takes more of them
//! ```
//!
//! The target says where it takes lanes; the source pairs each of its NICs with one of those, the
//! best first, and keeps the pairs that answer. A rail that dies takes its lanes with it, and lanes
//! are opened again over the others; when it answers again, over it too. Owned by the source's
//! [`Mover`](super::source), on its thread; one thread of its own looks after those that are away.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use pageferry_datapath::control::LaneAddress;
use pageferry_uring::nic::Nic;
use pageferry_uring::plan::LaneRoute;
use pageferry_uring::source::reaches;

use crate::limits;
use crate::privileges;
use crate::report::events::RailDetail;

/// A pair of NICs that lanes can run between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rail {
    /// The source's NIC.
    pub device: String,
    /// Its address.
    pub from: IpAddr,
    /// The target's NIC, by the target's name.
    pub target_device: String,
    /// Its address, with the port that takes lanes.
    pub to: SocketAddr,
    /// Both NICs have an RDMA device, and lanes here may be over it.
    pub rdma: bool,
}

impl Rail {
    /// The way of a lane over it.
    pub fn route(&self) -> LaneRoute {
        LaneRoute { device: self.device.clone(), from: SocketAddr::new(self.from, 0), to: self.to }
    }

    /// Whether this is what `detail` tells about.
    pub fn is(&self, detail: &RailDetail) -> bool {
        (&self.device, self.from, self.to) == (&detail.device, detail.from, detail.to)
    }

    /// For the report; nothing went over it yet.
    pub fn detail(&self) -> RailDetail {
        RailDetail {
            device: self.device.clone(),
            from: self.from,
            target_device: self.target_device.clone(),
            to: self.to,
            lanes: 0,
            moved_bytes: 0,
        }
    }

    fn shares_a_nic(&self, other: &Self) -> bool {
        self.device == other.device || self.target_device == other.target_device
    }
}

/// Every NIC of this host; none where they can't be listed, which costs no more than rails.
pub fn nics() -> Vec<Nic> {
    Nic::all().unwrap_or_else(|error| {
        tracing::warn!(%error, "NICs can't be listed: lanes go where the routes lead them");
        Vec::new()
    })
}

/// Target: where lanes are taken, the best first: what `networks` name, if they name anything.
pub fn offered(nics: &[Nic], networks: &[IpNet]) -> Vec<LaneAddress> {
    // One without a carrier too: it may be back before the migration is over.
    let usable = nics.iter().filter(|nic| !nic.is_loopback);
    let mut offered: Vec<_> = usable
        .flat_map(|nic| {
            nic.addresses.iter().map(|&address| LaneAddress {
                device: nic.name.clone(),
                address,
                bits_per_second: nic.bits_per_second,
                queues: queues(nic),
                rdma: false,
            })
        })
        .filter(|offer| preference(networks, offer.address).is_some())
        .collect();
    offered.sort_by_key(|offer| preference(networks, offer.address));
    offered.truncate(limits::RAIL_ADDRESSES_MAX);
    offered
}

/// Source: how many NICs lanes could be spread over.
pub fn usable_nics(nics: &[Nic], networks: &[IpNet]) -> u16 {
    let usable = nics.iter().filter(|nic| {
        !nic.is_loopback
            && nic.addresses.iter().any(|&address| preference(networks, address).is_some())
    });
    usable.count().min(limits::RAILS_MAX) as u16
}

/// A pair that might do.
#[derive(Clone, Debug)]
struct Pair {
    rail: Rail,
    /// Both addresses are in one network: as it is meant to be.
    together: bool,
    /// The source's NIC has a carrier.
    is_up: bool,
    /// Of the slower of the two NICs, in bits a second; 0 if one is not known.
    speed: u64,
}

impl Pair {
    /// Lanes over TCP on it are worth having beside RDMA this fast.
    fn is_worth_having(&self, fastest_rdma: u64) -> bool {
        let least = fastest_rdma / limits::RAIL_BESIDE_RDMA_MIN;
        self.rail.rdma || self.speed == 0 || self.speed >= least
    }
}

/// Every pair that might do, the best first: preferred networks, then pairs in one subnet, then RDMA,
/// which NICs named `rdma` have here, then the speed and the queues of the lesser of the two.
fn pairs(
    own: &[Nic],
    theirs: &[LaneAddress],
    (port, networks): (u16, &[IpNet]),
    rdma: &[String],
) -> Vec<Pair> {
    let ours: Vec<IpAddr> = own.iter().flat_map(|nic| nic.addresses.iter().copied()).collect();
    // The same address on both hosts is a bridge of each, and leads to ourselves.
    let theirs: Vec<_> = theirs.iter().filter(|there| !ours.contains(&there.address)).collect();
    let mut ranked = Vec::new();
    for nic in own.iter().filter(|nic| !nic.is_loopback) {
        for network in &nic.networks {
            let from = network.addr();
            for there in theirs.iter().filter(|there| there.address.is_ipv4() == from.is_ipv4()) {
                let (Some(here_rank), Some(there_rank)) =
                    (preference(networks, from), preference(networks, there.address))
                else {
                    continue;
                };
                let speed = nic.bits_per_second.zip(there.bits_per_second);
                let speed = speed.map_or(0, |(here, there)| here.min(there));
                let together = network.contains(&there.address);
                let rdma = there.rdma && rdma.contains(&nic.name);
                let rank = (
                    here_rank.max(there_rank),
                    !together,
                    !rdma,
                    std::cmp::Reverse((speed, queues(nic).min(there.queues))),
                );
                let rail = Rail {
                    device: nic.name.clone(),
                    from,
                    target_device: there.device.clone(),
                    to: SocketAddr::new(there.address, port),
                    rdma,
                };
                ranked.push((rank, Pair { rail, together, is_up: nic.is_up, speed }));
            }
        }
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    let mut pairs: Vec<_> = ranked.into_iter().map(|(_, pair)| pair).collect();
    pairs.truncate(limits::RAIL_PAIRS_MAX);
    pairs
}

/// Place of the first network that an address is in; all are alike if none are named.
fn preference(networks: &[IpNet], address: IpAddr) -> Option<usize> {
    match networks.is_empty() {
        true => Some(0),
        false => networks.iter().position(|network| network.contains(&address)),
    }
}

fn queues(nic: &Nic) -> u32 {
    let receiving = nic.channels.map_or(1, |channels| channels.receiving().max(1));
    if nic.rss.is_some() { receiving } else { 1 }
}

/// The rails of one migration.
#[derive(Debug, Default)]
pub struct Rails {
    networks: Vec<IpNet>,
    /// Those that lanes run on.
    used: Vec<Rail>,
    /// Those that lanes have run on.
    known: Vec<Rail>,
    /// Pairs with RDMA devices that are away.
    rdma_away: bool,
    /// Those whose lanes failed, until when they are left alone, and how often it happened.
    blamed: Vec<(Rail, Instant, u32)>,
    /// Looks after those that are away.
    watch: Option<Watch>,
}

impl Rails {
    /// Of a source that was told to prefer these networks.
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self { networks, ..Self::default() }
    }

    /// Finds the pairs that answer, for lanes to a target that takes them at `theirs`; NICs here that
    /// are named `rdma` have RDMA devices that lanes may use. None are found where there is nothing to
    /// choose from: then lanes go where the control connection goes.
    pub fn choose(
        &mut self,
        own: &[Nic],
        theirs: &[LaneAddress],
        control: SocketAddr,
        rdma: &[String],
    ) {
        (self.watch, self.rdma_away) = (None, false);
        self.used.clear();
        if control.ip().is_loopback() || theirs.is_empty() {
            return;
        }
        let now = Instant::now();
        let pairs = pairs(own, theirs, (control.port(), &self.networks), rdma);
        let left_alone = |rail: &Rail| {
            self.blamed.iter().any(|(blamed, until, _)| blamed == rail && *until > now)
        };
        let (tried, others): (Vec<_>, Vec<_>) =
            pairs.into_iter().partition(|pair| pair.is_up && !left_alone(&pair.rail));
        let rails: Vec<_> = tried.iter().map(|pair| pair.rail.clone()).collect();
        let answers = answering(&rails);
        tracing::debug!(?tried, ?answers, ?others, "pairs of NICs");
        let rdma = tried.iter().zip(&answers).filter(|(pair, answers)| pair.rail.rdma && **answers);
        let fastest_rdma = rdma.map(|(pair, _)| pair.speed).max().unwrap_or(0);
        let mut away = others;
        for (pair, answers) in tried.into_iter().zip(answers) {
            let taken = self.used.iter().any(|used| used.shares_a_nic(&pair.rail));
            match (answers, taken) {
                (true, false) if !pair.is_worth_having(fastest_rdma) => {}
                (true, false) => self.used.push(pair.rail),
                (false, false) => away.push(pair),
                (_, true) => {}
            }
        }
        self.used.truncate(limits::RAILS_MAX);
        // What was never seen to work, and is not meant to, is not waited for.
        let awaited = |pair: &Pair| pair.together || self.known.contains(&pair.rail);
        let away: Vec<_> = away.into_iter().filter(awaited).map(|pair| pair.rail).collect();
        let free = |rail: &Rail| !self.used.iter().any(|used| used.shares_a_nic(rail));
        let away: Vec<_> = away.into_iter().filter(free).collect();
        self.rdma_away = away.iter().any(|rail| rail.rdma);
        let is_elsewhere = |rail: &Rail| rail.rdma && rail.to.ip() != control.ip();
        if self.used.len() < 2
            && self.networks.is_empty()
            && away.is_empty()
            && !self.used.iter().any(is_elsewhere)
        {
            self.used.clear();
        }
        self.known.extend(
            self.used.iter().filter(|rail| !self.known.contains(rail)).cloned().collect::<Vec<_>>(),
        );
        if !self.used.is_empty() && !away.is_empty() {
            let after = self.blamed.iter().map(|(_, until, _)| *until).max();
            self.watch = Some(Watch::start(away, after.filter(|until| *until > now)));
        }
        tracing::info!(rails = ?self.used, "lanes are spread over rails");
    }

    /// Those that lanes run on: lane N on rail N modulo their number.
    pub fn used(&self) -> &[Rail] {
        &self.used
    }

    /// Nothing is to be chosen from: lanes go where the control connection goes.
    pub fn leave(&mut self) {
        self.used.clear();
        self.watch = None;
    }

    /// Of so many lanes, those whose rails have RDMA devices.
    pub fn have_rdma(&self, lanes: usize) -> Vec<bool> {
        self.used.iter().cycle().take(lanes).map(|rail| rail.rdma).collect()
    }

    /// Whether pairs with RDMA devices are there but do not answer.
    pub fn is_rdma_away(&self) -> bool {
        self.rdma_away
    }

    /// Whether lanes ran over RDMA on one of them.
    pub fn knew_rdma(&self) -> bool {
        self.known.iter().any(|rail| rail.rdma)
    }

    /// A lane failed: its rail is left alone for a while, longer each time.
    pub fn blame(&mut self, lane: usize) {
        if self.used.len() < 2 {
            return; // There would be none left.
        }
        let rail = self.used[lane % self.used.len()].clone();
        let now = Instant::now();
        match self.blamed.iter_mut().find(|(blamed, _, _)| *blamed == rail) {
            Some((_, until, times)) => {
                *times += 1;
                let pause = limits::RAIL_PAUSE_MIN * 2u32.saturating_pow(*times);
                *until = now + pause.min(limits::RAIL_PAUSE_MAX);
            }
            None => self.blamed.push((rail, now + limits::RAIL_PAUSE_MIN, 0)),
        }
    }

    /// A lane on a rail whose NIC has no carrier any more, if there is one.
    pub fn without_carrier(&self) -> Option<usize> {
        if self.used.len() < 2 {
            return None;
        }
        let up = pageferry_uring::nic::running().ok()?;
        self.used.iter().position(|rail| !up.contains(&rail.device))
    }

    /// Whether one that was away answers again; true once.
    pub fn is_one_back(&mut self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.back.swap(false, Ordering::Relaxed))
    }
}

/// Which of these answer; all are tried at once.
fn answering(rails: &[Rail]) -> Vec<bool> {
    let try_one = |rail: &Rail| reaches(&rail.route(), limits::RAIL_ANSWERS_WITHIN);
    thread::scope(|scope| {
        let tries: Vec<_> = rails.iter().map(|rail| scope.spawn(move || try_one(rail))).collect();
        tries.into_iter().map(|thread| thread.join().unwrap_or(false)).collect()
    })
}

/// Looks after rails that are away, on a thread that ends with this.
#[derive(Debug)]
struct Watch {
    back: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    fn start(away: Vec<Rail>, after: Option<Instant>) -> Self {
        let (back, stop) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let watch = Self { back: Arc::clone(&back), stop: Arc::clone(&stop) };
        let looks = move || {
            privileges::drop_on_this_thread(&[]);
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(limits::RAIL_LOOKS_EVERY);
                if after.is_some_and(|after| Instant::now() < after) {
                    continue;
                }
                if answering(&away).contains(&true) {
                    back.store(true, Ordering::Relaxed);
                    return;
                }
            }
        };
        let started = thread::Builder::new().name("pf-rails".into()).spawn(looks);
        if let Err(error) = started {
            tracing::warn!(%error, "rails that are away are not looked after");
        }
        watch
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// How long a lane may be without progress: where there are other rails, not for long.
pub fn progress_wait(rails: usize) -> Option<Duration> {
    (rails > 1).then_some(limits::RAIL_PROGRESS_WAIT_MAX)
}

#[cfg(test)]
#[path = "rails/tests.rs"]
mod tests;
