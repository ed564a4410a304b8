//! Sockets of a network namespace: which are connected where, and ending one from outside (sock_diag(7)).
//!
//! Deliberately absent: which sockets are to be ended.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::ControlFlow;

use super::netlink::Netlink;

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// States of linux/tcp_states.h, as bits, in which a socket has a peer to talk to: ESTABLISHED (also of connected UDP
/// sockets), SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;
/// Bytes of `struct inet_diag_sockid`, and in front of it, of a request and of an answer.
const ID: usize = 48;
const REQUEST_ID: usize = 8;
const ANSWER_ID: usize = 4;

/// A connected socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// `AF_INET` or `AF_INET6`.
    family: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Where it is connected to; an IPv4-mapped address is told as IPv4.
    pub peer: SocketAddr,
    /// What `bpf_get_socket_cookie` says too.
    pub cookie: u64,
    /// `struct inet_diag_sockid` as the kernel told it.
    id: [u8; ID],
}

/// A socket that asks the kernel about the namespace in which it was made.
#[derive(Debug)]
pub struct SockDiag {
    socket: Netlink,
}

impl SockDiag {
    /// Opens it in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        Netlink::open(libc::NETLINK_SOCK_DIAG).map(|socket| Self { socket })
    }

    /// All connected sockets of a protocol (IP protocol number), of both families.
    ///
    /// # Errors
    /// The kernel cannot list them (no `CONFIG_INET_UDP_DIAG` or `CONFIG_INET_TCP_DIAG`).
    pub fn connected(&self, protocol: u8) -> io::Result<Vec<Connected>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            self.socket.send(BY_FAMILY, libc::NLM_F_DUMP, &request(family, protocol, &[0; ID]))?;
            self.socket.answers(|payload| {
                all.extend(parse(payload, protocol));
                ControlFlow::Continue(())
            })?;
        }
        Ok(all)
    }

    /// Ends a socket: its owner's next call fails with ECONNABORTED. Returns whether it was still there.
    ///
    /// # Errors
    /// The kernel cannot (EOPNOTSUPP: no `CONFIG_INET_DIAG_DESTROY`) or may not.
    pub fn destroy(&self, socket: &Connected) -> io::Result<bool> {
        self.socket.send(DESTROY, libc::NLM_F_ACK, &request(socket.family, socket.protocol, &socket.id))?;
        match self.socket.answers(|_| ControlFlow::Continue(())) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the kernel can end sockets of this protocol: asked to end one that does not exist, it says so.
    ///
    /// # Errors
    /// It cannot, and why.
    pub fn can_destroy(&self, protocol: u8) -> io::Result<()> {
        let mut id = [0; ID];
        // From port 9 to port 9 of a documentation address (RFC 5737), with a cookie that no socket has.
        id[..4].copy_from_slice(&[0, 9, 0, 9]);
        id[4..8].copy_from_slice(&[192, 0, 2, 1]);
        id[20..24].copy_from_slice(&[192, 0, 2, 2]);
        id[40..].copy_from_slice(&[0xfe; 8]);
        let peer = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 2), 9));
        let nobody = Connected { family: libc::AF_INET as u8, protocol, peer, cookie: 0, id };
        self.destroy(&nobody).map(drop)
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, protocol: u8, id: &[u8; ID]) -> Vec<u8> {
    let mut request = Vec::with_capacity(REQUEST_ID + ID);
    request.extend_from_slice(&[family, protocol, 0, 0]);
    request.extend_from_slice(&CONNECTED.to_ne_bytes());
    request.extend_from_slice(id);
    request
}

/// A socket of `struct inet_diag_msg`.
fn parse(payload: &[u8], protocol: u8) -> Option<Connected> {
    let family = *payload.first()?;
    let id: [u8; ID] = *payload.get(ANSWER_ID..)?.first_chunk()?;
    let port = u16::from_be_bytes([id[2], id[3]]);
    let remote: [u8; 16] = *id[20..].first_chunk()?;
    let ip = if i32::from(family) == libc::AF_INET {
        IpAddr::from(*remote.first_chunk::<4>()?)
    } else {
        Ipv6Addr::from(remote).to_canonical()
    };
    // Two words, low before high, each in the machine's order.
    let words: [u32; 2] = [40, 44].map(|at| u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]));
    let cookie = u64::from(words[0]) | u64::from(words[1]) << 32;
    Some(Connected { family, protocol, peer: SocketAddr::new(ip, port), cookie, id })
}
