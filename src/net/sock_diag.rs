//! Sockets of a network namespace: which are connected where, and ending one from outside (sock_diag(7)).
//!
//! Deliberately absent: which sockets are to be ended.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// States of linux/tcp_states.h, as bits, in which a socket has a peer to talk to: ESTABLISHED (also of connected UDP
/// sockets), SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;
/// Bytes of `struct nlmsghdr`, `struct inet_diag_sockid` and, in front of the latter, of a request and of an answer.
const HEADER: usize = 16;
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
    fd: OwnedFd,
}

impl SockDiag {
    /// Opens it in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        // SAFETY: plain integers; the descriptor is checked before it is owned.
        let fd =
            unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else has it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// All connected sockets of a protocol (IP protocol number), of both families.
    ///
    /// # Errors
    /// The kernel cannot list them (no `CONFIG_INET_UDP_DIAG` or `CONFIG_INET_TCP_DIAG`).
    pub fn connected(&self, protocol: u8) -> io::Result<Vec<Connected>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            self.send(BY_FAMILY, libc::NLM_F_REQUEST as u16 | libc::NLM_F_DUMP as u16, family, protocol, &[0; ID])?;
            self.answers(|payload| all.extend(parse(payload, protocol)))?;
        }
        Ok(all)
    }

    /// Ends a socket: its owner's next call fails with ECONNABORTED. Returns whether it was still there.
    ///
    /// # Errors
    /// The kernel cannot (EOPNOTSUPP: no `CONFIG_INET_DIAG_DESTROY`) or may not.
    pub fn destroy(&self, socket: &Connected) -> io::Result<bool> {
        let flags = libc::NLM_F_REQUEST as u16 | libc::NLM_F_ACK as u16;
        self.send(DESTROY, flags, socket.family, socket.protocol, &socket.id)?;
        match self.answers(|_| ()) {
            Ok(()) => Ok(true),
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

    /// Sends `struct inet_diag_req_v2`.
    fn send(&self, kind: u16, flags: u16, family: u8, protocol: u8, id: &[u8; ID]) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER + REQUEST_ID + ID);
        message.extend_from_slice(&((HEADER + REQUEST_ID + ID) as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        // Sequence number and port: one request at a time, answered to whoever asked.
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[family, protocol, 0, 0]);
        message.extend_from_slice(&CONNECTED.to_ne_bytes());
        message.extend_from_slice(id);
        // SAFETY: the buffer is valid for its length during the call.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads answers up to the one that ends them.
    fn answers(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            // SAFETY: the buffer is valid and writable for its length during the call.
            let len = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if len < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut rest = &buffer[..len as usize];
            while let Some((kind, payload, next)) = message(rest) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = payload.first_chunk().map_or(-libc::EIO, |code| i32::from_ne_bytes(*code));
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => each(payload),
                }
                rest = next;
            }
        }
    }
}

/// The first message: its type, its payload, and what follows.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let payload = bytes.get(HEADER..len)?;
    Some((kind, payload, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
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
