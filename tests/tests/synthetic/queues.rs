//! Lanes on the receive queues of NICs with RSS, between two machines (`tests/rdma-vm/queues`).

use super::*;

/// Between two machines whose NICs have several queues; `None`, said, where there are none.
fn scene(test: &str, port: u16) -> Option<Scene> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    if variable("PF_QUEUES").is_empty() {
        skip(test, "needs NICs with several queues (make test-queues)");
        return None;
    }
    let is_server = variable("PF_ROLE") == "server";
    let at = variable(if is_server { "PF_LOCAL_ADDR" } else { "PF_PEER_ADDR" });
    Some(Scene { to: format!("{at}:{port}"), has_source: !is_server, has_target: is_server })
}

/// What a scene's machines are given beside the role.
fn variable(name: &str) -> String {
    std::env::var(name).expect("set with the others")
}

/// How often each receive queue of the virtio card has interrupted a processor: by the kernel's
/// count, as the driver's own of packets are not in `ethtool -S` any more.
fn interrupts() -> Vec<u64> {
    let table = std::fs::read_to_string("/proc/interrupts").expect("it is there");
    // ` 40:  5  0  PCI-MSIX-0000:00:03.0  1-edge  virtio2-input.0`
    let queue = |line: &str| {
        let (counts, name) = line.trim().rsplit_once(' ')?;
        let (device, queue) = name.split_once("-input.")?;
        let counts = counts.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
        device.starts_with("virtio").then_some(())?;
        Some((queue.parse::<usize>().ok()?, counts.sum()))
    };
    let mut queues: Vec<(usize, u64)> = table.lines().filter_map(queue).collect();
    queues.sort_unstable();
    assert!(!queues.is_empty(), "no queues: {table}");
    queues.into_iter().map(|(_, count)| count).collect()
}

fn ethtool(args: &[&str]) {
    let status = Command::new("ethtool").args(args).status();
    assert!(status.is_ok_and(|status| status.success()), "ethtool {args:?}");
}

/// A lane that has a queue for itself makes it interrupt this often at least: there are MiBs on it.
const INTERRUPTS_MIN: u64 = 10;

/// Moves a guest by so many lanes, and prints where they arrived and what the cores did.
fn move_by(scene: &Scene, lanes: &str) -> Moved {
    let more = [&["--transport", "tcp", "--lanes", lanes], &HOWEVER_SLOW[..]].concat();
    let shape = Shape { writers: 1, pages_per_second: 50, ..shape(32, None) };
    let moved = scene.move_guest(&shape, &more, None);
    if scene.has_source {
        moved.assert_migrated("tcp");
        let summary = moved.summary();
        let mib = summary["bytes_per_second"].as_u64().unwrap_or(0) >> 20;
        println!("lanes {lanes}: {mib} MiB/s, rss {}", summary["rss"]);
        println!("lanes {lanes}: cores {} -> {}", summary["cores_source"], summary["cores_target"]);
    }
    if scene.has_target {
        assert_goes_on(moved.arrived.as_ref().expect("it arrived"));
    }
    moved
}

#[test]
fn take_a_lane_each() {
    let Some(scene) = scene("queues::take_a_lane_each", 4831) else { return };
    let lanes = variable("PF_QUEUES");
    if scene.has_target {
        ethtool(&["-x", &variable("PF_NETDEV")]);
    }
    let before = interrupts();
    let moved = move_by(&scene, &lanes);
    if scene.has_source {
        let summary = moved.summary();
        assert_eq!(summary["rss"]["placed"].to_string(), lanes, "{:#}", summary["rss"]);
        assert_eq!(summary["rss"]["reason"], Value::Null);
        assert!(!summary["cores_target"].as_array().expect("cores").is_empty());
    }
    if scene.has_target {
        let counts: Vec<u64> = interrupts().iter().zip(&before).map(|(a, b)| a - b).collect();
        println!("interrupts by queue: {counts:?}");
        assert_eq!(counts.len().to_string(), lanes);
        assert!(counts.iter().all(|count| *count >= INTERRUPTS_MIN), "a queue had no lane");
    }
}

#[test]
fn take_one_lane_too() {
    let Some(scene) = scene("queues::take_one_lane_too", 4832) else { return };
    let moved = move_by(&scene, "1");
    assert!(!scene.has_source || moved.summary()["rss"]["placed"] == 1);
}

#[test]
fn that_no_port_leads_to_are_told_with_the_reason() {
    let name = "queues::that_no_port_leads_to_are_told_with_the_reason";
    let Some(scene) = scene(name, 4833) else { return };
    let device = variable("PF_NETDEV");
    if scene.has_target {
        ethtool(&["-N", &device, "rx-flow-hash", "tcp4", "sd"]);
    }
    let moved = move_by(&scene, &variable("PF_QUEUES"));
    if scene.has_source {
        let rss = &moved.summary()["rss"];
        assert_eq!(rss["placed"], 0);
        assert!(rss["reason"].as_str().is_some_and(|why| why.contains("rx-flow-hash tcp4 sdfn")));
    }
    if scene.has_target {
        ethtool(&["-N", &device, "rx-flow-hash", "tcp4", "sdfn"]);
    }
}
