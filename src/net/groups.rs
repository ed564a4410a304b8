//! Membership in solicited-node multicast groups (RFC 4291 section 2.7.1): who answers for an address must hear those
//! who ask for it.
//!
//! A membership makes the network card let the group's frames through, and reports it to switches that forward groups
//! only where somebody listens (MLD, RFC 3810). It belongs to a socket, so it ends with the process: nothing is left
//! behind. Whoever knows the address already asks it directly meanwhile. Deliberately absent: reading anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv6Addr, UdpSocket};

use super::NetError;

/// The group that those who look for the address send to.
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]))
}

/// The groups of a node's addresses, by device. Addresses with the same last 24 bits share one.
#[derive(Debug, Default)]
pub struct Groups {
    /// A socket holds as many memberships as its option memory allows.
    sockets: Vec<UdpSocket>,
    members: BTreeMap<(u32, Ipv6Addr), Member>,
}

#[derive(Debug)]
struct Member {
    /// Index into the sockets.
    socket: usize,
    addresses: BTreeSet<Ipv6Addr>,
}

impl Groups {
    /// Joins the group of an address on a device of the current network namespace, unless it has been joined.
    ///
    /// # Errors
    /// When the device is gone, or has no IPv6.
    pub fn join(&mut self, ifindex: u32, address: Ipv6Addr) -> Result<(), NetError> {
        let group = solicited_node(address);
        if let Some(member) = self.members.get_mut(&(ifindex, group)) {
            member.addresses.insert(address);
            return Ok(());
        }
        let failed = || NetError::io(format!("join multicast group {group} on interface {ifindex}"));
        let joined = match self.sockets.last() {
            Some(socket) => socket.join_multicast_v6(&group, ifindex),
            None => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        };
        match joined {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS)) => {
                let socket = open().map_err(failed())?;
                socket.join_multicast_v6(&group, ifindex).map_err(failed())?;
                self.sockets.push(socket);
            }
            joined => joined.map_err(failed())?,
        }
        let member = Member { socket: self.sockets.len() - 1, addresses: BTreeSet::from([address]) };
        self.members.insert((ifindex, group), member);
        Ok(())
    }

    /// Leaves the group of an address unless another address needs it. A device that has gone is no error.
    pub fn leave(&mut self, ifindex: u32, address: Ipv6Addr) {
        let key = (ifindex, solicited_node(address));
        let Some(member) = self.members.get_mut(&key) else { return };
        member.addresses.remove(&address);
        if member.addresses.is_empty() {
            // The kernel has ended memberships of a device that has gone.
            let _ = self.sockets[member.socket].leave_multicast_v6(&key.1, ifindex);
            self.members.remove(&key);
        }
    }
}

/// A socket that no datagram reaches.
fn open() -> io::Result<UdpSocket> {
    // SAFETY: socket(2) takes no pointers; its result is checked.
    let fd = unsafe { libc::socket(libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}
