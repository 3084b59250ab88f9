//! Which pairs of NICs are tried, and in which order; no socket is opened.

use super::*;

fn nic(name: &str, network: &str, gbit: u64) -> Nic {
    let network: IpNet = network.parse().expect("an address with its network");
    Nic {
        name: name.into(),
        addresses: vec![network.addr()],
        networks: vec![network],
        is_up: true,
        bits_per_second: Some(gbit * 1_000_000_000),
        ..Nic::default()
    }
}

fn names(pairs: &[Pair]) -> Vec<String> {
    let rails = pairs.iter().map(|pair| &pair.rail);
    rails.map(|rail| format!("{}-{}", rail.device, rail.target_device)).collect()
}

#[test]
fn one_subnet_comes_before_another_and_fast_before_slow() {
    let own = [nic("a1", "10.1.0.1/24", 1), nic("a10", "10.2.0.1/24", 10)];
    let theirs = [nic("b1", "10.1.0.2/24", 1), nic("b10", "10.2.0.2/24", 10)];
    let pairs = pairs(&own, &offered(&theirs, &[]), (7, &[]), &[]);
    assert_eq!(names(&pairs), ["a10-b10", "a1-b1", "a1-b10", "a10-b1"]);
    assert_eq!(pairs[0].rail.to, "10.2.0.2:7".parse().unwrap());
}

#[test]
fn networks_restrict_and_rank() {
    let own = [nic("a1", "10.1.0.1/24", 1), nic("a2", "10.2.0.1/24", 10)];
    let theirs = [nic("b1", "10.1.0.2/24", 1), nic("b2", "10.2.0.2/24", 10)];
    let theirs = offered(&theirs, &[]);
    let parse = |networks: &[&str]| -> Vec<IpNet> {
        networks.iter().map(|network| network.parse().unwrap()).collect()
    };
    let both = pairs(&own, &theirs, (7, &parse(&["10.1.0.0/16", "10.2.0.0/16"])), &[]);
    assert_eq!(names(&both)[0], "a1-b1");
    let one = pairs(&own, &theirs, (7, &parse(&["10.2.0.0/16"])), &[]);
    assert_eq!(names(&one), ["a2-b2"]);
    assert_eq!(usable_nics(&own, &parse(&["10.2.0.0/16"])), 1);
}

#[test]
fn what_is_down_is_waited_for_and_what_leads_to_ourselves_is_no_rail() {
    let mut down = nic("a2", "10.2.0.1/24", 10);
    down.is_up = false;
    let own = [nic("virbr0", "192.168.122.1/24", 0), down];
    let theirs = [nic("virbr0", "192.168.122.1/24", 0), nic("b2", "10.2.0.2/24", 10)];
    let pairs = pairs(&own, &offered(&theirs, &[]), (7, &[]), &[]);
    assert_eq!(names(&pairs), ["a2-b2", "virbr0-b2"], "nothing to the bridge of the same address");
    assert!(!pairs[0].is_up && pairs[0].together, "waited for");
    assert!(pairs[1].is_up && !pairs[1].together, "tried, and not waited for");
}

#[test]
fn a_rail_whose_lanes_fail_is_left_alone_longer_each_time() {
    let own = [nic("a1", "10.1.0.1/24", 1), nic("a2", "10.2.0.1/24", 1)];
    let theirs = [nic("b1", "10.1.0.2/24", 1), nic("b2", "10.2.0.2/24", 1)];
    let used = pairs(&own, &offered(&theirs, &[]), (7, &[]), &[]);
    let used: Vec<_> = used.into_iter().take(2).map(|pair| pair.rail).collect();
    let mut rails = Rails { used: used.clone(), ..Rails::default() };
    let before = Instant::now();
    for times in 0..10 {
        rails.blame(3);
        let (rail, until, _) = &rails.blamed[0];
        assert_eq!(rail, &used[1]);
        assert!(
            *until
                >= before + (limits::RAIL_PAUSE_MIN * 2u32.pow(times)).min(limits::RAIL_PAUSE_MAX)
        );
    }
    assert_eq!(rails.blamed.len(), 1);
    rails.used.truncate(1);
    rails.blame(0);
    assert_eq!(rails.blamed.len(), 1, "the last one is not left alone");
}

#[test]
fn rdma_comes_before_speed_and_lanes_are_mixed_where_not_all_rails_have_it() {
    let own = [nic("a1", "10.1.0.1/24", 100), nic("a2", "10.2.0.1/24", 10)];
    let theirs = [nic("b1", "10.1.0.2/24", 100), nic("b2", "10.2.0.2/24", 10)];
    let mut theirs = offered(&theirs, &[]);
    theirs.iter_mut().for_each(|there| there.rdma = there.device == "b2");
    let used = |rdma: &[String]| -> Rails {
        let pairs = pairs(&own, &theirs, (7, &[]), rdma);
        let used = pairs.into_iter().take(2).map(|pair| pair.rail).collect();
        Rails { used, ..Rails::default() }
    };
    let both = ["a1".to_owned(), "a2".to_owned()];
    assert_eq!(used(&both).used[0].device, "a2", "only there have both ends a device");
    assert_eq!(used(&both).have_rdma(3), [true, false, true]);
    assert_eq!(used(&both[..1]).have_rdma(3), [false; 3]);
    assert!(Rails::default().have_rdma(3).is_empty());
    assert_eq!(used(&[]).used[0].device, "a1");
}

#[test]
fn a_rail_that_is_slow_beside_rdma_carries_nothing() {
    let own = [nic("a1", "10.1.0.1/24", 1), nic("a10", "10.2.0.1/24", 10)];
    let theirs = [nic("b1", "10.1.0.2/24", 1), nic("b10", "10.2.0.2/24", 10)];
    let pairs = pairs(&own, &offered(&theirs, &[]), (7, &[]), &[]);
    assert_eq!(names(&pairs)[..2], ["a10-b10", "a1-b1"]);
    let worth =
        |gbit: u64| [0, 1].map(|pair: usize| pairs[pair].is_worth_having(gbit * 1_000_000_000));
    assert_eq!(worth(0), [true, true], "nothing is beside RDMA");
    assert_eq!(worth(10), [true, true]);
    assert_eq!(worth(25), [true, false]);
    assert_eq!(worth(200), [false, false]);
    let unknown = Pair { speed: 0, ..pairs[1].clone() };
    assert!(unknown.is_worth_having(200_000_000_000));
}
