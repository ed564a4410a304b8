//! Gratuitous ARP: tells every neighbour on a segment that an address now lives at our MAC.
//!
//! Only IPv4; its sibling of IPv6 is `na`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::NetError;

/// Length of an Ethernet frame with an ARP packet for IPv4, without padding and FCS.
pub const FRAME_LEN: usize = 42;

/// The whole Ethernet frame of a gratuitous ARP.
///
/// RFC 826 lays out the packet. RFC 5227 section 2.3 calls it an ARP announcement: an ARP *request* (receivers update
/// an existing entry on any ARP packet, and requests are what switches and stacks handle best), broadcast, whose sender
/// and target protocol addresses are both the announced one. The target hardware address is ignored in requests; it is
/// the broadcast address here because that is what Cilium's announcements carry, and packet captures are compared.
pub fn frame(mac: [u8; 6], address: Ipv4Addr) -> [u8; FRAME_LEN] {
    super::arp::frame(&super::arp::Arp {
        ethernet_destination: [0xff; 6],
        ethernet_source: mac,
        operation: super::arp::REQUEST,
        sender_mac: mac,
        sender: address,
        target_mac: [0xff; 6],
        target: address,
    })
}

/// Announces `address` at `mac` on one interface of the current network namespace, once. Never blocks.
///
/// # Errors
/// When the interface has no MAC, is gone or down, or its queue is full; announcing again is harmless.
pub fn send(ifindex: u32, mac: impl Into<Option<[u8; 6]>>, address: Ipv4Addr) -> Result<(), NetError> {
    let Some(mac) = mac.into() else {
        return Err(NetError::Invalid(format!("announce {address}: interface {ifindex} has no MAC address")));
    };
    GarpSender::open()?.send(ifindex, mac, address)
}

/// Sends gratuitous ARP on any interface of the namespace that it was opened in.
#[derive(Debug)]
pub struct GarpSender {
    socket: OwnedFd,
}

impl GarpSender {
    /// Opens the socket in the current network namespace. It receives nothing.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`.
    pub fn open() -> Result<Self, NetError> {
        // Protocol 0: packet(7) delivers nothing to such a socket.
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: socket(2) takes no pointers; its result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(NetError::io("open the packet socket for gratuitous ARP")(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self { socket: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Announces `address` at `mac` on one interface. Never blocks, so it may be called from async code.
    ///
    /// # Errors
    /// When the interface is gone or down, or its queue is full (`WouldBlock`, `ENOBUFS`): announcing again is harmless.
    pub fn send(&self, ifindex: u32, mac: [u8; 6], address: Ipv4Addr) -> Result<(), NetError> {
        let frame = frame(mac, address);
        self.send_frame(ifindex, super::arp::ETHERTYPE_ARP, &frame)
            .map_err(NetError::io(format!("announce {address} on interface {ifindex}")))
    }

    /// Sends a whole Ethernet frame. Never blocks.
    pub(super) fn send_frame(&self, ifindex: u32, ethertype: u16, frame: &[u8]) -> io::Result<()> {
        super::arp::send(self.socket.as_raw_fd(), ifindex, ethertype, frame)
    }
}
