//! Receive queues, their interrupts, and the cores those go to.
//!
//! Drivers name their interrupts as they like and sysfs does not tie an interrupt to a queue, so
//! the queue is read from the name in `/proc/interrupts`. A name that fits no known pattern is
//! left out rather than guessed: a wrong core is worse than none.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cpulist;

/// One receive queue's interrupt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QueueIrq {
    /// The receive queue.
    pub queue: u32,
    /// The interrupt's number.
    pub irq: u32,
    /// The cores it goes to now.
    pub cpus: Vec<usize>,
    /// The driver's name for it.
    pub name: String,
}

/// The receive queues of interface `name` whose PCI function is `pci`.
pub(super) fn queue_irqs(root: &Path, name: &str, pci: Option<&Path>) -> Vec<QueueIrq> {
    let owned: BTreeSet<u32> = pci
        .and_then(|pci| fs::read_dir(pci.join("msi_irqs")).ok())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let interrupts = fs::read_to_string(root.join("proc/interrupts")).unwrap_or_default();
    let mut queues: Vec<QueueIrq> = interrupts
        .lines()
        .filter_map(|line| {
            let (irq, rest) = line.split_once(':')?;
            let irq: u32 = irq.trim().parse().ok()?;
            let action = rest.split_whitespace().next_back()?;
            // A function's interrupts are its own; without that list the name has to say so.
            let is_ours = match owned.is_empty() {
                true => names_interface(action, name),
                false => owned.contains(&irq),
            };
            if !is_ours {
                return None;
            }
            let queue = receive_queue(action)?;
            Some(QueueIrq { queue, irq, cpus: cpus(root, irq), name: action.to_owned() })
        })
        .collect();
    queues.sort();
    queues
}

fn names_interface(action: &str, name: &str) -> bool {
    action.split(|c: char| c != '_' && !c.is_ascii_alphanumeric()).any(|part| part == name)
}

/// The receive queue in names such as `eth0-TxRx-3`, `i40e-eth0-TxRx-3`, `eth0-rx-3`,
/// `mlx5_comp3@pci:0000:08:00.0`, `virtio2-input.3`, `ens5-Tx-Rx-3`, `eth0-Rx3`, `qede0-fp-3`.
fn receive_queue(action: &str) -> Option<u32> {
    let stem = action.split('@').next()?.to_ascii_lowercase();
    let name = stem.trim_end_matches(|c: char| c.is_ascii_digit());
    let queue = stem[name.len()..].parse().ok()?;
    let kind = name.trim_end_matches(['-', '.', '_', ':']);
    let receives = ["rx", "rxtx", "txrx", "input", "mlx5_comp", "-fp", "-queue"];
    receives.iter().any(|suffix| kind.ends_with(suffix)).then_some(queue)
}

/// Where the interrupt really goes, or where it may go: on kernels that don't tell, and while a
/// move is asked for that only the next interrupt makes.
fn cpus(root: &Path, irq: u32) -> Vec<usize> {
    let directory = root.join("proc/irq").join(irq.to_string());
    let list = |file: &str| {
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        cpulist::parse(&text).unwrap_or_default()
    };
    let (effective, may) = (list("effective_affinity_list"), list("smp_affinity_list"));
    let is_pending = !may.is_empty() && !effective.iter().all(|cpu| may.contains(cpu));
    match effective.is_empty() || is_pending {
        true => may,
        false => effective,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_read_from_the_names_drivers_give() {
        for (action, queue) in [
            ("eth0-TxRx-3", Some(3)),
            ("i40e-enp4s0f0-TxRx-12", Some(12)),
            ("eth0-rx-0", Some(0)),
            ("eth0-tx-0", None),
            ("mlx5_comp7@pci:0000:08:00.0", Some(7)),
            ("mlx5_async0@pci:0000:08:00.0", None),
            ("virtio2-input.1", Some(1)),
            ("virtio2-output.1", None),
            ("virtio2-config", None),
            ("ens5-Tx-Rx-5", Some(5)),
            ("ena-mgmnt@pci:0000:00:05.0", None),
            ("eth0-Rx4", Some(4)),
            ("iavf-eth1-TxRx-2", Some(2)),
            ("eth0", None),
        ] {
            assert_eq!(receive_queue(action), queue, "{action}");
        }
        assert!(names_interface("i40e-eth1-TxRx-0", "eth1"));
        assert!(!names_interface("i40e-eth11-TxRx-0", "eth1"));
    }
}
