//! Plain netlink sockets, for what no crate of ours speaks: one request at a time, and answers as bytes.
//!
//! Deliberately absent: what is in the messages.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of `struct nlmsghdr` and `struct nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
/// Marks of an attribute's type that are no part of it (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
const MARKS: u16 = 0xc000;

/// A socket that asks the kernel about the namespace in which it was made.
#[derive(Debug)]
pub(super) struct Netlink {
    fd: OwnedFd,
}

impl Netlink {
    /// Opens it in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel does not have this protocol (`EPROTONOSUPPORT`).
    pub(super) fn open(protocol: i32) -> io::Result<Self> {
        // SAFETY: plain integers; the descriptor is checked before it is owned.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else has it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Hears the notifications of a group from now on.
    ///
    /// # Errors
    /// The kernel does not let us.
    pub(super) fn join(&self, group: u32) -> io::Result<()> {
        // A socket without an address of its own is left out of what the kernel says for itself.
        // SAFETY: all zeros is a valid sockaddr_nl.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: the pointer and length describe an address that outlives the call.
        let bound = unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), length) };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the pointer and length describe a u32 that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_ADD_MEMBERSHIP,
                (&raw const group).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes one notification off the socket, whatever it says; `WouldBlock` where there is none.
    ///
    /// # Errors
    /// `ENOBUFS` says once that some were lost.
    pub(super) fn discard(&self) -> io::Result<()> {
        let mut byte = 0u8;
        // SAFETY: the buffer is valid and writable for its length during the call.
        let len = unsafe { libc::recv(self.fd.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT) };
        if len < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends a request.
    pub(super) fn send(&self, kind: u16, flags: i32, payload: &[u8]) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend_from_slice(&((HEADER + payload.len()) as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
        // Sequence number and port: one request at a time, answered to whoever asked.
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(payload);
        // SAFETY: the buffer is valid for its length during the call.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads answers up to the one that ends them, or to the one after which no more are wanted; then the socket is of no
    /// further use. Returns whether they are of one moment: a dump during which the kernel's tables change has gaps.
    pub(super) fn answers(&self, mut each: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<bool> {
        let mut buffer = vec![0u8; 64 * 1024];
        let mut consistent = true;
        loop {
            // SAFETY: the buffer is valid and writable for its length during the call.
            let len = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if len < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut rest = &buffer[..len as usize];
            while let Some((message, next)) = Message::first(rest) {
                consistent &= i32::from(message.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    // A dump that fails may say so at its end.
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        let code = message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(consistent) };
                    }
                    _ if each(message.payload).is_break() => return Ok(consistent),
                    _ => {}
                }
                rest = next;
            }
        }
    }
}

impl AsRawFd for Netlink {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A message as it was received.
struct Message<'a> {
    kind: u16,
    flags: u16,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The first one, and what follows it.
    fn first(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let flags = u16::from_ne_bytes(*bytes.get(6..)?.first_chunk()?);
        let payload = bytes.get(HEADER..len)?;
        Some((Self { kind, flags, payload }, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
    }
}

/// The attributes in a payload, or in another attribute: types and contents. Ends where the bytes are none.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & !MARKS;
        let content = bytes.get(ATTRIBUTE..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

/// The text of an attribute, without what ends it.
pub(super) fn text(content: &[u8]) -> String {
    String::from_utf8_lossy(content.strip_suffix(&[0]).unwrap_or(content)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_end_with_the_bytes_and_broken_ones_are_none() {
        let mut bytes = vec![7, 0, 1, 0x80, b'a', b'b', 0, 0];
        bytes.extend_from_slice(&[8, 0, 2, 0, 1, 2, 3, 4]);
        let found: Vec<_> = attributes(&bytes).collect();
        assert_eq!(found, [(1, &b"ab\0"[..]), (2, &[1, 2, 3, 4][..])]);
        assert_eq!(text(found[0].1), "ab");
        for (length, whole) in [(0, 0), (6, 0), (7, 1), (15, 1), (16, 2)] {
            assert_eq!(attributes(&bytes[..length]).count(), whole, "{length} bytes");
        }
        // A length below the header's own ends it, too.
        assert_eq!(attributes(&[0, 0, 1, 0, 5, 0, 2, 0, 1]).count(), 0);
    }
}
