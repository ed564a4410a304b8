//! Hooks: links pinned below `<bpf-root>/kinesin/links`, adopted and replaced in place, each on its own (R34).

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::programs::TcAttachType;
use serde::Serialize;

use super::{clsact, sys};

/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` of `enum bpf_attach_type`.
pub(crate) const TCX: [u32; 2] = [46, 47];
/// `BPF_XDP` of the same.
const XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`: in the driver or not at all. The kernel's generic mode comes after all that acceleration saves.
const IN_DRIVER: u32 = 1 << 2;

/// How a program hangs in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Attachment {
    /// A tcx link (Linux 6.6).
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
    /// A cgroup link.
    Cgroup,
    /// An XDP link, in the driver.
    Xdp,
}

/// One hook, and how it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HookStatus {
    /// The program.
    pub program: String,
    /// Device and direction, or cgroup; empty while it is only loaded.
    pub place: String,
    /// How it is attached; none where it is not.
    pub attached: Option<Attachment>,
    /// Why it could not be loaded or attached.
    pub error: Option<String>,
}

impl HookStatus {
    pub(crate) fn new(program: &str, place: String, result: Result<Attachment, String>) -> Self {
        let (attached, error) = match result {
            Ok(attachment) => (Some(attachment), None),
            Err(error) => (None, Some(error)),
        };
        Self { program: program.to_owned(), place, attached, error }
    }

    /// The device, of the XDP program's hook.
    pub fn accelerates(&self) -> Option<&str> {
        self.place.strip_suffix(" xdp")
    }

    /// Attached.
    pub fn is_ok(&self) -> bool {
        self.attached.is_some()
    }
}

/// The hooks of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceHooks {
    /// Packets into the node.
    pub ingress: HookStatus,
    /// Packets out of the node.
    pub egress: HookStatus,
    /// IPv6 into and out of the node, where it is served.
    pub ipv6: Option<[HookStatus; 2]>,
    /// In the driver, where that is asked for and the device has Ethernet headers. (One that need not be is not there.)
    pub xdp: Option<HookStatus>,
}

impl DeviceHooks {
    /// All of them are attached.
    pub fn are_ok(&self) -> bool {
        self.ingress.is_ok()
            && self.egress.is_ok()
            && self.ipv6.iter().flatten().chain(&self.xdp).all(HookStatus::is_ok)
    }
}

/// A place of a device that one program hangs at. Those of IPv6 are beside the others, which leave it to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Ingress,
    Egress,
    Ingress6,
    Egress6,
    Xdp,
}

impl Place {
    pub(crate) const ALL: [Self; 5] = [Self::Ingress, Self::Egress, Self::Ingress6, Self::Egress6, Self::Xdp];

    pub(crate) fn is_egress(self) -> bool {
        matches!(self, Self::Egress | Self::Egress6)
    }

    pub(crate) fn is_ipv6(self) -> bool {
        matches!(self, Self::Ingress6 | Self::Egress6)
    }

    /// Of the places of tc.
    pub(crate) fn direction(self) -> TcAttachType {
        if self.is_egress() { TcAttachType::Egress } else { TcAttachType::Ingress }
    }

    /// As pins call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::Ingress6 => "ingress6",
            Self::Egress6 => "egress6",
            Self::Xdp => "xdp",
        }
    }
}

/// What a hook held before it was attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A program of ours, which was replaced in place.
    Ours,
    /// Nothing of ours.
    Nothing,
}

/// The name of a device's pin.
pub(crate) fn device_pin(ifindex: u32, place: Place) -> String {
    format!("{ifindex}-{}", place.name())
}

/// Attaches by a tcx link, or puts the program into the link that is pinned.
///
/// # Errors
/// EINVAL where the kernel has no tcx.
pub(crate) fn tcx(program: BorrowedFd<'_>, ifindex: u32, place: Place, links: &Path) -> io::Result<Found> {
    let kind = TCX[usize::from(place.is_egress())];
    let path = links.join(device_pin(ifindex, place));
    adopt(
        &path,
        program,
        |info| info.kind == sys::LINK_TCX && info.target == [ifindex, kind],
        || sys::create_link(program, ifindex, kind, 0),
    )
}

/// Attaches to the driver by a link that nobody holds but its file descriptor.
pub(crate) fn xdp_link(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    sys::create_link(program, ifindex, XDP, IN_DRIVER)
}

/// Attaches to the driver by an XDP link, or puts the program into the link that is pinned. A device has room for one
/// program; that of somebody else stays (R48).
///
/// # Errors
/// EBUSY or EEXIST where somebody else's is there, EOPNOTSUPP where the driver has no XDP, others as the driver says.
pub(crate) fn xdp(program: BorrowedFd<'_>, ifindex: u32, links: &Path) -> io::Result<Found> {
    adopt(
        &links.join(device_pin(ifindex, Place::Xdp)),
        program,
        |info| info.kind == sys::LINK_XDP && info.target[0] == ifindex,
        || xdp_link(program, ifindex),
    )
}

/// Attaches by a cgroup link, or puts the program into the link that is pinned. `id` is the cgroup's.
pub(crate) fn cgroup(
    program: BorrowedFd<'_>,
    (cgroup, id): (BorrowedFd<'_>, u64),
    attach_type: u32,
    path: &Path,
) -> io::Result<Found> {
    use std::os::fd::AsRawFd;
    let target = [id as u32, (id >> 32) as u32];
    adopt(
        path,
        program,
        |info| info.kind == sys::LINK_CGROUP && info.target == target,
        || sys::create_link(program, cgroup.as_raw_fd() as u32, attach_type, 0),
    )
}

/// Replaces the program of the pinned link if it is the right one; else makes and pins a new one, and only then lets
/// go of what was pinned: a hook is never empty in between.
fn adopt(
    path: &Path,
    program: BorrowedFd<'_>,
    is_right: impl FnOnce(&sys::LinkInfo) -> bool,
    create: impl FnOnce() -> io::Result<OwnedFd>,
) -> io::Result<Found> {
    let pinned = sys::open_pin(path)?;
    if let Some(link) = &pinned
        && sys::link_info(link.as_fd()).is_ok_and(|info| is_right(&info))
    {
        match sys::update_link(link.as_fd(), program) {
            // The link's device or cgroup has gone: it can never carry anything again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT | libc::EINVAL)) => {}
            result => return result.map(|()| Found::Ours),
        }
    }
    let link = create()?;
    if pinned.is_some() {
        fs::remove_file(path)?;
    }
    sys::pin(link.as_fd(), path)?;
    Ok(Found::Nothing)
}

/// Takes the programs off places of a device: links by their pins, filters by what their pins say.
pub(crate) fn detach(ifindex: u32, places: impl Iterator<Item = Place>, links: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for place in places {
        let pin = links.join(device_pin(ifindex, place));
        release(&pin);
        match fs::remove_file(pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => result = result.and(Err(error)),
            _ => {}
        }
        result = result.and(clsact::detach(ifindex, place, links));
    }
    result
}

/// Empties the hook of a pinned link, if that is what is pinned. Where the kernel cannot (before 5.9, or because the
/// device has gone), the hook empties with the pin.
fn release(pin: &Path) {
    if let Ok(Some(link)) = sys::open_pin(pin)
        && sys::link_info(link.as_fd()).is_ok()
    {
        let _ = sys::detach_link(link.as_fd());
    }
}

/// Empties all hooks that pins say are ours: links, and clsact filters.
pub(crate) fn detach_pinned(links: &Path) -> io::Result<()> {
    let Ok(pins) = fs::read_dir(links) else { return Ok(()) };
    let mut result = Ok(());
    for pin in pins.flatten() {
        release(&pin.path());
        if let Some(filter) = clsact::Filter::of_pin(&pin.file_name().to_string_lossy()) {
            result = result.and(filter.remove());
        }
    }
    result
}

/// The hooks that pins below this root tell of, for whoever looks while no agent runs. Of the program at a device's hook its
/// pin says only the family, as `IPv4` or `IPv6`; the names of devices are those of the calling thread's network namespace.
pub fn pinned_hooks(bpf_root: &Path) -> Vec<HookStatus> {
    let pins = fs::read_dir(super::links_dir(bpf_root)).into_iter().flatten().flatten();
    let names = pins.map(|pin| pin.file_name().to_string_lossy().into_owned());
    names
        .filter_map(|name| {
            if let Some(program) = name.strip_prefix("cgroup-") {
                return Some(HookStatus::new(program, String::new(), Ok(Attachment::Cgroup)));
            }
            let how = if clsact::Filter::of_pin(&name).is_some() { Attachment::Clsact } else { Attachment::Tcx };
            let mut parts = name.split('-');
            let (ifindex, place) = (parts.next()?, parts.next()?);
            let how = if place == Place::Xdp.name() { Attachment::Xdp } else { how };
            let (direction, program) = match place.strip_suffix('6') {
                Some(direction) => (direction, "IPv6"),
                None if how == Attachment::Xdp => (place, super::hooks::XDP),
                None => (place, "IPv4"),
            };
            let device = nix::net::if_::if_indextoname(ifindex.parse().ok()?).ok()?;
            Some(HookStatus::new(program, format!("{} {direction}", device.to_string_lossy()), Ok(how)))
        })
        .collect()
}

/// Forgets links and filters whose device has gone; returns how many.
pub(crate) fn sweep(links: &Path) -> usize {
    let Ok(pins) = fs::read_dir(links) else { return 0 };
    pins.flatten()
        .filter(|pin| {
            let link = || sys::link_info(sys::open_pin(&pin.path()).ok()??.as_fd()).ok();
            let stale = match clsact::Filter::of_pin(&pin.file_name().to_string_lossy()) {
                Some(filter) => filter.has_no_device(),
                None => {
                    link().is_some_and(|info| matches!(info.kind, sys::LINK_TCX | sys::LINK_XDP) && info.target[0] == 0)
                }
            };
            stale && fs::remove_file(pin.path()).is_ok()
        })
        .count()
}

/// An error with its sources, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}
