//! What is told of NICs, what is picked by it, and what is said afterwards.

use pageferry_datapath::control::LanePlaced;
use pageferry_uring::nic::QueueIrq;

use super::*;

fn nic(name: &str, address: &str, cores: &[usize]) -> Nic {
    let irq = |(queue, &cpu): (usize, &usize)| QueueIrq {
        queue: queue as u32,
        irq: 100 + queue as u32,
        cpus: vec![cpu],
        name: format!("{name}-rx-{queue}"),
    };
    Nic {
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
        rss: Some(Rss {
            function: HashFunction::Toeplitz,
            key: (0..40).map(|byte: u8| byte.wrapping_mul(37) ^ 0x5a).collect(),
            indirection: (0..128).map(|entry| entry % cores.len() as u32).collect(),
            tcp4_ports: Some(true),
            tcp6_ports: None,
        }),
        queue_irqs: cores.iter().enumerate().map(irq).collect(),
        ..Nic::default()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn rail(device: &str, from: &str, to: &str) -> Rail {
    Rail {
        device: device.into(),
        from: ip(from),
        target_device: device.into(),
        to: to.parse().unwrap(),
        rdma: false,
    }
}

#[test]
fn each_lane_gets_ports_that_land_on_a_queue_of_its_own() {
    let nics = [nic("eth0", "10.1.0.2", &[0, 1, 2, 3]), nic("eth1", "10.2.0.2", &[4, 5])];
    let told = told(&nics, &[ip("10.1.0.2"), ip("::ffff:10.2.0.2")], &[0, 1, 2, 3, 4, 5]);
    let rails =
        [rail("eth0", "10.1.0.1", "10.1.0.2:4777"), rail("eth1", "10.2.0.1", "10.2.0.2:4777")];
    let picked = pick(&told, 4, (rails[0].to, &rails), SessionId(77));
    assert_eq!(picked.why_not, None);
    let landings = picked.from.iter().enumerate().map(|(lane, from)| {
        let to = rails[lane % 2].to;
        let all: Vec<Landing> = from.iter().map(|from| landing(&told, *from, to)).collect();
        assert!(all.len() > 1 && all.iter().all(|it| *it == all[0]), "every port leads there");
        all[0].clone()
    });
    let landings: Vec<_> = landings.map(|it| (it.device.unwrap(), it.queue, it.cpu)).collect();
    let at = |device: &str, queue, cpu| (device.to_owned(), Some(queue), Some(cpu));
    assert_eq!(landings, [at("eth0", 0, 0), at("eth1", 0, 4), at("eth0", 1, 1), at("eth1", 1, 5)]);
    // As a socket that listens for both families has it.
    let mapped = "[::ffff:10.1.0.2]:4777".parse().unwrap();
    assert_eq!(landing(&told, picked.from[0][0], mapped).queue, Some(0));
}

#[test]
fn queues_whose_cores_are_taken_come_last() {
    // The first and third interrupt core 0, which lanes may not use.
    let nics = [nic("eth0", "10.1.0.2", &[0, 1, 0, 2])];
    let told = told(&nics, &[ip("10.1.0.2")], &[1, 2, 3]);
    let order: Vec<u16> = told[0].queues.iter().map(|core| core.queue).collect();
    assert_eq!(order, [1, 3, 0, 2]);
}

#[test]
fn why_not_is_said() {
    let good = nic("eth0", "10.1.0.2", &[0, 1]);
    let with = |change: &dyn Fn(&mut Rss)| {
        let mut changed = good.clone();
        change(changed.rss.as_mut().unwrap());
        changed
    };
    let veth = Nic { rss: None, no_rss: Some("no table".into()), ..good.clone() };
    for (nic, why) in [
        (veth, "eth0 has no RSS (no table)"),
        (with(&|it| it.function = HashFunction::Xor), "another hash"),
        (with(&|it| it.key.clear()), "another hash"),
        (with(&|it| it.tcp4_ports = Some(false)), "ethtool -N eth0 rx-flow-hash tcp4 sdfn"),
        (with(&|it| it.indirection.truncate(100)), "100 entries"),
        (with(&|it| it.indirection = vec![70_000, 1]), "not understood"),
        (with(&|it| it.indirection.fill(1)), "leads to one queue"),
    ] {
        let told = told(&[nic], &[ip("10.1.0.2")], &[0, 1]);
        let to = "10.1.0.2:4777".parse().unwrap();
        let rails = [rail("eth0", "10.1.0.1", "10.1.0.2:4777")];
        let picked = pick(&told, 2, (to, &rails), SessionId(1));
        let reason = picked.why_not.clone().unwrap();
        assert!(reason.contains(why), "{reason}");
        assert!(picked.from.iter().all(Vec::is_empty));
        let report = report(&picked, Some(&LanesPlaced::default()));
        assert_eq!((report.placed, report.lanes, report.reason), (0, 2, Some(reason)));
        assert_eq!(landing(&told, "10.1.0.1:5".parse().unwrap(), to).queue, None);
    }
    let to = "127.0.0.1:4777".parse().unwrap();
    let picked = pick(&[], 1, (to, &[]), SessionId(1));
    assert!(picked.why_not.unwrap().contains("does not tell"));
}

#[test]
fn the_report_goes_by_where_lanes_arrived() {
    let picked = Picked { from: vec![vec!["10.1.0.1:50000".parse().unwrap()]; 3], why_not: None };
    let lane = |lane, queue, napi| LanePlaced {
        lane,
        device: Some("eth0".into()),
        queue: Some(queue),
        napi,
        ..LanePlaced::default()
    };
    let said = |napis: [Option<u32>; 3]| {
        let lanes = (0..3).zip(napis).map(|(index, napi)| lane(index, index, napi));
        let placed = LanesPlaced { lanes: lanes.collect(), cores: vec![] };
        let report = report(&picked, Some(&placed));
        (report.placed, report.reason)
    };
    assert_eq!(said([Some(81), Some(82), Some(83)]), (3, None));
    let (placed, reason) = said([Some(81), Some(81), Some(83)]);
    assert!(placed == 1 && reason.unwrap().contains("other queues"));
    let (placed, reason) = said([None; 3]);
    assert!(placed == 0 && reason.unwrap().contains("does not tell"));
    let report = report(&picked, None);
    assert!(report.placed == 0 && report.reason.unwrap().contains("has not said"));
}
