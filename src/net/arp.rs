//! ARP packets on the wire (RFC 826), and a socket that asks and listens.
//!
//! The listener is for tests, the lab and wire checks: it reads every ARP packet of an interface, blocking, and
//! therefore belongs on a thread of its own. Answering ARP is the data path's task, not ours.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::NetError;
use super::garp::FRAME_LEN;

/// `ares_op$REQUEST` of RFC 826.
pub const REQUEST: u16 = 1;
/// `ares_op$REPLY` of RFC 826.
pub const REPLY: u16 = 2;

pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
/// Hardware Ethernet, protocol IPv4, address lengths 6 and 4.
const HEADER: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// An ARP packet for IPv4 over Ethernet, with its Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arp {
    /// Destination of the frame.
    pub ethernet_destination: [u8; 6],
    /// Source of the frame.
    pub ethernet_source: [u8; 6],
    /// [`REQUEST`] or [`REPLY`].
    pub operation: u16,
    /// `ar$sha`
    pub sender_mac: [u8; 6],
    /// `ar$spa`
    pub sender: Ipv4Addr,
    /// `ar$tha`
    pub target_mac: [u8; 6],
    /// `ar$tpa`
    pub target: Ipv4Addr,
}

/// The bytes of a packet.
pub fn frame(arp: &Arp) -> [u8; FRAME_LEN] {
    let mut bytes = [0; FRAME_LEN];
    bytes[0..6].copy_from_slice(&arp.ethernet_destination);
    bytes[6..12].copy_from_slice(&arp.ethernet_source);
    bytes[12..14].copy_from_slice(&ETHERTYPE_ARP.to_be_bytes());
    bytes[14..20].copy_from_slice(&HEADER);
    bytes[20..22].copy_from_slice(&arp.operation.to_be_bytes());
    bytes[22..28].copy_from_slice(&arp.sender_mac);
    bytes[28..32].copy_from_slice(&arp.sender.octets());
    bytes[32..38].copy_from_slice(&arp.target_mac);
    bytes[38..42].copy_from_slice(&arp.target.octets());
    bytes
}

/// Reads a packet; `None` for anything that is not ARP for IPv4 over Ethernet. Padding after it is ignored.
pub fn parse(bytes: &[u8]) -> Option<Arp> {
    let bytes: &[u8; FRAME_LEN] = bytes.get(..FRAME_LEN)?.try_into().ok()?;
    if bytes[12..14] != ETHERTYPE_ARP.to_be_bytes() || bytes[14..20] != HEADER {
        return None;
    }
    let mac = |at: usize| -> [u8; 6] { std::array::from_fn(|i| bytes[at + i]) };
    let address = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
    Some(Arp {
        ethernet_destination: mac(0),
        ethernet_source: mac(6),
        operation: u16::from_be_bytes([bytes[20], bytes[21]]),
        sender_mac: mac(22),
        sender: address(28),
        target_mac: mac(32),
        target: address(38),
    })
}

/// A socket that sends to and hears all ARP of one interface, in the namespace where it was opened.
#[derive(Debug)]
pub struct ArpSocket {
    socket: OwnedFd,
    ifindex: u32,
}

impl ArpSocket {
    /// Opens it on an interface of the current network namespace.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`, or when there is no such interface.
    pub fn open(ifindex: u32) -> Result<Self, NetError> {
        let what = || format!("open a packet socket on interface {ifindex}");
        // Protocol 0 until bind, so that packets of other interfaces never enter its queue.
        // SAFETY: socket(2) takes no pointers; its result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(NetError::io(what())(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let address = link_address(ifindex, ETHERTYPE_ARP);
        // SAFETY: the pointer and length describe `address`, which outlives the call.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
        };
        if bound != 0 {
            return Err(NetError::io(what())(io::Error::last_os_error()));
        }
        Ok(Self { socket, ifindex })
    }

    /// Sends a packet on the interface.
    ///
    /// # Errors
    /// When the interface is down or gone.
    pub fn send(&self, arp: &Arp) -> Result<(), NetError> {
        send(self.socket.as_raw_fd(), self.ifindex, ETHERTYPE_ARP, &frame(arp))
            .map_err(NetError::io(format!("send ARP for {} on interface {}", arp.target, self.ifindex)))
    }

    /// The next ARP packet from the wire before `deadline`; `None` when there was none.
    ///
    /// # Errors
    /// When the socket fails, for example because the interface went down.
    pub fn receive(&self, deadline: Instant) -> Result<Option<Arp>, NetError> {
        let failed = |e| NetError::io(format!("hear ARP on interface {}", self.ifindex))(e);
        let mut bytes = [0u8; 128];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let limit = left.as_millis().clamp(1, 60_000) as i32;
            // SAFETY: one pollfd, alive during the call.
            let ready = unsafe { libc::poll(&raw mut poll, 1, limit) };
            if ready == 0 {
                continue;
            }
            // SAFETY: the buffer is as long as said and alive during the call.
            let length = unsafe { libc::recv(self.socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            if length < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(failed(error));
            }
            if let Some(arp) = parse(&bytes[..length as usize]) {
                return Ok(Some(arp));
            }
        }
    }

    /// Asks who has `target` and collects every distinct MAC that answers within `bound`, in order of arrival. Waits
    /// the whole bound, because the second answer is the interesting one.
    ///
    /// `from` is our own MAC and address; the unspecified address makes it an RFC 5227 probe.
    ///
    /// # Errors
    /// When the interface is down or gone.
    pub fn who_has(
        &self,
        target: Ipv4Addr,
        from: ([u8; 6], Ipv4Addr),
        bound: Duration,
    ) -> Result<Vec<[u8; 6]>, NetError> {
        let deadline = Instant::now() + bound;
        self.send(&Arp {
            ethernet_destination: [0xff; 6],
            ethernet_source: from.0,
            operation: REQUEST,
            sender_mac: from.0,
            sender: from.1,
            target_mac: [0; 6],
            target,
        })?;
        let mut answers = Vec::new();
        while let Some(arp) = self.receive(deadline)? {
            if arp.operation == REPLY && arp.sender == target && !answers.contains(&arp.sender_mac) {
                answers.push(arp.sender_mac);
            }
        }
        Ok(answers)
    }
}

/// Sends a whole Ethernet frame on an interface.
pub(super) fn send(socket: RawFd, ifindex: u32, ethertype: u16, frame: &[u8]) -> io::Result<()> {
    let address = link_address(ifindex, ethertype);
    // SAFETY: both pointers describe values that outlive the call, with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket,
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_NOSIGNAL,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn link_address(ifindex: u32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: ifindex as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}
