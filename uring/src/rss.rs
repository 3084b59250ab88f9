//! Which receive queue a flow lands on, and source ports that land on a given one.
//!
//! A NIC with RSS hashes a packet's addresses and ports by the Toeplitz function under its key; the
//! hash's lowest bits pick an entry of the indirection table, and that is the queue. Key and table
//! are the *target's*: it receives. The source can choose nothing but its own ports, and that is
//! enough: one in so many of them leads to any given queue.
//!
//! Pure arithmetic over what [`nic`](crate::nic) has read; what really happened is told by the
//! queues' counters afterwards.
//!
//! The function and its test vectors: Microsoft, "RSS hashing functions" and "Verifying the RSS hash
//! calculation" (Windows driver documentation).

use std::net::{IpAddr, SocketAddr};

use crate::nic::{HashFunction, Rss};

/// Ports that a client may take: the dynamic ones (RFC 6335), which no service is meant to have.
const PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;

/// Toeplitz of `input` under `key`: for each set bit, the 32 bits of the key that begin there,
/// folded by XOR. A key has to be 4 bytes longer than the input; what is missing counts as zeros.
pub fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let byte = |index: usize| u64::from(key.get(index).copied().unwrap_or(0));
    input.iter().enumerate().fold(0, |hash, (at, &bits)| {
        // The 40 bits of the key that this byte's eight windows lie in.
        let window = (0..5).fold(0, |window, next| window << 8 | byte(at + next));
        (0..8)
            .filter(|bit| bits & (0x80 >> bit) != 0)
            .fold(hash, |hash, bit| hash ^ (window >> (8 - bit)) as u32)
    })
}

/// The hash of a TCP flow, as the receiver of its packets computes it; `None` if the two addresses
/// are of different families.
pub fn flow_hash(key: &[u8], from: SocketAddr, to: SocketAddr) -> Option<u32> {
    let mut input = Vec::with_capacity(36);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            input.extend(from.octets());
            input.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            input.extend(from.octets());
            input.extend(to.octets());
        }
        _ => return None,
    }
    input.extend(from.port().to_be_bytes());
    input.extend(to.port().to_be_bytes());
    Some(toeplitz(key, &input))
}

/// The receive queue of a flow at a NIC with this RSS; `None` where it can't be told.
pub fn queue_of(rss: &Rss, from: SocketAddr, to: SocketAddr) -> Option<u32> {
    if rss.function != HashFunction::Toeplitz || rss.indirection.is_empty() {
        return None;
    }
    let hash = flow_hash(&rss.key, from, to)?;
    // Tables have a power of two of entries.
    rss.indirection.get(hash as usize % rss.indirection.len()).copied()
}

/// Source ports from which a flow to `to` lands on `queue`, at most `count`; none where it can't be
/// told or no entry of the table leads there. They begin at a place that differs from `salt` to
/// `salt`, so that two migrations don't fight for the same ones.
pub fn ports_to(
    rss: &Rss,
    from: IpAddr,
    to: SocketAddr,
    queue: u32,
    salt: u64,
    count: usize,
) -> Vec<u16> {
    let ports = u64::from(PORTS.end() - PORTS.start()) + 1;
    (0..ports)
        .map(|step| PORTS.start() + ((salt + step) % ports) as u16)
        .filter(|&port| queue_of(rss, SocketAddr::new(from, port), to) == Some(queue))
        .take(count)
        .collect()
}

/// Where a lane was to arrive, and the kernel's number for the queue where it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived<'a> {
    /// The NIC that took it in.
    pub device: &'a str,
    /// The queue that its ports were chosen for.
    pub queue: u32,
    /// What the kernel calls the queue that its packets come from, if it says.
    pub napi: Option<u32>,
}

/// Which of the lanes arrived as was meant: those for one queue together, and apart from all others.
/// The kernel's numbers are not the NIC's, so that is all there is to tell, and all that matters.
pub fn arrived_apart(lanes: &[Arrived<'_>]) -> Vec<bool> {
    let as_meant = |one: &Arrived<'_>| {
        let of_same_nic = |other: &&Arrived<'_>| other.device == one.device;
        one.napi.is_some()
            && lanes
                .iter()
                .filter(of_same_nic)
                .all(|other| (other.queue == one.queue) == (other.napi == one.napi))
    };
    lanes.iter().map(as_meant).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The key of the published vectors.
    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    #[test]
    fn the_published_vectors_come_out() {
        for (to, from, addresses, with_ports) in [
            ("161.142.100.80:1766", "66.9.149.187:2794", 0x323e_8fc2, 0x51cc_c178),
            ("65.69.140.83:4739", "199.92.111.2:14230", 0xd718_262a, 0xc626_b0ea),
            ("12.22.207.184:38024", "24.19.198.95:12898", 0xd2d0_a5de, 0x5c2b_394a),
            ("209.142.163.6:2217", "38.27.205.30:48228", 0x8298_9176, 0xafc7_327f),
            ("202.188.127.2:1303", "153.39.163.191:44251", 0x5d18_09c5, 0x10e8_28a2),
            ("[3ffe:2501:200:3::1]:1766", "[3ffe:2501:200:1fff::7]:2794", 0x2cc1_8cd5, 0x4020_7d3d),
            ("[ff02::1]:4739", "[3ffe:501:8::260:97ff:fe40:efab]:14230", 0x0f0c_461c, 0xdde5_1bbf),
            (
                "[fe80::200:f8ff:fe21:67cf]:38024",
                "[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251",
                0x4b61_e985,
                0x02d1_feef,
            ),
        ] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            assert_eq!(flow_hash(&KEY, from, to), Some(with_ports), "{from} to {to}");
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            let input = [octets(from.ip()), octets(to.ip())].concat();
            assert_eq!(toeplitz(&KEY, &input), addresses, "{from} to {to}");
        }
    }

    fn rss(queues: u32) -> Rss {
        Rss {
            function: HashFunction::Toeplitz,
            key: KEY.to_vec(),
            indirection: (0..128).map(|entry| entry % queues).collect(),
            tcp4_ports: Some(true),
            tcp6_ports: Some(true),
        }
    }

    #[test]
    fn every_lane_gets_a_queue_of_its_own() {
        let (from, to) = ("10.0.0.1".parse().unwrap(), "10.0.0.2:4777".parse().unwrap());
        let rss = rss(4);
        for queue in 0..4 {
            let ports = ports_to(&rss, from, to, queue, 12345, 8);
            assert_eq!(ports.len(), 8);
            for port in ports {
                assert_eq!(queue_of(&rss, SocketAddr::new(from, port), to), Some(queue));
                assert!(PORTS.contains(&port));
            }
        }
    }

    #[test]
    fn where_it_cannot_be_told_no_port_is_picked() {
        let (from, to) = ("10.0.0.1".parse().unwrap(), "10.0.0.2:4777".parse().unwrap());
        let unknown = Rss { function: HashFunction::Xor, ..rss(4) };
        let empty = Rss { indirection: vec![], ..rss(4) };
        assert!(ports_to(&unknown, from, to, 0, 0, 1).is_empty());
        assert!(ports_to(&empty, from, to, 0, 0, 1).is_empty());
        assert!(ports_to(&rss(4), from, to, 9, 0, 1).is_empty());
        assert_eq!(
            flow_hash(&KEY, "10.0.0.1:1".parse().unwrap(), "[::1]:1".parse().unwrap()),
            None
        );
    }

    #[test]
    fn lanes_are_placed_where_queues_that_differ_are_found_to_differ() {
        let of = |lanes: &[(&'static str, u32, u32)]| {
            let arrived = lanes.iter().map(|&(device, queue, napi)| {
                let napi = Some(napi).filter(|napi| *napi > 0);
                Arrived { device, queue, napi }
            });
            arrived_apart(&arrived.collect::<Vec<_>>())
        };
        assert_eq!(of(&[("a", 0, 81), ("a", 1, 82), ("b", 0, 91)]), [true; 3]);
        // More lanes than queues: two share one, as was meant.
        assert_eq!(of(&[("a", 0, 81), ("a", 1, 82), ("a", 0, 81)]), [true; 3]);
        // The NIC goes by another table, or by none.
        assert_eq!(of(&[("a", 0, 81), ("a", 1, 81), ("a", 2, 83)]), [false, false, true]);
        assert_eq!(of(&[("a", 0, 81), ("a", 0, 82), ("a", 2, 83)]), [false, false, true]);
        // A kernel that does not tell.
        assert_eq!(of(&[("a", 0, 0), ("a", 1, 82)]), [false, true]);
        assert!(of(&[]).is_empty());
    }

    proptest! {
        /// The definition, bit by bit.
        #[test]
        fn whole_bytes_are_no_different_from_single_bits(
            key in prop::collection::vec(any::<u8>(), 0..60),
            input in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let bit = |index: usize| {
                key.get(index / 8).is_some_and(|byte| byte & (0x80 >> (index % 8)) != 0)
            };
            let mut hash = 0u32;
            for index in 0..input.len() * 8 {
                if input[index / 8] & (0x80 >> (index % 8)) != 0 {
                    hash ^= (0..32).fold(0, |word, next| word << 1 | u32::from(bit(index + next)));
                }
            }
            prop_assert_eq!(toeplitz(&key, &input), hash);
        }
    }
}
