//! The programs at pods' devices (`cil_from_container`), by which answers leave without the host's stack.
//!
//! Their links are not pinned: they end with the agent, and answers then pass the stack and are translated where they leave.
//! So nothing has to be adopted, swept or removed. Deliberately absent: kernels without tcx (before 6.6), where answers always
//! go that way.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::util::KernelVersion;

use super::attach::{Attachment, HookStatus, TCX};
use super::loader::Datapath;
use super::options::AttachMode;
use super::sys;

/// The programs, that of IPv6 second.
const CONTAINER: [&str; 2] = ["cil_from_container", "cil_from_container6"];
const HAS_TCX: KernelVersion = KernelVersion::new(6, 6, 0);
/// Where they hang, for people.
const PLACE: &str = "pods ingress";

/// What hangs at pods' devices.
#[derive(Default)]
pub(super) struct PodHooks {
    /// Links by program and ifindex.
    links: BTreeMap<(&'static str, u32), OwnedFd>,
    /// How it went, for each program.
    status: Vec<HookStatus>,
}

impl PodHooks {
    pub(super) fn status(&self) -> &[HookStatus] {
        &self.status
    }
}

impl Datapath {
    /// The programs that hang there, as far as the kernel and the options have it.
    pub(super) fn pod_programs(&self) -> impl Iterator<Item = &'static str> + use<> {
        let tcx =
            self.options.attach == AttachMode::Auto && KernelVersion::current().is_ok_and(|kernel| kernel >= HAS_TCX);
        let families = if self.options.ipv6 { 2 } else { 1 };
        CONTAINER.into_iter().take(if tcx { families } else { 0 })
    }

    /// Attaches to these devices (ifindex) of the calling thread's network namespace, and leaves all others. A program that
    /// fails says so in its status and leaves the other working.
    pub fn follow_pods(&mut self, devices: &BTreeSet<u32>) {
        self.pods.links.retain(|(_, ifindex), link| devices.contains(ifindex) && is_at(link, *ifindex));
        self.pods.status.clear();
        if devices.is_empty() {
            return;
        }
        for program in self.pod_programs() {
            let attached = self.program_fd(program).and_then(|fd| self.pods.attach(program, fd.as_fd(), devices));
            let status = attached.map(|()| Attachment::Tcx);
            self.pods.status.push(HookStatus::new(program, PLACE.into(), status));
        }
    }
}

impl PodHooks {
    fn attach(&mut self, program: &'static str, fd: BorrowedFd<'_>, devices: &BTreeSet<u32>) -> Result<(), String> {
        let mut result = Ok(());
        for ifindex in devices {
            let Entry::Vacant(place) = self.links.entry((program, *ifindex)) else { continue };
            match sys::create_link(fd, *ifindex, TCX[0], 0) {
                Ok(link) => drop(place.insert(link)),
                // It has gone meanwhile, which the next call will know.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => result = Err(format!("device {ifindex}: {error}")),
            }
        }
        result
    }
}

/// Whether a link still is where it was made.
fn is_at(link: &OwnedFd, ifindex: u32) -> bool {
    sys::link_info(link.as_fd()).is_ok_and(|info| info.target[0] == ifindex)
}
