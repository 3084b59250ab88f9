//! A card and a virtio NIC on a file system made for them; then this host's own.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

struct Fake;

impl EthtoolSource for Fake {
    fn driver(&self, _: &str) -> io::Result<String> {
        Ok("ice".into())
    }

    fn channels(&self, _: &str) -> io::Result<Channels> {
        Ok(Channels { rx: 0, tx: 0, combined: 2, combined_max: 64 })
    }

    fn rss(&self, _: &str) -> io::Result<Rss> {
        let function = HashFunction::Toeplitz;
        let (key, indirection) = (vec![7; 52], vec![0, 1, 0, 1]);
        Ok(Rss { function, key, indirection, tcp4_ports: Some(true), tcp6_ports: None })
    }
}

struct Mute;

impl EthtoolSource for Mute {
    fn driver(&self, _: &str) -> io::Result<String> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn channels(&self, _: &str) -> io::Result<Channels> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn rss(&self, _: &str) -> io::Result<Rss> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn up() -> Link {
    Link {
        flags: InterfaceFlags::IFF_UP | InterfaceFlags::IFF_LOWER_UP,
        addresses: vec!["10.0.0.1".parse().unwrap()],
        networks: vec!["10.0.0.1/24".parse().unwrap()],
    }
}

#[test]
fn a_card_is_read_down_to_the_core_of_each_queue() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let pci = "sys/devices/pci0000:3a/0000:3b:00.0";
    write(root, &format!("{pci}/numa_node"), "1\n");
    for irq in ["120", "121", "122"] {
        write(root, &format!("{pci}/msi_irqs/{irq}"), "msix\n");
    }
    write(root, "sys/class/net/eth2/speed", "100000\n");
    write(root, "sys/class/net/eth2/mtu", "9000\n");
    symlink(root.join(pci), root.join("sys/class/net/eth2/device")).unwrap();
    write(
        root,
        "proc/interrupts",
        concat!(
            "           CPU0       CPU1\n",
            " 120:   0   0  IR-PCI-MSIX-0000:3b:00.0    0-edge      ice-0000:3b:00.0:misc\n",
            " 121:   5   0  IR-PCI-MSIX-0000:3b:00.0    1-edge      ice-eth2-TxRx-0\n",
            " 122:   0   9  IR-PCI-MSIX-0000:3b:00.0    2-edge      ice-eth2-TxRx-1\n",
            " 130:   0   9  IR-PCI-MSIX-0000:5e:00.0    2-edge      ice-eth9-TxRx-1\n",
            " NMI:   1   2  Non-maskable interrupts\n",
        ),
    );
    write(root, "proc/irq/121/smp_affinity_list", "0-15\n");
    write(root, "proc/irq/121/effective_affinity_list", "8\n");
    write(root, "proc/irq/122/smp_affinity_list", "9\n");
    write(root, "proc/irq/122/effective_affinity_list", "8\n");

    let nic = Nic::read(root, "eth2", up(), &Fake);
    assert_eq!((nic.is_up, nic.is_virtual), (true, false));
    assert_eq!(nic.pci.as_deref(), Some("0000:3b:00.0"));
    assert_eq!((nic.numa_node, nic.mtu_bytes), (Some(1), Some(9000)));
    assert_eq!(nic.bits_per_second, Some(100_000_000_000));
    assert_eq!(nic.channels.unwrap().receiving(), 2);
    let queues: Vec<_> =
        nic.queue_irqs.iter().map(|q| (q.queue, q.irq, q.cpus.as_slice())).collect();
    assert_eq!(queues, [(0, 121, &[8][..]), (1, 122, &[9][..])]);
    assert_eq!(nic.rss.as_ref().unwrap().indirection, [0, 1, 0, 1]);
    let nics = [nic];
    assert!(Nic::with_address(&nics, &"10.0.0.1".parse().unwrap()).is_some());
    assert!(Nic::with_address(&nics, &"10.0.0.2".parse().unwrap()).is_none());
}

#[test]
fn virtio_finds_its_pci_function_one_level_up() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let pci = "sys/devices/pci0000:00/0000:00:03.0";
    write(root, &format!("{pci}/msi_irqs/40"), "msix\n");
    write(root, &format!("{pci}/numa_node"), "-1\n");
    write(root, &format!("{pci}/virtio2/status"), "");
    write(root, "sys/class/net/eth0/speed", "-1\n");
    symlink(root.join(pci).join("virtio2"), root.join("sys/class/net/eth0/device")).unwrap();
    write(root, "proc/interrupts", " 40: 1 2 PCI-MSIX-0000:00:03.0 1-edge virtio2-input.0\n");
    write(root, "proc/irq/40/effective_affinity_list", "1\n");
    let nic = Nic::read(root, "eth0", up(), &Mute);
    assert_eq!(nic.pci.as_deref(), Some("0000:00:03.0"));
    assert_eq!((nic.numa_node, nic.bits_per_second, nic.rss), (None, None, None));
    assert_eq!(nic.no_rss.as_deref(), Some("its driver does not tell: unsupported"));
    assert_eq!((nic.queue_irqs[0].queue, &nic.queue_irqs[0].cpus[..]), (0, &[1][..]));
}

#[test]
fn this_host_has_its_loopback() {
    let nics = Nic::all().unwrap();
    println!("{nics:#?}");
    let loopback = nics.iter().find(|nic| nic.is_loopback).expect("every namespace has one");
    assert!(loopback.is_virtual && loopback.rss.is_none());
}
