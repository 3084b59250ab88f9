//! `SIOCETHTOOL`: the only way to a NIC's RSS key and indirection table that every driver has.
//!
//! No netlink crate at hand reads RSS, and the ioctl's layouts are fixed ABI
//! (`include/uapi/linux/ethtool.h`). Owned by whoever asks; reads only, changes nothing.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{Channels, EthtoolSource, HashFunction, Rss};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GRXFH: u32 = 0x29;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_GRSSH: u32 = 0x46;

/// `struct ethtool_drvinfo`: 196 bytes; `driver` is the 32 bytes after the command.
const DRVINFO_WORDS: usize = 196 / 4;
/// `struct ethtool_channels`.
const CHANNELS_WORDS: usize = 9;
/// `struct ethtool_rxnfc`: 192 bytes, of which ETHTOOL_GRXFH moves the first 16.
const RXNFC_WORDS: usize = 192 / 4;
/// Of its `data`: the two halves of the four bytes that ports are.
const RXH_PORTS: u32 = 1 << 6 | 1 << 7;
const TCP_V4_FLOW: u32 = 0x01;
const TCP_V6_FLOW: u32 = 0x05;
/// `struct ethtool_rxfh` without its array.
const RXFH_WORDS: usize = 6;
/// The largest tables in use have 2048 entries of indirection and a key of 52 bytes; the kernel
/// says how large they are, and more than this is not believed.
const RXFH_SIZE_MAX: u32 = 1 << 16;

/// The running kernel's ethtool.
pub(super) struct Ethtool {
    socket: OwnedFd,
}

impl Ethtool {
    /// Any socket will do: the ioctl is answered by the network namespace it belongs to.
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket })
    }

    /// Runs one command on `interface`. `words` holds the command's structure.
    ///
    /// Private, because its safety rests on `words` being as long as the command says; each caller
    /// below is a command with the length the kernel takes it to have.
    fn call(&self, interface: &str, words: &mut [u32]) -> io::Result<()> {
        // SAFETY: `ifreq` is plain data; all zeros is an empty name and a null pointer.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // One byte stays zero: the name is terminated.
        if interface.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        // SAFETY:
        // - the descriptor is open: `self` owns it.
        // - `request` lives through the call; its name is terminated (checked above).
        // - the kernel reads and writes through `ifru_data` no more than the command's structure,
        //   whose size is fixed and is that of `words` in `driver`, `channels` and `ports`. For
        //   ETHTOOL_GRSSH it writes the header alone while both sizes in it are zero, and else
        //   refuses (EINVAL) sizes that are not the device's; `rss` asks with a header of zeros
        //   first, and then with as many words behind it as the sizes it names.
        let answer = unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        match answer {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Ethtool {
    /// Whether a flow type's ports are hashed; `None` if the driver does not say.
    fn ports(&self, interface: &str, flow: u32) -> Option<bool> {
        let mut words = [0; RXNFC_WORDS];
        (words[0], words[1]) = (ETHTOOL_GRXFH, flow);
        self.call(interface, &mut words).ok()?;
        // `data` is 64 bits; what we ask for is in its lower half.
        let fields = if cfg!(target_endian = "little") { words[2] } else { words[3] };
        Some(fields & RXH_PORTS == RXH_PORTS)
    }
}

impl EthtoolSource for Ethtool {
    fn driver(&self, interface: &str) -> io::Result<String> {
        let mut words = [0; DRVINFO_WORDS];
        words[0] = ETHTOOL_GDRVINFO;
        self.call(interface, &mut words)?;
        let bytes = words[1..9].iter().flat_map(|word| word.to_ne_bytes());
        let name: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
        Ok(String::from_utf8_lossy(&name).into_owned())
    }

    fn channels(&self, interface: &str) -> io::Result<Channels> {
        let mut words = [0; CHANNELS_WORDS];
        words[0] = ETHTOOL_GCHANNELS;
        self.call(interface, &mut words)?;
        Ok(Channels { rx: words[5], tx: words[6], combined: words[8], combined_max: words[4] })
    }

    fn rss(&self, interface: &str) -> io::Result<Rss> {
        let mut sizes = [0; RXFH_WORDS];
        sizes[0] = ETHTOOL_GRSSH;
        self.call(interface, &mut sizes)?;
        let (entries, key_bytes) = (sizes[2], sizes[3]);
        if entries > RXFH_SIZE_MAX || key_bytes > RXFH_SIZE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let key_words = key_bytes.div_ceil(4) as usize;
        let mut words = vec![0; RXFH_WORDS + entries as usize + key_words];
        words[0] = ETHTOOL_GRSSH;
        (words[2], words[3]) = (entries, key_bytes);
        self.call(interface, &mut words)?;
        let (table, key) = words[RXFH_WORDS..].split_at(entries as usize);
        // The hash function's byte is the first of its word, in memory's order.
        let [function, transformed, ..] = words[4].to_ne_bytes();
        Ok(Rss {
            function: match function {
                // What is hashed was folded before (symmetric XOR): another function.
                _ if !matches!(transformed, 0 | 0xff) => HashFunction::Unknown,
                1 => HashFunction::Toeplitz,
                2 => HashFunction::Xor,
                4 => HashFunction::Crc32,
                _ => HashFunction::Unknown,
            },
            key: key.iter().flat_map(|word| word.to_ne_bytes()).take(key_bytes as usize).collect(),
            indirection: table.to_vec(),
            tcp4_ports: self.ports(interface, TCP_V4_FLOW),
            tcp6_ports: self.ports(interface, TCP_V6_FLOW),
        })
    }
}
