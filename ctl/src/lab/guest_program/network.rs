//! The guest's network interface: an address by rtnetlink, and a UDP echo.
//!
//! Pings are answered by the guest's kernel as soon as the interface is up, so they show whether
//! the machine runs and not how busy the guest program is.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use super::GuestError;
use super::boot::read_number;

/// virtio-net's first interface; the guest has no other and no udev to rename it.
const INTERFACE: &str = "/sys/class/net/eth0/ifindex";

// linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLM_F_CREATE_EXCL: u16 = 0x400 | 0x200;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// Gives the interface an address and brings it up.
pub(super) fn configure(address: Ipv4Addr, prefix: u8) -> Result<(), GuestError> {
    let index = read_number(INTERFACE)? as u32;

    // struct ifaddrmsg: family, prefix length, flags, scope, index; then two attributes.
    let mut body = vec![libc::AF_INET as u8, prefix, 0, 0];
    body.extend(index.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend(8_u16.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(address.octets());
    }
    request("add an address", RTM_NEWADDR, NLM_F_CREATE_EXCL, &body)?;

    // struct ifinfomsg: family, padding, type, index, flags, mask of the flags to change.
    let up = libc::IFF_UP as u32;
    let mut body = vec![0; 4];
    for word in [index, up, up] {
        body.extend(word.to_ne_bytes());
    }
    request("bring the interface up", RTM_NEWLINK, 0, &body)
}

/// Echoes every datagram on `port`, on a thread of its own.
pub(super) fn echo_udp(port: u16) -> Result<(), GuestError> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
        .map_err(GuestError::file("bind", "UDP echo"))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            if let Ok((length, sender)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], sender);
            }
        }
    });
    Ok(())
}

fn request(action: &'static str, kind: u16, flags: u16, body: &[u8]) -> Result<(), GuestError> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )
    .map_err(GuestError::call("socket", "netlink"))?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))
        .map_err(GuestError::call("bind", "netlink"))?;

    // struct nlmsghdr: length, type, flags, sequence, port.
    let mut message = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())
        .map_err(GuestError::call("send", "netlink"))?;

    let mut answer = [0; 4096];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())
        .map_err(GuestError::call("recv", "netlink"))?;
    // struct nlmsgerr follows the header: a negative errno, 0 for done.
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    let errno = -i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if length >= 20 && kind == NLMSG_ERROR && errno == 0 {
        Ok(())
    } else {
        Err(GuestError::Netlink { action, errno })
    }
}
