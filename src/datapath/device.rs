//! What a device is, as far as it matters to what can be attached to it.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Whether packets of the device have an Ethernet header (`ARPHRD_ETHER`, `ARPHRD_LOOPBACK`).
pub(super) fn has_ethernet_header(name: &str) -> io::Result<bool> {
    let mut request = request(name)?;
    ask(libc::SIOCGIFHWADDR, &mut request)?;
    // SAFETY: SIOCGIFHWADDR fills this member.
    let family = unsafe { request.ifr_ifru.ifru_hwaddr.sa_family };
    Ok(family == libc::ARPHRD_ETHER || family == libc::ARPHRD_LOOPBACK)
}

/// Whether it is one end of a virtual cable. What XDP sends there arrives only if the other end runs an XDP program too,
/// and that end is somebody else's.
pub(super) fn is_veth(name: &str) -> io::Result<bool> {
    const ETHTOOL_GDRVINFO: u32 = 3;
    /// `struct ethtool_drvinfo`: the command, the driver's name, and what is not asked for here.
    #[repr(C)]
    struct Driver {
        command: u32,
        name: [u8; 32],
        rest: [u8; 160],
    }
    let mut driver = Driver { command: ETHTOOL_GDRVINFO, name: [0; 32], rest: [0; 160] };
    match ethtool(name, &mut driver) {
        Ok(()) => Ok(driver.name.starts_with(b"veth\0")),
        // Drivers need not say.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A question or an order of `linux/ethtool.h` about a device: a structure that begins with its command, and that the kernel
/// reads or fills.
pub(crate) fn ethtool<T>(name: &str, value: &mut T) -> io::Result<()> {
    const SIOCETHTOOL: u64 = 0x8946;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_data = (&raw mut *value).cast();
    ask(SIOCETHTOOL as _, &mut request)
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    // SAFETY: integers, arrays and unions of them and of pointers; zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ask(what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the request is valid for this ioctl and outlives it, as does what it points to.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut *request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
