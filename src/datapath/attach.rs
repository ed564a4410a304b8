//! Hooks: links pinned below `<bpf-root>/kinesin/links`, adopted and replaced in place, each on its own (R34).

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::programs::links::Link;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcHandle};
use aya::programs::{SchedClassifier, TcAttachType, tc};
use serde::Serialize;

use super::sys;

/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` of `enum bpf_attach_type`.
const TCX: [u32; 2] = [46, 47];
/// Priority and handle of our clsact filters: fixed, so that they are found again.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x4b69);
/// Pins of programs in clsact filters end so; they only mark that the filter is ours.
/// (No dot: bpffs reserves it.)
const CLSACT: &str = "-clsact";

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

    /// Attached.
    pub fn is_ok(&self) -> bool {
        self.attached.is_some()
    }
}

/// Both hooks of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceHooks {
    /// Packets into the node.
    pub ingress: HookStatus,
    /// Packets out of the node.
    pub egress: HookStatus,
}

fn directed(direction: TcAttachType) -> (usize, &'static str) {
    match direction {
        TcAttachType::Ingress => (0, "ingress"),
        TcAttachType::Egress => (1, "egress"),
    }
}

/// The name of a device's pin.
pub(crate) fn device_pin(ifindex: u32, direction: TcAttachType) -> String {
    format!("{ifindex}-{}", directed(direction).1)
}

/// Attaches by a tcx link, or puts the program into the link that is pinned.
///
/// # Errors
/// EINVAL where the kernel has no tcx.
pub(crate) fn tcx(program: BorrowedFd<'_>, ifindex: u32, direction: TcAttachType, links: &Path) -> io::Result<()> {
    let kind = TCX[directed(direction).0];
    let path = links.join(device_pin(ifindex, direction));
    adopt(
        &path,
        program,
        |info| info.kind == sys::LINK_TCX && info.target == [ifindex, kind],
        || sys::create_link(program, ifindex, kind),
    )
}

/// Attaches by a cgroup link, or puts the program into the link that is pinned. `id` is the cgroup's.
pub(crate) fn cgroup(
    program: BorrowedFd<'_>,
    (cgroup, id): (BorrowedFd<'_>, u64),
    attach_type: u32,
    path: &Path,
) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let target = [id as u32, (id >> 32) as u32];
    adopt(
        path,
        program,
        |info| info.kind == sys::LINK_CGROUP && info.target == target,
        || sys::create_link(program, cgroup.as_raw_fd() as u32, attach_type),
    )
}

/// Replaces the program of the pinned link if it is the right one; else makes and pins a new one, and only then lets
/// go of what was pinned: a hook is never empty in between.
fn adopt(
    path: &Path,
    program: BorrowedFd<'_>,
    is_right: impl FnOnce(&sys::LinkInfo) -> bool,
    create: impl FnOnce() -> io::Result<std::os::fd::OwnedFd>,
) -> io::Result<()> {
    let pinned = sys::open_pin(path)?;
    if let Some(link) = &pinned
        && sys::link_info(link.as_fd()).is_ok_and(|info| is_right(&info))
    {
        match sys::update_link(link.as_fd(), program) {
            // The link's device or cgroup has gone: it can never carry anything again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT | libc::EINVAL)) => {}
            result => return result,
        }
    }
    let link = create()?;
    if pinned.is_some() {
        fs::remove_file(path)?;
    }
    sys::pin(link.as_fd(), path)
}

/// Attaches as a filter of the clsact qdisc, replacing our own if there is one.
pub(crate) fn clsact(
    program: &mut SchedClassifier,
    ifindex: u32,
    direction: TcAttachType,
    links: &Path,
) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| chain(error);
    // Usually it is there already; if it could not be made, attaching fails and says this too.
    let qdisc = tc::qdisc_add_clsact(ifindex).err();
    let old = SchedClassifierLink::attached(ifindex, direction.into(), PRIORITY, HANDLE, None)
        .map_err(|error| text(&error))?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program
                .attach(ifindex, aya::programs::tc::TcAttach::Netlink { parent: direction.into(), options })
                .map_err(|error| match &qdisc {
                    Some(qdisc) => format!("{}; clsact: {}", text(&error), text(qdisc)),
                    None => text(&error),
                })?
        }
    };
    let link = program.take_link(id).map_err(|error| text(&error))?;
    // The filter holds the program; dropping the link would remove the filter.
    std::mem::forget(link);
    let path = links.join(device_pin(ifindex, direction) + CLSACT);
    let _ = fs::remove_file(&path);
    let fd = program.fd().map_err(|error| text(&error))?;
    sys::pin(fd.as_fd(), &path).map_err(|error| text(&error))
}

/// Takes the programs off a device: links by their pins, filters by their fixed handle.
pub(crate) fn detach(ifindex: u32, links: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        let name = device_pin(ifindex, direction);
        for (pin, is_filter) in [(name.clone(), false), (name + CLSACT, true)] {
            let pin = links.join(pin);
            release(&pin);
            match fs::remove_file(pin) {
                Ok(()) if is_filter => result = result.and(remove_filter(ifindex, direction)),
                Err(error) if error.kind() != io::ErrorKind::NotFound => result = result.and(Err(error)),
                _ => {}
            }
        }
    }
    result
}

fn remove_filter(ifindex: u32, direction: TcAttachType) -> io::Result<()> {
    let link = SchedClassifierLink::attached(ifindex, direction.into(), PRIORITY, HANDLE, None)?;
    // A device that has gone has taken its filters along.
    link.detach().or_else(|error| {
        let there = nix::net::if_::if_indextoname(ifindex).is_ok();
        if there { Err(io::Error::other(chain(&error))) } else { Ok(()) }
    })
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
        let name = pin.file_name().to_string_lossy().into_owned();
        let Some((ifindex, direction)) = name.strip_suffix(CLSACT).and_then(|name| name.split_once('-')) else {
            continue;
        };
        let direction = if direction == "ingress" { TcAttachType::Ingress } else { TcAttachType::Egress };
        if let Ok(ifindex) = ifindex.parse() {
            result = result.and(remove_filter(ifindex, direction));
        }
    }
    result
}

/// Forgets links whose device has gone; returns how many.
pub(crate) fn sweep(links: &Path) -> usize {
    let Ok(pins) = fs::read_dir(links) else { return 0 };
    pins.flatten()
        .filter(|pin| {
            let info = sys::open_pin(&pin.path()).ok().flatten().and_then(|fd| sys::link_info(fd.as_fd()).ok());
            let stale = info.is_some_and(|info| info.kind == sys::LINK_TCX && info.target[0] == 0);
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
