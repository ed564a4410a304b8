//! Makes a veth carry what a real cable carries: frames of one segment each, with their checksums, and what XDP sends.
//!
//! Deliberately absent: putting it back. The veth goes with its lab.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::LabError;
use crate::datapath::{ethtool, xdp_link};
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
    const ETHTOOL_STXCSUM: u32 = 0x17;
    // `struct ethtool_value`: the command, and off.
    ethtool(device, &mut [ETHTOOL_STXCSUM, 0])
}

/// Attaches a program that lets everything pass to a device of this namespace.
fn attach_pass(device: &str) -> io::Result<OwnedFd> {
    const PROG_LOAD: u32 = 5;
    /// `BPF_PROG_TYPE_XDP`
    const TYPE: u32 = 6;
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
    xdp_link(program.as_fd(), nix::net::if_::if_nametoindex(device)?)
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
