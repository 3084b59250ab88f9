//! Lanes on receive queues: what the target tells of its NICs, which ports the source picks by it,
//! and what is said of where the lanes arrived.
//!
//! ```text
//!   target: NIC, its key, table, cores ── Choice ──> source: a queue for each lane, and ports
//!           socket of each lane        <── TCP ────          that lead there (Toeplitz)
//!           its queue and core  ── LanesPlaced ────> report: `placed 4 of 4 lanes`, or why not
//! ```
//!
//! Every step has its "why not", and none of them keeps a lane from being opened. Nothing here holds
//! a socket; the hash is in `pageferry_uring::rss`, cores are chosen by [`cores`](crate::cores).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use pageferry_datapath::control::{LanesPlaced, NicQueues, QueueCore};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::limits::{
    RSS_ADDRESSES_MAX, RSS_KEY_BYTES_MAX, RSS_NICS_MAX, RSS_QUEUES_MAX, RSS_TABLE_MAX,
};
use pageferry_uring::nic::{HashFunction, Nic, Rss};
use pageferry_uring::rss::{self, Arrived};

use super::rails::Rail;
use crate::limits::RSS_PORTS_MAX;
use crate::report::events::RssDetail;

/// Target: what is told of the NICs that have these addresses; lanes may use `cpus`.
pub fn told(nics: &[Nic], addresses: &[IpAddr], cpus: &[usize]) -> Vec<NicQueues> {
    let addresses: BTreeSet<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
    let of_nic = |nic: &Nic| {
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = nic
            .addresses
            .iter()
            .copied()
            .filter(|address| addresses.contains(address))
            .partition(IpAddr::is_ipv4);
        [(v4, false), (v6, true)]
            .into_iter()
            .filter(|(addresses, _)| !addresses.is_empty())
            .map(|(addresses, v6)| of_family(nic, addresses, v6, cpus))
            .collect::<Vec<_>>()
    };
    nics.iter().flat_map(of_nic).take(RSS_NICS_MAX).collect()
}

fn of_family(nic: &Nic, mut addresses: Vec<IpAddr>, v6: bool, cpus: &[usize]) -> NicQueues {
    addresses.truncate(RSS_ADDRESSES_MAX);
    let told = NicQueues { device: nic.name.clone(), addresses, ..NicQueues::default() };
    match usable(nic, v6) {
        Err(why) => NicQueues { why_not: Some(why), ..told },
        Ok(rss) => NicQueues {
            key: rss.key.clone(),
            table: rss.indirection.iter().map(|&queue| queue as u16).collect(),
            queues: in_order(nic, rss, cpus),
            ..told
        },
    }
}

/// Why lanes that come to a NIC over IPv4 can't be put on its queues; `None` if they can.
pub fn why_not(nic: &Nic) -> Option<String> {
    usable(nic, false).err()
}

/// Its RSS, if it can be told which queue a flow lands on, and there is more than one.
fn usable(nic: &Nic, v6: bool) -> Result<&Rss, String> {
    let name = &nic.name;
    let Some(rss) = &nic.rss else {
        let why = nic.no_rss.as_deref().unwrap_or("its driver does not tell");
        return Err(format!("{name} has no RSS ({why})"));
    };
    let entries = rss.indirection.len();
    let (family, ports) = match v6 {
        false => ("tcp4", rss.tcp4_ports),
        true => ("tcp6", rss.tcp6_ports),
    };
    if rss.function != HashFunction::Toeplitz || rss.key.is_empty() {
        Err(format!("{name} spreads flows by another hash than Toeplitz"))
    } else if ports == Some(false) {
        Err(format!("{name} does not hash ports (ethtool -N {name} rx-flow-hash {family} sdfn)"))
    } else if !entries.is_power_of_two()
        || entries > RSS_TABLE_MAX
        || rss.key.len() > RSS_KEY_BYTES_MAX
        || rss.indirection.iter().any(|&queue| u16::try_from(queue).is_err())
    {
        Err(format!("{name} has a table of {entries} entries, which is not understood"))
    } else if rss.indirection.iter().all(|queue| *queue == rss.indirection[0]) {
        Err(format!("all of {name}'s table leads to one queue"))
    } else {
        Ok(rss)
    }
}

/// Its queues, those first whose cores lanes may use and no queue before interrupts.
fn in_order(nic: &Nic, rss: &Rss, cpus: &[usize]) -> Vec<QueueCore> {
    let queues: BTreeSet<u32> = rss.indirection.iter().copied().collect();
    let mut taken = BTreeSet::new();
    let mut ranked: Vec<_> = queues
        .into_iter()
        .map(|queue| {
            let cpu = core_of(nic, queue);
            let again = cpu.is_some_and(|cpu| !taken.insert(cpu));
            let not_ours = cpu.is_some_and(|cpu| !cpus.contains(&cpu));
            let cpu = cpu.and_then(|cpu| u16::try_from(cpu).ok());
            ((again, not_ours), QueueCore { queue: queue as u16, cpu })
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, queue)| queue).take(RSS_QUEUES_MAX).collect()
}

/// The core that a queue interrupts, if it is one.
fn core_of(nic: &Nic, queue: u32) -> Option<usize> {
    let mut cpus = nic.queue_irqs.iter().filter(|irq| irq.queue == queue).flat_map(|it| &it.cpus);
    let first = *cpus.next()?;
    cpus.next().is_none().then_some(first)
}

/// Where a flow lands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Landing {
    /// The NIC.
    pub device: Option<String>,
    /// Its queue, if that can be told.
    pub queue: Option<u16>,
    /// The core that the queue interrupts, if that is known.
    pub cpu: Option<usize>,
}

/// Target: where a lane that came `from` there `to` here lands, by what was told.
pub fn landing(told: &[NicQueues], from: SocketAddr, to: SocketAddr) -> Landing {
    let (from, to) = (canonical(from), canonical(to));
    let Some(nic) = told.iter().find(|nic| nic.addresses.contains(&to.ip())) else {
        return Landing::default();
    };
    let queue = rss::queue_of(&rss_of(nic), from, to).and_then(|it| u16::try_from(it).ok());
    let core = nic.queues.iter().find(|core| Some(core.queue) == queue);
    let cpu = core.and_then(|core| core.cpu).map(usize::from);
    Landing { device: Some(nic.device.clone()), queue, cpu }
}

fn rss_of(nic: &NicQueues) -> Rss {
    Rss {
        function: HashFunction::Toeplitz,
        key: nic.key.clone(),
        indirection: nic.table.iter().copied().map(u32::from).collect(),
        tcp4_ports: None,
        tcp6_ports: None,
    }
}

/// Listening for both families, IPv4 comes in as a part of IPv6; its packets don't.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Source: for each lane the local addresses from which it lands on a queue of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picked {
    /// None for a lane for which none could be picked.
    pub from: Vec<Vec<SocketAddr>>,
    /// Why for some there are none.
    pub why_not: Option<String>,
}

/// Picks them: lane N runs over rail N modulo their number, or to `address` if there are none.
pub fn pick(
    told: &[NicQueues],
    lanes: usize,
    (address, rails): (SocketAddr, &[Rail]),
    session: SessionId,
) -> Picked {
    let mut picked = Picked::default();
    let direct = local_towards(address);
    for lane in 0..lanes {
        let rail = rails.get(lane % rails.len().max(1));
        let to = canonical(rail.map_or(address, |rail| rail.to));
        // The how-many-th lane to this NIC it is.
        let place = lane / rails.len().max(1);
        let from = rail.map(|rail| rail.from).or(direct).ok_or("no way to the target".to_owned());
        let ports = from.and_then(|from| ports(told, place, (from, to), session));
        picked.from.push(match ports {
            Ok(from) => from,
            Err(why) => {
                picked.why_not.get_or_insert(why);
                Vec::new()
            }
        });
    }
    picked
}

fn ports(
    told: &[NicQueues],
    place: usize,
    (from, to): (IpAddr, SocketAddr),
    session: SessionId,
) -> Result<Vec<SocketAddr>, String> {
    let nic = told.iter().find(|nic| nic.addresses.contains(&to.ip()));
    let nic = nic.ok_or("the target does not tell how it spreads flows")?;
    if let Some(why) = &nic.why_not {
        return Err(why.clone());
    }
    let queue =
        nic.queues.get(place % nic.queues.len().max(1)).ok_or("the target names no queue")?;
    let salt = session.0 as u64 ^ (place as u64) << 7;
    let wanted =
        rss::ports_to(&rss_of(nic), from, to, queue.queue.into(), salt % (1 << 32), RSS_PORTS_MAX);
    match wanted.is_empty() {
        true => Err(format!("no port leads to queue {} of {}", queue.queue, nic.device)),
        false => Ok(wanted.into_iter().map(|port| SocketAddr::new(from, port)).collect()),
    }
}

/// The address that the system's routes leave from; nothing is sent.
fn local_towards(address: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match canonical(address) {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(canonical(address)).ok()?;
    Some(socket.local_addr().ok()?.ip().to_canonical())
}

/// Source: what to report of lanes that `picked` was picked for, and of which the target said this.
pub fn report(picked: &Picked, placed: Option<&LanesPlaced>) -> RssDetail {
    let lanes = picked.from.len();
    let wanted = picked.from.iter().filter(|from| !from.is_empty()).count();
    let detail = RssDetail { placed: 0, lanes, reason: picked.why_not.clone(), queues: Vec::new() };
    if wanted == 0 {
        return detail;
    }
    let Some(placed) = placed else {
        let reason = "ports were picked, and the target has not said where they led".to_owned();
        return RssDetail { reason: Some(reason), ..detail };
    };
    let known: Vec<_> = placed
        .lanes
        .iter()
        .filter(|lane| picked.from.get(usize::from(lane.lane)).is_some_and(|it| !it.is_empty()))
        .collect();
    let arrived: Vec<_> = known
        .iter()
        .filter_map(|lane| {
            let (device, queue) = (lane.device.as_deref()?, lane.queue?.into());
            Some(Arrived { device, queue, napi: lane.napi })
        })
        .collect();
    let apart = rss::arrived_apart(&arrived).into_iter().filter(|it| *it).count();
    let silent = arrived.iter().filter(|lane| lane.napi.is_none()).count();
    let reason = match apart {
        count if count == lanes => None,
        _ if silent == arrived.len() => {
            Some("the target's kernel does not tell which queues they arrived at".to_owned())
        }
        _ => detail.reason.clone().or_else(|| {
            Some("the others arrived at other queues than the target's table says".to_owned())
        }),
    };
    RssDetail { placed: apart.min(lanes), reason, queues: placed.lanes.clone(), ..detail }
}

#[cfg(test)]
#[path = "queues/tests.rs"]
mod tests;
