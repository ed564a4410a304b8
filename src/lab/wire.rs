//! Makes a veth carry what a real cable carries: frames of one segment each, with their checksums, and what XDP sends.
//!
//! Deliberately absent: putting it back. The veth goes with its lab.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::LabError;
use crate::net::Netns;

/// The other end's XDP program, for as long as it is kept. A veth wakes its peer for what its own program sends only if
/// the peer has one too.
#[derive(Debug)]
pub(super) struct Wire {
    _link: OwnedFd,
}

/// Makes a wire of the cable from a port of the LAN to `eth0` of a host.
///
/// # Errors
/// When the kernel refuses something.
pub(super) fn wire(lan: &Netns, port: &str, host: &Netns) -> Result<Wire, LabError> {
    let failed = || LabError::io(format!("make a wire of the cable to {port}"));
    host.run(|| leave_checksums("eth0"))?.map_err(failed())?;
    let link = lan.run(|| leave_checksums(port).and_then(|()| attach_pass(port)))?.map_err(failed())?;
    Ok(Wire { _link: link })
}

/// Lets the stack fill in checksums, and with them make segments, before a device of this namespace sends.
fn leave_checksums(device: &str) -> io::Result<()> {
    const SIOCETHTOOL: u64 = 0x8946;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // `struct ethtool_value`: the command, and off.
    let mut value = [ETHTOOL_STXCSUM, 0];
    // SAFETY: integers, arrays and unions of them and of pointers; zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value that it points to are valid for this ioctl and outlive it.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches a program that lets everything pass to a device of this namespace.
fn attach_pass(device: &str) -> io::Result<OwnedFd> {
    const PROG_LOAD: u32 = 5;
    const LINK_CREATE: u32 = 28;
    /// `BPF_PROG_TYPE_XDP`, `BPF_XDP` and `XDP_FLAGS_DRV_MODE`
    const TYPE: u32 = 6;
    const ATTACH: u32 = 37;
    const IN_DRIVER: u32 = 4;
    // r0 = XDP_PASS; exit
    let code: [[u32; 2]; 2] = [[0xb7, 2], [0x95, 0]];
    let license = c"GPL";
    let pointer = |address: usize| (address as u64).to_ne_bytes();
    let mut load = [0u8; 72];
    load[..4].copy_from_slice(&TYPE.to_ne_bytes());
    load[4..8].copy_from_slice(&(code.len() as u32).to_ne_bytes());
    load[8..16].copy_from_slice(&pointer(code.as_ptr().addr()));
    load[16..24].copy_from_slice(&pointer(license.as_ptr().addr()));
    let program = bpf(PROG_LOAD, &mut load)?;
    let ifindex = nix::net::if_::if_nametoindex(device)?;
    let words = [program.as_raw_fd() as u32, ifindex, ATTACH, IN_DRIVER];
    let mut create = [0u8; 16];
    create.iter_mut().zip(words.into_iter().flat_map(u32::to_ne_bytes)).for_each(|(to, from)| *to = from);
    bpf(LINK_CREATE, &mut create)
}

/// A command of bpf(2) that makes a file descriptor.
fn bpf(command: u32, attr: &mut [u8]) -> io::Result<OwnedFd> {
    // SAFETY: the attribute is readable and writable for its size, and what it points to outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), attr.len()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned it for us to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
