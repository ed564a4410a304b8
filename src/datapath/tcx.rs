//! Which programs are at the tcx hooks of a device.
//!
//! Deliberately absent: filters of qdiscs, which are asked for elsewhere, and attaching.

use std::io;

use super::attach::TCX;
use super::sys;

/// Ids of the programs at both hooks of a device; none where the kernel has no tcx (before 6.6). A device that has gone has
/// no program at it.
///
/// # Errors
/// The kernel does not tell, and why.
pub fn programs_at(ifindex: u32) -> io::Result<Option<Vec<u32>>> {
    let mut all = Vec::new();
    for hook in TCX {
        match sys::programs_at(ifindex, hook) {
            Ok(ids) => all.extend(ids),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(Some(Vec::new())),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(all))
}
