//! Whose programs are at the tcx hooks of a device.
//!
//! Deliberately absent: filters of qdiscs, which are asked for elsewhere, and attaching.

use std::io;

use super::attach::TCX;
use super::sys;

/// Names of the programs at both hooks of a device, at most 15 characters of each; empty where the kernel does not tell. None
/// where it has no tcx (before 6.6). A device that has gone has none at it.
///
/// # Errors
/// The kernel does not tell, and why.
pub fn programs_at(ifindex: u32) -> io::Result<Option<Vec<String>>> {
    let mut names = Vec::new();
    for hook in TCX {
        let ids = match sys::programs_at(ifindex, hook) {
            Ok(ids) => ids,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(Some(Vec::new())),
            Err(error) => return Err(error),
        };
        for id in ids {
            match sys::program_name(id) {
                Ok(name) => names.push(name),
                // Taken away since.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(_) => names.push(String::new()),
            }
        }
    }
    Ok(Some(names))
}
